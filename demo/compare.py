"""Compare the targets of distillation on the demo world, over several seeds with equal budgets, in one table.

    python demo/compare.py                      # whole U-Nets
    python demo/compare.py --lora               # LoRAs
    python demo/compare.py --recipes lcm phased --add "phased, learning rate 5e-4=--target phased --learning_rate 5e-4"

Every recipe is the demo's command (run.py) with a few more options: the same teacher, pictures, batch size and steps.
A seed changes the training, and the captions and the noise of the sampling. The cells hold the share of pictures in
which everything is right and the Frechet distance, each as the mean over the seeds and, in parentheses, its range.

A run that is finished is kept in --output_dir and not repeated, so a killed comparison goes on where it was. Options
that are not listed below go to the training script of all recipes, but not to a public script. `comparison.png` shows
the first captions of the first seed.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import run
from PIL import Image

STEPS = (1, 2, 4, 8, 16)
UNGUIDED = "--w_min 0 --w_max 0 --proportion_empty_prompts 0.1"
# What each recipe adds to the demo's command.
RECIPES = {
    "lcm": "--target lcm",
    "phased": "--target phased --num_phases 4",
    "phased, falling": "--target phased --num_phases 8 4 2 1",
    "trajectory": "--target trajectory",
    "unguided": f"--target lcm {UNGUIDED}",
    "unguided, phased": f"--target phased --num_phases 4 {UNGUIDED}",
    "two solver steps": "--target lcm --num_solver_steps 2",
}
# Next to no pictures while it trains.
FEW_PICTURES = ["--validation_steps=1000000", "--validation_teacher_steps", "--validation_num_inference_steps=1"]
TEACHER = "teacher"
PUBLIC = "public script"
# Options of the demo's command that the public scripts do not have, or read in another way.
NOT_PUBLIC = ("validation_num_inference_steps", "validation_prompts", "validation_guidance_scale")


def slug(name: str) -> str:
    """A file name for a recipe."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def train_and_measure(name: str, more: str, seed: int, folder: Path, args: argparse.Namespace) -> Path:
    """Train one recipe with one seed and measure it; returns the file of its rows. Finished files are kept."""
    result = folder / f"{slug(name)}-{seed}.json"
    about = [more, args.num_images, 0 if name == TEACHER else args.max_train_steps]
    if result.exists() and json.loads(result.read_text())["about"] == about:
        return result
    run.quieten()
    import evaluate
    import torch
    from safetensors.torch import load_file, save_file

    from lcm.models.lora_files import DIFFUSERS_FILE

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    student, start = folder / f"{slug(name)}-{seed}", time.perf_counter()
    scale = run.GUIDANCE_SCALE
    if name == TEACHER:
        pipes = {
            steps: [(evaluate.load_pipeline(run.HERE / "teacher", sampler=sampler), scale) for sampler, scale in few]
            for steps, few in run.TEACHER_SAMPLERS.items()
        }
    else:
        shutil.rmtree(student, ignore_errors=True)
        about_run = (str(student), args.lora, seed, args.max_train_steps)
        command = run.training_command(*about_run, [*FEW_PICTURES, *shlex.split(more)])
        if name == PUBLIC:
            known = {k: value for k, value in run.training_options(*about_run).items() if k not in NOT_PUBLIC}
            more_of_theirs = {"max_train_samples": 4000, "validation_steps": 1_000_000}
            command = [*shlex.split(args.public_script), *run.as_arguments(known | more_of_theirs)]
        with open(student.with_suffix(".log"), "wb") as log:
            subprocess.run(command, cwd=run.ROOT, check=True, stdout=log, stderr=log)
        if name == PUBLIC:  # it writes no scheduler, and a LoRA to a folder of its own
            pipe = evaluate.load_pipeline(run.HERE / "teacher")
            scheduler = evaluate.samplers.make_scheduler("lcm", pipe.scheduler, original_inference_steps=run.GRID)
            scheduler.save_pretrained(student / "scheduler")
            if args.lora:
                weights = load_file(student / "unet_lora" / DIFFUSERS_FILE)  # with keys that diffusers cannot load
                weights = {key.replace("base_model.model.", ""): tensor for key, tensor in weights.items()}
                save_file(weights, student / DIFFUSERS_FILE)
        pipe, _ = evaluate.load_student(student)
        has_learned_guidance = args.lora and UNGUIDED not in more
        pipes = {steps: [(pipe, 1.0 if has_learned_guidance else scale)] for steps in STEPS}
    seconds = time.perf_counter() - start
    captions, rows = run.choose_captions(args.num_images, seed), []
    for steps, candidates in pipes.items():
        measured = [evaluate.measure(pipe, captions, steps, guidance, seed) for pipe, guidance in candidates]
        rows.append({"name": name, "seed": seed, "training": seconds, **run.most_accurate(measured)})
    pictures = torch.stack([row.pop("pictures")[: len(run.SHOWN)] for row in rows])
    strip = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # a row of pictures for each number of steps
    Image.fromarray(strip.numpy()).save(result.with_suffix(".png"))
    result.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    shutil.rmtree(student, ignore_errors=True)
    return result


def cell(values: list[float], form: str, factor: float = 1) -> str:
    """The mean of values and, if there are several, their range."""
    mean = f"{factor * sum(values) / len(values):{form}}"
    return mean + (f" ({factor * min(values):{form}}-{factor * max(values):{form}})" if len(values) > 1 else "")


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A table with a line for each recipe and a column for each number of steps."""
    columns = sorted({row["steps"] for row in rows})
    lines = ["| " + " | ".join(["recipe", *(f"{steps} step{'s' * (steps > 1)}" for steps in columns)]) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for steps in columns:
            found = [row for row in rows if (row["name"], row["steps"]) == (name, steps)]
            shares, distances = ([row[key] for row in found] for key in ("all right", "distance"))
            cells.append(f"{cell(shares, '.1f', 100)} %, {cell(distances, '.2f')}" if found else "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], folder: Path, seed: int, count: int = 2) -> None:
    """Write comparison.png: a row for each recipe, `count` pictures for each number of steps."""
    from lcm.pictures.grid import picture_grid

    columns, size, cells = sorted({row["steps"] for row in rows}), 64, []
    names = list(dict.fromkeys(row["name"] for row in rows))
    blank = Image.new("RGB", (size, size), "white")
    for name in names:
        strip = Image.open(folder / f"{slug(name)}-{seed}.png")
        steps = [row["steps"] for row in rows if (row["name"], row["seed"]) == (name, seed)]
        places = [(i * size, steps.index(n) * size) if n in steps else None for n in columns for i in range(count)]
        cells.append([strip.crop((*at, at[0] + size, at[1] + size)) if at else blank for at in places])
    labels = [f"{steps} step{'s' * (steps > 1)}" for steps in columns for _ in range(count)]
    groups = range(count, len(labels), count)
    picture_grid(cells, names, labels, cell_size=96, group_gap=list(groups)).save(folder / "comparison.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--lora", action="store_true", help="train LoRAs")
    add("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES), help="default: all", metavar="NAME")
    add("--add", nargs="+", action="extend", default=[], metavar="NAME=OPTIONS", help="further recipes")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--max_train_steps", type=int, default=500, help="optimizer steps of every run (default: 500)")
    add("--num_images", type=int, default=500, help="pictures of every figure (default: 500)")
    add("--jobs", type=int, default=1, help="runs at the same time, which share the cores (default: 1)")
    add("--public_script", metavar="COMMAND", help="also run a public script: its path, after a Python if need be")
    add("--output_dir", type=Path, default=Path("lcm-compare"), help="where runs are kept (default: lcm-compare)")
    args, args.more = parser.parse_known_args(argv)
    folder = (args.output_dir / ("lora" if args.lora else "full")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recipes = {TEACHER: "", **({PUBLIC: ""} if args.public_script else {})}
    recipes |= {name: shlex.join([*shlex.split(RECIPES[name]), *args.more]) for name in args.recipes}
    for text in args.add:
        name, equals, options = text.partition("=")
        if not equals:
            parser.error(f"--add: {text!r} has no =; allowed: NAME=OPTIONS")
        recipes[name] = shlex.join([*shlex.split(options), *args.more])

    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        todo = [(name, more, seed, folder, args) for seed in args.seeds for name, more in recipes.items()]
        results = []
        for (name, *_), future in zip(todo, [pool.submit(train_and_measure, *job) for job in todo], strict=True):
            results.append(future.result())
            print(f"{len(results)} of {len(todo)}: {name}", file=sys.stderr, flush=True)
    rows = [row for path in results for row in json.loads(path.read_text())["rows"]]
    draw(rows, folder, args.seeds[0])
    table = as_markdown(rows)
    (folder / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
