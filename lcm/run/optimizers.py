"""The optimizer, and its learning rate schedule."""

import importlib
import logging
from typing import Any

import diffusers
import torch

from lcm.errors import UserError
from lcm.options.checks import optimizer_name
from lcm.options.choices import OPTIMIZERS
from lcm.options.plan import Plan
from lcm.options.types import Options

logger = logging.getLogger(__name__)

# Smaller changes of a number in bfloat16 may be less than half of its spacing.
BFLOAT16_BETA2 = 1 - 2**-8
# What the options decide in a group of parameters, as torch, bitsandbytes and optimi call it. The rest is state.
SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "beta1", "beta2", "eps")


def make_optimizer(args: Options, plan: Plan, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer`, for parameters that it casts to the dtype that it trains. Logs the effective
    learning rate. Raises UserError for 16-bit weights without autocast in bfloat16.
    """
    kind = OPTIMIZERS[optimizer_name(args)]
    if kind.weights != "float32":
        if plan.mixed_precision != "bf16":
            raise UserError(
                f"--optimizer: {args.optimizer} given, but the mixed precision is {plan.mixed_precision}; allowed: "
                "--mixed_precision bf16"
            )
        if args.adam_beta2 > BFLOAT16_BETA2:
            logger.warning("--adam_beta2: %g is rounded to 1 in bfloat16; at most %g moves the second moment",
                           args.adam_beta2, BFLOAT16_BETA2)  # fmt: skip
        for parameter in parameters:
            parameter.data = parameter.data.to(getattr(torch, kind.weights))
    rate = args.learning_rate
    if args.scale_lr:
        rate *= plan.samples_per_step
    settings: dict[str, Any] = {"lr": rate, "weight_decay": args.adam_weight_decay, **kind.settings}
    if "adam_beta1" in kind.options:
        settings["betas"] = (args.adam_beta1, args.adam_beta2)
    if "adam_epsilon" in kind.options:
        settings["eps"] = args.adam_epsilon
    logger.info("Optimizer: %s, learning rate %g, %s", kind.name, rate, args.lr_scheduler)
    return getattr(importlib.import_module(kind.module), kind.name)(parameters, **settings)


def make_lr_scheduler(
    args: Options, plan: Plan, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule in optimizer steps. accelerate, which would multiply them, does not prepare it."""
    return diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
