"""How often each sample is used, for several numbers of shards and streams: python benchmarks/sample_uses.py

A stream is a data worker of a process; all streams yield the same number of samples. The order is that of the training
scripts, but no shard is read. After a pass, all streams together have yielded as many samples as the shards hold.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lcm.data import config as lcm_config
from lcm.data import stream as lcm_stream

CASES = {  # name: sizes of the shards, streams
    "3 equal shards, 4 streams": ([100] * 3, 4),
    "shards of 200, 200 and 20, 4 streams": ([200, 200, 20], 4),
    "20 equal shards, 64 streams": ([100] * 20, 64),
    "1000 shards of 10 to 200, 8 streams": (np.random.default_rng(0).integers(10, 201, 1000).tolist(), 8),
}


def samples(stream: lcm_stream.Stream) -> Iterator[Any]:
    """The samples of one stream, without end, as (shard, number)."""
    return (read.sample for read in stream.shuffled() if isinstance(read, lcm_stream.Read))


def uses(sizes: list[int], num_streams: int, num_passes: int, shuffle_buffer_size: int) -> Iterator[Counter[Any]]:
    """Yield, after each of `num_passes` passes, a Counter of how often each sample was used."""
    lcm_stream.read_shard = lambda url, *_: ((int(url), i) for i in range(sizes[int(url)]))
    config = lcm_config.DataConfig(
        shards=tuple(map(str, range(len(sizes)))),
        batch_size=1,
        resolution=8,
        seed=0,
        shuffle_buffer_size=shuffle_buffer_size,
        num_workers=num_streams,
    )
    streams = [samples(lcm_stream.Stream(config, index)) for index in range(num_streams)]
    counts = Counter({(shard, i): 0 for shard, size in enumerate(sizes) for i in range(size)})
    turns = itertools.cycle(streams)
    for _ in range(num_passes):
        counts.update(next(next(turns)) for _ in range(sum(sizes)))
        yield counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4, 20])
    parser.add_argument("--shuffle_buffer_size", type=int, default=1000)
    args = parser.parse_args()
    print("| shards and streams | passes | least | most | ratio | by shard, least to most |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (sizes, num_streams) in CASES.items():
        for number, counts in enumerate(uses(sizes, num_streams, max(args.passes), args.shuffle_buffer_size), 1):
            if number not in args.passes:
                continue
            least, most = min(counts.values()), max(counts.values())
            by_shard = Counter()
            for (shard, _), count in counts.items():
                by_shard[shard] += count / sizes[shard]
            ratio = f"{most / least:.2f}" if least else "-"
            ends = f"{min(by_shard.values()):.2f} to {max(by_shard.values()):.2f}"
            print(f"| {name} | {number} | {least} | {most} | {ratio} | {ends} |", flush=True)


if __name__ == "__main__":
    main()
