"""The teacher's noise schedule."""

import diffusers

from lcm.errors import UserError
from lcm.models.loading import OPTION, load_config, load_part
from lcm.options.choices import PREDICTION_TYPES


def load_noise_schedule(args):
    """The teacher's scheduler as a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type.

    Raises UserError for a scheduler without betas (flow matching) or with senseless ones, for an unknown prediction
    type, for fewer timesteps than `--num_ddim_timesteps`, and for epsilon prediction with zero terminal SNR, where the
    network's output at the last timestep says nothing about x_0.
    """
    schedule = load_part(diffusers.DDPMScheduler, args, "scheduler")
    raw = load_config(diffusers.DDPMScheduler, args, "scheduler")  # what the file says, before defaults fill it up
    prediction_type = schedule.config.prediction_type
    if "beta_schedule" not in raw:
        raise UserError(f"{OPTION}: its scheduler, {raw.get('_class_name')}, has no beta schedule to distil along")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{OPTION}: its prediction type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    alphas = schedule.alphas_cumprod
    if len(alphas) < args.num_ddim_timesteps:
        raise UserError(
            f"--num_ddim_timesteps: {args.num_ddim_timesteps} given; allowed: at most the schedule's "
            f"{len(alphas)} timesteps"
        )
    if not (alphas.diff() < 0).all():  # nor if they are NaN
        raise UserError(f"{OPTION}: its scheduler's betas are none: the signal has to fall at each timestep")
    if prediction_type == "epsilon" and alphas[-1] < 1e-6:
        raise UserError(
            f"{OPTION}: its schedule ends at zero signal (zero terminal SNR), where epsilon prediction determines no "
            "x_0; allowed with it: v_prediction, sample"
        )
    return schedule
