"""The memory that the README promises, at the true sizes of SD 1.5 and SDXL."""

import pytest

from benchmarks import configs
from lcm.simulation.many import Command, peaks_of

ALWAYS = ("--train_shards_path_or_url=0.tar", "--mixed_precision=fp16", "--gradient_checkpointing")
WHOLE = ("--cast_teacher_unet", "--offload", "--offload_ema", "--use_8bit_adam")
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
    teacher = (f"--pretrained_teacher_model={folder}/sd15",)
    if "sdxl" in kind:
        teacher = (
            f"--pretrained_teacher_model={folder}/sdxl",
            f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix",
        )
    options = (*teacher, *ALWAYS, *more, f"--train_batch_size={batch}")
    peak = max(peaks_of(Command(f"train_lcm_distill_{kind}_wds", options)).values()) / 1e9
    assert 0.9 * promised < peak <= promised
