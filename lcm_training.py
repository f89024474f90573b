"""The frame around a training loop: start-up, the optimizer, the log.

Nothing here knows which script called it, or owns the loop over steps.
"""

import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from tqdm.auto import tqdm

from lcm_checkpoint import check_resume, stored_seed
from lcm_options import BEFORE_ERROR, UserError, first_line, public_options

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 50  # the scaler halves its scale of 65536 at each: by then no scale is left


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
    for noisy in ("httpx", "accelerate", "torch", "PIL"):
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


def start_trackers(accelerator, args):
    """Open the trackers and give them the options; lists and None become text, which all of them take.

    Raises UserError if one cannot be opened: no account, a name that it does not allow, a folder that is a file.
    """
    config = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in public_options(args).items()}
    logging_dir = os.path.join(args.output_dir, args.logging_dir)
    try:
        if accelerator.is_main_process and accelerator.log_with:
            os.makedirs(logging_dir, exist_ok=True)  # W&B falls back to a temporary folder if it is missing
        settings = {"wandb": {"dir": logging_dir}}
        accelerator.init_trackers(args.tracker_project_name, config=config, init_kwargs=settings)
    except Exception as error:  # each tracker has its own
        raise UserError(f"--report_to: cannot open {args.report_to}: {first_line(error)}") from error


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


class StopSignals:
    """SIGTERM and SIGINT, which ask for a checkpoint and a clean end after the current step; a second ends at once."""

    def __init__(self):
        self.received = None
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name

    def restore(self):
        """Put the handlers of before back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class Progress:
    """The progress bar, the trackers' scalars, the check that the loss is a number, and word of a signal to stop.

    `stopping` is True, on all processes alike, when one of them was told to stop before the last `mean_loss`.
    """

    def __init__(self, accelerator, args, first_step):
        self.accelerator = accelerator
        self.samples_per_step = samples_per_step(args, accelerator)
        self.bar = tqdm(
            total=args.max_train_steps,
            initial=first_step,
            desc="Steps",
            unit="step",
            disable=not accelerator.is_local_main_process,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.signals = StopSignals()
        self.stopping = False
        BEFORE_ERROR.append(self.close)
        self.started = self.last = time.perf_counter()
        self.losses = []
        self.skipped_in_a_row = 0

    def restart_clock(self):
        """Leave what was done since the last step, pictures and checkpoints, out of the speed that is shown."""
        self.last = time.perf_counter()

    def add_loss(self, loss):
        """Keep the loss of one forward pass, a scalar tensor, without waiting for it."""
        self.losses.append(loss.detach())

    def mean_loss(self, step, gradient_norm):
        """The loss of an optimizer step: mean over its forward passes and over processes; waits for the device.

        Called before the optimizer steps. Raises UserError, on all processes alike, if the loss or the gradient's norm
        (a scalar tensor) is not finite. With fp16 the gradient scaler skips a step whose gradients overflow, so that
        only many such steps in a row are an error.
        """
        stop = self.losses[0].new_tensor(float(self.signals.received is not None))
        loss, stop = self.accelerator.reduce(torch.stack([torch.stack(self.losses).mean(), stop]), reduction="mean")
        if hasattr(gradient_norm, "full_tensor"):  # of weights that are split over processes
            gradient_norm = gradient_norm.full_tensor()
        loss, norm, stop = torch.stack([loss, gradient_norm.to(loss), stop]).tolist()  # one wait for all
        self.stopping = stop > 0
        self.losses.clear()
        has_scaler = self.accelerator.scaler is not None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if has_scaler and not math.isfinite(norm) else 0
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(norm) and not has_scaler:
            problem = f"the norm of the gradients is {norm}"
        elif self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            problem = f"the gradients overflowed fp16 {MAX_SKIPPED_IN_A_ROW} times in a row"
        else:
            return loss
        raise UserError(
            f"{problem} at step {step}; training stops before the weights are touched, and the last checkpoint is as "
            "it was. A lower --learning_rate, or bf16 in place of fp16, is the usual cure"
        )

    def step(self, step, loss, learning_rate):
        """Show and log one finished optimizer step."""
        now = time.perf_counter()
        images_per_second = self.samples_per_step / (now - self.last)
        self.last = now
        self.bar.update(1)
        self.bar.set_postfix_str(f"loss {loss:.4g}, lr {learning_rate:.3g}, {images_per_second:.3g} images/s")
        scalars = {"loss": loss, "lr": learning_rate, "images_per_second": images_per_second}
        self.accelerator.log(scalars, step=step)

    def close(self):
        """End the bar, and take signals as before; returns the seconds since it began."""
        self.signals.restore()
        self.bar.close()
        return time.perf_counter() - self.started
