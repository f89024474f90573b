"""The demo: distil the built-in teacher with a training script, then compare teacher and student in one table.

    python demo/run.py           # a U-Net
    python demo/run.py --lora    # a LoRA

1. `accelerate launch train_lcm_distill_sd_wds.py`, or `train_lcm_distill_lora_sd_wds.py`, on demo/teacher and
   demo/shards, with the options below. To distil a model of your own, change the two paths.
2. Samples the teacher (50 steps, and its best samplers at 4, 2 and 1) and the student, the LoRA, or both if both are
   in the output folder (4, 2 and 1), and measures the share of pictures that match their captions, the Frechet
   distance to held-out pictures, and the seconds per picture.
3. Writes `comparison.png`, `table.md` and `rows.json` to the output folder, and prints the table.

Options that are not listed below go to the training script: `python demo/run.py --learning_rate 5e-4`.
"""

import argparse
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

# The teacher's best few-step samplers, of seven that were tried at guidance scales from 1 to 7 (demo/README.md). Its
# pictures at 1 and 2 steps are better with a low guidance scale, so both scales are tried; the table has the better.
GUIDANCE_SCALE = 3.0
TEACHER_SAMPLERS = [(name, scale) for name in ("ddim-trailing", "dpm++") for scale in (GUIDANCE_SCALE, 1.5)]
FEW_STEPS = (4, 2, 1)
# For each student its files in the output folder, and the guidance scale to sample with. A LoRA has learned its
# guidance: 1 adds no more.
STUDENTS = {
    "student": ("unet_target", GUIDANCE_SCALE),
    "LoRA": ("lora/pytorch_lora_weights.safetensors", 1.0),
}
SHOWN = (
    "a red three on a white background",
    "a green seven on a black background",
    "a blue two on a white background",
    "a red five on a black background",
    "a purple eight on a white background",
)


def train(args: argparse.Namespace) -> None:
    """Run the training script through `accelerate launch`; its progress bar shows in this terminal."""
    options = {
        "pretrained_teacher_model": HERE / "teacher",
        "train_shards_path_or_url": HERE / "shards" / "train-{00000..00005}.tar",
        "resolution": 32,
        "train_batch_size": 32,
        "max_train_steps": args.max_train_steps,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "num_ddim_timesteps": 20,
        "loss_type": "huber",
        "dataloader_num_workers": 1,
        "checkpoints_total_limit": 1,
        "validation_num_inference_steps": (1, 2, 4),
        "validation_prompts": SHOWN,
        "seed": args.seed,
    }
    if args.lora:
        script = "train_lcm_distill_lora_sd_wds.py"
        options |= {
            "output_dir": os.path.join(args.output_dir, "lora"),
            "learning_rate": 2e-3,
            "lora_rank": 16,
            "lora_alpha": 16,
            "w_min": 2,  # a LoRA has no input for w, so it learns one value, the guidance scale - 1
            "w_max": 2,
        }
    else:
        script = "train_lcm_distill_sd_wds.py"
        options |= {
            "output_dir": args.output_dir,
            "learning_rate": 7e-4,
            "ema_decay": 0.95,
            "w_min": 1,
            "w_max": 3,
            "validation_guidance_scale": GUIDANCE_SCALE,
        }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", script]
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    command += args.more
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


class Bench:
    """Samples networks on the same captions from the same noise, and measures the pictures."""

    def __init__(self, args: argparse.Namespace):
        import diffusers
        import evaluate
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.evaluate = args, evaluate
        self.captions = evaluate.choose_captions(args.num_images, args.seed)

    def load(self, network: str, sampler: str) -> Any:
        """The pipeline that samples a network, built as users do it."""
        if network == "teacher":
            return self.evaluate.load_pipeline(HERE / "teacher", sampler=sampler)
        from diffusers import LCMScheduler

        folder = Path(self.args.output_dir)
        if network == "LoRA":
            folder /= "lora"
            pipeline = self.evaluate.load_pipeline(HERE / "teacher")
            pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        else:
            pipeline = self.evaluate.load_pipeline(HERE / "teacher", unet=folder / "unet_target")
        pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
        return pipeline

    def row(self, network: str, steps: int, sampler: str, guidance_scale: float = GUIDANCE_SCALE) -> dict[str, Any]:
        """One row of the table, as a dict; `pictures` are the sampled ones (N, 3, H, W) uint8."""
        pipeline = self.load(network, sampler)
        pictures, seconds = self.evaluate.sample(pipeline, self.captions, steps, guidance_scale, self.args.seed)
        digit, colour, everything = self.evaluate.accuracy(pictures, self.captions).values()
        distance = self.evaluate.frechet_distance(pictures)
        print(
            f"{network}, {steps} steps, {sampler}, guidance {guidance_scale:g}: {everything:.1%} right, "
            f"distance {distance:.2f}",
            flush=True,
        )
        return {
            "network": network,
            "steps": steps,
            "sampler": sampler,
            "guidance": guidance_scale,
            "digit": digit,
            "colour": colour,
            "all": everything,
            "distance": distance,
            "seconds": seconds,
            "pictures": pictures,
        }


def compare(args: argparse.Namespace, students: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """(captions, all rows): the teacher at 50 steps, every teacher sampler and the students at few steps."""
    bench = Bench(args)
    rows = [bench.row("teacher", 50, "ddim")]
    rows += [bench.row("teacher", steps, *sampler) for steps in FEW_STEPS for sampler in TEACHER_SAMPLERS]
    rows += [bench.row(name, steps, "lcm", STUDENTS[name][1]) for name in students for steps in FEW_STEPS]
    return bench.captions, rows


def best_rows(rows: list[dict[str, Any]], best_only: bool = False) -> list[dict[str, Any]]:
    """The rows to show: for each number of few steps, the teacher's most accurate sampler at the students' guidance
    scale (unless `best_only`), its most accurate sampler at any scale, and the students."""
    shown = [rows[0]]
    for steps in FEW_STEPS:
        candidates = [r for r in rows if r["network"] == "teacher" and r["steps"] == steps]
        best = max(candidates, key=lambda r: (r["all"], -r["distance"]))
        same_guidance = [r for r in candidates if r["guidance"] == GUIDANCE_SCALE]
        best_at_same = max(same_guidance, key=lambda r: (r["all"], -r["distance"]))
        students = [r for r in rows if r["network"] != "teacher" and r["steps"] == steps]
        shown += [*([] if best_only or best_at_same is best else [best_at_same]), best, *students]
    return shown


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| steps | network | sampler | guidance | digit | colour | all right | Frechet distance | s / image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['steps']} | {r['network']} | {r['sampler']} | {r['guidance']:g} | {r['digit']:.1%} | {r['colour']:.1%} "
        f"| {r['all']:.1%} | {r['distance']:.2f} | {r['seconds']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def draw(captions: list[str], rows: list[dict[str, Any]], path: Path) -> None:
    """One picture: a column for each row of the table, a row for each of a few captions."""
    from PIL import Image

    from lcm.pictures.grid import picture_grid

    chosen = [captions.index(caption) for caption in SHOWN]
    pictures = [[Image.fromarray(r["pictures"][i].permute(1, 2, 0).numpy()) for r in rows] for i in chosen]
    labels = [
        f"{r['network']}\n{r['steps']} step{'s' * (r['steps'] > 1)}\n{r['sampler']}\nguidance {r['guidance']:g}"
        for r in rows
    ]
    starts = [i for i in range(1, len(rows)) if rows[i]["steps"] != rows[i - 1]["steps"]]
    picture_grid(pictures, SHOWN, labels, cell_size=96, group_gap=starts).save(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lora", action="store_true", help="distil a LoRA, into the folder lora of --output_dir")
    parser.add_argument("--output_dir", default="lcm-demo", help="where everything is written (default: lcm-demo)")
    parser.add_argument("--max_train_steps", type=int, default=700, help="optimizer steps (default: 700)")
    parser.add_argument("--num_images", type=int, default=500, help="pictures a row of the table (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling (default: 0)")
    parser.add_argument("--only_compare", action="store_true", help="do not train; sample what is in --output_dir")
    args, args.more = parser.parse_known_args(argv)
    args.output_dir = os.path.abspath(args.output_dir)
    if args.num_images < 100:
        parser.error("--num_images: at least 100, one for each caption")

    # Idle threads that busy-wait slow down a busy machine many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    started = time.perf_counter()
    if not args.only_compare:
        train(args)
    folder = Path(args.output_dir)
    students = [name for name, (made, _) in STUDENTS.items() if (folder / made).exists()]
    if not students:
        parser.error(f"--only_compare: {folder} holds neither a student nor a LoRA")
    print(f"\nSampling {' and '.join(['teacher', *students])}:", flush=True)
    captions, rows = compare(args, students)
    shown = best_rows(rows)
    # With two students, two columns of the teacher as well would make the picture too wide.
    draw(captions, best_rows(rows, best_only=len(students) > 1), folder / "comparison.png")
    (folder / "table.md").write_text(as_markdown(rows) + "\n")
    numbers = [{name: value for name, value in row.items() if name != "pictures"} for row in rows]
    (folder / "rows.json").write_text(json.dumps(numbers, indent=1))
    print(f"\n{as_markdown(shown)}\n\n{folder}/comparison.png: the pictures; {folder}/table.md: every sampler")
    print(f"{time.perf_counter() - started:.0f} seconds in all")


if __name__ == "__main__":
    main()
