"""Samples per second of one data worker, here and in the pipeline of diffusers' scripts: python benchmarks/data.py

Writes shards of JPEGs whose detail falls off as that of photographs does, and reads each in turn, round after round:

here       lcm/data: from a shard to batches of uint8 pixels; the device makes them float32
public     webdataset's `decode("pil")`, then resize, random crop, `to_tensor` and `normalize` as torchvision does them
           to a PIL picture: from a shard to batches of float32 pixels

Both run in this process, on one thread, and are timed in CPU seconds. Prints medians over the rounds, and their range;
and how much our pixels differ from those of a picture that is decoded whole, as a PSNR in dB.
"""

import argparse
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import run_public
from benchmarks.speed import spread
from lcm.data.config import DataConfig
from lcm.data.order import Position
from lcm.data.pictures import open_picture, transform
from lcm.data.shards import read_shard
from lcm.data.stream import Item, Stream
from lcm.data.writer import write_tar
from lcm.options.shapes import covering_size


def photograph(side: int, rng: np.random.Generator) -> bytes:
    """A square JPEG of noise with the spectrum of photographs: the amplitude falls as 1 / frequency."""
    row, column = np.fft.fftfreq(side), np.fft.rfftfreq(side)
    frequency = np.hypot(row[:, None], column).clip(min=1 / side)
    waves = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency, s=(side, side))
    pixels = 128 + 50 * waves / waves.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, side: int, count: int) -> None:
    """Write a shard of `count` samples."""
    rng = np.random.default_rng(0)
    pictures = [photograph(side, rng) for _ in range(4)]
    write_tar(str(path), ({"__key__": f"{i:06d}", "jpg": pictures[i % 4], "txt": b"noise"} for i in range(count)))


def here(path: Path, resolution: int, batch_size: int) -> Iterator[Item]:
    """What our data worker sends."""
    config = DataConfig((str(path),), batch_size=batch_size, resolution=resolution, seed=0, shuffle_buffer_size=16)
    yield from Stream(config, 0, Position())


def public(path: Path, resolution: int, batch_size: int) -> Iterator[Any]:
    """Batches of the same work as in diffusers' scripts."""

    def pixels(image: Image.Image) -> torch.Tensor:
        image = run_public.resize(image, resolution)
        image = run_public.crop(image, *run_public.RandomCrop.get_params(image, (resolution, resolution)))
        return run_public.normalize(run_public.to_tensor(image), [0.5], [0.5])

    dataset = webdataset.WebDataset(str(path), shardshuffle=False).repeat().shuffle(16).decode("pil")
    rows = ((pixels(sample["jpg"]), sample["txt"]) for sample in dataset)
    while True:
        batch = list(itertools.islice(rows, batch_size))
        yield torch.stack([row[0] for row in batch]), [row[1] for row in batch]


def rate(reader: Callable[[Path, int, int], Iterator[Any]], path: Path, args: argparse.Namespace) -> float:
    """Samples per CPU second, after a first batch."""
    batches = reader(path, args.resolution, args.batch_size)
    next(batches)
    start, count = time.process_time(), max(1, args.samples // args.batch_size)
    for _ in range(count):
        next(batches)
    return count * args.batch_size / (time.process_time() - start)


def difference(path: Path, resolution: int) -> str:
    """The PSNR in dB between the centre of the first picture as we read it, and decoded whole."""
    config = DataConfig((str(path),), batch_size=1, resolution=resolution, seed=0, center_crop=True)
    data, rng = next(iter(read_shard(str(path))))["jpg"], np.random.default_rng(0)  # type: ignore[index]
    sizes = (lambda size: covering_size((resolution, resolution), size), None)
    ours, whole = (transform(open_picture(data, resized), config, rng)[0].astype(float) for resized in sizes)
    error = np.square(ours - whole).mean()
    return f"{10 * np.log10(255**2 / error):.1f}" if error else "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="sides of pictures (default: 512 1024 2048)")
    add("--resolution", type=int, default=512, help="(default: 512)")
    add("--batch_size", type=int, default=8, help="(default: 8)")
    add("--samples", type=int, default=64, help="of each measurement (default: 64)")
    add("--rounds", type=int, default=5, help="(default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| pictures | MB | here, samples / s | public | ratio | PSNR |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sizes:
            path = Path(folder, f"{side}.tar")
            write_shard(path, side, 64)
            rates = [(rate(here, path, args), rate(public, path, args)) for _ in range(args.rounds)]
            ours, theirs = (list(column) for column in zip(*rates, strict=True))
            ratios = [a / b for a, b in rates]
            cells = [f"{side}x{side}", f"{path.stat().st_size / 64e6:.2f}", spread(ours, ".1f"), spread(theirs, ".1f")]
            print(f"| {' | '.join([*cells, spread(ratios, '.2f'), difference(path, args.resolution)])} |", flush=True)


if __name__ == "__main__":
    main()
