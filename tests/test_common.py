"""The math, against figures of the public reference and against laws that must hold.

`golden/lcm_math.npz` holds figures that were computed with the math of the public diffusers scripts
(examples/consistency_distillation, August 2026) on fixed random inputs; none of it comes from this project.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import lcm_common as lcm

GOLDEN = np.load(Path(__file__).parent / "golden" / "lcm_math.npz")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def assert_golden(actual, name, rtol=1e-4, atol=1e-5):
    assert actual.dtype in (torch.float32, torch.int64)
    torch.testing.assert_close(actual, golden(name), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def tables():
    return lcm.noise_schedule(golden("alphas_cumprod"))


# Against the reference's figures.


@pytest.mark.parametrize("num_steps", [50, 20])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_whole_step_matches_the_reference(num_steps, prediction_type, tables):
    def given(name):
        return golden(f"step_{num_steps}_{prediction_type}_{name}")

    name = f"step_{num_steps}_{prediction_type}_"
    solver = lcm.DDIMSolver(golden("alphas_cumprod"), num_steps)
    assert_golden(solver.timesteps, f"grid_{num_steps}")
    t_nk, t_n = solver.interval(golden(f"index_{num_steps}"))
    assert_golden(t_nk, name + "t_nk")
    assert_golden(t_n, name + "t_n")
    z_nk = lcm.add_noise(given("z_0"), given("noise"), t_nk, *tables)
    assert_golden(z_nk, name + "z_nk")
    f_student = lcm.consistency_function(given("student_out"), t_nk, z_nk, *tables, prediction_type)
    assert_golden(f_student, name + "f_student")
    output = lcm.apply_guidance(given("cond_out"), given("uncond_out"), golden("w"))
    x_0 = lcm.predicted_origin(output, t_nk, z_nk, *tables, prediction_type)
    eps = lcm.predicted_noise(output, t_nk, z_nk, *tables, prediction_type)
    z_n = solver.step(x_0, eps, t_n)
    assert_golden(z_n, name + "z_n")
    f_target = lcm.consistency_function(given("target_out"), t_n, z_n, *tables, prediction_type)
    assert_golden(f_target, name + "f_target")
    assert_golden(lcm.consistency_loss(f_student, f_target).mean(), name + "l2")
    for c in (0.001, 0.05):
        assert_golden(lcm.consistency_loss(f_student, f_target, "huber", c).mean(), f"{name}huber_{c}")


@pytest.mark.parametrize("scaling", [10.0, 3.5])
def test_boundary_scalings_match_the_reference(scaling):
    c_skip, c_out = lcm.boundary_scalings(golden("t_scalings"), scaling)
    assert_golden(c_skip, f"c_skip_scale{scaling}")
    assert_golden(c_out, f"c_out_scale{scaling}")


@pytest.mark.parametrize("dim", [256, 33])
def test_guidance_embedding_matches_the_reference(dim):
    assert_golden(lcm.guidance_embedding(golden("w"), dim), f"guidance_embedding_{dim}", atol=5e-3)


# Against diffusers' own classes.


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_solver_takes_the_step_of_ddim_scheduler(prediction_type, tables):
    from diffusers import DDIMScheduler

    before = torch.cat([torch.ones(1), golden("alphas_cumprod")[:-1]])
    scheduler = DDIMScheduler(
        trained_betas=(1 - golden("alphas_cumprod") / before).numpy(),
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(50)
    solver = lcm.DDIMSolver(golden("alphas_cumprod"), 50)
    z, output = torch.randn(2, 1, 4, 8, 8, generator=torch.manual_seed(0))
    for n in (1, 25, 49):
        t_nk, t_n = solver.interval(torch.tensor([n]))
        assert t_nk.item() in scheduler.timesteps
        expected = scheduler.step(output, t_nk.item(), z).prev_sample
        x_0 = lcm.predicted_origin(output, t_nk, z, *tables, prediction_type)
        eps = lcm.predicted_noise(output, t_nk, z, *tables, prediction_type)
        torch.testing.assert_close(solver.step(x_0, eps, t_n), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [50, 20, 30, 7])
def test_grid_is_the_one_that_lcm_scheduler_samples_on(num_steps):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(original_inference_steps=num_steps)
    scheduler.set_timesteps(num_steps)
    solver = lcm.DDIMSolver(golden("alphas_cumprod"), num_steps)
    assert scheduler.timesteps.tolist() == solver.timesteps.flip(0).tolist()
    assert solver.reaches_end == (1000 % num_steps == 0)


def test_guidance_embedding_is_the_pipelines():
    from diffusers import StableDiffusionPipeline

    w = torch.linspace(0, 14, 29)
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(lcm.guidance_embedding(w, 256), expected, rtol=0, atol=5e-3)


# Laws.


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_consistency_function_is_the_identity_at_time_zero(prediction_type, tables):
    z, output = torch.randn(2, 3, 4, 8, 8)
    t = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(lcm.consistency_function(output, t, z, *tables, prediction_type), z)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_origin_and_noise_are_the_two_parts_of_z_t(prediction_type, tables):
    z_t, output = torch.randn(2, 5, 4, 8, 8)
    t = torch.tensor([0, 19, 300, 700, 999])
    x_0 = lcm.predicted_origin(output, t, z_t, *tables, prediction_type)
    eps = lcm.predicted_noise(output, t, z_t, *tables, prediction_type)
    torch.testing.assert_close(lcm.add_noise(x_0, eps, t, *tables), z_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guiding_the_output_is_guiding_origin_and_noise(prediction_type, tables):
    z_t, cond, uncond = torch.randn(3, 5, 4, 8, 8)
    t, w = torch.tensor([19, 39, 300, 700, 999]), torch.tensor([0.0, 1.0, 5.0, 7.5, 15.0])
    for convert in (lcm.predicted_origin, lcm.predicted_noise):
        once = convert(lcm.apply_guidance(cond, uncond, w), t, z_t, *tables, prediction_type)
        both = (convert(output, t, z_t, *tables, prediction_type) for output in (cond, uncond))
        torch.testing.assert_close(once, lcm.apply_guidance(*both, w), rtol=1e-3, atol=1e-2)


def test_guidance_weight_zero_is_the_conditional_output():
    cond, uncond = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(lcm.apply_guidance(cond, uncond, torch.zeros(3)), cond)


def test_first_interval_ends_at_zero():
    t_nk, t_n = lcm.DDIMSolver(golden("alphas_cumprod"), 50).interval(torch.tensor([0, 1]))
    assert t_nk.tolist() == [19, 39] and t_n.tolist() == [0, 19]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_gives_finite_steps(prediction_type):
    alphas_cumprod = golden("alphas_cumprod").clone()
    alphas_cumprod[-1] = 0
    solver = lcm.DDIMSolver(alphas_cumprod, 50)
    z, output = torch.randn(2, 1, 4, 8, 8)
    t_nk, t_n = solver.interval(torch.tensor([49]))
    assert t_nk.item() == 999
    x_0 = lcm.predicted_origin(output, t_nk, z, solver.alphas, solver.sigmas, prediction_type)
    eps = lcm.predicted_noise(output, t_nk, z, solver.alphas, solver.sigmas, prediction_type)
    assert solver.step(x_0, eps, t_n).isfinite().all()


def test_everything_is_float32_whatever_goes_in(tables):
    z, output = torch.randn(2, 2, 4, 8, 8, dtype=torch.bfloat16)
    t, w = torch.tensor([19, 999]), torch.rand(2, dtype=torch.float16)
    for result in (
        lcm.add_noise(z, output, t, *tables),
        lcm.predicted_origin(output, t, z, *tables, "epsilon"),
        lcm.predicted_noise(output, t, z, *tables, "v_prediction"),
        lcm.apply_guidance(output, z, w),
        lcm.guidance_embedding(w, 16),
        lcm.consistency_loss(z, output),
        *lcm.boundary_scalings(t),
    ):
        assert result.dtype == torch.float32


def test_huber_lies_between_absolute_and_squared_error():
    a, b = torch.randn(2, 4, 8, 8)
    assert lcm.consistency_loss(a, b, "huber", 1e-6).mean() == pytest.approx((a - b).abs().mean().item(), rel=1e-4)
    wide = lcm.consistency_loss(a, b, "huber", 1e3).mean().item() * 2e3
    assert wide == pytest.approx((a - b).square().mean().item(), rel=0.1)


# The moving average.


def update(target, source, decay):
    lcm.update_ema(dict(target.named_parameters()), dict(source.named_parameters()), decay)


def test_ema_is_the_weighted_mean():
    target, source = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    update(target, source, 0.9)
    torch.testing.assert_close(target.weight, torch.nn.Parameter(expected))


@pytest.mark.parametrize("decay, winner", [(0.0, "source"), (1.0, "target")])
def test_ema_at_its_ends(decay, winner):
    modules = {"target": torch.nn.Linear(3, 2), "source": torch.nn.Linear(3, 2)}
    expected = modules[winner].weight.detach().clone()
    update(modules["target"], modules["source"], decay)
    assert torch.equal(modules["target"].weight, expected)


def test_ema_keeps_the_targets_dtype():
    target, source = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).to(torch.bfloat16)
    update(target, source, 0.5)
    assert target.weight.dtype == torch.float32


def test_ema_refuses_other_parameters():
    with pytest.raises(ValueError, match="bias"):
        update(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, bias=False), 0.5)


# Errors.


ONE = torch.ones(1)
ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lcm.predicted_origin(ONE, ZERO, ONE, ONE, ONE, "flow"), "prediction_type"),
        (lambda: lcm.predicted_noise(ONE, ZERO, ONE, ONE, ONE, "flow"), "prediction_type"),
        (lambda: lcm.consistency_loss(ONE, ONE, "l1"), "loss_type"),
        (lambda: lcm.guidance_embedding(ONE, 2), "dim"),
        (lambda: lcm.DDIMSolver(torch.ones(10), 11), "num_steps"),
        (lambda: lcm.DDIMSolver(torch.ones(10), 0), "num_steps"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
