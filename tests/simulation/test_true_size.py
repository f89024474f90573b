"""The memory that the README promises, at the true sizes of SD 1.5 and SDXL."""

import pytest

from benchmarks import configs, dry_runs

WHOLE = ("--offload", "--offload_ema", "--use_8bit_adam")
# Script, batch, more options, GB of 10^9 bytes.
PROMISES = [
    ("lora_sd", 12, (), 6.0),
    ("lora_sdxl", 4, ("--offload", "--use_8bit_adam"), 10.0),
    ("sd", 12, WHOLE, 10.5),
    ("sdxl", 4, WHOLE, 28.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    configs.main(folder)
    return folder


@pytest.mark.parametrize(("kind", "batch", "more", "promised"), PROMISES, ids=[kind for kind, *_ in PROMISES])
def test_it_fits(folder, kind, batch, more, promised):
    """In the steps, and while checkpoints and results are written; the promise is not much too large."""
    peak = dry_runs.peak(dry_runs.command(folder, kind, batch, more))
    assert 0.9 * promised < peak <= promised
