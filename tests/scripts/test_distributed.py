"""Several processes, for real, on a CPU by gloo: DistributedDataParallel and FSDP2."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import distributed_run
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, SCRIPTS, Script, encode_image, write_tar
from PIL import Image
from safetensors.torch import load_file

PROGRAM = ROOT / "tests" / "scripts" / "distributed_run.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
# With --cpu accelerate would start one process, however many are asked for.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip
USE_CPU = {"ACCELERATE_USE_CPU": "true"}


def run(kind, script, folder, *more, launcher):
    """A finished run of the program's KIND, as users start it."""
    env = {**os.environ, **USE_CPU, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), kind, script.path.stem, *script.options(folder, *more)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def run_forked(kind, script, folder, *more, num_processes=2):
    """The same in forked processes, which spares the imports, with the variables that `torchrun` sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def one(rank):
        os.environ.update(USE_CPU)
        if num_processes > 1:
            os.environ.update(meeting, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes),
                              LOCAL_WORLD_SIZE=str(num_processes))  # fmt: skip
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        distributed_run.main(kind, script.path.stem, script.options(folder, *more))

    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=one, args=(rank,)) for rank in range(num_processes)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def killed_after_step_2(finished, folder):
    """A copy of a finished run's folder, as it was when `checkpoint-2` was the last thing in it."""
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    return folder


@pytest.fixture(scope="module")
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


@pytest.fixture(scope="module")
def ddp(sd, tmp_path_factory):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    run("ddp", sd, folder, "--checkpointing_steps=2", launcher=ACCELERATE)
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_two_processes_have_the_gradient_of_twice_the_batch(sd, ddp, tmp_path):
    """The same samples, noise, timesteps and guidance, as two halves or as one batch; and so the logged loss, which is
    the mean over processes."""
    run_forked("joint", sd, tmp_path, "--train_batch_size=4", num_processes=1)
    for name, value in metrics(tmp_path)[0].items():
        if "loss" in name or name == "gradient_norm":
            assert metrics(ddp)[0][name] == pytest.approx(value, rel=1e-3)
    two, one = (torch.load(folder / "gradients.pt") for folder in (ddp, tmp_path))
    assert len(two) == len(one) > 50
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert max(gradient.abs().max() for gradient in one) > 1e-3


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_resume_bit_for_bit(name, teacher, sdxl_teacher, shards, tmp_path):
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    more = ["--checkpointing_steps=2", "--dataloader_num_workers=1", "--random_flip"]
    if name == "sd":
        run("ddp", script, tmp_path / "unbroken", *more, launcher=TORCHRUN)
    else:
        run_forked("ddp", script, tmp_path / "unbroken", *more)
    resumed = killed_after_step_2(tmp_path / "unbroken", tmp_path / "resumed")
    run_forked("ddp", script, resumed, *more, "--resume_from_checkpoint=latest")
    assert_same(script.weights(tmp_path / "unbroken"), script.weights(resumed))


def test_processes_with_different_shapes_stay_in_step(sdxl_teacher, tmp_path):
    """Each step of each process has one shape; a resume is exact; all weights are finite."""
    rng, members = np.random.default_rng(0), []
    for i, size in enumerate([(20, 20), (20, 40), (40, 20), (20, 30), (30, 20)] * 6):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        members += [(f"{i}.png", encode_image(pixels)), (f"{i}.txt", f"{i}".encode())]
    script = Script("lora_sdxl", sdxl_teacher, write_tar(tmp_path / "0.tar", members), SCRIPTS["lora_sdxl"])
    more = ["--checkpointing_steps=2", "--aspect_ratio_buckets=16,16;16,32;32,16;16,24;24,16",
            "--max_watermark_probability=1"]  # fmt: skip
    run_forked("ddp", script, tmp_path / "unbroken", *more)
    states = json.loads((tmp_path / "unbroken" / "checkpoint-2" / "training_state.json").read_text())["data"]
    assert len(states) == 2 and len({tuple(sorted(state["shapes"].items())) for state in states}) == 2
    resumed = killed_after_step_2(tmp_path / "unbroken", tmp_path / "resumed")
    run_forked("ddp", script, resumed, *more, "--resume_from_checkpoint=latest")
    assert_same(script.weights(tmp_path / "unbroken"), script.weights(resumed))
    assert all(torch.isfinite(value).all() for value in script.weights(resumed).values())


def test_another_number_of_processes_is_refused(sd, ddp, capsys):
    with pytest.raises(SystemExit):
        sd.main(ddp, "--checkpointing_steps=2", "--resume_from_checkpoint=latest")
    assert "--resume_from_checkpoint: saved by 2 processes, but 1 are running" in capsys.readouterr().err


def test_another_number_of_processes_with_the_override(sd, ddp, tmp_path):
    """From two to one, and on to two, of which the second finds no random state of its own; every sample counts."""
    folder = killed_after_step_2(ddp, tmp_path)
    more = ["--checkpointing_steps=2", "--resume_from_checkpoint=latest", "--resume_with_changed_options"]
    sd.main(folder, *more, "--scale_lr")
    run_forked("ddp", sd, folder, *more, "--scale_lr", "--max_train_steps=6")
    states = [json.loads((folder / f"checkpoint-{n}/training_state.json").read_text())["data"] for n in (2, 4, 6)]
    assert [len(state) for state in states] == [2, 1, 2]
    assert [sum(process["num_used"] for process in state) for state in states] == [8, 12, 20]
    passes = [{position["pass_index"] for process in state for position in process["positions"]} for state in states]
    assert max(passes[0]) < min(passes[1]) and max(passes[1]) < min(passes[2])
    assert [row["lr"] for row in metrics(folder)[-4:]] == pytest.approx([2e-3, 2e-3, 4e-3, 4e-3])


def test_fsdp_trains_saves_resumes_and_exports(sd, ddp, tmp_path):
    """As DistributedDataParallel to rounding, resumed bit for bit; whole weights that diffusers loads; pictures."""
    from diffusers import UNet2DConditionModel

    run("fsdp", sd, tmp_path / "unbroken", "--checkpointing_steps=2", launcher=TORCHRUN)
    resumed = killed_after_step_2(tmp_path / "unbroken", tmp_path / "resumed")
    run_forked("fsdp", sd, resumed, "--checkpointing_steps=2", "--resume_from_checkpoint=latest")
    unbroken = sd.weights(tmp_path / "unbroken")
    assert_same(unbroken, sd.weights(resumed))
    for name, tensor in sd.weights(ddp).items():
        torch.testing.assert_close(unbroken[name], tensor, rtol=1e-3, atol=1e-4)
    for one, other in zip(metrics(tmp_path / "unbroken"), metrics(ddp), strict=True):
        for name in ("loss", "gradient_norm", "ema_distance"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    for folder in ("unet", "unet_target", "checkpoint-4/unet", "checkpoint-4/unet_target"):
        _, info = UNet2DConditionModel.from_pretrained(tmp_path / "unbroken" / folder, output_loading_info=True)
        assert not any(info.values())
    assert (
        Image.open(tmp_path / "unbroken/validation/step-000004.png").size
        == Image.open(ddp / "validation/step-000004.png").size
    )
    start = load_file(sd.teacher / "unet" / "diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "unbroken/unet/diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(start[name], trained[name]) for name in ("conv_in.weight", "conv_out.weight"))
