"""From pictures and captions to cached shards: what `precompute_lcm.py` runs on one device."""

import itertools
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from lcm.cache import EMBEDDING, EMPTY_SUFFIX, SUFFIX, Origin, Tensors, pack, sample_bytes, shapes_of
from lcm.data.config import DataConfig
from lcm.data.pictures import Unusable, all_crops
from lcm.data.samples import Captioned, as_problem, read_sample
from lcm.data.shards import Problem, Sample, is_local, read_shard
from lcm.data.tally import Tally
from lcm.data.writer import read_counts, write_counts, write_tar
from lcm.errors import UserError, first_line
from lcm.models.family import Family
from lcm.options.choices import PICTURE_FORMATS
from lcm.options.types import Options
from lcm.secrets import redact

logger = logging.getLogger(__name__)

TAR_BYTES = 3 * 1024  # of a sample in a tar besides its contents: headers, padding, the metadata of its tensors


@dataclass
class Row:
    """A sample that is decoded and not yet encoded."""

    sample: Sample
    read: Captioned
    crops: list[tuple[np.ndarray, tuple[int, int]]]  # (3, H, W) uint8, (top, left)


class Maker:
    """Makes cached shards with the VAE and the text encoders of a family."""

    def __init__(self, args: Options, accelerator: Accelerator, family: Family, config: DataConfig):
        self.args, self.family, self.config, self.device = args, family, config, accelerator.device
        self.is_main_process = accelerator.is_main_process
        self.dtype = getattr(torch, args.dtype)
        self.empty = {name: part[0] for name, part in self.embed([""]).items()}
        blank = self.moments([np.zeros((3, args.resolution, args.resolution), np.uint8)])
        self.origin: Origin = {
            **family.origin(),
            "scaling_factor": str(family.scaling_factor),
            "dtype": args.dtype,
            "shapes": shapes_of({"moments": blank, "original_size": torch.zeros(2), **self.empty}),
        }

    def embed(self, captions: list[str]) -> Tensors:
        """The embeddings of B captions, on the CPU."""
        parts = self.family.encode_prompts.encode(captions)
        return {name: part.to("cpu", self.dtype) for name, part in zip(EMBEDDING, parts, strict=False)}

    @torch.no_grad()
    def moments(self, crops: list[np.ndarray]) -> torch.Tensor:
        """The moments of the VAE's posterior for crops (3, H, W) uint8, on the CPU."""
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).float() / 127.5 - 1
        return self.family.moments(pixels).to("cpu", self.dtype)

    def moments_of(self, batch: list[Row]) -> list[torch.Tensor]:
        """The moments (variants, 2C, h, w) of the crops of each of B samples, encoded together with those of their
        shape."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(batch):
            by_shape.setdefault(row.crops[0][0].shape, []).append(i)
        found: dict[int, torch.Tensor] = {}
        for members in by_shape.values():
            moments = self.moments([pixels for i in members for pixels, _ in batch[i].crops])
            found |= zip(members, moments.chunk(len(members)), strict=True)
        return [found[i] for i in range(len(batch))]

    def check_disk(self, shards: list[str]) -> None:
        """Say how much will be written. Raises UserError if the disk has less than that.

        The number of samples is that of the first shard, if it is a local file, times the number of shards.
        """
        variants = self.args.crops_per_picture * (1 + self.args.random_flip)
        size = TAR_BYTES + sample_bytes(self.origin, variants)
        if not is_local(shards[0]):
            logger.info("A sample takes %.1f kB; the number of samples is not known before they are read", size / 1e3)
            return
        count = sum(isinstance(sample, dict) for sample in read_shard(shards[0])) * len(shards)
        needed = size * count
        if self.args.keep_pictures:
            needed += os.path.getsize(shards[0]) * len(shards)
        free = shutil.disk_usage(self.args.output_dir).free
        logger.info("About %d samples of %.1f kB, %.3g GB in all; %.3g GB are free", count, size / 1e3, needed / 1e9,
                    free / 1e9)  # fmt: skip
        if needed > free:
            raise UserError(
                f"--output_dir: about {needed / 1e9:.3g} GB will be written, but {self.args.output_dir!r} has "
                f"{free / 1e9:.3g} GB left; allowed: another folder, fewer --crops_per_picture, or a smaller --dtype"
            )

    def make(self, paths: dict[int, str]) -> None:
        """Write the cached shard of each of these shards, {number of the shard: path}."""
        with (
            ThreadPoolExecutor(self.args.decoding_threads) as pool,
            tqdm(unit="sample", dynamic_ncols=True, disable=not self.is_main_process) as progress,
        ):
            for done, (number, path) in enumerate(paths.items()):
                progress.set_description(f"shard {done + 1} of {len(paths)}")
                write_tar(path, self.samples(number, path, pool, progress))

    def samples(self, number: int, path: str, pool: ThreadPoolExecutor, progress: Any) -> Iterator[dict[str, Any]]:
        """Yield the members of one cached shard. At its end, write its counts beside it."""
        tally, first = Tally(), {EMPTY_SUFFIX: pack(self.empty, self.origin)}
        rows = self.rows(number, pool, tally)
        while batch := list(itertools.islice(rows, self.args.batch_size)):
            for sample in self.encode(batch, tally):
                yield {**sample, **first}
                first = {}
                progress.update()
        write_counts(path, tally, {"source": redact(self.config.shards[number])})

    def rows(self, number: int, pool: ThreadPoolExecutor, tally: Tally) -> Iterator[Row]:
        """Yield the usable samples of one shard, decoded ahead in threads; count the others."""

        def decode(index: int, sample: Sample | Problem) -> Row | Problem:
            if isinstance(sample, Problem):
                return sample
            rng = np.random.default_rng((self.args.seed, number, index))
            try:
                read = read_sample(sample, self.config, rng)
                return Row(sample, read, all_crops(read.picture, self.config, rng, self.args.crops_per_picture))
            except Unusable as error:
                return as_problem(sample, error)

        def finished(futures: "deque[Future[Row | Problem]]", most: int) -> Iterator[Row]:
            while len(futures) > most:
                row = futures.popleft().result()
                if isinstance(row, Row):
                    yield row
                else:
                    tally.skip(row)

        ahead: deque[Future[Row | Problem]] = deque()
        for index, sample in enumerate(read_shard(self.config.shards[number], self.config.shard_timeout)):
            ahead.append(pool.submit(decode, index, sample))
            yield from finished(ahead, 2 * self.args.batch_size)
        yield from finished(ahead, 0)

    def encode(self, batch: list[Row], tally: Tally) -> Iterator[dict[str, Any]]:
        """Yield the members of B samples."""
        try:
            moments = self.moments_of(batch)
            embeddings = self.embed([row.read.caption for row in batch])
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch_size: {self.args.batch_size} given, but {first_line(error)}") from error
        for i, row in enumerate(batch):
            tensors = {
                "moments": moments[i],
                **{name: part[i] for name, part in embeddings.items()},
            }
            key = row.sample["__key__"]
            if not all(part.isfinite().all() for part in tensors.values()):
                detail = f"{row.sample['__url__']}: {key}: try --dtype=float32, or --mixed_precision=no"
                tally.skip(Problem("not finite in this precision", detail))
                continue
            tensors["crops"] = torch.tensor([place for _, place in row.crops], dtype=torch.int32)
            tensors["original_size"] = torch.tensor(row.read.original_size, dtype=torch.int32)
            tally.used += 1
            yield {
                "__key__": key,
                SUFFIX: pack(tensors, self.origin),
                "txt": row.read.caption.encode(),
                **{name: row.sample[name] for name in self.kept() if row.sample.get(name) is not None},
            }

    def kept(self) -> list[str]:
        """The members that are copied: the JSON, which filters may need, and the picture if asked for."""
        return ["json", *(PICTURE_FORMATS if self.args.keep_pictures else ())]


def summary(paths: list[str]) -> str:
    """What is in a folder of cached shards, in one line."""
    return f"{len(paths)} shards, {sum(map(os.path.getsize, paths)) / 1e6:.1f} MB: {read_counts(paths)}."
