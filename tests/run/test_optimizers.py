"""`--optimizer adamw_bf16`: weights and states in bfloat16 that take the steps of float32 ones."""

from types import SimpleNamespace

import pytest
import torch
from conftest import common_options

import train_lcm_distill_sd_wds
from lcm.errors import UserError
from lcm.run.optimizers import make_optimizer


@pytest.fixture
def parse(tmp_path, teacher, shards):
    return lambda *more: train_lcm_distill_sd_wds.parse_args(common_options(teacher, shards, tmp_path, *more))


def trained(args, precision, num_steps, start=1.0):
    """1000 weights after steps whose gradients are those of a parabola around 0, with noise."""
    weights = torch.nn.Parameter(torch.linspace(start / 2, start, 1000))
    optimizer = make_optimizer(args, SimpleNamespace(mixed_precision=precision), [weights])
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        weights.grad = (weights.float() + 0.1 * torch.randn(1000, generator=generator)).to(weights.dtype)
        optimizer.step()
    return weights.detach()


def test_steps_far_below_the_spacing_of_bfloat16_add_up(parse):
    """The spacing between 0.5 and 1 is 0.004. 400 steps of 1e-5 come to 0.004 all the same."""
    usual, exact = parse("--learning_rate=1e-5", "--adam_beta2=0.99"), torch.linspace(0.5, 1, 1000)
    low = parse("--learning_rate=1e-5", "--optimizer=adamw_bf16")
    weights = trained(low, "bf16", 400)
    assert weights.dtype is torch.bfloat16
    moved, expected = (weights.float() - exact).mean().item(), (trained(usual, "no", 400) - exact).mean().item()
    assert expected == pytest.approx(-0.004, rel=0.05) and moved == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_they_need_autocast_in_bfloat16(parse, precision):
    with pytest.raises(UserError, match=r"^--optimizer: adamw_bf16 given, but the mixed precision is"):
        trained(parse("--optimizer=adamw_bf16"), precision, 1)


@pytest.mark.parametrize(("beta2", "stands"), [("0.999", True), ("0.99", False)])
def test_a_second_moment_that_stands_still(parse, caplog, beta2, stands):
    """With the decay 0.999 it forgets nothing, which is said; with 0.99 it does."""
    args = parse("--optimizer=adamw_bf16", f"--adam_beta2={beta2}")
    weights = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(args, SimpleNamespace(mixed_precision="bf16"), [weights])
    means = []
    for i in range(2000):
        weights.grad = torch.full_like(weights, float(i < 1000))
        optimizer.step()
        means.append(optimizer.state[weights]["exp_avg_sq"].item())
    assert (means[-1] == means[1000]) is stands
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.split(" is ")[0] for line in warned] == ["--adam_beta2: 0.999"] * stands
