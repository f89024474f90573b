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

from lcm.data.shards import expand_shards
from lcm.errors import UserError, first_line
from lcm.options.choices import PRECISIONS
from lcm.run.checkpoints import check_resume, stored_seed
from lcm.run.plan import make_plan

logger = logging.getLogger(__name__)



def start(args, can_shard=False):
    """(Accelerator, Plan) of a run, with logs set up, seeds set, and the output folder made.

    `can_shard` says whether FSDP can split the script's networks over processes. Raises UserError if `accelerate`
    refuses the combination of options and hardware, or was configured for what the script cannot do; for a checkpoint
    to resume that is of another run; for shards that are not there.
    """
    accelerator = make_accelerator(args)
    refuse_what_cannot_run(accelerator, can_shard)
    set_up_logs(accelerator.is_main_process)
    seed = args.seed
    if seed is None:
        stored = stored_seed(args) if accelerator.is_main_process else None
        seed = broadcast_object_list([secrets.randbelow(2**31) if stored is None else stored])[0]
        logger.info("--seed was not given; %s %d", "drew" if stored is None else "the checkpoint's is", seed)
    set_seed((seed + accelerator.process_index) % 2**32)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        logger.warning(
            "--gradient_accumulation_steps: %d given, but `accelerate config` says %d "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which is used",
            args.gradient_accumulation_steps,
            accelerator.gradient_accumulation_steps,
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        logger.warning("--mixed_precision: fp16 needs a GPU; on this CPU everything is computed in float32")
    plan = make_plan(args, accelerator, seed, expand_shards(args.train_shards_path_or_url))
    check_resume(args, plan)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None
    accelerator.wait_for_everyone()
    return accelerator, plan


def make_accelerator(args):
    """The Accelerator, as options and `accelerate config` say. Raises UserError if accelerate refuses them."""
    try:
        return Accelerator(
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


def refuse_what_cannot_run(accelerator, can_shard):
    """Raise UserError if `accelerate config` asks for what the scripts cannot do."""
    kind = accelerator.distributed_type.value
    is_fsdp2 = kind == "FSDP" and accelerator.is_fsdp2
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA") and not (is_fsdp2 and can_shard):
        more = "or FSDP with fsdp_version: 2" if can_shard else "a LoRA needs no FSDP: the whole of it fits on one GPU"
        raise UserError(
            f"accelerate config: {kind}{' version 1' * (kind == 'FSDP' and not is_fsdp2)} is not supported; allowed: "
            f"one process, or several with DistributedDataParallel; {more}"
        )
    precision, passes = accelerator.mixed_precision, accelerator.gradient_accumulation_steps
    if precision not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        raise UserError(f"--mixed_precision: `accelerate config` says {precision}; allowed: {allowed}")
    if passes < 1:
        raise UserError(f"--gradient_accumulation_steps: `accelerate config` says {passes}; allowed: at least 1")


def set_up_logs(is_main):
    """Log to standard error, on the main process everything, on others errors; the libraries only warn."""
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


def leave_process_group():
    """Leave the other processes, after all that `train` built is freed.

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
