"""What is in effect in a run, where the options leave it open or the launcher decides."""

import logging
import math
from dataclasses import dataclass

from lcm.secrets import public_options

logger = logging.getLogger(__name__)


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

    def options(self, args):
        """The options in effect, as a dict that may be logged, stored and shown: without secrets."""
        return public_options(args) | {
            "seed": self.seed,
            "mixed_precision": self.mixed_precision,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_train_steps": self.max_train_steps,
        }


def make_plan(args, accelerator, seed, shards):
    """The Plan of the options on this accelerator."""
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
    )


def describe_run(args, plan, accelerator, networks, solver, data_config):
    """Log what the run is about to do."""
    parameters = sum(p.numel() for p in networks.student.parameters()) / 1e6
    trainable = sum(p.numel() for p in networks.student.parameters() if p.requires_grad) / 1e6
    steps, epoch = plan.max_train_steps, plan.steps_per_epoch
    epochs = f", {steps / epoch:.3g} epochs of {epoch}" if epoch else ""
    guidance = f"w in [{args.w_min:g}, {args.w_max:g}]: guidance_scale {args.w_min + 1:g} to {args.w_max + 1:g}"
    for line in (
        f"Teacher: {args.pretrained_teacher_model}; {trainable:.2f} M trainable parameters of {parameters:.2f} M",
        f"Device: {accelerator.device}, {plan.num_processes} process(es), mixed precision {plan.mixed_precision}",
        f"Batch: {args.train_batch_size} samples x {plan.num_processes} processes "
        f"x {plan.gradient_accumulation_steps} accumulated = {plan.samples_per_step} a step",
        f"Length: {steps} steps = {steps * plan.samples_per_step} samples{epochs}",
        f"Data: {len(plan.shards)} shard(s), {data_config.num_streams} stream(s), {args.resolution} x "
        f"{args.resolution} pixels, seed {plan.seed}",
        f"Host memory for data, a process: up to {data_config.max_bytes / 1e9:.2g} GB, "
        f"{data_config.streams_per_process} x {data_config.shuffle_buffer_mb:g} MB of it for --shuffle_buffer_mb",
        f"Distillation: {args.num_ddim_timesteps} DDIM steps, {guidance}, {args.loss_type} loss",
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
