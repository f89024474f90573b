"""What the tests of the playground share: the demo's teacher, and two networks, trained on it for two steps."""

import functools
import importlib
import shutil

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import DEMO_TEACHER, ROOT

import playground

SIZE = 64  # pixels a side, of the demo's pictures
NIGHT, SNOW = "a cat, night", "a cat, snow"
GRID = 10  # points of the grid that was trained
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """{label: output folder} of a whole U-Net (guidance 2 to 4) and of a LoRA."""
    folder = tmp_path_factory.mktemp("trained")
    shards = ROOT / "demo" / "shards" / "heldout-00000.tar"
    for name, script, own in (
        ("student", "train_lcm_distill_sd_wds", ["--w_min=1", "--w_max=3", "--validation_guidance_scale=3"]),
        ("LoRA", "train_lcm_distill_lora_sd_wds", ["--w_min=2", "--w_max=2", "--lora_rank=4", "--learning_rate=1e-2"]),
    ):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        options = [
            f"--pretrained_teacher_model={DEMO_TEACHER}", f"--train_shards_path_or_url={shards}",
            f"--output_dir={folder / name}", f"--resolution={SIZE}", "--train_batch_size=2", "--max_train_steps=2",
            f"--num_ddim_timesteps={GRID}", "--shuffle_buffer_size=8", "--report_to=none", "--logging_steps=1",
            "--validation_prompts", NIGHT, "--validation_num_inference_steps=1", "--validation_teacher_steps",
            "--validation_steps=1", "--checkpointing_steps=2", "--seed=0", *own,
        ]  # fmt: skip
        importlib.import_module(script).main(options)
    return {"student": folder / "student", "LoRA": folder / "LoRA"}


def command(trained, *more):
    """The options of the playground for these networks."""
    names = [f"{name}={folder}" for name, folder in trained.items()]
    return [f"--pretrained_teacher_model={DEMO_TEACHER}", "--trained", *names, *map(str, more)]


def parse(trained, *more):
    return playground.parse_args(command(trained, *more))


@functools.cache
def needs_browser():
    """Skip, with a word, where the browser or a package for it is missing."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    pytest.importorskip("playwright", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
