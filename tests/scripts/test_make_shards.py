"""make_shards.py: real pictures of a tiny teacher, whatever happens on the way; and a training on them."""

import importlib
import json
import os
import re
import shlex
import signal
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, Script, encode_image, forked, launch_two, read_tars
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

import make_shards
from lcm.data import writer
from lcm.evaluation.sampling import picture_generator

PROMPTS = ["a red three", "a blue two, größer", "a green seven"]


def options(teacher, folder, *more):
    own = ["--num_images=7", "--shard_size=3", "--batch_size=2", "--num_inference_steps=2", "--picture_format=png"]
    return [f"--pretrained_teacher_model={teacher}", f"--output_dir={folder}", *own, *more, "--prompts", *PROMPTS]


@pytest.fixture(params=["sd", "sdxl"])
def source(request, teacher, sdxl_teacher):
    return teacher if request.param == "sd" else sdxl_teacher


def test_pictures_captions_and_json(source, tmp_path, capsys):
    """Each picture is what the pipeline draws for its prompt alone, from the noise of its number."""
    make_shards.main(options(source, tmp_path, "--seed=5", "--guidance_scale=3", "--negative_prompt=grey"))
    found = read_tars(tmp_path)
    assert len(found) == 21 and {name.split("/")[0] for name in found} == {"00000.tar", "00001.tar", "00002.tar"}
    pipeline = DiffusionPipeline.from_pretrained(source, safety_checker=None)
    config = {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config({**pipeline.scheduler.config, **config})
    for i in (0, 4, 6):
        key = f"{i // 3:05d}.tar/{i:09d}"
        picture = Image.open(BytesIO(found[f"{key}.png"]))
        about = json.loads(found[f"{key}.json"])
        assert found[f"{key}.txt"].decode() == PROMPTS[i % 3] == about["caption"]
        sizes = {about[name] for name in ("width", "height", "original_width", "original_height")}
        assert sizes == {*picture.size} and (about["seed"], about["number"]) == (5, i)
        expected = pipeline(
            PROMPTS[i % 3], negative_prompt="grey", num_inference_steps=2, guidance_scale=3,
            generator=picture_generator(5, i),
        ).images[0]  # fmt: skip
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1
    printed = capsys.readouterr().out
    assert f'--train_shards_path_or_url="{tmp_path}/{{00000..00002}}.tar"' in printed


def test_killed_and_started_again(teacher, tmp_path, monkeypatch):
    """Complete shards stay, unfinished ones are drawn again: the bytes are those of an unbroken run."""
    make_shards.main(options(teacher, tmp_path / "unbroken"))

    def dying():
        encode = writer.encode_picture
        count = iter(range(99))

        def encode_or_die(*args):
            if next(count) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)

        writer.encode_picture = encode_or_die
        make_shards.main(options(teacher, tmp_path / "killed"))

    assert forked(dying).returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"make_shards.json", "00000.tar", "00001.tar.partial"}
    before = os.stat(tmp_path / "killed" / "00000.tar").st_mtime_ns
    make_shards.main(options(teacher, tmp_path / "killed", "--batch_size=3"))
    assert os.stat(tmp_path / "killed" / "00000.tar").st_mtime_ns == before
    assert not list((tmp_path / "killed").glob("*.partial"))
    ours, unbroken = read_tars(tmp_path / "killed"), read_tars(tmp_path / "unbroken")
    assert ours.keys() == unbroken.keys()
    assert all(ours[name] == unbroken[name] for name in ours if not name.startswith("00001.tar"))


def test_two_processes_share_the_shards(teacher, tmp_path):
    make_shards.main(options(teacher, tmp_path / "one"))
    done = launch_two("make_shards.py", options(teacher, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Train with:") == 1 and "0 of 3 shards are there" in done.stdout
    assert read_tars(tmp_path / "two") == read_tars(tmp_path / "one")


@pytest.mark.parametrize(("more", "start"), [
    (["--seed=1"], "--seed: 1 given, but the shards in "),
    (["--num_inference_steps=3"], "--num_inference_steps: 3 given, but "),
    (["--shard_size=2"], "--shard_size: 2 given, but "),
    (["--prompts", "another"], "--prompts: '1, SHA-256 "),
])  # fmt: skip
def test_other_options_are_not_mixed(teacher, tmp_path, more, start, capsys):
    make_shards.main(options(teacher, tmp_path, "--num_images=1"))
    before = read_tars(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        make_shards.main([*options(teacher, tmp_path, "--num_images=1"), *more])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith(start)
    assert read_tars(tmp_path) == before


@pytest.mark.parametrize(("more", "start"), [
    (["--resolution=12"], "--resolution: 12 given; allowed: multiples of 8"),
    (["--num_images=0"], "--num_images: '0' given; allowed: an integer of at least 1"),
    (["--scheduler=lcm"], "--scheduler: invalid choice: 'lcm'"),
    (["--prompts", "nosuch.txt"], "--prompts: 'nosuch.txt' is not a file"),
    (["--picture_format=gif"], "--picture_format: invalid choice: 'gif'"),
    (["--output_dir=file/x"], "--output_dir: 'file/x' given, but "),
])  # fmt: skip
def test_wrong_options(teacher, tmp_path, monkeypatch, more, start, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        make_shards.main([*options(teacher, tmp_path / "out"), *more])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(start)


def test_training_on_drawn_shards(teacher, tmp_path):
    """A checkpoint and prompts are enough to distil it."""
    make_shards.main([*options(teacher, tmp_path / "shards", "--picture_format=jpg", "--resolution=24")])
    script = Script("sd", teacher, str(tmp_path / "shards" / "{00000..00002}.tar"), SCRIPTS["sd"])
    script.main(tmp_path / "out", "--max_train_steps=2", "--width_key=original_width", "--height_key=original_height")
    assert all(torch.isfinite(value).all() for value in script.weights(tmp_path / "out").values())


README_COMMANDS = re.findall(
    r"^python (make_shards\.py .*)\n^python (train_lcm_distill_lora_sd_wds\.py (?:.*\\\n)*.*)$",
    (ROOT / "README.md").read_text(), re.M,
)  # fmt: skip


@pytest.mark.parametrize("source", ["folder", "data set", "at once"])
def test_the_readmes_two_commands(source, tmp_path, monkeypatch, capsys):
    """From 40 pictures with captions to a LoRA for the built-in teacher, which draws with it."""
    (commands,) = README_COMMANDS
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (70, 60 + i, 3), dtype=np.uint8)
        (tmp_path / "pictures" / f"{i}.png").write_bytes(encode_image(pixels))
        (tmp_path / "pictures" / f"{i}.txt").write_text("a fox and a star, night")
    made, trained = (shlex.split(command.replace("\\\n", " "))[1:] for command in commands)
    if source == "data set":
        datasets = pytest.importorskip("datasets")
        columns = {"image": [f"pictures/{i}.png" for i in range(40)], "text": ["a fox and a star, night"] * 40}
        (tmp_path / "set").mkdir()
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet("set/all.parquet")
        made = ["--dataset_name=set", *made[1:]]
    if source == "at once":
        trained = [made[0] if option.startswith("--train_shards") else option for option in trained]
    else:
        make_shards.main(made)
        assert "40 samples used, skipped: none" in capsys.readouterr().out
    importlib.import_module("train_lcm_distill_lora_sd_wds").main([*trained, "--max_train_steps=2"])
    assert "samples used, skipped: none" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained("demo/teacher", safety_checker=None)
    pipeline.load_lora_weights("my-lora", weight_name="pytorch_lora_weights.safetensors")
    assert pipeline("a fox, meadow", num_inference_steps=1, guidance_scale=1).images[0].size == (64, 64)
