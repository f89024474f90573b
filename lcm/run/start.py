"""The frame around a training loop: start-up, the optimizer, the log.

Nothing here knows which script called it, or owns the loop over steps.
"""

import gc
import logging
import os
import secrets
import sys
from datetime import timedelta

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed

from lcm.options.groups import AT_END, UserError, first_line
from lcm.run.checkpoints import check_resume, stored_seed

logger = logging.getLogger(__name__)


# Start-up.


def start(args, can_shard=False):
    """Make the Accelerator, the logs and the seed. Writes the seed, if one had to be drawn, into `args`.

    `can_shard` says whether FSDP can split the script's networks over processes. Raises UserError if `accelerate`
    refuses the combination of options and hardware, or was configured for what the script cannot do.
    """
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
            # Processes wait for the main one while it saves and draws; the default would end them after 10 minutes.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"accelerate cannot start: {first_line(error)}; see `accelerate config`, and ACCELERATE_... and the "
            "launcher's variables in the environment"
        ) from None
    AT_END.append(leave_process_group)
    kind = accelerator.distributed_type.value
    is_fsdp2 = kind == "FSDP" and accelerator.is_fsdp2
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA") and not (is_fsdp2 and can_shard):
        more = "or FSDP with fsdp_version: 2" if can_shard else "a LoRA needs no FSDP: the whole of it fits on one GPU"
        raise UserError(
            f"accelerate config: {kind}{' version 1' * (kind == 'FSDP' and not is_fsdp2)} is not supported; allowed: "
            f"one process, or several with DistributedDataParallel; {more}"
        )
    precision, passes = accelerator.mixed_precision, accelerator.gradient_accumulation_steps
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"--mixed_precision: `accelerate config` says {precision}; allowed: no, fp16, bf16")
    if passes < 1:
        raise UserError(f"--gradient_accumulation_steps: `accelerate config` says {passes}; allowed: at least 1")
    is_main = accelerator.is_main_process
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if is_main else logging.ERROR,
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("httpx", "accelerate", "torch", "PIL", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()

    if args.seed is None:
        seed = stored_seed(args) if is_main else None
        args.seed = broadcast_object_list([secrets.randbelow(2**31) if seed is None else seed])[0]
        logger.info("--seed was not given; %s %d", "drew" if seed is None else "the checkpoint's is", args.seed)
    set_seed((args.seed + accelerator.process_index) % 2**32)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        logger.warning(
            "--gradient_accumulation_steps: %d given, but `accelerate config` says %d "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which holds",
            args.gradient_accumulation_steps,
            accelerator.gradient_accumulation_steps,
        )
        args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps
    args.mixed_precision = accelerator.mixed_precision  # what holds, for the card, the checkpoints and a resume
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        logger.warning("--mixed_precision: fp16 needs a GPU; on this CPU everything is computed in float32")
    check_resume(args, accelerator.num_processes)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None
    accelerator.wait_for_everyone()
    return accelerator


def leave_process_group():
    """Leave the other processes, after all that `train` built is gone.

    In the other order, that of `Accelerator.end_training`, DistributedDataParallel is the one to free the group. Then
    torch 2.13's gloo waits, with the interpreter's lock in hand, for a thread of its own that waits for that lock.
    """
    gc.collect()  # networks are parts of reference cycles
    PartialState().destroy_process_group()


def set_length(args, num_processes):
    """Fill in `max_train_steps` from epochs, and return the optimizer steps of one epoch (None without epochs)."""
    if args.max_train_samples is None:
        return None
    batches = -(-args.max_train_samples // (args.train_batch_size * num_processes))
    steps_per_epoch = -(-batches // args.gradient_accumulation_steps)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    return steps_per_epoch


def step_generator(seed, rank, step, device):
    """A generator that is a function of (seed, process, forward pass): a resumed run draws what the first would have.

    Mixed by numpy's SeedSequence, so that neighbours are unrelated.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


# Optimization.


def enable_memory_savers(args, accelerator, student, others):
    """Gradient checkpointing for the student and, where it can be had, xformers' attention for all."""
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        if accelerator.device.type != "cuda" or not diffusers.utils.is_xformers_available():
            logger.warning(
                "--enable_xformers_memory_efficient_attention: needs xformers and CUDA; using PyTorch's own attention"
            )
        else:
            try:
                for network in (student, *others):
                    network.enable_xformers_memory_efficient_attention()
            except Exception as error:  # built for another torch or GPU: diffusers' trial of it fails
                for network in (student, *others):
                    network.disable_xformers_memory_efficient_attention()
                logger.warning("--enable_xformers_memory_efficient_attention: %s; using PyTorch's", first_line(error))


def make_optimizer(args, parameters, num_processes):
    """AdamW, or bitsandbytes' 8-bit AdamW, at the effective learning rate, which is logged."""
    rate = args.learning_rate
    if args.scale_lr:
        rate *= num_processes * args.gradient_accumulation_steps * args.train_batch_size
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    logger.info("Optimizer: %s, learning rate %g, %s", optimizer_class.__name__, rate, args.lr_scheduler)
    return optimizer_class(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_lr_scheduler(args, optimizer):
    """The learning rate's course in optimizer steps. accelerate does not prepare it, and so does not multiply it."""
    return diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


# The log.


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
