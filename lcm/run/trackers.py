"""TensorBoard, W&B, Comet and the other trackers of accelerate: scalars, pictures, and the options of the run.

A tracker that fails, for example without a network or a key, is named in the log and not used any more. It never
ends a run.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from lcm.errors import first_line
from lcm.options.choices import RUN_NAMES
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.pictures.validation import Pictures
from lcm.secrets import redacted_command_line

logger = logging.getLogger(__name__)

# Trackers that can resume a run: how they name it, and the arguments that open it again.
# TensorBoard needs neither: its run is a folder.
RUNS = {
    "wandb": (lambda tracker: tracker.run.id, lambda run: {"id": run, "resume": "allow"}),
    "comet_ml": (lambda tracker: tracker.writer.get_key(), lambda run: {"experiment_key": run}),
    "mlflow": (lambda tracker: tracker.active_run.info.run_id, lambda run: {"run_id": run}),
    "trackio": (lambda tracker: tracker.run.name, lambda run: {"name": run, "resume": "allow"}),
    "swanlab": (lambda tracker: tracker.run.id, lambda run: {"id": run, "resume": "allow"}),
}


def hyperparameters(options: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The options in a form that all trackers take: lists and None become text."""
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in options.items()}


class Trackers:
    """The trackers of `--report_to`, on the main process; on others the methods do nothing.

    `runs` has the names that trackers gave this run, {tracker: name}; checkpoints store them. If it is set before
    `start`, the trackers resume those runs.
    """

    def __init__(self, accelerator: Accelerator, args: Options, plan: Plan):
        self.kinds = [str(kind) for kind in accelerator.log_with] if accelerator.is_main_process else []
        self.args, self.plan, self.logging_dir = args, plan, accelerator.logging_dir
        self.active: list[GeneralTracker] = []
        self.runs: dict[str, str] = {}
        self.told: set[str] = set()  # trackers about which the user was told that they take no pictures

    def each(self, call: Callable[[GeneralTracker], Any]) -> None:
        """Call `call(tracker)` for each tracker; drop those that raise."""
        for tracker in list(self.active):
            try:
                call(tracker)
            except Exception as error:  # no network, no key, a full disk
                logger.warning("--report_to: lost %s: %s; training goes on without", tracker.name, first_line(error))
                self.active.remove(tracker)

    def start(self, step: int) -> None:
        """Open the trackers at an optimizer step, which is 0 for a new run, and give them the options."""
        if self.kinds:
            with contextlib.suppress(OSError):  # W&B falls back to a temporary folder if it is missing
                os.makedirs(self.logging_dir, exist_ok=True)
        more = {
            "tensorboard": {"purge_step": step + 1} if step else {},  # later steps are trained again
            "wandb": {"dir": self.logging_dir},
            "swanlab": {"log_dir": os.path.join(self.logging_dir, "swanlab")},
            "dvclive": {"dir": os.path.join(self.logging_dir, "dvclive"), "resume": step > 0},
        }
        for kind in self.kinds:
            tracker_class = LOGGER_TYPE_TO_CLASS[kind]
            folder = [self.logging_dir] if tracker_class.requires_logging_directory else []
            again = RUNS[kind][1](self.runs[kind]) if kind in RUNS and kind in self.runs else {}
            project, options = self.args.tracker_project_name, more.get(kind, {}) | again
            if self.args.tracker_run_name is not None and not again:
                if kind == "tensorboard":
                    project = os.path.join(project, self.args.tracker_run_name)
                options |= named(kind, self.args.tracker_run_name)
            self.active.append(tracker_class(project, *folder, **options))
        with redacted_command_line():
            self.each(lambda tracker: tracker.start())
        self.each(self.store_options)
        self.each(self.keep_name)

    def store_options(self, tracker: GeneralTracker) -> None:
        """Log the options in effect."""
        if tracker.name != "mlflow" or "mlflow" not in self.runs:  # mlflow refuses new values in a resumed run
            tracker.store_init_configuration(hyperparameters(self.plan.options(self.args)))

    def keep_name(self, tracker: GeneralTracker) -> None:
        """Put the name that a tracker gave the run into `runs`."""
        if tracker.name in RUNS:
            self.runs[tracker.name] = RUNS[tracker.name][0](tracker)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Log a dict of numbers."""
        self.each(lambda tracker: tracker.log(scalars, step=step))

    def log_pictures(self, pictures: Pictures, step: int) -> None:
        """Log PIL pictures, {name: list of (picture, caption)}, to the trackers that take any."""
        for tracker in self.active:
            if not takes_pictures(tracker) and tracker.name not in self.told:
                logger.info("--report_to: pictures do not go to %s; see %s", tracker.name, self.args.output_dir)
                self.told.add(tracker.name)
        self.each(lambda tracker: log_pictures(tracker, pictures, step) if takes_pictures(tracker) else None)

    def finish(self) -> None:
        """End the trackers' runs. `Accelerator.end_training` would end the process group too."""
        self.each(lambda tracker: tracker.finish())


def named(kind: str, name: str) -> dict[str, Any]:
    """The arguments by which a tracker gives a new run this name; none if it cannot."""
    if kind == "comet_ml":
        import comet_ml

        return {"experiment_config": comet_ml.ExperimentConfig(name=name)}
    argument = RUN_NAMES.get(kind)
    return {argument: name} if argument else {}


def takes_pictures(tracker: GeneralTracker) -> bool:
    """Whether a tracker of accelerate takes pictures."""
    return hasattr(tracker, "log_images") or tracker.name == "comet_ml"


def log_pictures(tracker: GeneralTracker, pictures: Pictures, step: int) -> None:
    """Log PIL pictures, {name: list of (picture, caption)}, to one tracker of accelerate."""
    for name, captioned in pictures.items():
        if tracker.name == "wandb":
            log_to_wandb(tracker, name, captioned, step)
            continue
        for picture, caption in captioned:
            tag = f"{name}/{caption}" if caption else name  # TensorBoard and others show no caption but the name
            if tracker.name == "comet_ml":
                tracker.tracker.log_image(picture, name=f"{name}: {caption}" if caption else name, step=step)
            elif tracker.name == "tensorboard":
                tracker.log_images({tag: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif tracker.name in ("aim", "clearml"):  # they take one picture under a name
                tracker.log_images({tag: np.asarray(picture) if tracker.name == "clearml" else picture}, step=step)
            else:
                tracker.log_images({tag: [picture]}, step=step)


def log_to_wandb(
    tracker: GeneralTracker, name: str, captioned: list[tuple[Image.Image, str | None]], step: int
) -> None:
    """Log a list of (picture, caption). W&B wants pictures of one size under a name."""
    import wandb

    by_size: dict[tuple[int, int], list[wandb.Image]] = {}
    for picture, caption in captioned:
        by_size.setdefault(picture.size, []).append(wandb.Image(picture, caption=caption))
    for (width, height), images in by_size.items():
        tracker.log({f"{name}, {width} x {height}" if len(by_size) > 1 else name: images}, step=step)
