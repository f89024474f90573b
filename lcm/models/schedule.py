"""The teacher's noise schedule."""

from argparse import Namespace

import diffusers

from lcm.errors import UserError
from lcm.models.loading import TEACHER, load_config, load_part
from lcm.options.choices import PREDICTION_TYPES


def load_noise_schedule(args: Namespace) -> diffusers.DDPMScheduler:
    """The teacher's scheduler as a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type.

    Raises UserError for a scheduler without betas (flow matching) or with invalid betas, for an unknown prediction
    type, for fewer timesteps than `--num_ddim_timesteps`, for more `--num_solver_steps` than fit between two points of
    the grid, and for epsilon prediction with zero terminal SNR, where the
    network's output at the last timestep does not determine x_0.
    """
    noise_schedule = load_part(diffusers.DDPMScheduler, args, "scheduler")
    raw = load_config(diffusers.DDPMScheduler, args, "scheduler")  # the file alone, without defaults
    prediction_type = noise_schedule.config.prediction_type
    if "beta_schedule" not in raw:
        name = raw.get("_class_name")
        raise UserError(f"{TEACHER}: its scheduler, {name}, has no beta schedule; allowed: one with betas")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{TEACHER}: its prediction type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    alphas_cumprod = noise_schedule.alphas_cumprod
    if len(alphas_cumprod) < args.num_ddim_timesteps:
        raise UserError(
            f"--num_ddim_timesteps: {args.num_ddim_timesteps} given; allowed: at most the schedule's "
            f"{len(alphas_cumprod)} timesteps"
        )
    interval = len(alphas_cumprod) // args.num_ddim_timesteps
    if args.num_solver_steps > interval:
        raise UserError(
            f"--num_solver_steps: {args.num_solver_steps} given; allowed: at most {interval}, the timesteps "
            f"between two points of the grid of --num_ddim_timesteps={args.num_ddim_timesteps}"
        )
    if not (alphas_cumprod.diff() < 0).all():  # NaN fails as well
        raise UserError(
            f"{TEACHER}: its scheduler's betas are invalid: alphas_cumprod must decrease at every timestep"
        )
    if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-6:
        raise UserError(
            f"{TEACHER}: its noise schedule has zero terminal SNR, where epsilon prediction does not determine x_0; "
            "allowed with zero terminal SNR: v_prediction, sample"
        )
    return noise_schedule
