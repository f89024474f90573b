"""Which checkpoint a run resumes, and which of its options may have changed since."""

import json
import logging
import os
import re
from typing import Any

from lcm.errors import UserError
from lcm.options.files import find_checkpoint
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.secrets import without_credentials, without_secrets

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
RESUME, OVERRIDE = "--resume_from_checkpoint", "--resume_with_changed_options"
# Options that may change: where files go, what is shown, how long the run is, how much memory and patience it takes.
# The options that save memory change rounding at most.
MAY_CHANGE_ON_RESUME = {
    "config", "output_dir", "cache_dir", "logging_dir", "report_to", "tracker_project_name", "tracker_run_name",
    "local_rank",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "resume_with_changed_options",
    "max_train_steps", "num_train_epochs", "max_train_samples",
    "gradient_checkpointing", "vae_encode_batch_size", "offload", "offload_ema", "shard_timeout",
    "logging_steps", "validation_steps", "validation_prompts", "validation_negative_prompt", "num_validation_images",
    "validation_num_inference_steps", "validation_guidance_scale", "validation_resolution", "validation_teacher_steps",
    "push_to_hub", "hub_model_id", "hub_private",
}  # fmt: skip
# Options that decide the shapes in a checkpoint's files. With others the files could not be loaded.
CANNOT_CHANGE = {
    "unet_time_cond_proj_dim", "lora_rank", "lora_rank_pattern", "lora_target_modules", "optimizer", "use_8bit_adam",
}  # fmt: skip
# Options that, with the number of streams, decide the order of the data.
DATA_ORDER = {
    "seed", "train_shards_path_or_url", "train_data_dir", "dataset_name", "dataset_config_name",
    "shuffle_buffer_size", "shuffle_buffer_mb",
}  # fmt: skip
# Options that only some scripts have. By them an old checkpoint shows which script saved it.
TELLTALES = ("lora_rank", "unet_time_cond_proj_dim", "use_fix_crop_and_size")


def list_checkpoints(output_dir: str) -> list[str]:
    """The complete checkpoints in `output_dir`, as paths, oldest first."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        number = re.fullmatch(r"checkpoint-(\d+)", name)
        if number and os.path.isfile(os.path.join(output_dir, name, STATE_FILE)):
            found.append((int(number[1]), os.path.join(output_dir, name)))
    return [path for _, path in sorted(found)]


def folder_to_resume(args: Options) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names; None if it is unset, or `latest` and there is none."""
    if args.resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(args.output_dir)), None)
    return args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)


def read_state(folder: str) -> dict[str, Any]:
    """A checkpoint's `training_state.json`. Raises UserError if the folder is not one of our checkpoints."""
    try:
        with open(os.path.join(folder, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        for name, kind in (("step", int), ("options", dict), ("data", list), ("lr_scheduler", dict)):
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is {state[name]!r:.40}")
        if state["step"] < 0 or type(state["options"]["seed"]) is not int:
            raise ValueError(f"step {state['step']}, seed {state['options']['seed']!r:.40}")
        # Older versions knew fewer kinds of secrets and stored some, which messages about differences would show.
        state["options"] = {name: without_secrets(value) for name, value in state["options"].items()}
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{RESUME}: {folder!r} is not one of our checkpoints ({reason})") from None


def stored_seed(args: Options) -> int | None:
    """The seed in the checkpoint to resume, None for a new run."""
    folder = folder_to_resume(args)
    return read_state(folder)["options"]["seed"] if folder else None


def comparable(name: str, value: Any) -> Any:
    """An option's value without the parts that may be renewed: signatures and credentials in addresses of shards."""
    if name == "train_shards_path_or_url" and isinstance(value, list):
        return [without_credentials(str(pattern)) for pattern in value]
    return value


def changed_options(args: Options, given: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """{name: value in the checkpoint} of the options whose values differ: `given` now, and `stored` in the checkpoint.

    An option that is not stored is newer than the checkpoint, which was trained with its default.
    """
    changed = {}
    for name, value in given.items():
        if name in MAY_CHANGE_ON_RESUME:
            continue
        if name not in stored:
            if name not in args.left_at_default:
                changed[name] = args.defaults[name]
        elif comparable(name, stored[name]) != comparable(name, value):
            changed[name] = stored[name]
    return changed


def is_fixed(name: str, stored: Any, given: Any) -> bool:
    """Whether a checkpoint cannot be loaded if this option differs."""
    return name in CANNOT_CHANGE or (name == "ema_decay" and None in (stored, given))  # an EMA more or less


def is_of_other_script(args: Options, state: dict[str, Any]) -> bool:
    """Whether another script saved the checkpoint with this state."""
    if "script" in state:
        return state["script"] != args.script
    return any((name in state["options"]) != (name in vars(args)) for name in TELLTALES)


def check_resume(args: Options, plan: Plan) -> None:
    """Raise UserError, naming the option, if the checkpoint to resume is of a run with other options.

    With `--resume_with_changed_options` a difference is a warning, unless the checkpoint could not be loaded.
    """
    folder = folder_to_resume(args)
    if folder is None:
        return
    state = read_state(folder)
    if is_of_other_script(args, state):
        saved_by = f"another script, {state['script']}" if "script" in state else "another script"
        raise UserError(f"{RESUME}: {folder!r} was saved by {saved_by}; allowed: a checkpoint of {args.script}")
    options = plan.options(args)
    for name in sorted(state["options"].keys() - options.keys()):
        logger.warning(
            "%s: the checkpoint's --%s (%r) is ignored; this version has no such option",
            RESUME, name, state["options"][name],
        )  # fmt: skip
    changed = changed_options(args, options, state["options"])
    fixed = [name for name in changed if is_fixed(name, changed[name], options[name])]
    differences = [
        (f"--{name}", f"{options[name]!r} given, but the checkpoint was trained with {changed[name]!r}")
        for name in fixed or changed
    ]
    if fixed:
        option, difference = differences[0]
        raise UserError(
            f"{option}: {difference}; allowed: the same, or a new run in another --output_dir. {OVERRIDE} does not "
            "help: the checkpoint's files depend on it"
        )
    if len(state["data"]) != plan.num_processes:
        differences.append((RESUME, f"saved by {len(state['data'])} processes, but {plan.num_processes} are running"))
    for option, difference in differences:
        if not args.resume_with_changed_options:
            raise UserError(
                f"{option}: {difference}; allowed: the same, or a new run in another --output_dir. {OVERRIDE} resumes "
                "all the same, but not bit for bit"
            )
        logger.warning("%s: %s; resuming all the same, not bit for bit (%s)", option, difference, OVERRIDE)
