"""Batches of captioned pictures from WebDataset shards: an endless, seeded stream that can be resumed exactly.

One *stream* is one data loader worker of one process. Its stages, in order:

    order of shards -> samples as bytes -> shuffled blocks -> pictures and captions (lcm_samples) -> batches

What cannot be used travels through the shuffle as a `Problem` and is counted. A stream's place is five integers
(`Position`): a block of samples and how many of it were used. The order within a block is a function of (seed, stream,
pass, block), so a resume passes over the shard up to that block, reads the block, and decodes nothing twice.
"""

import glob
import itertools
import logging
import os
import signal
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

import braceexpand
import numpy as np
import torch
from accelerate.utils import gather_object

from lcm_options import UserError, redact
from lcm_samples import CAPTION_SUFFIXES, IMAGE_SUFFIXES, Problem, Unusable, collate, decode_sample, read_shard

logger = logging.getLogger(__name__)


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
    num_workers: int = 0
    rank: int = 0
    num_processes: int = 1

    @property
    def streams_per_process(self):
        return max(1, self.num_workers)

    @property
    def num_streams(self):
        return self.num_processes * self.streams_per_process


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


@dataclass
class Item:
    """What a stream hands to the training process: a batch, or word that a whole pass gave nothing."""

    stream: int  # of this process
    position: Position
    empty_passes: int  # reported since `position`
    empty_share: list  # where `batch` is None: what was gone through, as `shard_order` gives it
    batch: dict | None
    num_usable: int
    problems: list = field(default_factory=list)

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
            raise UserError(f"{option}: {redact(pattern)!r}: {error}") from None
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


def shard_order(config, stream, pass_index):
    """This stream's share of one pass, as a list of (shard, part, num_parts).

    All streams shuffle alike and deal the shards out among themselves. With fewer shards than streams several streams
    open the same shard and each takes every `num_parts`-th sample of it. The deal moves on with each pass, so that in
    `num_processes` passes with one order, every process sees every shard.
    """
    round_index, turn = divmod(pass_index, config.num_processes)
    order = np.random.default_rng((config.seed, round_index)).permutation(len(config.shards))
    slot = (stream + turn * config.streams_per_process) % config.num_streams
    num_shards = len(config.shards)
    if num_shards >= config.num_streams:
        return [(config.shards[i], 0, 1) for i in order[slot :: config.num_streams]]
    shard = slot % num_shards  # whatever the order, so that the shares are the same in every pass
    return [(config.shards[shard], slot // num_shards, len(range(shard, config.num_streams, num_shards)))]


# Streams.


class Block:
    """Up to `size` samples of one pass, read a few at a time so that reading goes on while the last block is used."""

    def __init__(self, source, start, size):
        self.source, self.start, self.size = source, start, size
        self.samples, self.next_start = [], None

    def read(self, count):
        """Read `count` samples more, or fewer if the block is full or the pass ends."""
        while count > 0 and self.next_start is None:
            place, sample = next(self.source)
            if sample is None:  # the pass has ended
                self.next_start = place
                return
            self.samples.append(sample)
            count -= 1
            if len(self.samples) == self.size:
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
                for member_index, sample in enumerate(read_shard(url)):
                    if member_index >= skip_members and member_index % num_parts == part:
                        yield Position(pass_index, shard_index, member_index + 1), sample
                skip_shards = skip_members = 0
            yield Position(pass_index + 1), None

    def shuffled(self):
        """Yield (position after it, rng of its own, sample), shuffled within blocks; a None sample ends a pass."""
        source = self.samples(self.start)
        block = Block(source, self.start, self.config.shuffle_buffer_size)
        block.read(block.size)
        while True:
            start = block.start
            ahead = Block(source, replace(block.next_start, taken=0), block.size)
            order = self.rng(start.pass_index, start.block_index).permutation(len(block.samples))
            for taken, i in enumerate(order):
                if taken >= start.taken:
                    rng = self.rng(start.pass_index, start.block_index, i)
                    yield replace(start, taken=taken + 1), rng, block.samples[i]
                    ahead.read(1)
            if ahead.start.pass_index > start.pass_index:
                yield ahead.start, None, None
            ahead.read(block.size)
            block = ahead

    def __iter__(self):
        rows, problems, num_usable, usable_in_pass = [], [], 0, self.start.taken > 0
        batch_end, empty_passes = self.start, 0
        for position, rng, sample in self.shuffled():
            if sample is None:
                if not usable_in_pass:
                    empty_passes += 1
                    if empty_passes > self.reported:
                        share = shard_order(self.config, self.id, position.pass_index - 1)
                        yield Item(self.index, batch_end, empty_passes, share, None, num_usable, problems)
                    problems, num_usable = [], 0
                usable_in_pass = False
                continue
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            try:
                rows.append(decode_sample(sample, self.config, rng))
                usable_in_pass = True
                num_usable += 1
            except Unusable as error:
                reason, detail = error.args
                problems.append(Problem(reason, f"{sample['__url__']}: {sample['__key__']}: {detail}"))
            if len(rows) == self.config.batch_size:
                batch_end, empty_passes, self.reported = position, 0, 0
                yield Item(self.index, batch_end, 0, [], collate(rows), num_usable, problems)
                rows, problems, num_usable = [], [], 0


def ignore_stop_signals(worker):
    """Leave SIGTERM and SIGINT, which a terminal or SLURM sends to all processes of a run, to the training process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Streams(torch.utils.data.IterableDataset):
    """The dataset of one process: worker w iterates over stream (w + first) mod the number of workers."""

    def __init__(self, config, positions, empty_passes, first):
        self.config, self.positions, self.empty_passes, self.first = config, positions, empty_passes, first

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index = ((worker.id if worker else 0) + self.first) % self.config.streams_per_process
        return iter(Stream(self.config, index, self.positions[index], self.empty_passes[index]))


def describe(skipped):
    """A Counter of skips in one line, the most frequent reason first."""
    return ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common()) or "none"


def as_scalars(num_used, skipped):
    """The tally for the trackers: {"samples/used": n, "samples/skipped/the_reason": n, ...}."""
    reasons = {f"samples/skipped/{reason.replace(' ', '_')}": count for reason, count in sorted(skipped.items())}
    return {"samples/used": num_used, **reasons}


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
        self.num_used = 0
        self.skipped = Counter()

    def state_dict(self):
        return {
            "positions": [asdict(position) for position in self.positions],
            "empty_passes": list(self.empty_passes),
            "next_stream": self.next_stream,
            "num_used": self.num_used,
            "skipped": dict(self.skipped),
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
        self.num_used = state["num_used"]
        self.skipped = Counter(state["skipped"])
        places = [number for position in self.positions for number in asdict(position).values()]
        for number in (*places, *self.empty_passes, self.next_stream, self.num_used, *self.skipped.values()):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no place in the data")

    def totals(self):
        """(samples used, Counter of skips by reason) over all processes, which all must call this."""
        states = gather_object([(self.num_used, dict(self.skipped))])
        return sum(used for used, _ in states), sum((Counter(skipped) for _, skipped in states), Counter())

    def note_problems(self, problems):
        """Count what was skipped, and log the first of each kind in full."""
        for problem in problems:
            self.skipped[problem.reason] += 1
            if self.skipped[problem.reason] == 1:
                logger.warning("Skipped: %s (%s). Further ones are counted.", problem.reason, redact(problem.detail))

    def __iter__(self):
        loader = torch.utils.data.DataLoader(
            Streams(self.config, self.positions, self.empty_passes, self.next_stream),
            batch_size=None,
            num_workers=self.config.num_workers,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator(),  # the loader's own draw must not move the global generator
            worker_init_fn=ignore_stop_signals,
        )
        everything = {share for s in range(self.config.num_streams) for share in shard_order(self.config, s, 0)}
        without_use = set()
        for item in loader:
            self.positions[item.stream] = item.position
            self.empty_passes[item.stream] = item.empty_passes
            self.next_stream = (item.stream + 1) % self.config.streams_per_process
            self.num_used += item.num_usable
            self.note_problems(item.problems)
            if item.num_usable:
                without_use.clear()
            if item.batch is None:
                without_use.update(item.empty_share)
                if without_use >= everything:
                    raise UserError(
                        "--train_shards_path_or_url: a whole pass over the shards gave no usable sample. "
                        f"Skipped: {describe(self.skipped)}. A sample needs a picture "
                        f"({', '.join(IMAGE_SUFFIXES)}) and a caption ({', '.join(CAPTION_SUFFIXES)}, or "
                        "--caption_key in its JSON), and must pass the filters"
                    )
                continue
            pixels = item.batch["pixels"].to(self.device, non_blocking=True)
            yield {**item.batch, "pixels": pixels.float() / 127.5 - 1}
