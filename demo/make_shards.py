"""Write the demo's WebDataset shards: 6,000 training pictures in six tar files, 1,188 held-out pictures in one.

Every sample is KEY.png (a 4-bit palette PNG) and KEY.txt (its caption). The bytes are the same on every run with the
same versions of NumPy and Pillow.

    python demo/make_shards.py
"""

import argparse
import io
import tarfile
from pathlib import Path
from typing import Any

import digits
import numpy as np
from PIL import Image

COPIES = 4  # renderings of each handwritten digit
SHARD_SIZE = 1000


def encode_png(shades: np.ndarray, colour: int, background: int) -> bytes:
    """Return a picture as PNG bytes; `shades` (32, 32) index the 16 colours from background to ink.

    A palette picture takes 327 bytes on average, one tar block; an RGB picture takes 552, mostly two blocks.
    """
    picture = Image.fromarray(shades, mode="P")
    picture.putpalette(digits.palette(colour, background).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True, bits=4)
    return buffer.getvalue()


def add_file(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add bytes to a tar file; TarInfo's defaults (no owner, time 0) keep the archive the same on every run."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))


def write_shard(path: Path, samples: list[Any]) -> None:
    """Write numbered (shades, indices) pairs to one tar file."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, (shades, (digit, colour, background)) in samples:
            add_file(shard, f"{number:06d}.png", encode_png(shades, colour, background))
            add_file(shard, f"{number:06d}.txt", digits.caption(digit, colour, background).encode())
    print(f"{path}: {len(samples)} pictures, {path.stat().st_size / 2**20:.2f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "shards", help="Shard folder.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train = list(enumerate(digits.render_split("train", COPIES, seed=10)))
    for first in range(0, len(train), SHARD_SIZE):
        path = args.output_dir / f"train-{first // SHARD_SIZE:05d}.tar"
        write_shard(path, train[first : first + SHARD_SIZE])
    heldout = list(enumerate(digits.render_split("heldout", COPIES, seed=11)))
    write_shard(args.output_dir / "heldout-00000.tar", heldout)


if __name__ == "__main__":
    main()
