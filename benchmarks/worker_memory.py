"""The peak memory of one data worker on pictures of 2 MB: python benchmarks/worker_memory.py

Writes a shard of 1,100 such pictures (2.2 GB) to a temporary folder; the worker then reads two blocks of it.
"""

import argparse
import io
import resource
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lcm.data import config as lcm_config
from lcm.data import loader


def write_shard(path: str, count: int, size: int) -> None:
    """Write `count` JPEGs of noise, of about `size` bytes each, with captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    picture = buffer.getvalue()[:size].ljust(size, b"\0")  # readers ignore bytes after the end of a JPEG
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for suffix, data in (("jpg", picture), ("txt", b"noise")):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shuffle_buffer_size", type=int, default=1000)
    parser.add_argument("--shuffle_buffer_mb", type=float)
    parser.add_argument("--picture_bytes", type=int, default=2_000_000)
    args = parser.parse_args()
    limit = {} if args.shuffle_buffer_mb is None else {"shuffle_buffer_mb": args.shuffle_buffer_mb}
    with tempfile.TemporaryDirectory() as folder:
        shard = str(Path(folder, "large.tar"))
        write_shard(shard, 1100, args.picture_bytes)
        config = lcm_config.DataConfig(
            shards=(shard,) * 3,
            batch_size=8,
            resolution=64,
            seed=0,
            shuffle_buffer_size=args.shuffle_buffer_size,
            num_workers=1,
            **limit,
        )
        batches = iter(loader.TrainingData(config))
        for _ in range(2 * args.shuffle_buffer_size // config.batch_size):
            next(batches)
        batches.close()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak of the worker {worker * 1024 / 1e6:.0f} MB; of this process, without data: {own * 1024 / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
