"""Saving and loading checkpoints. A resumed run continues exactly where the saved one was.

A folder is called `checkpoint-N` only once all its files are on the disk. So after a kill at any moment the newest
complete checkpoint is usable. It holds the trained networks, in files that diffusers loads, the optimizer, the random
state of each process, and `training_state.json`: the step, each process's position in the data, the options without
secrets.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import RNG_STATE_NAME, SCALER_NAME, gather_object, load
from diffusers import SchedulerMixin

from lcm.data.loader import TrainingData
from lcm.errors import UserError, first_line
from lcm.models.networks import Networks
from lcm.models.sharding import load_state, save_state
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.results.metrics import METRICS_FILE
from lcm.run.optimizers import SETTINGS
from lcm.run.resume import (
    DATA_ORDER,
    RESUME,
    STATE_FILE,
    changed_options,
    folder_to_resume,
    list_checkpoints,
    read_state,
)
from lcm.run.trackers import Trackers
from lcm.storage import PARTIAL, publish, remove_folder, remove_leftovers

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What a checkpoint holds. The student and the optimizer are those that accelerate wrapped. `sampler` is the
    scheduler that samples from the networks; it is saved beside them and does not change."""

    networks: Networks
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    data: TrainingData
    sampler: SchedulerMixin


class Checkpoints:
    """Saves and restores the TrainingState of one run. All processes call all methods."""

    def __init__(self, accelerator: Accelerator, args: Options, plan: Plan, trackers: Trackers, state: TrainingState):
        self.accelerator, self.args, self.plan, self.trackers = accelerator, args, plan, trackers
        self.networks, self.optimizer, self.lr_scheduler = state.networks, state.optimizer, state.lr_scheduler
        self.data, self.sampler = state.data, state.sampler
        # accelerate must not save the networks too: they are saved in files that diffusers loads.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def changed_options(self, state: dict[str, Any]) -> dict[str, Any]:
        """Those that differ from the options in a `training_state.json`, with the values there."""
        return changed_options(self.args, self.plan.options(self.args), state["options"])

    def save_state(self, folder: str) -> None:
        """Write networks, optimizer, gradient scaler and random states."""
        complete = self.networks.gathered()
        if self.accelerator.is_main_process:
            complete.save(folder)
            self.sampler.save_pretrained(os.path.join(folder, "scheduler"))
        if self.networks.is_sharded:
            save_state(self.accelerator, self.networks.student, self.optimizer, folder)
        else:
            self.accelerator.save_state(folder)

    def load_state(self, folder: str) -> None:
        """Read what `save_state` wrote."""
        self.networks.load(folder)
        if self.networks.is_sharded:
            load_state(self.accelerator, self.networks.student, self.optimizer, folder)
        else:
            # accelerate ignores random states that it cannot read; here that is an error.
            random_states = os.path.join(folder, f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl")
            if os.path.exists(random_states) or not self.args.resume_with_changed_options:
                load(random_states)["torch_manual_seed"]
            scaler, scaler_state = self.accelerator.scaler, os.path.join(folder, SCALER_NAME)
            if self.args.resume_with_changed_options and not os.path.exists(scaler_state):
                self.accelerator.scaler = None  # saved in another precision: the loss scale starts again
            # To the CPU first: AdamW's step counts would stay on the GPU, and each later step would wait for it.
            self.accelerator.load_state(folder, map_location="cpu")
            self.accelerator.scaler = scaler
            for parameter, moments in self.optimizer.state.items():
                if moments.get("exp_avg", parameter).shape != parameter.shape:
                    raise ValueError("the optimizer's state belongs to weights of other shapes")

    def load_with_changed_options(self, folder: str, state: dict[str, Any]) -> None:
        """Read a checkpoint, but keep what the options of now decide: settings of the optimizer, the schedule of the
        learning rate, and the order of the data if that has changed."""
        groups = [{k: group[k] for k in SETTINGS if k in group} for group in self.optimizer.param_groups]
        base_lrs = self.lr_scheduler.base_lrs
        self.load_state(folder)
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(given)
        last_epoch = state["lr_scheduler"]["last_epoch"]
        self.lr_scheduler.load_state_dict(
            {**state["lr_scheduler"], "base_lrs": base_lrs, "last_epoch": last_epoch - 1}
        )
        self.lr_scheduler.step()  # to `last_epoch`: sets the learning rate of that step
        config = self.data.config
        streams = [config.streams_per_process] * config.num_processes
        saved_streams = [len(process["positions"]) for process in state["data"]]
        if saved_streams != streams or DATA_ORDER & self.changed_options(state).keys():
            logger.warning("The order of the data has changed; a new pass over all of it begins")
            self.data.start_new_cycle(state["data"])
        else:
            self.data.load_state_dict(state["data"][self.accelerator.process_index])

    def save(self, step: int) -> None:
        """Write `checkpoint-{step}`, then remove the oldest ones beyond `--checkpoints_total_limit`.

        Raises UserError if it cannot be written; earlier checkpoints stay as they are.
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
        except Exception as error:  # on a full disk torch and safetensors raise errors of their own
            if self.accelerator.is_main_process:
                shutil.rmtree(folder + PARTIAL, ignore_errors=True)
            raise UserError(
                f"--output_dir: cannot write {folder!r}: {first_line(error)}; earlier checkpoints are intact"
            ) from error
        self.trackers.log(self.data.totals().as_scalars(), step=step)
        logger.info("Saved %s", folder)

    def resume(self) -> int:
        """Load the checkpoint of `--resume_from_checkpoint`; returns the number of finished optimizer steps.

        Raises UserError for a folder that is not a checkpoint of ours, or that cannot be loaded.
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
                    "--output_dir: %s is of an earlier run, which --resume_from_checkpoint=latest would resume; this "
                    "is a new run, and its metrics and results replace the earlier ones",
                    earlier[-1],
                )
            elif os.path.isfile(os.path.join(self.args.output_dir, METRICS_FILE)):
                logger.warning(
                    "--output_dir: %s holds an earlier run, whose metrics and results this one replaces",
                    self.args.output_dir,
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
            raise UserError(f"{RESUME}: cannot load {folder!r}: {first_line(error)}") from error
        if os.path.samefile(os.path.dirname(os.path.abspath(folder)), self.args.output_dir):
            self.trackers.runs = state.get("trackers", {})  # a checkpoint from elsewhere gets a tracker run of its own
        logger.info("Resuming from %s", folder)
        for later in list_checkpoints(self.args.output_dir):
            if int(later.rpartition("-")[2]) > state["step"]:
                logger.warning("%s is of a later step, and `latest` means it. Remove it if you do not want it", later)
        return state["step"]
