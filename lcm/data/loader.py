"""The batches of one process, from its streams: an endless iterator that can be resumed exactly."""

import logging
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import asdict
from functools import partial

import psutil
import torch
from accelerate.utils import gather_object

from lcm.data.commands import end_children
from lcm.data.config import BATCHES_AHEAD
from lcm.data.order import ORDER_VERSION, Position, shard_parts
from lcm.data.stream import Stream
from lcm.data.tally import Tally, describe
from lcm.errors import UserError, first_line
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS
from lcm.secrets import redact

logger = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3  # of data workers, without a batch in between


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
                        f"({', '.join(PICTURE_FORMATS)}) and a caption ({', '.join(CAPTION_SUFFIXES)}, or "
                        "--caption_key in its JSON), and must pass the filters"
                    )
                continue
            pixels = item.batch["pixels"].to(self.device, non_blocking=True)
            yield {**item.batch, "pixels": pixels.float() / 127.5 - 1}
