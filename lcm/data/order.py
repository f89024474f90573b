"""How shards are dealt out among the streams so that every sample is used equally often."""

from dataclasses import dataclass

import numpy as np

ORDER_VERSION = 2  # of the rules by which a Position stands for a place; 1 is that of checkpoints without a number


@dataclass(frozen=True)
class Position:
    """The start of a stream's current block, and how many of the block's samples were taken."""

    pass_index: int = 0  # how often the stream went through its shards
    shard_index: int = 0  # within the stream's share of this pass
    member_index: int = 0  # the block's first sample, counted in its shard
    block_index: int = 0  # within this pass
    taken: int = 0


def shard_parts(config):
    """What is dealt out among the streams, as a list of (shard, part, num_parts): every `num_parts`-th of its samples.

    These are the shards, unless there are fewer of them than streams: then each is split into equally many parts.
    """
    num_parts = -(-config.num_streams // len(config.shards))
    return [(shard, part, num_parts) for shard in config.shards for part in range(num_parts)]


def shard_order(config, stream, pass_index):
    """This stream's share of one pass, as a list of (shard, part, num_parts) in the order of reading.

    All streams shuffle the parts alike and cut them into shares, one for each. Where a stream has gone through its
    share it takes the next one's, without waiting for it. So after `num_streams` shares each stream has used every
    sample exactly once, whatever the sizes of the shards; then the parts are shuffled anew. In between the uses of two
    samples differ by 1 or 2 where shares are of about the same size, and never by more than `num_streams`.
    """
    parts = shard_parts(config)
    round_index, turn = divmod(pass_index, config.num_streams)
    shuffled = np.random.default_rng((config.seed, round_index)).permutation(len(parts))
    share = (stream + turn) % config.num_streams
    first, last = (len(parts) * i // config.num_streams for i in (share, share + 1))
    order = np.random.default_rng((config.seed, stream, pass_index)).permutation(shuffled[first:last])
    return [parts[i] for i in order]
