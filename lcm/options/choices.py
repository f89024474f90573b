"""What a user may choose, one table a choice. Parser, checks and code read the tables here.

The tables name what other libraries do. Losses, targets and prediction types are ours: `lcm_common.py` computes them,
under the same names.
"""

from typing import Any, NamedTuple

LOSSES = ("l2", "huber")  # computed by lcm_common.consistency_loss
TARGETS = ("lcm", "phased", "trajectory")  # made by lcm_common.make_consistency_function
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of a teacher; converted by lcm_common.predicted_origin
PRECISIONS = ("no", "fp16", "bf16")  # those of accelerate that the scripts can train in

BASE_PRECISIONS = ("no_change", "int8", "nf4")  # of frozen linear layers; made by lcm.models.quantize
CACHE_DTYPES = ("float16", "bfloat16", "float32")  # of what precompute_lcm.py stores

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


class Optimizer(NamedTuple):
    """An optimizer of `--optimizer`."""

    module: str
    name: str  # of its class
    options: tuple[str, ...] = ADAM  # those of ADAM that are its own
    settings: dict[str, Any] = {}  # what it is given besides
    defaults: dict[str, Any] = {}  # its own defaults of options
    weights: str = "float32"  # the dtype of the weights that it trains


# torch's fused AdamW, and a loop instead of `foreach`, make no temporary tensors of the size of all trained weights.
# Steps of bfloat16 weights are far smaller than their spacing: optimi keeps what rounding loses, by Kahan summation.
# Their second moment needs a shorter memory: with a decay of 0.999 it would stand still, for the same reason.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("torch.optim", "AdamW", settings={"fused": True}),
    "adamw_bf16": Optimizer("optimi", "AdamW", settings={"foreach": False, "triton": False, "kahan_sum": True},
                            defaults={"adam_beta2": 0.99}, weights="bfloat16"),
    "adamw8bit": Optimizer("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw8bit": Optimizer("bitsandbytes.optim", "PagedAdamW8bit"),
    "lion": Optimizer("bitsandbytes.optim", "Lion", ADAM[:2], defaults={"adam_beta2": 0.99}),
    "lion8bit": Optimizer("bitsandbytes.optim", "Lion8bit", ADAM[:2], defaults={"adam_beta2": 0.99}),
    "adafactor": Optimizer("torch.optim", "Adafactor", (), {"foreach": False}),
    "prodigy": Optimizer("prodigyopt", "Prodigy", settings={"use_bias_correction": True, "safeguard_warmup": True},
                         defaults={"learning_rate": 1.0}),
}  # fmt: skip
LR_SHAPE = ("lr_num_cycles", "lr_power")
# Schedules of the learning rate, as diffusers.optimization.get_scheduler calls them, and options that are their own.
LR_SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": (),
    "cosine_with_restarts": ("lr_num_cycles",),
    "polynomial": ("lr_power",),
    "constant": (),
    "constant_with_warmup": (),
}

# Pictures in shards: file suffix, and Pillow's name of the format.
PICTURE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Suffixes of caption files, in the order in which they are looked for.
CAPTION_SUFFIXES = ("txt", "text", "caption")
# How pictures are resized: name, and Pillow's name of the filter. Its nearest is already the exact one.
INTERPOLATIONS = {
    "bilinear": "BILINEAR",
    "bicubic": "BICUBIC",
    "box": "BOX",
    "nearest": "NEAREST",
    "nearest_exact": "NEAREST",
    "hamming": "HAMMING",
    "lanczos": "LANCZOS",
}

# What --resolution says of the shapes that `--aspect_ratio_buckets auto` makes: computed by lcm.options.shapes.
RESOLUTION_TYPES = ("area", "pixel")

# Samplers: the class in diffusers, and the settings that are not the teacher's.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "dpm++-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc-trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
STUDENT_SAMPLERS = ("lcm", "tcd")  # those that only fit distilled networks

# Trackers that accelerate knows, and the packages of which each needs one.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "mlflow": ("mlflow",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}

# Those of them in which a run has a name: the argument for it. TensorBoard's runs are folders; Comet has a class for
# it.
RUN_NAMES = {
    "tensorboard": None,
    "wandb": "name",
    "comet_ml": None,
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
}

VALIDATION_PROMPTS = [
    "a watercolour of a lighthouse on a cliff at dusk, gentle waves, warm light in the windows",
    "portrait of an old fisherman in a yellow raincoat, shallow depth of field, overcast morning",
    "a bowl of ramen on a wooden counter, steam, neon signs out of focus behind it",
    "a small red fox asleep in fresh snow, soft light, detailed fur",
]
