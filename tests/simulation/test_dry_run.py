"""The command: what it prints and writes, what it advises, and what it refuses."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from lcm.simulation.many import Command, peaks_of


def call_dry_run(*options):
    call = [sys.executable, "dry_run.py", *map(str, options)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def options(teacher):
    return [
        "train_lcm_distill_sd_wds.py", f"--pretrained_teacher_model={teacher}",
        "--train_shards_path_or_url=no/such/{000..999}.tar", "--mixed_precision=bf16", "--resolution=16",
        "--train_batch_size=4", "--validation_prompts=a red three", "--validation_num_inference_steps=1",
    ]  # fmt: skip


def test_what_it_prints_and_writes(teacher, tmp_path):
    """No shards, no weights, no output folder, nothing on the Hub; the pictures are drawn, too."""
    path = tmp_path / "figures.json"
    done = call_dry_run("--gpu_memory=1", f"--json={path}", *options(teacher), "--push_to_hub")
    assert done.returncode == 0, done.stderr
    for what in ("", " while pictures are drawn", " while a checkpoint is saved", " while results are written"):
        assert f"Peak memory{what}" in done.stdout
    assert "from_pretrained" not in done.stdout
    assert "0.0 GB hardly fits in 1 GB: 1.0 GB are left for what is not included" in done.stdout
    assert "Waits of the host for the device, in a step: 1" in done.stdout
    figures = json.loads(path.read_text())
    steps = [step["peak"] for step in figures["steps"]]
    assert figures["peak"] == max(*steps, *(figures[what] for what in ("pictures", "checkpoints", "export")))
    assert max(steps) > figures["loaded"] > 0
    script, *its_options = options(teacher)
    command = Command(script.removesuffix(".py"), (*its_options, "--train_batch_size=1"), with_pictures=True)
    assert 0 < max(peaks_of(command).values()) < figures["peak"]
    same = peaks_of(command.with_more(["--train_batch_size=4"]))
    assert max(same.values()) == figures["peak"] and same["pictures"] == figures["pictures"]


def test_what_the_script_refuses_is_one_line(tmp_path):
    done = call_dry_run(*options(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("--pretrained_teacher_model: cannot load ")


@pytest.mark.parametrize(("wrong", "option"), [("--gpu_memory=0", "--gpu_memory"), ("train.py", "SCRIPT")])
def test_wrong_options_are_one_line(teacher, wrong, option):
    done = call_dry_run(wrong, *options(teacher))
    assert done.returncode == 2 and done.stderr.startswith(f"{option}: ") and len(done.stderr.splitlines()) == 1


def test_what_is_advised_if_it_does_not_fit(teacher):
    """What is left to try is tried."""
    given = ["--gradient_checkpointing", "--offload", "--offload_ema", "--cast_teacher_unet", "--train_batch_size=1"]
    done = call_dry_run("--gpu_memory=0.000001", *options(teacher), *given)
    assert done.returncode == 0, done.stderr
    *_, header, row, _, last = done.stdout.splitlines()
    assert header.split() == ["in", "addition", "peak", "GB"] and row.split() == ["--use_8bit_adam", "0.0"]
    assert last == "Even a batch of 1 does not fit."
    assert done.stderr.splitlines()[0].startswith("Simulating two steps of train_lcm_distill_sd_wds.py")
    assert done.stderr.splitlines()[-1] == "--use_8bit_adam: 0.0 GB"
