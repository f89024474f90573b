"""The start and the end of a run: Accelerator, logs, seeds, process group."""

import dataclasses
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
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)

from lcm.data.packing import shards_of_pictures
from lcm.data.shards import expand_shards, find_cache
from lcm.errors import UserError, first_line
from lcm.options.checks import optimizer_name
from lcm.options.choices import OPTIMIZERS, PRECISIONS
from lcm.options.plan import Plan, make_plan
from lcm.options.types import Options
from lcm.run.resume import check_resume, stored_seed

logger = logging.getLogger(__name__)


def start(args: Options, can_shard: bool = False) -> tuple[Accelerator, Plan]:
    """(Accelerator, Plan) of a run, with logs set up, seeds set, and the output folder made.

    `can_shard` says whether FSDP can shard the script's networks. Raises UserError if accelerate refuses the options
    on this hardware, or was configured for what the scripts cannot do; if shards are missing; if the checkpoint to
    resume is of a run with other options.
    """
    accelerator = make_accelerator(args)
    check_accelerator(accelerator, args, can_shard)
    keep_inputs(accelerator)
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
    shards = find_shards(args)
    plan = make_plan(args, accelerator, seed, shards, find_cache(shards, args.shard_timeout))
    check_resume(args, plan)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None
    accelerator.wait_for_everyone()
    return accelerator, plan


def find_shards(args: Options) -> tuple[str, ...]:
    """The shards to train on; those of a folder of pictures, or of a data set, are made first. Raises UserError."""
    return expand_shards(args.train_shards_path_or_url or shards_of_pictures(args))


def make_accelerator(args: Options) -> Accelerator:
    """The Accelerator for the options and `accelerate config`. Raises UserError if accelerate refuses them."""
    try:
        return Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
            # Processes wait for the main one while it saves and draws; the default timeout is 10 minutes.
            # Gradients are parts of the buckets that processes share: else each is in memory twice.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"accelerate cannot start: {first_line(error)}; see `accelerate config`, and ACCELERATE_... and the "
            "launcher's variables in the environment"
        ) from None


def check_accelerator(accelerator: Accelerator, args: Options, can_shard: bool) -> None:
    """Raise UserError if `accelerate config` asks for something that the scripts, or these options, cannot do."""
    kind = accelerator.distributed_type.value
    is_fsdp2 = kind == "FSDP" and accelerator.is_fsdp2
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA") and not (is_fsdp2 and can_shard):
        more = "or FSDP with fsdp_version: 2" if can_shard else "a LoRA needs no FSDP: it fits on one GPU"
        raise UserError(
            f"accelerate config: {kind}{' version 1' * (kind == 'FSDP' and not is_fsdp2)} is not supported; allowed: "
            f"one process, or several with DistributedDataParallel; {more}"
        )
    if is_fsdp2 and args.base_model_precision != "no_change":
        raise UserError("--base_model_precision: bitsandbytes' layers cannot be sharded; allowed: no_change with FSDP")
    if is_fsdp2 and OPTIMIZERS[optimizer_name(args)].weights != "float32":
        raise UserError(f"--optimizer: {args.optimizer} given, but FSDP trains float32 weights; allowed: another one")
    if is_fsdp2 and args.offload_ema:
        raise UserError("--offload_ema: FSDP splits the moving average already; allowed: one of the two")
    precision, passes = accelerator.mixed_precision, accelerator.gradient_accumulation_steps
    if precision not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        raise UserError(f"--mixed_precision: `accelerate config` says {precision}; allowed: {allowed}")
    if passes < 1:
        raise UserError(f"--gradient_accumulation_steps: `accelerate config` says {passes}; allowed: at least 1")


def keep_inputs(accelerator: Accelerator) -> None:
    """Let FSDP give networks their inputs as they are. It would round timesteps and sizes to the mixed precision."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, cast_forward_inputs=False)


def set_up_logs(is_main: bool) -> None:
    """Log to standard error: on the main process everything, on others errors. Libraries log warnings only."""
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


def leave_process_group() -> None:
    """Leave the process group. To be called after the objects of `train` are freed.

    In the other order, that of `Accelerator.end_training`, DistributedDataParallel frees the group. Then gloo in
    torch 2.13 can deadlock: it holds the GIL and waits for a thread of its own that waits for the GIL.
    """
    gc.collect()  # networks are in reference cycles
    PartialState().destroy_process_group()


def step_generator(seed: int, rank: int, step: int, device: torch.device | str) -> torch.Generator:
    """A generator that is a function of (seed, process, forward pass), so that a resumed run has the same draws.

    numpy's SeedSequence mixes the three, so that generators of neighbours are unrelated.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
