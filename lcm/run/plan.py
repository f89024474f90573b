"""How long a run is, how much it sees in a step, and what it says of itself before it starts."""

import logging

logger = logging.getLogger(__name__)



def set_length(args, num_processes):
    """Fill in `max_train_steps` from epochs, and return the optimizer steps of one epoch (None without epochs)."""
    if args.max_train_samples is None:
        return None
    batches = -(-args.max_train_samples // (args.train_batch_size * num_processes))
    steps_per_epoch = -(-batches // args.gradient_accumulation_steps)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    return steps_per_epoch


def samples_per_step(args, accelerator):
    """How many samples one optimizer step sees, over all processes."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def describe_run(args, accelerator, student, solver, data_config, steps_per_epoch):
    """Log what the run is about to do."""
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    total = samples_per_step(args, accelerator)
    epochs = f", {args.max_train_steps / steps_per_epoch:.3g} epochs of {steps_per_epoch}" if steps_per_epoch else ""
    guidance = f"w in [{args.w_min:g}, {args.w_max:g}]: guidance_scale {args.w_min + 1:g} to {args.w_max + 1:g}"
    for line in (
        f"Teacher: {args.pretrained_teacher_model}; {trainable:.2f} M trainable parameters of {parameters:.2f} M",
        f"Device: {accelerator.device}, {accelerator.num_processes} process(es), "
        f"mixed precision {accelerator.mixed_precision}",
        f"Batch: {args.train_batch_size} samples x {accelerator.num_processes} processes "
        f"x {args.gradient_accumulation_steps} accumulated = {total} a step",
        f"Length: {args.max_train_steps} steps = {args.max_train_steps * total} samples{epochs}",
        f"Data: {len(data_config.shards)} shard(s), {data_config.num_streams} stream(s), {args.resolution} x "
        f"{args.resolution} pixels, seed {args.seed}",
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
    if outside and hasattr(args, "unet_time_cond_proj_dim"):  # guidance is an input; of a LoRA it is not
        logger.warning(
            "--validation_guidance_scale: %s lies outside of [%g, %g], w_min + 1 to w_max + 1: the student is not "
            "trained for it",
            ", ".join(f"{scale:g}" for scale in outside),
            low,
            high,
        )
