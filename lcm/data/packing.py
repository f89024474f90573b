"""From pictures with captions to shards: what `make_shards.py`, and `--train_data_dir` of a training script, run."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from lcm.data.pictures import Size, Unusable, open_picture
from lcm.data.shards import Problem, Sample
from lcm.data.sources import DataSet, PictureFolder, Raw, Source, Stream
from lcm.data.tally import Tally
from lcm.data.writer import (
    brace_range,
    counts_path,
    encode_picture,
    make_captioned,
    missing_shards,
    read_counts,
    remove_shards,
    write_counts,
    write_tar,
)
from lcm.errors import UserError
from lcm.options.choices import PICTURE_FORMATS
from lcm.options.shapes import Shape, as_text, make_buckets, nearest_shape
from lcm.options.types import Options

logger = logging.getLogger(__name__)

RECORD = "make_shards.json"
THREADS = 4  # that decode pictures, in each process
AHEAD = 64  # pictures that they decode ahead
SUFFIXES = {kind: suffix for suffix, kind in reversed(PICTURE_FORMATS.items())}  # of two suffixes the first


@dataclass(frozen=True)
class Packing:
    """How pictures are put into shards."""

    shard_size: int = 1000  # pictures
    max_shorter_side: int | None = None  # pixels; None leaves pictures as they are
    picture_format: str = "jpg"  # of pictures that are made smaller


def open_source(args: Options) -> Source:
    """The pictures that the options name. Raises UserError."""
    if args.train_data_dir is not None:
        return PictureFolder(args.train_data_dir, args.caption_column)
    columns = args.image_column, args.caption_column
    kind = Stream if getattr(args, "streaming", False) else DataSet  # an option of make_shards.py alone
    return kind(args.dataset_name, args.dataset_config_name, *columns, args.cache_dir)


def make_sample(number: int, read: Callable[[], Raw], packing: Packing) -> tuple[Sample, Size]:
    """The members of one sample, and the size of its picture, as it is or made smaller. Raises Unusable."""
    raw, most = read(), packing.max_shorter_side

    def reduced(size: Size) -> Size:
        if most is None or min(size) <= most:
            return size
        return round(most * size[0] / min(size)), round(most * size[1] / min(size))

    try:
        picture = open_picture(raw.data, reduced)
    except Unusable as error:
        reason, detail = error.args
        raise Unusable(reason, f"{raw.name}: {detail}") from None
    size, data, suffix = reduced(picture.size), raw.data, SUFFIXES[picture.format]
    if size != picture.size:
        suffix = packing.picture_format
        data = encode_picture(picture.image.resize(size, Image.Resampling.LANCZOS), suffix)
    entries = {**raw.about, "file": raw.name}
    return make_captioned(f"{number:09d}", suffix, data, raw.captions, size, picture.size, entries), size


def make_shard(source: Source, numbers: range, packing: Packing, path: str, progress: Any) -> None:
    """Write the pictures with these numbers to a shard; and beside it counts, and what is wrong with the others."""
    tally, sizes, problems = Tally(), Counter[str](), list[str]()

    def sample_or_problem(number: int, read: Callable[[], Raw]) -> tuple[Sample, Size] | Problem:
        try:
            return make_sample(number, read, packing)
        except Unusable as error:
            return Problem(*error.args)

    def samples() -> Iterator[Sample]:
        readers = source.readers(numbers)
        with ThreadPoolExecutor(THREADS) as pool:
            for first in range(numbers.start, numbers.stop, AHEAD):
                block = list(islice(readers, AHEAD))
                for made in pool.map(sample_or_problem, range(first, first + AHEAD), block):
                    progress.update()
                    if isinstance(made, Problem):
                        tally.skip(made)
                        problems.append(made.detail)
                        continue
                    sample, (width, height) = made
                    tally.used += 1
                    sizes[f"{width}x{height}"] += 1
                    yield sample
        write_counts(path, tally, {"sizes": dict(sizes), "problems": problems})

    write_tar(path, samples())


def make_shards(source: Source, folder: str, packing: Packing) -> list[str]:
    """Write the shards of a source that `folder` lacks; the processes of a launch share them. Returns their paths.

    Raises UserError if those that it has are of other pictures, or made in another way; or if no picture is usable.
    """
    record = {**source.options, **asdict(packing)}
    paths, mine = missing_shards(folder, RECORD, record, (), len(source), packing.shard_size)
    state, total = PartialState(), sum(map(len, mine.values()))
    with tqdm(total=total, unit="picture", dynamic_ncols=True, disable=not state.is_main_process or not mine) as bar:
        for path, numbers in mine.items():
            make_shard(source, numbers, packing, path, bar)
    state.wait_for_everyone()
    found = read_counts(paths)
    if not found.used:
        state.wait_for_everyone()  # until all have read the counts
        if state.is_main_process:  # the same command may be given again, once the pictures are mended
            remove_shards(folder, RECORD, paths)
        raise UserError(f"--{next(iter(source.options))}: no picture can be used: {found}")
    return paths


def shards_of_pictures(args: Options) -> list[str]:
    """For a training script: the shards of `--train_data_dir` or `--dataset_name`, made in the output folder."""
    folder = os.path.join(args.output_dir, "shards")
    paths = make_shards(open_source(args), folder, Packing())
    logger.info("Pictures: %s, %s", brace_range(folder, len(paths)), read_counts(paths))
    return paths


def sizes_of(paths: Sequence[str]) -> Counter[Size]:
    """How many pictures of these shards have which (width, height)."""
    found = Counter[Size]()
    for path in paths:
        with open(counts_path(path), encoding="utf-8") as file:
            for size, count in json.load(file)["sizes"].items():
                width, height = map(int, size.split("x"))
                found[width, height] += count
    return found


def advise_shapes(sizes: Counter[Size]) -> str:
    """Options of a training that fit pictures of these sizes, with the shapes that at least 1 % of them need; "" if
    squares are all they need.

    The resolution is the largest of 1024 and 512, or else of the multiples of 64, that half of the pictures fill by
    three quarters.
    """
    areas = sorted((width * height for width, height in sizes.elements()), reverse=True)
    side = math.isqrt(int(areas[(len(areas) - 1) // 2] / 0.75))
    resolution = 1024 if side >= 1024 else 512 if side >= 512 else max(64, side // 64 * 64)
    shapes, total = Counter[Shape](), sizes.total()
    for size, count in sizes.items():
        shapes[nearest_shape(make_buckets(resolution, 64, "area"), size)] += count
    frequent = {shape: count for shape, count in shapes.most_common() if count >= total / 100}
    if frequent.keys() == {(resolution, resolution)}:
        return ""
    shares = ", ".join(f"{100 * n / total:.0f} % {width} x {height}" for (height, width), n in frequent.items())
    return f'--resolution={resolution} --aspect_ratio_buckets="{as_text(list(frequent))}"   # {shares}'
