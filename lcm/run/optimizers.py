"""The optimizer, and its learning rate schedule."""

import importlib
import logging
from typing import Any

import diffusers
import torch

from lcm.options.checks import optimizer_name
from lcm.options.choices import OPTIMIZERS
from lcm.options.plan import Plan
from lcm.options.types import Options

logger = logging.getLogger(__name__)

LION_BETA2 = 0.99  # the authors' (arXiv 2302.06675), and bitsandbytes' default


def make_optimizer(args: Options, plan: Plan, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer`. Logs the effective learning rate."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= plan.samples_per_step
    name = optimizer_name(args)
    module, class_name, own, more = OPTIMIZERS[name]
    settings: dict[str, Any] = {"lr": rate, "weight_decay": args.adam_weight_decay, **more}
    if "adam_beta1" in own:
        is_lion = name.startswith("lion") and "adam_beta2" in args.left_at_default
        settings["betas"] = (args.adam_beta1, LION_BETA2 if is_lion else args.adam_beta2)
    if "adam_epsilon" in own:
        settings["eps"] = args.adam_epsilon
    logger.info("Optimizer: %s, learning rate %g, %s", class_name, rate, args.lr_scheduler)
    return getattr(importlib.import_module(module), class_name)(parameters, **settings)


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
