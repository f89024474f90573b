"""TensorBoard, W&B, Comet, or whatever else accelerate knows: scalars, pictures, and the options of the run.

A tracker that fails, for want of a network or of a key, is named in the log and left alone from then on. It never
costs a run.
"""

import contextlib
import logging
import os

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lcm_options import first_line, public_options

logger = logging.getLogger(__name__)


def hyperparameters(args):
    """The options without tokens; lists and None become text, which all trackers take."""
    return {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in public_options(args).items()}


class Trackers:
    """Those of `--report_to`, on the main process; elsewhere its methods do nothing."""

    def __init__(self, accelerator, args):
        self.kinds = accelerator.log_with if accelerator.is_main_process else []
        self.args, self.logging_dir = args, accelerator.logging_dir
        self.active = []

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
        }
        for kind in map(str, self.kinds):
            tracker_class = LOGGER_TYPE_TO_CLASS[kind]
            folder = [self.logging_dir] if tracker_class.requires_logging_directory else []
            self.active.append(tracker_class(self.args.tracker_project_name, *folder, **more.get(kind, {})))
        self.each(lambda tracker: tracker.start())
        self.each(lambda tracker: tracker.store_init_configuration(hyperparameters(self.args)))

    def log(self, scalars, step):
        """Log a dict of numbers."""
        self.each(lambda tracker: tracker.log(scalars, step=step))

    def log_pictures(self, pictures, step):
        """Log PIL pictures: {name: list of (picture, caption)}."""
        self.each(lambda tracker: log_pictures(tracker, pictures, step))

    def finish(self):
        """End the trackers' run; not the process group, as `Accelerator.end_training` would."""
        self.each(lambda tracker: tracker.finish())


def log_pictures(tracker, pictures, step):
    """Log PIL pictures, {name: list of (picture, caption)}, to one of accelerate's trackers."""
    for name, captioned in pictures.items():
        if tracker.name == "wandb":
            log_to_wandb(tracker, name, captioned, step)
            continue
        for picture, caption in captioned:
            if tracker.name == "tensorboard":  # a tag is all the caption there is
                tag = f"{name}/{caption}" if caption else name
                tracker.log_images({tag: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "comet_ml":
                tracker.tracker.log_image(picture, name=f"{name}: {caption}" if caption else name, step=step)


def log_to_wandb(tracker, name, captioned, step):
    """Log a list of (picture, caption); those under one name have to be of one size."""
    import wandb

    by_size = {}
    for picture, caption in captioned:
        by_size.setdefault(picture.size, []).append(wandb.Image(picture, caption=caption))
    for (width, height), images in by_size.items():
        tracker.log({f"{name}, {width} x {height}" if len(by_size) > 1 else name: images}, step=step)
