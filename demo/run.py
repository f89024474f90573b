"""The demo: distil the built-in teacher with a training script, then compare teacher and student in one table.

    python demo/run.py           # a U-Net
    python demo/run.py --lora    # a LoRA

1. `accelerate launch train_lcm_distill_sd_wds.py`, or `train_lcm_distill_lora_sd_wds.py`, on demo/teacher and
   demo/shards, with the options below. To distil a model of your own, change the two paths.
2. Samples the teacher (50 steps, and its best samplers at few) and the student, the LoRA, or both if both are in the
   output folder, and measures the share of pictures that match their captions, the Frechet distance to held-out
   pictures, and the seconds per picture.
3. Writes `comparison.png`, `table.md` and `rows.json` to the output folder, and prints the table.

Options that are not listed below go to the training script: `python demo/run.py --target phased`.
"""

import argparse
import importlib.util
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(1, str(ROOT))

GUIDANCE_SCALE = 3.0
GRID = 20  # points of the solver's grid
FEW_STEPS = (8, 4, 2, 1)
# The teacher's best samplers and guidance scales at few steps, of all that were tried (demo/README.md).
TEACHER_SAMPLERS = {
    50: [("ddim", 3.0)],
    8: [("dpm++-trailing", 3.0)],
    4: [("dpm++-trailing", 3.0)],
    2: [("dpm++-trailing", 2.0)],
    1: [("ddim-trailing", 3.0)],
}
# Of the targets that compare.py compares, the one that is best at 2 steps and good at all (docs/targets.md).
TARGET = ["--target=trajectory"]
# For each student its files in the output folder, and the guidance scale to sample with. A LoRA has learned its
# guidance: 1 adds no more.
STUDENTS = {
    "student": ("unet_target", GUIDANCE_SCALE),
    "LoRA": ("lora/pytorch_lora_weights.safetensors", 1.0),
}
SHOWN = (
    "a fox and a star, night",
    "a frog, meadow",
    "a crown and a fish, sea",
    "a car and a tree, desert",
    "an apple and a cat, snow",
)


def training_options(folder: str, lora: bool, seed: int, max_train_steps: int) -> dict[str, Any]:
    """The options of the script that trains a student of the demo's teacher, by name."""
    options = {
        "pretrained_teacher_model": HERE / "teacher",
        "train_shards_path_or_url": HERE / "shards" / "train-{00000..00003}.tar",
        "output_dir": folder,
        "resolution": 64,
        "train_batch_size": 32,
        "max_train_steps": max_train_steps,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "num_ddim_timesteps": GRID,
        "loss_type": "huber",
        "dataloader_num_workers": 1,
        "checkpoints_total_limit": 1,
        "validation_num_inference_steps": (1, 2, 4),
        "validation_prompts": SHOWN,
        "seed": seed,
    }
    if lora:
        options |= {
            "learning_rate": 2e-3,
            "lora_rank": 16,
            "lora_alpha": 16,
            "w_min": 2,  # a LoRA has no input for w, so it learns one value, the guidance scale - 1
            "w_max": 2,
        }
    else:
        options |= {
            "learning_rate": 7e-4,
            "ema_decay": 0.95,
            "w_min": 1,
            "w_max": 3,
            "validation_guidance_scale": GUIDANCE_SCALE,
        }
    return options


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as they stand in a command."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))
    ]


def training_command(folder: str, lora: bool, seed: int, max_train_steps: int, more: Sequence[str] = ()) -> list[str]:
    """The command that trains a student of the demo's teacher; `more` are further options, in place of the demo's."""
    script = f"train_lcm_distill_{'lora_sd' if lora else 'sd'}_wds.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", script]
    given = {word.partition("=")[0] for word in more}  # in place of the demo's
    options = training_options(folder, lora, seed, max_train_steps).items()
    return [*command, *as_arguments({name: value for name, value in options if f"--{name}" not in given}), *more]


def train(args: argparse.Namespace) -> None:
    """Run the training script through `accelerate launch`; its progress bar shows in this terminal."""
    folder = os.path.join(args.output_dir, "lora") if args.lora else args.output_dir
    target = [] if any(word.split("=")[0] == "--target" for word in args.more) else TARGET
    command = training_command(folder, args.lora, args.seed, args.max_train_steps, [*target, *args.more])
    print(shlex.join(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def quieten() -> None:
    """Leave only what the demo itself prints, here and in the scripts that it starts."""
    # Idle threads that busy-wait slow down a busy machine many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def choose_captions(count: int, seed: int) -> list[str]:
    """`count` captions: those that are shown, then others."""
    import evaluate

    return [*SHOWN, *evaluate.choose_captions(count - len(SHOWN), seed)]


def compare(args: argparse.Namespace, students: list[str]) -> list[dict[str, Any]]:
    """All rows: every teacher sampler, from 50 steps down, and the students at few steps."""
    import evaluate

    captions = choose_captions(args.num_images, args.seed)
    rows = []

    def add(network: str, pipeline: Any, sampler: str, steps: int, guidance_scale: float) -> None:
        row = evaluate.measure(pipeline, captions, steps, guidance_scale, args.seed)
        rows.append({"network": network, "sampler": sampler, **row})
        print(
            f"{network}, {steps} steps, {sampler}, guidance {guidance_scale:g}: {row['all right']:.1%} right, "
            f"distance {row['distance']:.2f}",
            flush=True,
        )

    for steps, candidates in TEACHER_SAMPLERS.items():
        for sampler, scale in candidates:
            add("teacher", evaluate.load_pipeline(HERE / "teacher", sampler=sampler), sampler, steps, scale)
    for name in students:
        made, scale = STUDENTS[name]
        pipeline, sampler = evaluate.load_student(Path(args.output_dir, made).parent)
        for steps in FEW_STEPS:
            add(name, pipeline, sampler, steps, scale)
    return rows


def most_accurate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the most right pictures; of equals, the one with the least distance."""
    return max(rows, key=lambda row: (row["all right"], -row["distance"]))


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows to show: for each number of steps, the teacher's most accurate sampler and the students."""
    shown = [rows[0]]
    for steps in FEW_STEPS:
        candidates = [r for r in rows if r["network"] == "teacher" and r["steps"] == steps]
        students = [r for r in rows if r["network"] != "teacher" and r["steps"] == steps]
        shown += [most_accurate(candidates), *students]
    return shown


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| steps | network | sampler | guidance | things | background | all right | Frechet distance | s / image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['steps']} | {r['network']} | {r['sampler']} | {r['guidance']:g} | {r['things']:.1%} "
        f"| {r['background']:.1%} | {r['all right']:.1%} | {r['distance']:.2f} | {r['seconds']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One picture: a column for each row of the table, a row for each of the first captions."""
    from PIL import Image

    from lcm.pictures.grid import picture_grid

    pictures = [[Image.fromarray(r["pictures"][i].permute(1, 2, 0).numpy()) for r in rows] for i in range(len(SHOWN))]
    labels = [
        f"{r['network']}\n{r['steps']} step{'s' * (r['steps'] > 1)}\n{r['sampler']}\nguidance {r['guidance']:g}"
        for r in rows
    ]
    starts = [i for i in range(1, len(rows)) if rows[i]["steps"] != rows[i - 1]["steps"]]
    picture_grid(pictures, SHOWN, labels, cell_size=96, group_gap=starts).save(path)


def playground_lines(folder: str, students: list[str]) -> str:
    """How to draw with what was trained, while typing; `folder` is absolute, `students` are names in STUDENTS."""
    place = os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder
    trained = [f"{name}={Path(place, STUDENTS[name][0]).parent}" for name in students]
    own = ROOT / ".venv" / "bin" / "python"  # of `make demo`, which need not be activated
    python = os.path.relpath(own) if Path(sys.prefix) == ROOT / ".venv" and own.exists() else "python"
    command = [python, os.path.relpath(ROOT / "playground.py")]
    command += ["--pretrained_teacher_model", os.path.relpath(HERE / "teacher"), "--trained", *trained]
    command += ["--guidance_scale", f"{GUIDANCE_SCALE:g}"]
    needed = "" if importlib.util.find_spec("gradio") else 'pip install "gradio>=6.17.3"\n'
    return f"To draw while you type:\n{needed}{shlex.join(command)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lora", action="store_true", help="distil a LoRA, into the folder lora of --output_dir")
    parser.add_argument("--output_dir", default="lcm-demo", help="where everything is written (default: lcm-demo)")
    parser.add_argument("--max_train_steps", type=int, default=500, help="optimizer steps (default: 500)")
    parser.add_argument("--num_images", type=int, default=200, help="pictures a row of the table (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling (default: 0)")
    parser.add_argument("--only_compare", action="store_true", help="do not train; sample what is in --output_dir")
    args, args.more = parser.parse_known_args(argv)
    args.output_dir = os.path.abspath(args.output_dir)
    if args.num_images < len(SHOWN):
        parser.error(f"--num_images: at least {len(SHOWN)}, the captions of comparison.png")
    quieten()
    started = time.perf_counter()
    if not args.only_compare:
        train(args)
    folder = Path(args.output_dir)
    students = [name for name, (made, _) in STUDENTS.items() if (folder / made).exists()]
    if not students:
        parser.error(f"--only_compare: {folder} holds neither a student nor a LoRA")
    print(f"\nSampling {' and '.join(['teacher', *students])}:", flush=True)
    rows = compare(args, students)
    shown = best_rows(rows)
    draw(shown, folder / "comparison.png")
    (folder / "table.md").write_text(as_markdown(rows) + "\n")
    numbers = [{name: value for name, value in row.items() if name != "pictures"} for row in rows]
    (folder / "rows.json").write_text(json.dumps(numbers, indent=1))
    print(f"\n{as_markdown(shown)}\n")
    print(f"{folder}/comparison.png: the pictures; {folder}/table.md: the same table, by network")
    print(f"{time.perf_counter() - started:.0f} seconds in all")
    print(f"\n{playground_lines(args.output_dir, students)}")


if __name__ == "__main__":
    main()
