"""One stream of samples: what one data loader worker of one process reads.

Its stages, in order: order of shards -> samples as bytes -> shuffled blocks -> pictures and captions -> batches. What
cannot be used travels through the shuffle as a `Problem` and is counted. The order within a block is a function of
(seed, stream, pass, block), so a resume passes over the shard up to that block, reads the block, and decodes nothing
twice.
"""

import itertools
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lcm.data.order import Position, shard_order
from lcm.data.pictures import Unusable
from lcm.data.samples import collate, decode_sample
from lcm.data.shards import Problem, read_shard
from lcm.data.tally import Tally


@dataclass
class Item:
    """What a stream hands to the training process: a batch, or word that a whole pass gave nothing."""

    stream: int  # of this process
    position: Position
    empty_passes: int  # reported since `position`
    empty_share: list  # where `batch` is None: what was gone through, as `shard_order` gives it
    batch: dict | None
    tally: Tally = field(default_factory=Tally)  # since the last item, but for what was skipped
    problems: list = field(default_factory=list)  # which was this

    def pin_memory(self):
        """Called by the DataLoader, which pins nothing inside a class that it does not know."""
        if self.batch:
            self.batch["pixels"] = self.batch["pixels"].pin_memory()
        return self


def num_bytes(sample):
    """What a sample's members take in memory; 0 for a Problem."""
    return sum(len(data) for data in sample.values() if isinstance(data, bytes)) if isinstance(sample, dict) else 0


class Block:
    """Samples of one pass: up to `size` of them, or fewer where those take `max_bytes`.

    They are read a few at a time, so that reading goes on while the last block is used.
    """

    def __init__(self, source, start, size, max_bytes):
        self.source, self.start, self.size, self.max_bytes = source, start, size, max_bytes
        self.samples, self.next_start, self.bytes = [], None, 0

    def take(self, i):
        """Sample `i`, which the block then no longer holds."""
        sample, self.samples[i] = self.samples[i], None
        return sample

    def read(self, count):
        """Read `count` samples more, or fewer if the block is full or the pass ends."""
        while count > 0 and self.next_start is None:
            place, sample = next(self.source)
            if sample is None:  # the pass has ended
                self.next_start = place
                return
            self.samples.append(sample)
            self.bytes += num_bytes(sample)
            count -= 1
            if len(self.samples) == self.size or self.bytes >= self.max_bytes:
                self.next_start = replace(place, block_index=self.start.block_index + 1)


class Stream:
    """One stream of one process: an endless iterator over `Item`s from a `Position` on."""

    def __init__(self, config, index, position=Position(), empty_passes=0):
        self.config, self.index, self.start, self.reported = config, index, position, empty_passes
        self.id = config.rank * config.streams_per_process + index

    def rng(self, *numbers):
        return np.random.default_rng((self.config.seed, self.id, *numbers))

    def samples(self, start):
        """Yield (position after it, sample) without end, and (start of the next pass, None) after each pass."""
        skip_shards, skip_members = start.shard_index, start.member_index
        for pass_index in itertools.count(start.pass_index):
            for shard_index, (url, part, num_parts) in enumerate(shard_order(self.config, self.id, pass_index)):
                if shard_index < skip_shards:
                    continue
                for member_index, sample in enumerate(read_shard(url, self.config.shard_timeout)):
                    if member_index >= skip_members and member_index % num_parts == part:
                        yield Position(pass_index, shard_index, member_index + 1), sample
                skip_shards = skip_members = 0
            yield Position(pass_index + 1), None

    def shuffled(self):
        """Yield (position after it, rng of its own, sample), shuffled within blocks; a None sample ends a pass."""
        source = self.samples(self.start)
        new_block = partial(
            Block, source, size=self.config.shuffle_buffer_size, max_bytes=self.config.shuffle_buffer_mb * 1e6
        )
        block = new_block(self.start)
        block.read(block.size)
        while True:
            start = block.start
            ahead = new_block(replace(block.next_start, taken=0))
            order = self.rng(start.pass_index, start.block_index).permutation(len(block.samples))
            for i in order[: start.taken]:
                block.take(i)
            for taken, i in enumerate(order[start.taken :], start.taken + 1):
                rng = self.rng(start.pass_index, start.block_index, i)
                yield replace(start, taken=taken), rng, block.take(i)
                ahead.read(1)  # as many as were released, so that about one block is held in all
            if ahead.start.pass_index > start.pass_index:
                yield ahead.start, None, None
            ahead.read(block.size)
            block = ahead

    def __iter__(self):
        rows, problems, tally, usable_in_pass = [], [], Tally(), self.start.taken > 0
        batch_end, empty_passes = self.start, 0
        for position, rng, sample in self.shuffled():
            if sample is None:
                if not usable_in_pass:
                    empty_passes += 1
                    if empty_passes > self.reported:
                        share = shard_order(self.config, self.id, position.pass_index - 1)
                        yield Item(self.index, batch_end, empty_passes, share, None, tally, problems)
                    problems, tally = [], Tally()
                usable_in_pass = False
                continue
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            try:
                rows.append(decode_sample(sample, self.config, rng))
                usable_in_pass = True
                tally.used += 1
                tally.unscored += rows[-1]["unscored"]
            except Unusable as error:
                reason, detail = error.args
                problems.append(Problem(reason, f"{sample['__url__']}: {sample['__key__']}: {detail}"))
            if len(rows) == self.config.batch_size:
                batch_end, empty_passes, self.reported = position, 0, 0
                yield Item(self.index, batch_end, 0, [], collate(rows), tally, problems)
                rows, problems, tally = [], [], Tally()
