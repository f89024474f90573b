"""Write the demo's WebDataset shards: 4,000 training pictures in four tar files, 702 held-out pictures in one.

Every sample is KEY.webp (KEY.png if held out), KEY.txt (its caption) and KEY.json (its sizes). The bytes are the same
on every run with the same versions of NumPy and Pillow.

    python demo/make_shards.py
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import world
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))

from lcm.data.writer import write_shard  # noqa: E402

SHARDS, SHARD_SIZE, HELDOUT_SIZE = 4, 1000, 702


def samples(count: int, seed: int) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
    """Draw `count` pictures, as `write_shard` takes them."""
    captions = world.all_captions()
    for i, (picture, number) in enumerate(zip(*world.render(count, seed), strict=True)):
        yield f"{i:06d}", Image.fromarray(picture), captions[number], {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "shards", help="Shard folder.")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        write_shard(str(folder / f"train-{shard:05d}.tar"), samples(SHARD_SIZE, seed=10 + shard), "webp")
    # Held-out pictures are stored without loss: they are what others are measured by.
    write_shard(str(folder / "heldout-00000.tar"), samples(HELDOUT_SIZE, seed=20), "png")
    for path in sorted(folder.glob("*.tar")):
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
