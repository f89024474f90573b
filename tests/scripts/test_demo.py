"""The demo: its teacher keeps what the README says of it, its shards can be made again, its command works."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO_TEACHER, ROOT
from PIL import Image

import evaluate_lcm
import playground

DEMO = ROOT / "demo"
PICTURES = 16


def run_demo(script, *options):
    done = subprocess.run(
        [sys.executable, str(DEMO / script), *map(str, options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of the README's first command, with next to no training and few pictures."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = run_demo("run.py", "--output_dir", folder, "--max_train_steps", 3, "--num_images", PICTURES)
    return folder, printed


def test_first_command_prints_the_table_that_it_writes(finished):
    folder, printed = finished
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["steps"] for row in rows if row["network"] == "student"] == [8, 4, 2, 1]
    assert {row["steps"] for row in rows if row["network"] == "teacher"} == {50, 8, 4, 2, 1}
    table = (folder / "table.md").read_text()
    shown = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(shown) >= 9 and set(shown) <= set(table.splitlines())
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "accelerate" in printed  # it shows the command that it runs


def test_first_command_ends_with_the_line_that_starts_the_playground(finished):
    folder, printed = finished
    options = shlex.split(printed.splitlines()[-1])
    of_make = os.path.relpath(ROOT / ".venv" / "bin" / "python") if Path(sys.prefix) == ROOT / ".venv" else "python"
    assert options[:2] == [of_make, os.path.relpath(ROOT / "playground.py")]
    assert "To draw while you type:" in printed.splitlines()[-3:]
    args = playground.parse_args(options[2:])
    assert os.path.samefile(args.pretrained_teacher_model, DEMO_TEACHER) and args.output_dir == args.trained[0][1]
    assert [(name, Path(place).resolve()) for name, place in args.trained] == [("student", folder.resolve())]


def test_teacher_meets_its_bar(finished):
    """At 50 DDIM steps and guidance 3 at least 92 % of the pictures are right; at one step hardly any is."""
    row, *others = json.loads((finished[0] / "rows.json").read_text())
    assert (row["network"], row["sampler"], row["steps"], row["guidance"]) == ("teacher", "ddim", 50, 3.0)
    assert row["all right"] >= 0.92
    assert max(row["all right"] for row in others if (row["network"], row["steps"]) == ("teacher", 1)) < 0.2


def test_only_compare_does_not_train(finished, tmp_path, monkeypatch):
    """It samples what is in the folder; that the same is sampled again, the next test shows."""
    spec = importlib.util.spec_from_file_location("demo_run", DEMO / "run.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rows = json.loads((finished[0] / "rows.json").read_text())
    monkeypatch.setattr(demo, "train", lambda args: pytest.fail("it trains"))
    sampled = []
    monkeypatch.setattr(demo, "compare", lambda args, students: sampled.extend(students) or rows)
    monkeypatch.setattr(demo, "draw", lambda rows, path: None)
    (tmp_path / "unet_target").mkdir()
    demo.main(["--output_dir", str(tmp_path), "--only_compare"])
    assert sampled == ["student"]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_lora_joins_the_table_of_what_is_in_the_folder(finished, tmp_path):
    """With --lora its rows follow those of the first command, which are sampled again and stay as they were."""
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    before = json.loads((folder / "rows.json").read_text())
    printed = run_demo("run.py", "--lora", "--output_dir", folder, "--max_train_steps", 3, "--num_images", PICTURES)
    assert "train_lcm_distill_lora_sd_wds.py" in printed
    rows = json.loads((folder / "rows.json").read_text())
    assert [(row["steps"], row["guidance"]) for row in rows if row["network"] == "LoRA"] == [
        (8, 1),
        (4, 1),
        (2, 1),
        (1, 1),
    ]
    for row in before + rows:
        del row["seconds"]
    assert [row for row in rows if row["network"] != "LoRA"] == before
    shown = [line for line in printed.splitlines() if line.startswith("| ")]
    assert sum("| LoRA |" in line for line in shown) == sum("| student |" in line for line in shown) == 4
    assert set(shown) <= set((folder / "table.md").read_text().splitlines())
    assert Image.open(folder / "comparison.png").width < 1600  # 13 columns


def test_comparison_of_recipes(tmp_path):
    """A line for the teacher and for each recipe; what is finished is not trained again, unless it was another run."""
    command = ["compare.py", "--recipes", "--add", "four=--target phased", "--seeds", 0, "--num_images", 5]
    command += ["--output_dir", tmp_path, "--max_train_steps"]
    table = run_demo(*command, 2)
    assert [line.split(" | ")[0] for line in table.splitlines()] == ["| recipe", "| ---", "| teacher", "| four"]
    assert table == (tmp_path / "full" / "table.md").read_text()
    (four,) = (line for line in table.splitlines() if line.startswith("| four"))
    assert len(re.findall(r"\d+\.\d %, \d+\.\d\d", four)) == 5  # 1, 2, 4, 8 and 16 steps
    log = tmp_path / "full" / "four-0.log"
    log.unlink()
    assert run_demo(*command, 2) == table and not log.exists()
    run_demo(*command, 3)
    assert log.exists()


def test_only_compare_needs_something_to_compare(tmp_path):
    command = [sys.executable, DEMO / "run.py", "--only_compare", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--only_compare" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_shards_can_be_made_again_byte_for_byte(tmp_path):
    run_demo("make_shards.py", "--output_dir", tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in (DEMO / "shards").iterdir())
    for name in made:
        assert (tmp_path / name).read_bytes() == (DEMO / "shards" / name).read_bytes()


def test_teacher_is_an_ordinary_pipeline():
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_TEACHER)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32
    image = pipeline("a fox and a star, night", guidance_scale=3, num_inference_steps=10).images[0]
    assert image.size == (64, 64)


def test_repository_stays_small():
    sizes = {path: path.stat().st_size for path in Path(DEMO).rglob("*") if path.is_file()}
    assert max(sizes.values()) < 5 << 20
    assert sum(sizes.values()) < 28 << 20


def test_evaluation_of_the_demo(finished, tmp_path, monkeypatch, capsys):
    """The README's command for evaluate_lcm.py, with few pictures, on what the first command left."""
    (command,) = re.findall(r"^python evaluate_lcm\.py ((?:.*\\\n)*.*)$", (ROOT / "README.md").read_text(), re.M)
    options = shlex.split(command.replace("\\\n", " ").replace("lcm-demo", str(finished[0])))
    options.remove(f"LoRA={finished[0]}/lora")
    more = ["--output_dir", tmp_path, "--num_images=20", "--num_inference_steps=1", "--teacher_num_inference_steps=20"]
    monkeypatch.chdir(ROOT)
    evaluate_lcm.main([*map(str, [*options, *more])])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["network"], row["steps"]) for row in rows] == [("teacher", 20), ("teacher", 1), ("student", 1)]
    assert rows[0]["all right"] > 0.8 > rows[1]["all right"]
    assert all(row["frechet_distance"] > 0 for row in rows)  # of 20 pictures of few things: no figure to compare
    assert "| Frechet distance to 702 pictures of heldout-00000.tar |" in capsys.readouterr().out


def test_prompts_are_all_captions():
    captions = runpy.run_path(str(DEMO / "world.py"))["all_captions"]()
    assert (DEMO / "prompts.txt").read_text().splitlines() == captions
