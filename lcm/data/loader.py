"""Batches of captioned pictures from WebDataset shards: an endless, seeded stream that can be resumed exactly.

One *stream* is one data loader worker of one process. Its stages, in order:

    order of shards -> samples as bytes -> shuffled blocks -> pictures and captions (lcm_samples) -> batches

All streams give equally many batches, and every sample is used equally often: see `shard_order`. What cannot be
used travels through the shuffle as a `Problem` and is counted. A stream's place is five integers (`Position`): a block
of samples and how many of it were used. The order within a block is a function of (seed, stream, pass, block), so a
resume passes over the shard up to that block, reads the block, and decodes nothing twice.
"""

import glob
import itertools
import logging
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import braceexpand
import numpy as np
import psutil
import torch
from accelerate.utils import gather_object

from lcm.data.commands import end_children
from lcm.data.samples import CAPTION_SUFFIXES, IMAGE_SUFFIXES, Problem, Unusable, collate, decode_sample, read_shard
from lcm.options.groups import UserError, first_line
from lcm.options.secrets import redact

logger = logging.getLogger(__name__)

ORDER_VERSION = 2  # of the rules by which a Position stands for a place; 1 is that of checkpoints without a number
MAX_DEATHS_IN_A_ROW = 3  # of data workers, without a batch in between
BATCHES_AHEAD = 2  # that a data worker makes before they are asked for; the DataLoader's default


@dataclass(frozen=True)
class DataConfig:
    """What decides which batches a run sees, and in which order."""

    shards: tuple[str, ...]  # local paths, http(s):// or pipe: addresses, without braces
    batch_size: int
    resolution: int  # pixels, both sides
    seed: int
    interpolation_type: str = "bilinear"
    center_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    caption_key: str = "caption"  # in the JSON, for samples without a caption file
    width_key: str | None = None  # in the JSON; None measures the picture
    height_key: str | None = None
    min_image_size: int = 0  # pixels, of the shorter side
    max_watermark_probability: float | None = None  # against `pwatermark` in the JSON
    shuffle_buffer_size: int = 1000  # samples a block
    shuffle_buffer_mb: float = 512.0  # 10^6 bytes, after which a block ends early
    shard_timeout: float = 300.0  # seconds without a byte
    num_workers: int = 0
    rank: int = 0
    num_processes: int = 1

    @property
    def streams_per_process(self):
        return max(1, self.num_workers)

    @property
    def num_streams(self):
        return self.num_processes * self.streams_per_process

    @property
    def max_bytes(self):
        """What the streams of a process may hold: blocks of encoded samples, and batches of pixels ahead of use."""
        batch = 3 * self.resolution**2 * self.batch_size
        ahead = 1 + BATCHES_AHEAD * (self.num_workers > 0)
        return self.streams_per_process * (self.shuffle_buffer_mb * 1e6 + ahead * batch)


def data_config(args, shards, accelerator):
    """The options' and the process's DataConfig; `shards` come from `expand_shards`."""
    names = DataConfig.__dataclass_fields__.keys() & vars(args).keys()
    return DataConfig(
        shards=shards,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        **{name: getattr(args, name) for name in names},
    )


@dataclass(frozen=True)
class Position:
    """The start of a stream's current block, and how many of the block's samples were taken."""

    pass_index: int = 0  # how often the stream went through its shards
    shard_index: int = 0  # within the stream's share of this pass
    member_index: int = 0  # the block's first sample, counted in its shard
    block_index: int = 0  # within this pass
    taken: int = 0


def describe(skipped):
    """A Counter of skips in one line, the most frequent reason first."""
    return ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common()) or "none"


@dataclass
class Tally:
    """What became of the samples so far."""

    used: int = 0
    unscored: int = 0  # of them, those whose JSON has no `pwatermark`, which --max_watermark_probability lets through
    skipped: Counter = field(default_factory=Counter)  # by reason

    def __add__(self, other):
        return Tally(self.used + other.used, self.unscored + other.unscored, self.skipped + other.skipped)

    def __str__(self):
        unscored = f"{self.unscored} of them without a `pwatermark`, " if self.unscored else ""
        return f"{self.used} samples used, {unscored}skipped: {describe(self.skipped)}"

    def as_scalars(self):
        """The tally for the trackers: {"samples/used": n, "samples/skipped/the_reason": n, ...}."""
        reasons = {f"samples/skipped/{name.replace(' ', '_')}": count for name, count in sorted(self.skipped.items())}
        unscored = {"samples/without_pwatermark": self.unscored} if self.unscored else {}
        return {"samples/used": self.used, **unscored, **reasons}


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


def is_local(shard):
    """True for a path, False for an address or a command."""
    return not shard.startswith("pipe:") and "://" not in shard


def expand_shards(patterns, option="--train_shards_path_or_url"):
    """List every shard that the values of `option` name: brace ranges, `::`-joined lists, local wildcards.

    Raises UserError if a pattern is malformed or if no shard is left; missing local files are logged and left out.
    """
    shards = []
    for pattern in itertools.chain.from_iterable(p.split("::") for p in patterns):
        try:
            expanded = list(braceexpand.braceexpand(os.path.expanduser(pattern)))
        except ValueError as error:
            raise UserError(f"{option}: {redact(pattern)!r}: {redact(str(error))}") from None
        for shard in filter(None, expanded):
            is_wildcard = is_local(shard) and glob.has_magic(shard) and not os.path.isfile(shard)
            shards += (is_wildcard and sorted(glob.glob(shard))) or [shard]
    missing = {shard for shard in shards if is_local(shard) and not os.path.isfile(shard)}
    present = tuple(s for s in shards if s not in missing)
    if missing and present:
        logger.warning("%d of %d shards do not exist, for example %s", len(missing), len(shards), min(missing))
    if not present:
        raise UserError(f"{option}: {redact(' '.join(patterns))!r} matches no shard")
    return present


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


# Streams.


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


def ignore_stop_signals(closing, worker):
    """Leave SIGTERM and SIGINT, which a terminal or SLURM sends to all processes of a run, to the training process.

    Once `closing` is set a SIGTERM comes from torch, to a worker that still waits for a shard.
    """

    def terminate(*_):
        if closing.is_set():
            end_children(psutil.Process())
            os._exit(0)  # at once: a lock may be held by a worker that was killed

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


class Streams(torch.utils.data.IterableDataset):
    """The dataset of one process: worker w iterates over stream (w + first) mod the number of workers."""

    def __init__(self, config, positions, empty_passes, first):
        self.config, self.positions, self.empty_passes, self.first = config, positions, empty_passes, first

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index = ((worker.id if worker else 0) + self.first) % self.config.streams_per_process
        return iter(Stream(self.config, index, self.positions[index], self.empty_passes[index]))


class TrainingData:
    """An endless iterator over the batches of one process; `state_dict` is its place and its tally of skips.

    A batch is a dict: `pixels` (B, 3, H, W) float32 in [-1, 1] on `device`, `captions` a list of B strings,
    `original_sizes` (height, width) and `crops` (top, left), both (B, 2) int64 pixels.
    Raises UserError when a whole pass over the shards gave nothing that can be trained on.
    """

    def __init__(self, config, device="cpu"):
        self.config, self.device = config, device
        self.positions = [Position()] * config.streams_per_process
        self.empty_passes = [0] * config.streams_per_process
        self.next_stream = 0
        self.tally = Tally()

    def state_dict(self):
        return {
            "order": ORDER_VERSION,
            "positions": [asdict(position) for position in self.positions],
            "empty_passes": list(self.empty_passes),
            "next_stream": self.next_stream,
            "num_used": self.tally.used,
            "num_unscored": self.tally.unscored,
            "skipped": dict(self.tally.skipped),
        }

    def load_state_dict(self, state):
        """Continue from `state`. Raises UserError if it was saved with another number of workers, and any error if it
        is not what `state_dict` gave."""
        if len(state["positions"]) != self.config.streams_per_process:
            raise UserError(
                f"--dataloader_num_workers: the checkpoint was saved with {len(state['positions'])} data streams a "
                f"process, not {self.config.streams_per_process}"
            )
        self.positions = [Position(**position) for position in state["positions"]]
        self.empty_passes = list(state["empty_passes"])
        self.next_stream = state["next_stream"]
        self.tally = Tally(state["num_used"], state.get("num_unscored", 0), Counter(state["skipped"]))
        places = [number for position in self.positions for number in asdict(position).values()]
        counts = (self.tally.used, self.tally.unscored, *self.tally.skipped.values())
        for number in (*places, *self.empty_passes, self.next_stream, *counts):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no place in the data")
        if state.get("order", 1) != ORDER_VERSION:
            logger.warning(
                "--resume_from_checkpoint: saved by a version that dealt out the shards in another order; the data "
                "goes on from here in the new one, so that this is not the run that it would have been, bit for bit"
            )

    def start_new_cycle(self, states):
        """Begin a new pass over all shards, in an order that was not used before, for a run that goes on with another
        number of workers or processes.

        `states` are those of all processes of the checkpoint; their tallies go to the first process.
        """
        passes = 1 + max(position["pass_index"] for state in states for position in state["positions"])
        self.positions = [Position(passes * self.config.num_streams)] * self.config.streams_per_process
        if self.config.rank == 0:
            tallies = [Tally(s["num_used"], s.get("num_unscored", 0), Counter(s["skipped"])) for s in states]
            self.tally = sum(tallies, Tally())

    def totals(self):
        """The Tally over all processes, which all must call this."""
        return sum(gather_object([self.tally]), Tally())

    def note_problems(self, problems):
        """Count what was skipped, and log the first of each kind in full."""
        for problem in problems:
            self.tally.skipped[problem.reason] += 1
            if self.tally.skipped[problem.reason] == 1:
                logger.warning("Skipped: %s (%s). Further ones are counted.", problem.reason, redact(problem.detail))

    def items(self):
        """What the streams give, without end. Where a data worker dies all are started anew from the same place.

        Raises UserError if workers die again and again, or run out of memory.
        """
        advice = "fewer --dataloader_num_workers, or a smaller --shuffle_buffer_mb, take less memory"
        deaths = 0
        while True:
            try:
                for item in self.load():
                    yield item
                    deaths = 0
            except MemoryError as error:
                raise UserError(f"--shuffle_buffer_mb: out of memory while data was read; {advice}") from error
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker (pid"):
                    raise
                deaths += 1
                if deaths == MAX_DEATHS_IN_A_ROW:
                    raise UserError(
                        f"--dataloader_num_workers: data workers died {deaths} times in a row ({first_line(error)}); "
                        f"if the machine ran out of memory: {advice}"
                    ) from error
                logger.warning("--dataloader_num_workers: %s; starting all of them anew", first_line(error))

    def load(self):
        """Yield the items of one DataLoader, which starts at `positions`."""
        closing = multiprocessing.Event()
        loader = torch.utils.data.DataLoader(
            Streams(self.config, self.positions, self.empty_passes, self.next_stream),
            batch_size=None,
            num_workers=self.config.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.config.num_workers else None,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator(),  # the loader's own draw must not move the global generator
            worker_init_fn=partial(ignore_stop_signals, closing),
        )
        handler = signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch's handler raises in the middle of a training step. Without it a death shows where a batch is asked
            # for, at most 5 s later.
            signal.signal(signal.SIGCHLD, handler)
        try:
            yield from items
        finally:
            closing.set()

    def __iter__(self):
        everything = set(shard_parts(self.config))
        without_use = set()
        for item in self.items():
            self.positions[item.stream] = item.position
            self.empty_passes[item.stream] = item.empty_passes
            self.next_stream = (item.stream + 1) % self.config.streams_per_process
            self.tally += item.tally
            self.note_problems(item.problems)
            if item.tally.used:
                without_use.clear()
            if item.batch is None:
                without_use.update(item.empty_share)
                if without_use >= everything:
                    raise UserError(
                        "--train_shards_path_or_url: a whole pass over the shards gave no usable sample. "
                        f"Skipped: {describe(self.tally.skipped)}. A sample needs a picture "
                        f"({', '.join(IMAGE_SUFFIXES)}) and a caption ({', '.join(CAPTION_SUFFIXES)}, or "
                        "--caption_key in its JSON), and must pass the filters"
                    )
                continue
            pixels = item.batch["pixels"].to(self.device, non_blocking=True)
            yield {**item.batch, "pixels": pixels.float() / 127.5 - 1}
