"""What a run says of itself before it starts."""

import logging

import torch

from lcm.data.config import DataConfig
from lcm.models.networks import Networks
from lcm.options.checks import span, steps_in_words, target_in_words
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm_common import DDIMSolver

logger = logging.getLogger(__name__)


def shapes_in_words(config: DataConfig) -> str:
    """The shapes of the pictures, width x height."""
    shapes = [f"{width} x {height}" for height, width in config.shapes]
    if len(shapes) == 1:
        return f"{shapes[0]} pixels"
    return f"{len(shapes)} shapes, each batch one of them: {', '.join(shapes)}"


def describe_run(
    args: Options, plan: Plan, device: torch.device, networks: Networks, solver: DDIMSolver, data_config: DataConfig
) -> None:
    """Log what the run will do: models, device, batches, length, data, memory, method."""
    parameters = sum(p.numel() for p in networks.student.parameters()) / 1e6
    trainable = sum(p.numel() for p in networks.student.parameters() if p.requires_grad) / 1e6
    steps, epoch = plan.max_train_steps, plan.steps_per_epoch
    epochs = f", {steps / epoch:.3g} epochs of {epoch}" if epoch else ""
    guidance = f"w in [{args.w_min:g}, {args.w_max:g}]: guidance_scale {span(args.w_min + 1, args.w_max + 1)}"
    if args.w_max == 0:
        guidance = "no guidance, so one pass of the teacher"
    for line in (
        f"Teacher: {args.pretrained_teacher_model}; {trainable:.2f} M trainable parameters of {parameters:.2f} M",
        f"Device: {device}, {plan.num_processes} process(es), mixed precision {plan.mixed_precision}",
        f"Batch: {args.train_batch_size} samples x {plan.num_processes} processes "
        f"x {plan.gradient_accumulation_steps} accumulated = {plan.samples_per_step} a step",
        f"Length: {steps_in_words(steps)} of {plan.samples_per_step} samples{epochs}",
        f"Data: {len(plan.shards)} shard(s), {data_config.num_streams} stream(s), {shapes_in_words(data_config)}, "
        f"seed {plan.seed}{', cached: no VAE, no text encoder' if plan.cache else ''}",
        f"Host memory for data, a process: up to {data_config.max_bytes / 1e9:.2g} GB, "
        f"{data_config.streams_per_process} x {data_config.shuffle_buffer_mb:g} MB of it for --shuffle_buffer_mb",
        f"Distillation: target {target_in_words(args)}, {args.num_ddim_timesteps} DDIM steps, {guidance}, "
        f"{args.loss_type} loss",
    ):
        logger.info(line)
    if not solver.reaches_end:
        logger.warning(
            "--num_ddim_timesteps: %d does not divide the teacher's timesteps, so the grid ends early, at t = %d; "
            "the saved scheduler samples on the same grid",
            args.num_ddim_timesteps,
            solver.timesteps[-1],
        )
    low, high = args.w_min + 1, args.w_max + 1
    outside = [scale for scale in args.validation_guidance_scale or () if not low <= scale <= high]
    if outside and networks.takes_guidance:
        logger.warning(
            "--validation_guidance_scale: %s lies outside of [%g, %g], w_min + 1 to w_max + 1: the student is not "
            "trained for it",
            ", ".join(f"{scale:g}" for scale in outside),
            low,
            high,
        )
