"""How shards are dealt out among the streams so that every sample is used equally often."""

from dataclasses import dataclass

import numpy as np

from lcm.data.config import DataConfig

ORDER_VERSION = 2  # which sample a Position means; checkpoints without a version number have version 1
Part = tuple[str, int, int]  # (shard, part, num_parts): of the shard, the samples i with i % num_parts == part


@dataclass(frozen=True)
class Position:
    """The start of a stream's current block, and how many samples of the block were taken."""

    pass_index: int = 0  # how many shares the stream has finished
    shard_index: int = 0  # within the stream's share of this pass
    member_index: int = 0  # of the block's first sample, within its shard
    block_index: int = 0  # within this pass
    taken: int = 0


@dataclass(frozen=True)
class Address:
    """Where a sample is that was read, and waits for others of its shape."""

    pass_index: int
    shard_index: int  # within the stream's share of this pass
    member_index: int  # within the shard
    block_index: int  # within this pass
    number: int  # within the block


def shard_parts(config: DataConfig) -> list[Part]:
    """The parts that are dealt out among the streams.

    Each shard is one part. If there are fewer shards than streams, every shard is split into the same number of parts.
    """
    num_parts = -(-config.num_streams // len(config.shards))
    return [(shard, part, num_parts) for shard in config.shards for part in range(num_parts)]


def shard_order(config: DataConfig, stream: int, pass_index: int) -> list[Part]:
    """This stream's share of one pass, in the order of reading.

    All streams shuffle the parts in the same way and cut them into shares, one for each stream. After its own share a
    stream takes the next stream's share, without waiting for that stream. After `num_streams` shares each stream has
    used every sample exactly once, whatever the sizes of the shards; then the parts are shuffled again. Until then the
    numbers of uses of two samples differ by 1 or 2 for shares of similar size, and never by more than `num_streams`.
    """
    parts = shard_parts(config)
    round_index, turn = divmod(pass_index, config.num_streams)
    shuffled = np.random.default_rng((config.seed, round_index)).permutation(len(parts))
    share = (stream + turn) % config.num_streams
    first, last = (len(parts) * i // config.num_streams for i in (share, share + 1))
    order = np.random.default_rng((config.seed, stream, pass_index)).permutation(shuffled[first:last])
    return [parts[i] for i in order]
