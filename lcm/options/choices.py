"""What a user may choose from: samplers, trackers, and the default prompts."""



VALIDATION_PROMPTS = [
    "a watercolour of a lighthouse on a cliff at dusk, gentle waves, warm light in the windows",
    "portrait of an old fisherman in a yellow raincoat, shallow depth of field, overcast morning",
    "a bowl of ramen on a wooden counter, steam, neon signs out of focus behind it",
    "a small red fox asleep in fresh snow, soft light, detailed fur",
]
# Samplers: the class in diffusers, and what it does not take over from the teacher's own scheduler.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "dpm++-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc-trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
}
# What accelerate can log to, and the packages of which each needs one.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in (
        "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio",
    )},
}  # fmt: skip
