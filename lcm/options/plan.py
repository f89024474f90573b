"""What is in effect in a run: what the options leave open, and what the launcher decides."""

import math
from dataclasses import dataclass
from typing import Any

from lcm.options.types import Options
from lcm.secrets import public_options


@dataclass(frozen=True)
class Plan:
    """What is in effect in a run, the same on all processes."""

    seed: int
    mixed_precision: str  # no, fp16, bf16
    num_processes: int
    gradient_accumulation_steps: int
    max_train_steps: int
    steps_per_epoch: int | None  # None without epochs
    samples_per_step: int  # over all processes and accumulated passes
    shards: tuple[str, ...]  # addresses without braces
    cache: Any = None  # what the shards have in common if they are cached, an lcm.cache.Cache

    def options(self, args: Options) -> dict[str, Any]:
        """The options in effect, as a dict that may be logged, stored and shown: without secrets."""
        return public_options(args) | {
            "seed": self.seed,
            "mixed_precision": self.mixed_precision,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_train_steps": self.max_train_steps,
        }


def make_plan(args: Options, accelerator: Any, seed: int, shards: tuple[str, ...], cache: Any = None) -> Plan:
    """The Plan for these options and this `accelerate.Accelerator`."""
    passes = accelerator.gradient_accumulation_steps
    samples_per_pass = args.train_batch_size * accelerator.num_processes
    steps_per_epoch = None
    if args.max_train_samples is not None:
        steps_per_epoch = math.ceil(math.ceil(args.max_train_samples / samples_per_pass) / passes)
    return Plan(
        seed=seed,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        gradient_accumulation_steps=passes,
        max_train_steps=args.max_train_steps or args.num_train_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        samples_per_step=samples_per_pass * passes,
        shards=shards,
        cache=cache,
    )
