"""The start and the end of a run: Accelerator, logs, seed, process group."""

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

from lcm.errors import AT_END, UserError, first_line
from lcm.run.checkpoints import check_resume, stored_seed

logger = logging.getLogger(__name__)



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


def step_generator(seed, rank, step, device):
    """A generator that is a function of (seed, process, forward pass): a resumed run draws what the first would have.

    Mixed by numpy's SeedSequence, so that neighbours are unrelated.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
