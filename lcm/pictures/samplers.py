"""Every scheduler that pictures are sampled with, here and, from the exported `scheduler/`, by users.

A scheduler takes over what defines the teacher's diffusion process, and nothing that training never did: latents go
beyond [-1, 1], so clipping and thresholding are off. Each call returns a new object, because pipelines change the one
they are given: StableDiffusionPipeline overwrites `steps_offset` and `clip_sample` in its config.
"""

import diffusers

from lcm.options.choices import SAMPLERS

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


def make_scheduler(name, reference, **settings):
    """A new scheduler: one of `SAMPLERS`, or for "own" a copy of `reference` without clipping.

    `reference` is the noise schedule that was trained with, or the teacher's own scheduler. Its betas, its prediction
    type and, where the sampler has none of its own, its spacing of the timesteps are taken over. So are values that
    its config had from the defaults of its class: `from_config` alone would put those of the new class in their place.
    `settings` are options of the new class.

    `alphas_cumprod` (T,) equals that of `reference`; with zero terminal SNR, diffusers' samplers that divide by alpha
    replace the last value, 0, by 2**-24.
    """
    config = {key: value for key, value in reference.config.items() if key != "_use_default_values"}
    config["num_train_timesteps"] = len(reference.betas)  # `trained_betas` decide T, whatever the config says
    if name == "own":
        return type(reference).from_config({**config, **NO_CLIPPING}, **settings)
    kind, options = SAMPLERS[name]
    config = {key: config[key] for key in (*PROCESS, *SPACING) if key in config}
    if config["beta_schedule"] not in COMMON_BETA_SCHEDULES and config.get("trained_betas") is None:
        # As they were before they were rescaled, so that the sampler does that itself, and knows of it.
        as_given = type(reference).from_config({**reference.config, "rescale_betas_zero_snr": False})
        config["trained_betas"] = as_given.betas.tolist()
    return getattr(diffusers, kind).from_config({**config, **NO_CLIPPING}, **{**options, **settings})


def lcm_scheduler(noise_schedule, args):
    """The LCMScheduler that samples on the grid, and with the boundary scalings, that were trained.

    It ends at f(z, t) of its last timestep, so `set_alpha_to_one` and `steps_offset` have no effect on it.
    """
    return make_scheduler(
        "lcm",
        noise_schedule,
        original_inference_steps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )
