"""The targets of distillation: where f lands, what f is, and its loss and gradient against slow formulas."""

import math

import pytest
import torch

import lcm_common as lcm

STEPS = 50


def schedule(zero_snr=False):
    """alphas_cumprod of Stable Diffusion (1000,), if asked for with zero terminal SNR."""
    from diffusers import DDPMScheduler

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDPMScheduler(**config, rescale_betas_zero_snr=zero_snr).alphas_cumprod


def make(target, prediction_type="epsilon", zero_snr=False, phases=(4,), num_steps=STEPS):
    solver = lcm.DDIMSolver(schedule(zero_snr), num_steps, prediction_type)
    return solver, lcm.make_consistency_function(target, solver, 10.0, list(phases))


KINDS = [("epsilon", False), *((kind, zero_snr) for kind in ("v_prediction", "sample") for zero_snr in (False, True))]


# The laws.


@pytest.mark.parametrize(("prediction_type", "zero_snr"), KINDS)
@pytest.mark.parametrize("target", ["phased", "trajectory"])
def test_from_s_to_s_is_the_identity(target, prediction_type, zero_snr):
    """f(z, s, s) = z for every s and every output of the network."""
    _, f = make(target, prediction_type, zero_snr)
    s = torch.arange(1000)
    z, output = torch.randn(2, len(s), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(f(output, s, z, s), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [50, 37, 20])
@pytest.mark.parametrize("target", ["lcm", "phased", "trajectory"])
def test_where_it_lands(target, num_steps):
    """At 0, at the highest edge below, or anywhere below; never above t_n, and in the same phase as t_nk."""
    solver, f = make(target, num_steps=num_steps)
    t_nk, t_n = solver.interval(torch.arange(num_steps).repeat(200))
    s = f.end(t_n, 0.0, torch.Generator().manual_seed(0))
    assert s.dtype == torch.int64 and s.shape == t_n.shape and (s >= 0).all() and (s <= t_n).all()
    if target == "lcm":
        assert not s.any()
    if target == "phased":
        edges = lcm.phase_edges(solver, 4).tolist()
        assert edges[0] == 0 and len(set(edges)) == 4 and set(edges[1:]) <= set(solver.timesteps.tolist())
        assert s.tolist() == [max(edge for edge in edges if edge <= t) for t in t_n.tolist()]
        assert not any(low < edge < high for low, high in zip(s, t_nk, strict=True) for edge in edges if edge > low)
    if target == "trajectory":
        top = s[t_n == t_n.max()].double() / t_n.max()
        assert top.std() == pytest.approx(math.sqrt(1 / 12), rel=0.1) and top.mean() == pytest.approx(0.5, rel=0.1)
        assert not torch.equal(s, f.end(t_n, 0.0, torch.Generator().manual_seed(1)))
        assert torch.equal(s, f.end(t_n, 0.9, torch.Generator().manual_seed(0)))


def test_phases_follow_one_after_the_other():
    """8 4 2 1: each for a quarter of the run, at the same steps whatever was run before."""
    solver, f = make("phased", phases=(8, 4, 2, 1))
    t_n = solver.timesteps
    for step in range(10):
        expected = [8, 8, 8, 4, 4, 2, 2, 2, 1, 1][step]
        landed = set(f.end(t_n, step / 10, None).tolist())
        assert landed == set(lcm.phase_edges(solver, expected).tolist())
    assert not f.end(t_n, 0.99, None).any()


@pytest.mark.parametrize("num_steps", [50, 37, 20])
@pytest.mark.parametrize("phases", [1, 2, 3, 4, 7, 8, 16])
def test_edges_are_where_the_sampler_stops(phases, num_steps):
    """M steps of TCDScheduler go from edge to edge of M phases, and its step is f."""
    from diffusers import TCDScheduler

    solver, f = make("phased", phases=(phases,), num_steps=num_steps)
    scheduler = TCDScheduler(original_inference_steps=num_steps, beta_schedule="scaled_linear")
    scheduler.set_timesteps(phases)
    edges = lcm.phase_edges(solver, phases)
    assert scheduler.timesteps.tolist() == [solver.timesteps[-1].item(), *edges.flip(0).tolist()[:-1]]
    generator = torch.Generator().manual_seed(0)
    for t, s in zip(scheduler.timesteps, edges.flip(0), strict=True):
        z, output = torch.randn(2, 1, 4, 2, 2, generator=generator)
        reached = scheduler.step(output, t, z, eta=0.0).prev_sample
        torch.testing.assert_close(f(output, t[None], z, s[None]), reached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("substeps", [1, 2, 3, 7])
@pytest.mark.parametrize("num_steps", [50, 37])
def test_the_path_of_the_solver(num_steps, substeps):
    """From t_nk down to t_n in steps of equal length, up to rounding, none of them empty."""
    solver = lcm.DDIMSolver(schedule(), num_steps, substeps=substeps)
    t_nk, t_n = solver.interval(torch.arange(num_steps))
    path = solver.path(t_nk, t_n)
    assert len(path) == substeps and torch.equal(path[0][0], t_nk) and torch.equal(path[-1][1], t_n)
    assert all(torch.equal(path[i][1], path[i + 1][0]) for i in range(substeps - 1))
    lengths = torch.stack([start - end for start, end in path])
    assert (lengths > 0).all() and (lengths.amax(0) - lengths.amin(0) <= 1).all()


def test_unknown_names_and_numbers():
    solver, _ = make("lcm")
    with pytest.raises(ValueError, match="target is 'gan'; allowed: lcm, phased, trajectory"):
        lcm.make_consistency_function("gan", solver, 10.0, [])
    with pytest.raises(ValueError, match="num_phases is 51; allowed: 1 to 50"):
        lcm.make_consistency_function("phased", solver, 10.0, [51])


# Losses and gradients, against the formulas of the papers in float64, a number at a time.


def slow_origin(kind, output, alpha, sigma, z):
    """x_0 of one number, and its derivative by the output."""
    if kind == "epsilon":
        return (z - sigma * output) / alpha, -sigma / alpha
    return (output, 1.0) if kind == "sample" else (alpha * z - sigma * output, -sigma)


def slow_noise(kind, output, alpha, sigma, z):
    """eps of one number, and its derivative by the output."""
    if kind == "epsilon":
        return output, 1.0
    return ((z - alpha * output) / sigma, -alpha / sigma) if kind == "sample" else (alpha * output + sigma * z, alpha)


def slow_f(target, kind, alphas_cumprod, output, t, z, s):
    """f of one number, and its derivative by the output.

    lcm: equation 9 of arXiv 2310.04378. phased (arXiv 2405.18407) and trajectory (2402.19159): a DDIM step, which for
    epsilon is alpha_s / alpha_t z - alpha_s eps (sigma_t / alpha_t - sigma_s / alpha_s), and in the equal form
    alpha_s x_0 + sigma_s eps for the others.
    """
    alpha, sigma = math.sqrt(alphas_cumprod[t]), math.sqrt(1 - alphas_cumprod[t])
    x_0, x_0_slope = slow_origin(kind, output, alpha, sigma, z)
    if target == "lcm":
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        return c_skip * z + c_out * x_0, c_out * x_0_slope
    alpha_s, sigma_s = math.sqrt(alphas_cumprod[s]), math.sqrt(1 - alphas_cumprod[s])
    if kind == "epsilon":
        slope = -alpha_s * (sigma / alpha - sigma_s / alpha_s)
        return alpha_s / alpha * z + slope * output, slope
    noise, noise_slope = slow_noise(kind, output, alpha, sigma, z)
    return alpha_s * x_0 + sigma_s * noise, alpha_s * x_0_slope + sigma_s * noise_slope


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
@pytest.mark.parametrize("target", ["lcm", "phased", "trajectory"])
def test_loss_and_gradient_are_those_of_the_papers(target, kind, zero_snr, loss_type):
    solver, f = make(target, kind, zero_snr)
    generator = torch.Generator().manual_seed(0)
    n = torch.tensor([0, 1, 12, 13, 37, 48, 49])
    t_nk, t_n = solver.interval(n)
    s = f.end(t_n, 0.0, generator)
    z_nk, z_n, output, other = torch.randn(4, len(n), 1, 1, 3, generator=generator)
    output.requires_grad_()
    losses = lcm.consistency_loss(f(output, t_nk, z_nk, s), f(other, t_n, z_n, s), loss_type, 0.1)
    losses.mean().backward()

    alphas_cumprod = schedule(zero_snr).double().tolist()
    for b, (high, low, end) in enumerate(zip(t_nk.tolist(), t_n.tolist(), s.tolist(), strict=True)):
        loss, slopes = 0.0, []
        for i in range(3):
            numbers = [tensor[b, 0, 0, i].item() for tensor in (output, z_nk, other, z_n)]
            ours, slope = slow_f(target, kind, alphas_cumprod, numbers[0], high, numbers[1], end)
            goal, _ = slow_f(target, kind, alphas_cumprod, numbers[2], low, numbers[3], end)
            d = ours - goal
            loss += d * d if loss_type == "l2" else math.sqrt(d * d + 0.01) - 0.1
            slopes.append((2 * d if loss_type == "l2" else d / math.sqrt(d * d + 0.01)) * slope / 3 / len(n))
        assert losses[b].item() == pytest.approx(loss / 3, rel=1e-3, abs=1e-5)
        assert output.grad[b].flatten().tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-5)
