"""The batches of one process, from its streams: an endless iterator with an exact resume."""

import logging
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object

from lcm.data.commands import end_children
from lcm.data.config import BATCHES_AHEAD, DataConfig
from lcm.data.order import ORDER_VERSION, Address, Part, Position, shard_parts
from lcm.data.samples import FOR_DEVICE
from lcm.data.stream import Item, Stream
from lcm.data.tally import Tally, describe
from lcm.errors import UserError, first_line
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS

logger = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3  # crashes of data workers without a batch in between


def ignore_stop_signals(closing: Event, worker: int) -> None:
    """Leave SIGTERM and SIGINT, which a terminal or SLURM sends to all processes of a run, to the training process.

    After `closing` is set, a SIGTERM comes from torch, for a worker that still waits for a shard.
    """

    def terminate(*_: Any) -> None:
        if closing.is_set():
            end_children(psutil.Process())
            os._exit(0)  # without clean-up: a killed worker may hold a lock

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


def is_death(error: Exception) -> bool:
    """Whether an error of a DataLoader says that a worker died.

    That is torch's own RuntimeError, or an error of the connection over which a batch comes, if the worker died just
    then. An error that was raised in a worker begins with "Caught".
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught ")


def stored_tally(state: dict[str, Any]) -> Tally:
    """The tally in a result of `TrainingData.state_dict`."""
    skipped, shapes = Counter(state["skipped"]), Counter(state.get("shapes", {}))
    return Tally(state["num_used"], state.get("num_unscored", 0), skipped, shapes)


class Streams(torch.utils.data.IterableDataset):
    """The dataset of one process: worker w iterates over stream (w + first) mod the number of workers."""

    def __init__(
        self,
        config: DataConfig,
        positions: list[Position],
        empty_passes: list[int],
        waiting: list[list[Address]],
        first: int,
    ):
        self.config, self.positions, self.empty_passes, self.first = config, positions, empty_passes, first
        self.waiting = waiting

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        index = ((worker.id if worker else 0) + self.first) % self.config.streams_per_process
        place = self.positions[index], self.empty_passes[index], self.waiting[index]
        return iter(Stream(self.config, index, *place))


class TrainingData:
    """An endless iterator over the batches of one process; `state_dict` holds its position and its tally.

    A batch is a dict: `pixels` (B, 3, H, W) float32 in [-1, 1] on `device`, `captions` a list of B strings,
    `original_sizes` (height, width) and `crops` (top, left), both (B, 2) int64 pixels, `target_size` (H, W). If the
    samples are cached it has `moments` (B, 2C, h, w) in place of `pixels`, the embeddings of the captions, and
    `is_empty` (B,).
    Raises UserError after a complete pass over the shards without a usable sample.
    """

    def __init__(self, config: DataConfig, device: torch.device | str = "cpu"):
        self.config, self.device = config, device
        self.positions = [Position()] * config.streams_per_process
        self.empty_passes = [0] * config.streams_per_process
        self.waiting: list[list[Address]] = [[] for _ in self.positions]
        self.next_stream = 0
        self.tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        return {
            "order": ORDER_VERSION,
            "positions": [asdict(position) for position in self.positions],
            "empty_passes": list(self.empty_passes),
            "waiting": [[list(astuple(address)) for address in waiting] for waiting in self.waiting],
            "next_stream": self.next_stream,
            "num_used": self.tally.used,
            "num_unscored": self.tally.unscored,
            "skipped": dict(self.tally.skipped),
            "shapes": dict(self.tally.shapes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`. Raises UserError if it was saved with another number of workers, and any error if it is
        not a result of `state_dict`."""
        if len(state["positions"]) != self.config.streams_per_process:
            raise UserError(
                f"--dataloader_num_workers: the checkpoint was saved with {len(state['positions'])} data streams a "
                f"process, not {self.config.streams_per_process}"
            )
        self.positions = [Position(**position) for position in state["positions"]]
        self.empty_passes = list(state["empty_passes"])
        saved = state.get("waiting") or [[] for _ in self.positions]  # older ones have none
        self.waiting = [[Address(*address) for address in waiting] for waiting in saved]
        self.next_stream = state["next_stream"]
        self.tally = stored_tally(state)
        places = [number for position in self.positions for number in astuple(position)]
        places += [number for waiting in self.waiting for address in waiting for number in astuple(address)]
        counts = (self.tally.used, self.tally.unscored, *self.tally.skipped.values(), *self.tally.shapes.values())
        for number in (*places, *self.empty_passes, self.next_stream, *counts):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is not a position in the data")
        if state.get("order", 1) != ORDER_VERSION:
            logger.warning(
                "--resume_from_checkpoint: saved by a version that dealt out the shards in another order; from here "
                "on the data is in the new order, so the results differ from those of an uninterrupted run"
            )

    def start_new_cycle(self, states: list[dict[str, Any]]) -> None:
        """Begin a new pass over all shards, in an order that was not used before: for a resume with another number of
        workers or processes.

        `states` has the state of every process of the checkpoint; the first process takes over their tallies.
        """
        passes = 1 + max(position["pass_index"] for state in states for position in state["positions"])
        self.positions = [Position(passes * self.config.num_streams)] * self.config.streams_per_process
        self.waiting = [[] for _ in self.positions]
        if self.config.rank == 0:
            self.tally = sum(map(stored_tally, states), Tally())

    def totals(self) -> Tally:
        """The sum of the tallies of all processes; all of them must call this."""
        return sum(gather_object([self.tally]), Tally())

    def items(self) -> Iterator[Item]:
        """The items of the streams, without end. If a data worker dies, all are restarted at the same position.

        Raises UserError if workers die MAX_DEATHS_IN_A_ROW times in a row, or run out of memory.
        """
        advice = "fewer --dataloader_num_workers, or a smaller --shuffle_buffer_mb, take less memory"
        deaths = 0
        while True:
            try:
                for item in self.load():
                    yield item
                    deaths = 0
            except MemoryError as error:
                raise UserError(f"--shuffle_buffer_mb: out of memory while reading data; {advice}") from error
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not is_death(error):
                    raise
                deaths += 1
                if deaths == MAX_DEATHS_IN_A_ROW:
                    raise UserError(
                        f"--dataloader_num_workers: data workers died {deaths} times in a row ({first_line(error)}); "
                        f"if the machine ran out of memory: {advice}"
                    ) from error
                logger.warning("--dataloader_num_workers: %s; restarting all of them", first_line(error))

    def load(self) -> Iterator[Item]:
        """Yield the items of one DataLoader that starts at `positions`."""
        closing = multiprocessing.Event()
        loader = torch.utils.data.DataLoader(
            Streams(self.config, self.positions, self.empty_passes, self.waiting, self.next_stream),
            batch_size=None,
            num_workers=self.config.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.config.num_workers else None,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator(),  # so that the loader's draw of a seed does not advance the global generator
            worker_init_fn=partial(ignore_stop_signals, closing),
        )
        handler = signal.getsignal(signal.SIGCHLD)
        items = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch's handler raises in the middle of a training step. Without it, the request for the next batch
            # raises, at most 5 s later.
            signal.signal(signal.SIGCHLD, handler)
        try:
            yield from items
        finally:
            closing.set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        all_parts = set(shard_parts(self.config))
        unusable_parts: set[Part] = set()
        for item in self.items():
            self.positions[item.stream] = item.position
            self.empty_passes[item.stream] = item.empty_passes
            self.waiting[item.stream] = item.waiting
            self.next_stream = (item.stream + 1) % self.config.streams_per_process
            self.tally += item.tally
            for problem in item.problems:
                self.tally.skip(problem)
            if item.tally.used:
                unusable_parts.clear()
            if item.batch is None:
                unusable_parts.update(item.empty_share)
                if unusable_parts >= all_parts:
                    raise UserError(
                        "--train_shards_path_or_url: no usable sample in a complete pass over the shards. "
                        f"Skipped: {describe(self.tally.skipped)}. A sample needs a picture "
                        f"({', '.join(PICTURE_FORMATS)}) and a caption ({', '.join(CAPTION_SUFFIXES)}, or "
                        "--caption_key in its JSON), and must pass the filters"
                    )
                continue
            batch = dict(item.batch)
            for name in FOR_DEVICE & batch.keys():
                batch[name] = batch[name].to(self.device, non_blocking=True)
            if "pixels" in batch:
                batch["pixels"] = batch["pixels"].float().div_(127.5).sub_(1)
            yield batch
