"""The optimizer, and its learning rate schedule."""

import importlib
import logging

import diffusers
import torch

from lcm.options.choices import OPTIMIZERS
from lcm.options.plan import Plan
from lcm.options.types import Options

logger = logging.getLogger(__name__)


def make_optimizer(args: Options, plan: Plan, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW. Logs the effective learning rate.

    AdamW is fused: torch's default makes temporary tensors of the size of all trained weights on a GPU, and is slower.
    """
    rate = args.learning_rate
    if args.scale_lr:
        rate *= plan.samples_per_step
    module, name = OPTIMIZERS["adamw_8bit" if args.use_8bit_adam else "adamw"]
    optimizer_class = getattr(importlib.import_module(module), name)
    logger.info("Optimizer: %s, learning rate %g, %s", optimizer_class.__name__, rate, args.lr_scheduler)
    more = {"fused": True} if name == "AdamW" else {}
    return optimizer_class(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **more,
    )


def make_lr_scheduler(
    args: Options, plan: Plan, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's schedule in optimizer steps. accelerate, which would multiply them, does not prepare it."""
    return diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.max_train_steps,
    )
