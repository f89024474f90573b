"""Checkpoints: written whole or not at all, and enough to go on exactly.

A folder `checkpoint-N` takes that name only when everything in it is on the disk, so a kill at any moment leaves the
newest complete one usable. In it: what is trained, in files that diffusers loads, the optimizer, the random state of
every process, and `training_state.json`: the step, every process's place in the data, the options (never a token).
"""

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import RNG_STATE_NAME, SCALER_NAME, gather_object, load
from diffusers import SchedulerMixin

from lcm.data.loader import TrainingData
from lcm.errors import UserError, first_line
from lcm.models.networks import Networks
from lcm.models.sharding import load_state, save_state
from lcm.options.files import find_checkpoint
from lcm.secrets import without_credentials, without_secrets
from lcm.storage import PARTIAL, publish, remove_folder, remove_leftovers

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
RESUME, OVERRIDE = "--resume_from_checkpoint", "--resume_with_changed_options"
# What may differ when a run goes on: where things go and are shown, how long it is, how much memory and patience it
# takes. The memory savers change rounding at most.
MAY_CHANGE_ON_RESUME = {
    "output_dir", "cache_dir", "logging_dir", "report_to", "tracker_project_name", "local_rank",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "resume_with_changed_options",
    "max_train_steps", "num_train_epochs", "max_train_samples",
    "gradient_checkpointing", "vae_encode_batch_size", "shard_timeout",
    "logging_steps", "validation_steps", "validation_prompts", "validation_negative_prompt", "num_validation_images",
    "validation_num_inference_steps", "validation_guidance_scale", "validation_resolution", "validation_teacher_steps",
    "push_to_hub", "hub_model_id", "hub_private",
}  # fmt: skip
# What a checkpoint's files depend on, so that they could not be loaded.
CANNOT_CHANGE = {"unet_time_cond_proj_dim", "lora_rank", "lora_target_modules", "use_8bit_adam"}
# What decides which place in the data a position stands for, beside the number of streams.
DATA_ORDER = {"seed", "train_shards_path_or_url", "shuffle_buffer_size", "shuffle_buffer_mb"}
# Which script saved a checkpoint that does not say so: each has these, or lacks them.
TELLTALES = ("lora_rank", "unet_time_cond_proj_dim", "use_fix_crop_and_size")


def list_checkpoints(output_dir):
    """The complete checkpoints in `output_dir`, as paths, oldest first."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        number = re.fullmatch(r"checkpoint-(\d+)", name)
        if number and os.path.isfile(os.path.join(output_dir, name, STATE_FILE)):
            found.append((int(number[1]), os.path.join(output_dir, name)))
    return [path for _, path in sorted(found)]


def folder_to_resume(args):
    """The checkpoint that `--resume_from_checkpoint` names; None if it is unset, or `latest` and there is none."""
    if args.resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(args.output_dir)), None)
    return args.resume_from_checkpoint and find_checkpoint(args.output_dir, args.resume_from_checkpoint)


def read_state(folder):
    """A checkpoint's `training_state.json`. Raises UserError if the folder is not one of ours."""
    try:
        with open(os.path.join(folder, STATE_FILE), encoding="utf-8") as file:
            state = json.load(file)
        for name, kind in (("step", int), ("options", dict), ("data", list), ("lr_scheduler", dict)):
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is {state[name]!r:.40}")
        if state["step"] < 0 or type(state["options"]["seed"]) is not int:
            raise ValueError(f"step {state['step']}, seed {state['options']['seed']!r:.40}")
        # A version that knew fewer kinds of secrets stored them; they would show in messages on what differs.
        state["options"] = {name: without_secrets(value) for name, value in state["options"].items()}
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--resume_from_checkpoint: {folder!r} is not one of ours ({reason})") from None


def stored_seed(args):
    """The seed of the run that is about to go on, None for a new one."""
    folder = folder_to_resume(args)
    return read_state(folder)["options"]["seed"] if folder else None


def comparable(name, value):
    """An option's value without what may be renewed: signatures and credentials in the addresses of shards."""
    if name == "train_shards_path_or_url" and isinstance(value, list):
        return [without_credentials(str(pattern)) for pattern in value]
    return value


def changed_options(args, given, stored):
    """{name: what a checkpoint was trained with}, for the options that differ: `given` now, `stored` with it.

    An option that is not stored is newer than the checkpoint, and has the meaning of its default.
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


def is_fixed(name, stored, given):
    """Whether a checkpoint cannot be loaded where this option differs."""
    return name in CANNOT_CHANGE or (name == "ema_decay" and None in (stored, given))  # with one, or without


def is_of_other_script(args, state):
    """Whether another script than that of `args` saved the checkpoint with the state `state`."""
    if "script" in state:
        return state["script"] != args.script
    return any((name in state["options"]) != (name in vars(args)) for name in TELLTALES)


def check_resume(args, plan):
    """Raise UserError, naming the option, if `args` name a checkpoint that is not one of this very run.

    With `--resume_with_changed_options` differences are warnings, unless the checkpoint could not be loaded.
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


@dataclass
class TrainingState:
    """What a checkpoint holds. `networks.student` and `optimizer` are as accelerate prepared them; `data` and
    `lr_scheduler` have `state_dict` and `load_state_dict`, of plain numbers and lists; `sampler` is the scheduler that
    samples from the networks."""

    networks: Networks
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    data: TrainingData
    sampler: SchedulerMixin


class Checkpoints:
    """Saves and restores the TrainingState of one run. All processes call all methods."""

    def __init__(self, accelerator, args, plan, trackers, state):
        self.accelerator, self.args, self.plan, self.trackers = accelerator, args, plan, trackers
        self.networks, self.optimizer, self.lr_scheduler = state.networks, state.optimizer, state.lr_scheduler
        self.data, self.sampler = state.data, state.sampler
        # Networks are written in files that diffusers loads, instead of accelerate's own.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def changed_options(self, state):
        return changed_options(self.args, self.plan.options(self.args), state["options"])

    def save_state(self, folder):
        """Write networks, optimizer, gradient scaler and random states."""
        complete = self.networks.gathered()
        if self.accelerator.is_main_process:
            complete.save(folder)
            self.sampler.save_pretrained(os.path.join(folder, "scheduler"))  # so that it can be sampled from
        if self.networks.is_sharded:
            save_state(self.accelerator, self.networks.student, self.optimizer, folder)
        else:
            self.accelerator.save_state(folder)

    def load_state(self, folder):
        """Read what `save_state` wrote."""
        self.networks.load(folder)
        if self.networks.is_sharded:
            load_state(self.accelerator, self.networks.student, self.optimizer, folder)
        else:
            # accelerate would go on without random states that it cannot read.
            random_states = os.path.join(folder, f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl")
            if os.path.exists(random_states) or not self.args.resume_with_changed_options:
                load(random_states)["torch_manual_seed"]
            scaler, scaler_state = self.accelerator.scaler, os.path.join(folder, SCALER_NAME)
            if self.args.resume_with_changed_options and not os.path.exists(scaler_state):
                self.accelerator.scaler = None  # saved in another precision; the scale starts as in a new run
            # On the CPU, else AdamW's step counts land on the GPU, and reading them makes every later step wait.
            self.accelerator.load_state(folder, map_location="cpu")
            self.accelerator.scaler = scaler
            for parameter, moments in self.optimizer.state.items():
                if moments.get("exp_avg", parameter).shape != parameter.shape:
                    raise ValueError("the optimizer's state is that of other weights")

    def load_with_changed_options(self, folder, state):
        """Read a checkpoint, but for what the given options decide: those of the optimizer, the schedule of the
        learning rate, and the order of the data where it is another one."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        base_lrs = self.lr_scheduler.base_lrs
        self.load_state(folder)
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(given)
        last_epoch = state["lr_scheduler"]["last_epoch"]
        self.lr_scheduler.load_state_dict(
            {**state["lr_scheduler"], "base_lrs": base_lrs, "last_epoch": last_epoch - 1}
        )
        self.lr_scheduler.step()  # to `last_epoch`, which gives the optimizer the rate of that step
        config = self.data.config
        streams = [config.streams_per_process] * config.num_processes
        saved_streams = [len(process["positions"]) for process in state["data"]]
        if saved_streams != streams or DATA_ORDER & self.changed_options(state).keys():
            logger.warning("The data was in another order; a new pass over all of it begins")
            self.data.start_new_cycle(state["data"])
        else:
            self.data.load_state_dict(state["data"][self.accelerator.process_index])

    def save(self, step):
        """Write `checkpoint-{step}`, then remove those beyond `--checkpoints_total_limit`.

        Raises UserError if it cannot be written; what was there before is left as it is.
        """
        folder = os.path.join(self.args.output_dir, f"checkpoint-{step}")
        try:
            if self.accelerator.is_main_process:
                os.makedirs(folder + PARTIAL)
            self.accelerator.wait_for_everyone()
            self.save_state(folder + PARTIAL)
            data_states = gather_object([self.data.state_dict()])
            if self.accelerator.is_main_process:
                state = {
                    "step": step,
                    "script": self.args.script,
                    "options": self.plan.options(self.args),
                    "data": data_states,
                    "lr_scheduler": self.lr_scheduler.state_dict(),
                    "trackers": self.trackers.runs,
                }
                with open(os.path.join(folder + PARTIAL, STATE_FILE), "w", encoding="utf-8") as file:
                    json.dump(state, file, indent=2)
                publish(folder + PARTIAL, folder)
                limit = self.args.checkpoints_total_limit
                others = [path for path in list_checkpoints(self.args.output_dir) if path != folder]
                for old in others[: max(0, len(others) + 1 - limit)] if limit else []:
                    remove_folder(old)
        except Exception as error:  # for a full disk torch and safetensors raise errors of their own
            if self.accelerator.is_main_process:
                shutil.rmtree(folder + PARTIAL, ignore_errors=True)
            raise UserError(
                f"--output_dir: cannot write {folder!r}: {first_line(error)}; earlier checkpoints are intact"
            ) from error
        self.trackers.log(self.data.totals().as_scalars(), step=step)
        logger.info("Saved %s", folder)

    def resume(self):
        """Go on where `--resume_from_checkpoint` says; returns the number of finished optimizer steps.

        Raises UserError for a folder that is not a checkpoint, or one of a run with other options.
        """
        folder = folder_to_resume(self.args)
        if self.accelerator.is_main_process:
            remove_leftovers(self.args.output_dir, self.networks.outputs)
        if folder is None:
            earlier = list_checkpoints(self.args.output_dir)
            if self.args.resume_from_checkpoint:
                logger.info("No checkpoint in %s; starting a new run", self.args.output_dir)
            elif earlier:
                logger.warning(
                    "--output_dir: %s is of an earlier run, which --resume_from_checkpoint=latest goes on with; this "
                    "one starts anew, and its metrics and results replace those that are there",
                    earlier[-1],
                )
            return 0
        state = read_state(folder)
        if state["step"] > self.plan.max_train_steps:
            raise UserError(
                f"--max_train_steps: {self.plan.max_train_steps} given, but {folder!r} is of step {state['step']}; "
                "allowed: at least that, or an earlier checkpoint"
            )
        is_changed = self.args.resume_with_changed_options and (
            self.changed_options(state) or len(state["data"]) != self.plan.num_processes
        )
        try:
            if is_changed:
                self.load_with_changed_options(folder, state)
            else:
                self.load_state(folder)
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
                self.data.load_state_dict(state["data"][self.accelerator.process_index])
        except UserError:
            raise
        except Exception as error:  # a damaged file makes the libraries raise nearly anything
            raise UserError(f"--resume_from_checkpoint: cannot load {folder!r}: {first_line(error)}") from error
        if os.path.samefile(os.path.dirname(os.path.abspath(folder)), self.args.output_dir):
            self.trackers.runs = state.get("trackers", {})  # from elsewhere it is a branch, with a run of its own
        logger.info("Going on from %s", folder)
        for later in list_checkpoints(self.args.output_dir):
            if int(later.rpartition("-")[2]) > state["step"]:
                logger.warning("%s is of a later step; `latest` would take it. Remove it if it is not wanted", later)
        return state["step"]
