"""Which options make a training command fit on a card. Each suggestion is simulated, several at a time."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from lcm.models.family import pictures_at_once
from lcm.options.checks import optimizer_name
from lcm.options.shapes import training_shapes
from lcm.options.types import Options
from lcm.simulation.many import Command, Peaks, make_pool, num_cores, peaks_of
from lcm.simulation.report import table

More = tuple[str, ...]  # options in addition to those of the command


def savers(args: Options, is_sharded: bool = False) -> list[More]:
    """Options that save memory and that the command lacks: first those that do not change the results.

    `is_sharded` says whether FSDP splits the networks, and with them the moving average.
    """
    is_whole, has_bitsandbytes = "lora" not in args.script, importlib.util.find_spec("bitsandbytes") is not None
    at_once = min(pictures_at_once(*shape) for shape in training_shapes(args))
    helps = {
        "--gradient_checkpointing": not args.gradient_checkpointing,
        "--offload": not args.offload,
        "--offload_ema": is_whole and not is_sharded and not args.offload_ema,
        "--cast_teacher_unet": is_whole and not args.cast_teacher_unet and args.mixed_precision is not None,
        "--vae_encode_batch_size=1": (args.vae_encode_batch_size or 0) > at_once,
        "--use_8bit_adam": optimizer_name(args) == "adamw" and has_bitsandbytes,
        "--base_model_precision=nf4": not is_whole and args.base_model_precision == "no_change" and has_bitsandbytes,
    }
    return [(option,) for option, is_useful in helps.items() if is_useful]


@dataclass(frozen=True)
class Suggestion:
    """Options in addition, and what replaces the sizes of the command. More than two passes take no more than two."""

    more: More
    size: int  # of a batch
    passes: int  # that are accumulated in a step: 1 or 2, which stands for all larger numbers

    def options(self) -> More:
        return (*self.more, f"--train_batch_size={self.size}", f"--gradient_accumulation_steps={self.passes}")


class Advice:
    """Looks for options with which a command takes at most `memory` bytes; `peaks` are those of the command itself.

    `found` has the peaks of what was simulated.
    """

    def __init__(self, command: Command, args: Options, peaks: Peaks, memory: float, is_sharded: bool = False):
        self.command, self.memory = command, memory
        self.size, self.passes = args.train_batch_size, args.gradient_accumulation_steps
        self.alone = [self.with_options(more) for more in savers(args, is_sharded)]
        self.all = tuple(chain.from_iterable(one.more for one in self.alone))
        self.given = self.with_options(())
        self.found: dict[Suggestion, Peaks] = {self.given: peaks}

    def with_options(self, more: More) -> Suggestion:
        return Suggestion(more, self.size, min(2, self.passes))

    def simulate(self, suggestions: Iterable[Suggestion]) -> None:
        """Find the peaks of several. A line on standard error says when each is done."""
        missing = [suggestion for suggestion in suggestions if suggestion not in self.found]

        def one(suggestion: Suggestion) -> Peaks:
            peaks = peaks_of(self.command.with_more(suggestion.options()))
            print(f"{self.name(suggestion)}: {max(peaks.values()) / 1e9:.1f} GB", file=sys.stderr, flush=True)
            return peaks

        with make_pool() as pool:
            self.found.update(zip(missing, pool.map(one, missing), strict=True))

    def peak(self, suggestion: Suggestion) -> int:
        return max(self.found[suggestion].values())

    def fits(self, suggestion: Suggestion) -> bool:
        return self.peak(suggestion) <= self.memory

    def seek(self) -> More | None:
        """The smallest set of options that fits; if none does, all and the largest batch; None if that is none."""
        everything = self.with_options(self.all)
        self.simulate([*self.alone, everything])
        for suggestion in self.alone:
            if self.fits(suggestion):
                return suggestion.more
        return self.smallest_set() if self.fits(everything) else self.smaller_batch()

    def smallest_set(self) -> More:
        """The first of the smallest sets that fit; only those are simulated that should."""
        for number in range(2, len(self.alone)):
            # In the order of their last option, so that a set with a later option comes later.
            places = sorted(combinations(range(len(self.alone)), number), key=lambda parts: parts[::-1])
            every = [[self.alone[place] for place in parts] for parts in places]
            likely = [parts for parts in every if self.predicted(parts) <= self.memory]
            sets = [self.with_options(tuple(chain.from_iterable(one.more for one in parts))) for parts in likely]
            for first in range(0, len(sets), num_cores()):
                chunk = sets[first : first + num_cores()]
                self.simulate(chunk)
                for suggestion in chunk:
                    if self.fits(suggestion):
                        return suggestion.more
        return self.all

    def predicted(self, parts: Iterable[Suggestion]) -> int:
        """The peak with several options, as if each saved in each phase what it saves alone."""
        saved = [self.found[one] for one in parts]
        return max(
            peak - sum(peak - alone.get(phase, 0) for alone in saved) for phase, peak in self.found[self.given].items()
        )

    def smaller_batch(self) -> More | None:
        """All options and the largest batch that fits: of as many samples in a step as before, or else of fewer."""
        accumulated, single = Suggestion(self.all, 1, 2), Suggestion(self.all, 1, 1)
        self.simulate([single] if self.size == 1 else [accumulated, single])
        if self.size > 1 and self.fits(accumulated):
            size, total = self.largest_batch(2), self.size * self.passes
            size = max(divisor for divisor in range(1, size + 1) if total % divisor == 0)
            passes = total // size
        elif self.fits(single):
            size, passes = self.largest_batch(1), 1
        else:
            return None
        return (*self.all, f"--train_batch_size={size}", f"--gradient_accumulation_steps={passes}")

    def largest_batch(self, passes: int) -> int:
        """The largest batch that fits, as 1 does. Memory grows about linearly, so most need not be simulated."""

        def sized(size: int) -> Suggestion:
            return Suggestion(self.all, size, passes)

        known = {1: self.peak(sized(1))}  # {size: peak}
        # The largest that is known to fit, the smallest that is not to be tried.
        low, high = 1, self.size + (passes < self.given.passes)
        sizes = {max(2, self.size // 2)}
        while sizes := {size for size in sizes if low < size < high}:
            self.simulate(map(sized, sorted(sizes)))
            known |= {size: self.peak(sized(size)) for size in sizes}
            low = max(size for size in known if known[size] <= self.memory)
            high = min([high, *(size for size in known if known[size] > self.memory)])
            first, second = sorted(known)[-2:]
            growth = max(1, (known[second] - known[first]) // (second - first))
            guess = min(high - 1, low + int(self.memory - known[low]) // growth)
            sizes = {guess, guess + 1}
        return low

    def describe(self) -> str:
        """What was tried, in a table, and as the last line the options to add."""
        answer = self.seek()
        rows = [["in addition", "peak GB", ""]]
        for suggestion in sorted(self.found, key=self.order):
            if suggestion != self.given:
                fits = "fits" if self.fits(suggestion) else ""
                rows.append([self.name(suggestion), f"{self.peak(suggestion) / 1e9:.1f}", fits])
        last = "Even a batch of 1 does not fit." if answer is None else f"Options to add: {' '.join(answer)}"
        return "\n".join([*(table(rows) if len(rows) > 1 else []), "", last])

    def is_resized(self, suggestion: Suggestion) -> bool:
        return (suggestion.size, suggestion.passes) != (self.given.size, self.given.passes)

    def name(self, suggestion: Suggestion) -> str:
        is_all = suggestion.more == self.all and len(self.alone) > 1
        batch = f"a batch of {suggestion.size}{', accumulated' if suggestion.passes > 1 else ''}"
        options = "all of these" if is_all else " ".join(suggestion.more)
        return ", ".join(filter(None, [options, batch if self.is_resized(suggestion) else ""]))

    def order(self, suggestion: Suggestion) -> tuple[Any, ...]:
        """Single options, sets by their size, all of them; then batches, the largest first."""
        places = [self.all.index(option) for option in suggestion.more]
        return self.is_resized(suggestion), -suggestion.passes, -suggestion.size, len(places), places
