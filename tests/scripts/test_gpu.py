"""benchmarks/gpu.py: on a GPU all four scripts at their true sizes; on any machine a small run of it."""

import math

import pytest
from conftest import write_shards

from benchmarks import gpu

SIZES = [(kind, precision) for kind in gpu.KINDS for precision in ("fp16", "bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_shards(folder / "shards", num_shards=2, samples_per_shard=24, size=(64, 64))
    return folder


@pytest.fixture(scope="module")
def teachers(folder):
    gpu.make_teachers(folder, {"sd15", "sdxl"})
    return folder


def test_the_benchmark_on_any_machine(folder):
    """It trains, resumes to the same losses, runs the printed code, and simulates the command."""
    row = gpu.measure("lora_sd", "bf16", folder, small=True)
    assert len(row["losses"]) == gpu.STEPS and row["resume"] < (1e-9 if row["device"] == "a CPU" else 1e-2)
    assert row["simulated"] > 0 and gpu.show(row).startswith("| lora_sd, bf16 | ")


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "precision"), SIZES)
def test_every_script_at_its_true_size(teachers, kind, precision):
    row = gpu.measure(kind, precision, teachers)
    assert all(map(math.isfinite, row["losses"])) and row["resume"] < 1e-2
    assert row["simulated"] == pytest.approx(row["peak"], rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", gpu.KINDS)
def test_networks_in_host_memory(teachers, kind):
    """They take less memory, as foretold, and the losses are the same but for kernels that add in no fixed order."""
    more = ["--offload"] if "lora" in kind else ["--offload", "--offload_ema"]
    plain, offloaded = (gpu.measure(kind, "bf16", teachers, more=options) for options in ((), more))
    assert offloaded["peak"] < plain["peak"]
    assert offloaded["simulated"] == pytest.approx(offloaded["peak"], rel=0.05)
    assert offloaded["losses"] == pytest.approx(plain["losses"], rel=1e-2)
