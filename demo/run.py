"""The demo: distil the built-in teacher with the very script that users run, then compare the two in one table.

    python demo/run.py

1. `accelerate launch train_lcm_distill_sd_wds.py` on demo/teacher and demo/shards, with the options below. To distil
   a model of your own, change the two paths.
2. Samples the teacher (50 steps, and each of its few-step samplers at 4, 2 and 1) and the student (4, 2 and 1), and
   measures: is what the caption asks for in the picture, how far are the pictures from held-out ones, what do they cost.
3. Writes `comparison.png`, `table.md` and `rows.json` to the output folder, and prints the table.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))

TEACHER_SAMPLERS = ("ddim-trailing", "dpm++", "dpm++-trailing", "unipc-trailing")
FEW_STEPS = (4, 2, 1)
SHOWN = ("a red three on a white background", "a green seven on a black background", "a blue two on a white background",
         "a red five on a black background", "a purple eight on a white background")  # fmt: skip


def training_options(args):
    """Options of the training script. Every one of them is explained in its `--help`."""
    return {
        "pretrained_teacher_model": HERE / "teacher",
        "train_shards_path_or_url": HERE / "shards" / "train-{00000..00005}.tar",
        "output_dir": args.output_dir,
        "resolution": 32,
        "train_batch_size": 32,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "ema_decay": args.ema_decay,
        "w_min": 1,
        "w_max": 3,
        "num_ddim_timesteps": 50,
        "loss_type": "huber",
        "dataloader_num_workers": 1,
        "checkpointing_steps": 500,
        "checkpoints_total_limit": 1,
        "validation_steps": 200,
        "validation_prompts": SHOWN,
        "validation_num_inference_steps": (1, 2, 4),
        "validation_guidance_scale": args.guidance_scale,
        "seed": args.seed,
    }


def train(args):
    """Run the training script through `accelerate launch`; its progress bar shows in this terminal."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1",
               "--mixed_precision=no", "--dynamo_backend=no", "train_lcm_distill_sd_wds.py"]  # fmt: skip
    for name, value in training_options(args).items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name}", *map(str, values)]
    command += args.more
    print(" ".join(f"'{part}'" if " " in part else part for part in command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


class Bench:
    """Samples pipelines on the same captions from the same noise, and measures what they give."""

    def __init__(self, args):
        import diffusers
        import evaluate
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.args, self.evaluate = args, evaluate
        self.captions = evaluate.choose_captions(args.num_images, args.seed)
        self.real_images, _ = evaluate.load_heldout()

    def row(self, name, steps, unet=None, scheduler=None):
        """One row of the table, as a dict; `pictures` are the sampled ones (N, 3, H, W) uint8."""
        pipeline = self.evaluate.load_pipeline(HERE / "teacher", unet, None if unet else scheduler)
        if unet:
            from diffusers import LCMScheduler

            pipeline.scheduler = LCMScheduler.from_pretrained(self.args.output_dir, subfolder="scheduler")
        sample = [pipeline, self.captions, steps, self.args.guidance_scale, self.args.seed]
        pictures, seconds = self.evaluate.sample(*sample)
        digit, colour, everything = self.evaluate.accuracy(pictures, self.captions)
        row = {
            "network": name,
            "sampler": scheduler,
            "steps": steps,
            "digit": digit,
            "colour": colour,
            "all": everything,
            "distance": self.evaluate.frechet_distance(pictures, self.real_images),
            "seconds": seconds,
        }
        print(f"{name}, {scheduler}, {steps} steps: {everything:.1%} right, distance {row['distance']:.2f}", flush=True)
        return {**row, "pictures": pictures}


def compare(args):
    """All rows: the teacher at 50 steps, each teacher sampler and the student at few steps."""
    bench = Bench(args)
    rows = [bench.row("teacher", 50, scheduler="ddim")]
    rows += [bench.row("teacher", steps, scheduler=name) for steps in FEW_STEPS for name in TEACHER_SAMPLERS]
    unet = Path(args.output_dir) / "unet_target"
    rows += [bench.row("student", steps, unet=unet, scheduler="lcm") for steps in FEW_STEPS]
    return bench.captions, rows


def best_rows(rows):
    """The rows to show: of the teacher's samplers at few steps, the one that gets most pictures right."""
    few = [max((r for r in rows if r["network"] == "teacher" and r["steps"] == s), key=lambda r: (r["all"], -r["distance"]))
           for s in FEW_STEPS]  # fmt: skip
    return [rows[0], *few, *(r for r in rows if r["network"] == "student")]


def as_markdown(rows):
    """The rows as a Markdown table."""
    lines = [
        "| | sampler | steps | digit | colour | all right | Frechet distance | s / image |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['network']} | {r['sampler']} | {r['steps']} | {r['digit']:.1%} | {r['colour']:.1%} | {r['all']:.1%} "
        f"| {r['distance']:.2f} | {r['seconds']:.4f} |"
        for r in rows
    ]
    return "\n".join(lines)


def draw(captions, rows, path):
    """One picture: a column for each row of the table, a row for each of a few captions."""
    from PIL import Image

    from lcm_validation import picture_grid

    chosen = [captions.index(caption) for caption in SHOWN]
    pictures = [[Image.fromarray(r["pictures"][i].permute(1, 2, 0).numpy()) for r in rows] for i in chosen]
    labels = [f"{r['network']}\n{r['steps']} step{'s' * (r['steps'] > 1)}\n{r['sampler']}" for r in rows]
    picture_grid(pictures, SHOWN, labels, cell_size=96, group_gap=(1, 4)).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="lcm-demo", help="where everything is written (default: lcm-demo)")
    parser.add_argument("--max_train_steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="(default: 1e-3)")
    parser.add_argument("--ema_decay", type=float, default=0.95, help="(default: 0.95)")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="for teacher and student (default: 3)")
    parser.add_argument("--num_images", type=int, default=500, help="pictures a row of the table (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling (default: 0)")
    parser.add_argument("--only_compare", action="store_true", help="do not train; sample what --output_dir holds")
    args, args.more = parser.parse_known_args(argv)  # further options go to the training script

    # Idle threads that spin make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    started = time.perf_counter()
    if not args.only_compare:
        train(args)
    captions, rows = compare(args)
    shown, folder = best_rows(rows), Path(args.output_dir)
    draw(captions, shown, folder / "comparison.png")
    (folder / "table.md").write_text(as_markdown(rows) + "\n")
    for row in rows:
        del row["pictures"]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    print(f"\n{as_markdown(shown)}\n\n{folder}/comparison.png: the pictures; {folder}/table.md: every sampler")
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
