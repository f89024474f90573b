"""One stream of samples: one data loader worker of one process reads it.

Its stages: order of shards -> samples as bytes -> shuffled blocks -> pictures and captions -> batches. A `Problem` is
shuffled like a sample, and counted. The order within a block is a function of (seed, stream, pass, block). So a resume
skips the shard up to the block, reads the block again, and decodes only the samples that were not used.

Each batch has one shape. With --aspect_ratio_buckets a sample waits, across passes if need be, until there are enough
of its shape. A resume reads those that waited again. Libraries were tried first: webdataset batches what comes in
turn, and samplers of buckets need the shape of every picture in advance.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np

from lcm.data.config import DataConfig
from lcm.data.order import Address, Part, Position, shard_order
from lcm.data.pictures import Unusable
from lcm.data.samples import FOR_DEVICE, as_problem, collate, decode_sample
from lcm.data.shards import Problem, Sample, read_shard
from lcm.data.tally import Tally
from lcm.options.shapes import Shape


@dataclass
class Item:
    """What a stream sends to the training process: a batch, or None after a pass without a usable sample."""

    stream: int  # its index within this process
    position: Position
    empty_passes: int  # reported since `position`
    waiting: list[Address]  # samples before `position` that wait for others of their shape
    empty_share: list[Part]  # if `batch` is None: the share of that pass, as `shard_order` gives it
    batch: dict[str, Any] | None
    tally: Tally = field(default_factory=Tally)  # since the last item, without the skipped samples
    problems: list[Problem] = field(default_factory=list)  # the skipped samples since the last item

    def pin_memory(self) -> Self:
        """Called by the DataLoader, which does not look into a class that it does not know."""
        for name in FOR_DEVICE & (self.batch or {}).keys():
            self.batch[name] = self.batch[name].pin_memory()  # type: ignore[index]
        return self


def num_bytes(sample: Sample | Problem) -> int:
    """The memory that a sample's files take, in bytes; 0 for a Problem."""
    return sum(len(data) for data in sample.values() if isinstance(data, bytes)) if isinstance(sample, dict) else 0


class Block:
    """Up to `size` samples of one pass; it is full earlier if they take `max_bytes`.

    Samples are read one at a time, while those of the block before are used.
    """

    def __init__(self, source: Iterator[tuple[Position, Any]], start: Position, size: int, max_bytes: float):
        self.source, self.start, self.size, self.max_bytes = source, start, size, max_bytes
        self.samples: list[Sample | Problem | None] = []
        self.addresses: list[Address] = []
        self.next_start: Position | None = None  # of the next block; None until this block is full
        self.bytes = 0

    def take(self, i: int) -> Sample | Problem | None:
        """Return sample `i`, and release it from the block."""
        sample, self.samples[i] = self.samples[i], None
        return sample

    def read(self, count: int) -> None:
        """Read up to `count` more samples; stops if the block is full or the pass ends."""
        while count > 0 and self.next_start is None:
            place, sample = next(self.source)
            if sample is None:  # the pass has ended
                self.next_start = place
                return
            self.samples.append(sample)
            where = (place.pass_index, place.shard_index, place.member_index - 1)
            self.addresses.append(Address(*where, self.start.block_index, len(self.addresses)))
            self.bytes += num_bytes(sample)
            count -= 1
            if len(self.samples) == self.size or self.bytes >= self.max_bytes:
                self.next_start = replace(place, block_index=self.start.block_index + 1)


@dataclass(frozen=True)
class Read:
    """A sample in the order of training, and the position after it."""

    position: Position
    address: Address
    sample: Sample | Problem


class Stream:
    """One stream of one process: an endless iterator over `Item`s that starts at `position`, where the samples at
    `waiting` wait for others of their shape."""

    def __init__(
        self,
        config: DataConfig,
        index: int,
        position: Position = Position(),
        empty_passes: int = 0,
        waiting: Sequence[Address] = (),
    ):
        self.config, self.index, self.start, self.reported = config, index, position, empty_passes
        self.waiting = waiting
        self.id = config.rank * config.streams_per_process + index

    def rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, self.id, *numbers))

    def samples(self, start: Position) -> Iterator[tuple[Position, Sample | Problem | None]]:
        """Yield (position after the sample, sample) without end; after each pass, (start of the next pass, None)."""
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

    def shuffled(self) -> Iterator[Read | Position]:
        """As `samples`, shuffled within blocks. After each pass, the start of the next one."""
        source = self.samples(self.start)
        new_block = partial(
            Block, source, size=self.config.shuffle_buffer_size, max_bytes=self.config.shuffle_buffer_mb * 1e6
        )
        block = new_block(self.start)
        block.read(block.size)
        while True:
            start = block.start
            assert block.next_start is not None  # it is full
            ahead = new_block(replace(block.next_start, taken=0))
            order = self.rng(start.pass_index, start.block_index).permutation(len(block.samples))
            for i in order[: start.taken]:
                block.take(i)
            for taken, i in enumerate(order[start.taken :], start.taken + 1):
                sample = block.take(i)
                assert sample is not None
                yield Read(replace(start, taken=taken), block.addresses[i], sample)
                ahead.read(1)  # one for each that was released: together the two hold about one block
            if ahead.start.pass_index > start.pass_index:
                yield ahead.start
            ahead.read(block.size)
            block = ahead

    def decode(self, sample: Sample, address: Address) -> dict[str, Any]:
        """One row of a batch, with draws that depend on its address only. Raises Unusable."""
        rng = self.rng(address.pass_index, address.block_index, address.number)
        return {**decode_sample(sample, self.config, rng), "address": address}

    def waiting_rows(self) -> Iterator[dict[str, Any]]:
        """The samples that wait at the start, read and decoded again, in the same order."""
        shards: dict[tuple[int, int], dict[int, Address]] = {}
        for address in self.waiting:
            shards.setdefault((address.pass_index, address.shard_index), {})[address.member_index] = address
        rows = {}
        for (pass_index, shard_index), members in shards.items():
            url, _, _ = shard_order(self.config, self.id, pass_index)[shard_index]
            last = max(members)
            for member_index, sample in enumerate(read_shard(url, self.config.shard_timeout)):
                if member_index in members and isinstance(sample, dict):
                    with contextlib.suppress(Unusable):  # then the shard has changed
                        rows[members[member_index]] = self.decode(sample, members[member_index])
                if member_index == last:
                    break
        yield from (rows[address] for address in self.waiting if address in rows)

    def __iter__(self) -> Iterator[Item]:
        rows: dict[Shape, list[dict[str, Any]]] = {}  # those that wait, by shape
        for row in self.waiting_rows():
            rows.setdefault(row["target_size"], []).append(row)
        problems: list[Problem] = []
        usable_in_pass = self.start.taken > 0
        batch_end, waiting, empty_passes = self.start, list(self.waiting), 0
        for read in self.shuffled():
            if isinstance(read, Position):  # the pass has ended
                if not usable_in_pass:
                    empty_passes += 1
                    if empty_passes > self.reported:
                        share = shard_order(self.config, self.id, read.pass_index - 1)
                        yield Item(self.index, batch_end, empty_passes, waiting, share, None, Tally(), problems)
                    problems = []
                usable_in_pass = False
                continue
            if isinstance(read.sample, Problem):
                problems.append(read.sample)
                continue
            try:
                row = self.decode(read.sample, read.address)
            except Unusable as error:
                problems.append(as_problem(read.sample, error))
                continue
            usable_in_pass = True
            shape = row["target_size"]
            rows.setdefault(shape, []).append(row)
            if len(rows[shape]) == self.config.batch_size:
                batch = rows.pop(shape)
                batch_end, empty_passes, self.reported = read.position, 0, 0
                waiting = [row["address"] for others in rows.values() for row in others]
                tally = Tally(len(batch), sum(row["unscored"] for row in batch))
                if self.config.buckets:
                    tally.shapes[f"{shape[0]}x{shape[1]}"] = len(batch)
                yield Item(self.index, batch_end, 0, waiting, [], collate(batch), tally, problems)
                problems = []
