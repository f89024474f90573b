"""The schedulers that pictures are sampled with, here and, from the exported `scheduler/`, by users.

A sampler has the teacher's diffusion process. It does not clip or threshold, since training did not: latents go beyond
[-1, 1]. Each call returns a new object, because pipelines change theirs: StableDiffusionPipeline overwrites
`steps_offset` and `clip_sample` in its config.
"""

from typing import Any

import diffusers
from diffusers import SchedulerMixin

from lcm.options.checks import student_sampler
from lcm.options.choices import SAMPLERS
from lcm.options.types import Options

PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
SPACING = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
NO_CLIPPING = {"clip_sample": False, "thresholding": False}
COMMON_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # DDPMScheduler knows more than the others


def make_scheduler(name: str, reference: SchedulerMixin, **settings: Any) -> SchedulerMixin:
    """A new scheduler: one of `SAMPLERS`, or for "own" a copy of `reference` without clipping.

    `reference` is the noise schedule of the training, or the teacher's own scheduler. The sampler gets its betas, its
    prediction type and, unless the sampler sets another, its timestep spacing. Defaults of the reference's class count
    too: `from_config` alone would use the defaults of the new class. `settings` are options of the new class.

    `alphas_cumprod` (T,) equals that of `reference`; with zero terminal SNR, diffusers' samplers that divide by alpha
    replace the last value, 0, by 2**-24.
    """
    config = {key: value for key, value in reference.config.items() if key != "_use_default_values"}
    config["num_train_timesteps"] = len(reference.betas)  # `trained_betas` decide T, not the config
    if name == "own":
        return type(reference).from_config({**config, **NO_CLIPPING}, **settings)
    kind, options = SAMPLERS[name]
    config = {key: config[key] for key in (*PROCESS, *SPACING) if key in config}
    if config["beta_schedule"] not in COMMON_BETA_SCHEDULES and config.get("trained_betas") is None:
        # The betas before rescaling for zero SNR; the sampler rescales them itself.
        as_given = type(reference).from_config({**reference.config, "rescale_betas_zero_snr": False})
        config["trained_betas"] = as_given.betas.tolist()
    return getattr(diffusers, kind).from_config({**config, **NO_CLIPPING}, **{**options, **settings})


def teacher_scheduler(noise_schedule: SchedulerMixin) -> SchedulerMixin:
    """The sampler of the teacher's pictures during training. With trailing timesteps it is usable at few steps too."""
    return make_scheduler("ddim-trailing", noise_schedule)


def student_scheduler(noise_schedule: SchedulerMixin, args: Options) -> SchedulerMixin:
    """The scheduler that fits the student: LCMScheduler or TCDScheduler, with the grid of the training.

    The last step of an LCMScheduler returns f(z, t), so `set_alpha_to_one` and `steps_offset` have no effect on it.
    Its boundary scalings are those of the training. A TCDScheduler jumps from one edge of M phases to the next in M
    steps; a pipeline's `eta`, 0 unless given, is the noise that it adds after each.
    """
    return make_scheduler(
        student_sampler(args),
        noise_schedule,
        original_inference_steps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )
