"""TensorBoard, W&B, Comet and the other trackers of accelerate: scalars, pictures, and the options of the run.

A tracker that fails, for want of a network or of a key, is named in the log and left alone from then on. It never
costs a run.
"""

import contextlib
import logging
import os

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lcm.errors import first_line
from lcm.secrets import redacted_command_line

logger = logging.getLogger(__name__)

# How a run is gone on with, where its tracker can: what the tracker calls the run, and what opens it again.
# TensorBoard needs neither: its run is a folder.
RUNS = {
    "wandb": (lambda tracker: tracker.run.id, lambda run: {"id": run, "resume": "allow"}),
    "comet_ml": (lambda tracker: tracker.writer.get_key(), lambda run: {"experiment_key": run}),
    "mlflow": (lambda tracker: tracker.active_run.info.run_id, lambda run: {"run_id": run}),
    "trackio": (lambda tracker: tracker.run.name, lambda run: {"name": run, "resume": "allow"}),
    "swanlab": (lambda tracker: tracker.run.id, lambda run: {"id": run, "resume": "allow"}),
}


def hyperparameters(options):
    """The options as all trackers take them: lists and None become text."""
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in options.items()}


class Trackers:
    """Those of `--report_to`, on the main process; elsewhere its methods do nothing.

    `runs` is what they call this run, {tracker: name}; checkpoints keep it. Set before `start`, it makes them go on
    with that run.
    """

    def __init__(self, accelerator, args, plan):
        self.kinds = [str(kind) for kind in accelerator.log_with] if accelerator.is_main_process else []
        self.args, self.plan, self.logging_dir = args, plan, accelerator.logging_dir
        self.active, self.runs, self.told = [], {}, set()

    def each(self, call):
        """Call `call(tracker)` for each; those that raise are dropped."""
        for tracker in list(self.active):
            try:
                call(tracker)
            except Exception as error:  # no network, no key, a full disk
                logger.warning("--report_to: lost %s: %s; training goes on without", tracker.name, first_line(error))
                self.active.remove(tracker)

    def start(self, step):
        """Open them at an optimizer step, which is not 0 where a run goes on, and give them the options."""
        if self.kinds:
            with contextlib.suppress(OSError):  # W&B falls back to a temporary folder if it is missing
                os.makedirs(self.logging_dir, exist_ok=True)
        more = {
            "tensorboard": {"purge_step": step + 1} if step else {},  # what came later is trained again
            "wandb": {"dir": self.logging_dir},
            "swanlab": {"log_dir": os.path.join(self.logging_dir, "swanlab")},
            "dvclive": {"dir": os.path.join(self.logging_dir, "dvclive"), "resume": step > 0},
        }
        for kind in self.kinds:
            tracker_class = LOGGER_TYPE_TO_CLASS[kind]
            folder = [self.logging_dir] if tracker_class.requires_logging_directory else []
            again = RUNS[kind][1](self.runs[kind]) if kind in RUNS and kind in self.runs else {}
            options = more.get(kind, {}) | again
            self.active.append(tracker_class(self.args.tracker_project_name, *folder, **options))
        with redacted_command_line():
            self.each(lambda tracker: tracker.start())
        self.each(self.store_options)
        self.each(self.keep_name)

    def store_options(self, tracker):
        if tracker.name != "mlflow" or "mlflow" not in self.runs:  # which refuses other values for the same run
            tracker.store_init_configuration(hyperparameters(self.plan.options(self.args)))

    def keep_name(self, tracker):
        if tracker.name in RUNS:
            self.runs[tracker.name] = RUNS[tracker.name][0](tracker)

    def log(self, scalars, step):
        """Log a dict of numbers."""
        self.each(lambda tracker: tracker.log(scalars, step=step))

    def log_pictures(self, pictures, step):
        """Log PIL pictures, {name: list of (picture, caption)}, to the trackers that take any."""
        for tracker in self.active:
            if not takes_pictures(tracker) and tracker.name not in self.told:
                logger.info("--report_to: pictures do not go to %s; see %s", tracker.name, self.args.output_dir)
                self.told.add(tracker.name)
        self.each(lambda tracker: takes_pictures(tracker) and log_pictures(tracker, pictures, step))

    def finish(self):
        """End the trackers' run; not the process group, as `Accelerator.end_training` would."""
        self.each(lambda tracker: tracker.finish())


def takes_pictures(tracker):
    """Whether pictures go to one of accelerate's trackers."""
    return hasattr(tracker, "log_images") or tracker.name == "comet_ml"


def log_pictures(tracker, pictures, step):
    """Log PIL pictures, {name: list of (picture, caption)}, to one of accelerate's trackers."""
    for name, captioned in pictures.items():
        if tracker.name == "wandb":
            log_to_wandb(tracker, name, captioned, step)
            continue
        for picture, caption in captioned:
            tag = f"{name}/{caption}" if caption else name  # which is all the caption there is
            if tracker.name == "comet_ml":
                tracker.tracker.log_image(picture, name=f"{name}: {caption}" if caption else name, step=step)
            elif tracker.name == "tensorboard":
                tracker.log_images({tag: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif tracker.name in ("aim", "clearml"):  # theirs take one picture under a name
                tracker.log_images({tag: np.asarray(picture) if tracker.name == "clearml" else picture}, step=step)
            else:
                tracker.log_images({tag: [picture]}, step=step)


def log_to_wandb(tracker, name, captioned, step):
    """Log a list of (picture, caption); those under one name have to be of one size."""
    import wandb

    by_size = {}
    for picture, caption in captioned:
        by_size.setdefault(picture.size, []).append(wandb.Image(picture, caption=caption))
    for (width, height), images in by_size.items():
        tracker.log({f"{name}, {width} x {height}" if len(by_size) > 1 else name: images}, step=step)
