"""Samplers: whatever a teacher's config says or leaves out, pictures are sampled along what was trained."""

import itertools
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from lcm.models.schedule import load_noise_schedule
from lcm.options.choices import SAMPLERS
from lcm.pictures.samplers import make_scheduler, student_scheduler
from lcm_common import DDIMSolver, consistency_function

COMPLETE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "thresholding": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
LEFT_OUT = [
    (),
    ("beta_start",),
    ("beta_end",),
    ("beta_start", "beta_end"),
    ("clip_sample", "set_alpha_to_one", "steps_offset", "timestep_spacing"),
    tuple(COMPLETE.keys() - {"beta_schedule"}),
]
CHANGED = [
    {},
    {"beta_schedule": "linear", "num_train_timesteps": 300},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02, "rescale_betas_zero_snr": True},
    {"trained_betas": np.linspace(1e-4, 0.04, 500).tolist()},
    {"trained_betas": np.linspace(1e-4, 0.04, 500).tolist(), "rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "clip_sample": True, "thresholding": True},
    {"clip_sample": True, "clip_sample_range": 0.5, "use_karras_sigmas": True, "variance_type": "learned"},
    {"prediction_type": "epsilon", "thresholding": True},
    {"prediction_type": "sample", "rescale_betas_zero_snr": True},
]
CLASSES = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]


def teachers(folder, classes=("DDIMScheduler",)):
    """(config file, noise schedule of training, options) of every teacher that a training script accepts."""
    (folder / "scheduler").mkdir()
    args = SimpleNamespace(
        pretrained_teacher_model=str(folder), teacher_revision=None, revision=None, cache_dir=None,
        num_ddim_timesteps=50, num_solver_steps=1, timestep_scaling_factor=3.0, target="lcm",
    )  # fmt: skip
    for kind, left_out, changed in itertools.product(classes, LEFT_OUT, CHANGED):
        config = {key: value for key, value in (COMPLETE | changed).items() if key not in {*left_out} - changed.keys()}
        config = {"_class_name": kind, "_diffusers_version": "0.6.0", **config}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        if config.get("prediction_type") is None and config["beta_schedule"] == "squaredcos_cap_v2":
            continue  # refused: it ends at zero SNR, and epsilon is the default
        if config.get("prediction_type") is None and config.get("rescale_betas_zero_snr"):
            continue  # the same
        yield config, load_noise_schedule(args), args


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "sigmoid"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_snr_gives_finite_latents(beta_schedule, name):
    reference = diffusers.DDPMScheduler.from_config(
        COMPLETE | {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    )
    scheduler = make_scheduler(name, reference)
    scheduler.set_timesteps(4)
    latents = torch.ones(1, 4, 2, 2) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(latents, t)
        latents = scheduler.step(torch.full_like(latents, 0.1), t, latents).prev_sample
    assert latents.isfinite().all()


def test_every_sampler_samples_along_what_was_trained(tmp_path):
    """Betas, T and prediction type; never clipping; and what is saved is the same for stock diffusers."""
    count = 0
    for config, schedule, args in teachers(tmp_path):
        made = {name: make_scheduler(name, schedule) for name in SAMPLERS}
        made["export"] = student_scheduler(schedule, args)
        made["export"].save_pretrained(tmp_path / "saved")
        made["saved"] = diffusers.LCMScheduler.from_pretrained(tmp_path / "saved")
        for name, scheduler in made.items():
            where = f"{name} of {config}"
            expected = schedule.alphas_cumprod.clone()
            if scheduler.config.rescale_betas_zero_snr and name.startswith(("dpm++", "euler", "unipc")):
                expected[-1] = 2**-24  # diffusers puts it there: these divide by alpha
            assert torch.equal(scheduler.alphas_cumprod, expected), where
            assert scheduler.config.num_train_timesteps == len(schedule.alphas_cumprod), where
            assert scheduler.config.prediction_type == schedule.config.prediction_type, where
            assert not scheduler.config.get("clip_sample") and not scheduler.config.get("thresholding"), where
            assert scheduler.config.get("use_karras_sigmas", False) == (name == "dpm++-karras"), where
        solver = DDIMSolver(schedule.alphas_cumprod, 50)
        made["saved"].set_timesteps(50)
        assert made["saved"].timesteps.tolist() == solver.timesteps.flip(0).tolist(), config
        assert made["saved"].config.timestep_scaling == 3
        count += 1
    assert count > 50


def test_the_teachers_own_scheduler_decides_in_the_same_way(tmp_path):
    """The evaluation has no noise schedule, but the scheduler that the teacher's pipeline comes with."""
    for config, schedule, _ in teachers(tmp_path, CLASSES):
        if config["beta_schedule"] == "sigmoid" and config["_class_name"] != "DDPMScheduler":
            continue  # the pipeline cannot be loaded
        own = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "scheduler")
        before = dict(own.config)
        for name in ("ddim", "ddim-trailing", "lcm"):
            scheduler = make_scheduler(name, own)
            assert torch.equal(scheduler.alphas_cumprod, schedule.alphas_cumprod), (name, config)
            assert not scheduler.config.clip_sample and not scheduler.config.thresholding
            spacing = "trailing" if name == "ddim-trailing" else own.config.timestep_spacing
            assert scheduler.config.timestep_spacing == spacing
            assert scheduler.config.steps_offset == own.config.steps_offset
        copy = make_scheduler("own", own)
        assert type(copy) is type(own) and copy is not own and dict(own.config) == before
        assert torch.equal(copy.alphas_cumprod, own.alphas_cumprod)
        changed = {key for key in own.config if not key.startswith("_") and copy.config[key] != own.config[key]}
        assert changed <= {"clip_sample", "thresholding", "num_train_timesteps"}
        assert not copy.config.clip_sample and not copy.config.thresholding


def test_a_correction_by_the_pipeline_is_taken_over():
    """StableDiffusionPipeline sets `steps_offset` to 1 in a config that still lists it as a default; and a teacher
    with zero SNR and trailing timesteps begins at the last one."""
    own = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    own._internal_dict = diffusers.configuration_utils.FrozenDict({**own.config, "steps_offset": 1})
    assert "steps_offset" in own.config["_use_default_values"]
    for name, first in (("ddim", 981), ("own", 981), ("ddim-trailing", 999)):
        scheduler = make_scheduler(name, own)
        scheduler.set_timesteps(50)
        assert scheduler.timesteps[0] == first, name
    own = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler = make_scheduler("ddim", own)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] == 0


@pytest.mark.parametrize("changed", [change for change in CHANGED if change.get("prediction_type") != "sample"])
def test_the_exported_scheduler_ends_at_the_consistency_function(tmp_path, changed):
    """Whatever the teacher's `set_alpha_to_one` says: the last step gives f(z, t) of training, and those before it add
    noise with the alphas of training."""
    generator = torch.Generator().manual_seed(0)
    for config, schedule, args in teachers(tmp_path):
        if any(config.get(key) != changed[key] for key in changed):
            continue
        solver = DDIMSolver(schedule.alphas_cumprod, 50)
        scheduler = student_scheduler(schedule, args)
        z, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
        for steps in (1, 4):
            scheduler.set_timesteps(steps)
            for i, t in enumerate(scheduler.timesteps):
                f = consistency_function(
                    output, t[None], z, solver.alphas, solver.sigmas, schedule.config.prediction_type, 3.0
                )
                noise = torch.Generator().manual_seed(i)
                step = scheduler.step(output, t, z, generator=noise)
                torch.testing.assert_close(step.denoised, f)
                if i + 1 == steps:
                    torch.testing.assert_close(step.prev_sample, f)
                else:
                    following = scheduler.timesteps[i + 1]
                    noise = torch.randn(f.shape, generator=torch.Generator().manual_seed(i))
                    expected = solver.alphas[following] * f + solver.sigmas[following] * noise
                    torch.testing.assert_close(step.prev_sample, expected)


def test_no_two_schedulers_share_anything():
    schedule = diffusers.DDPMScheduler()
    args = SimpleNamespace(num_ddim_timesteps=50, timestep_scaling_factor=10.0, target="lcm")
    one, other = (student_scheduler(schedule, args) for _ in range(2))
    before = dict(other.config)
    one.set_timesteps(2)
    one.register_to_config(steps_offset=7, clip_sample=True)
    one.alphas_cumprod.zero_()
    assert dict(other.config) == before and other.num_inference_steps is None and other.alphas_cumprod[0] > 0.9
    assert schedule.alphas_cumprod[0] > 0.9 and "steps_offset" in schedule.config["_use_default_values"]
