"""Compare trained networks with their teacher, in a table and in a picture.

python evaluate_lcm.py \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --trained U-Net=lcm-sd15 LoRA=lcm-lora-sd15 \\
    --prompts=prompts.txt --num_images=1000 --reference_images=path/to/pictures --output_dir=lcm-evaluation

Draws the same prompts from the same noise: with the teacher in many steps and in few, and with each trained network in
few. Writes output_dir/README.md (the table, and how it was measured), output_dir/results.json and output_dir/grid.png.
"""

import importlib.util
import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lcm.errors import UserError, first_line, run
from lcm.options.choices import SAMPLERS, STUDENT_SAMPLERS, VALIDATION_PROMPTS
from lcm.options.files import read_labels, read_prompts
from lcm.options.groups import add_model_options
from lcm.options.types import Options, Parser, integer, make_parser, number
from lcm.secrets import redact_arguments

if TYPE_CHECKING:
    import torch
    from PIL import Image

# The teacher's. With "leading" timesteps, diffusers' default, a single step is at t = 0 or 1 and leaves the noise.
SAMPLER_MANY_STEPS, SAMPLER_FEW_STEPS = "ddim", "ddim-trailing"
GRID_ROWS, LARGEST_CELL = 5, 256  # of grid.png: prompts, and pixels a side of a picture
COLUMNS = {  # key in a row: (heading, format of the values)
    "network": ("network", "{}"),
    "steps": ("steps", "{}"),
    "sampler": ("sampler", "{}"),
    "guidance_scale": ("guidance", "{:g}"),
    "seconds": ("s / image", "{:.4f}"),
    "clip_score": ("CLIP score", "{:z.2f}"),
    "frechet_distance": ("Frechet distance", "{:z.2f}"),
    "teacher_rmse": ("RMSE to teacher", "{:.4f}"),
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The checked options. Heavy imports come later, so that a wrong option is reported at once."""
    parser = make_parser(__doc__)
    add_model_options(parser)
    add = parser.add_argument_group("what is compared").add_argument
    add("--trained", nargs="+", required=True, metavar="[LABEL=]FOLDER_OR_ID",
        help="The trained U-Nets and LoRAs: output folders, checkpoints or Hub ids. Each is sampled with its own "
             "scheduler/.")
    add("--variant", metavar="NAME",
        help="Variant of the teacher's weight files, such as fp16.")
    add("--output_dir", default="lcm-evaluation", metavar="FOLDER",
        help="Folder for the table, the numbers and the pictures.")

    add = parser.add_argument_group("sampling").add_argument
    add("--prompts", nargs="+", default=VALIDATION_PROMPTS, metavar="PROMPT_OR_FILE",
        help="Prompts, or a text file with one prompt in each line.")
    add("--num_images", type=integer(2), default=100, metavar="N",
        help="Pictures for each row of the table; the prompts are repeated in order.")
    add("--num_inference_steps", nargs="+", type=integer(1, 1000), default=[1, 2, 4, 8], metavar="STEPS",
        help="Few steps, for the teacher and for all trained networks.")
    add("--teacher_num_inference_steps", type=integer(1, 1000), default=50, metavar="STEPS",
        help="Many steps, for the teacher only: its pictures are what the others should match.")
    add("--teacher_scheduler", choices=[*(name for name in SAMPLERS if name not in STUDENT_SAMPLERS), "own"],
        help="The teacher's sampler; `own` is that of its scheduler/, `ddim` has the same timestep spacing. If unset: "
             f"{SAMPLER_MANY_STEPS} for many steps, {SAMPLER_FEW_STEPS} for few.")
    add("--guidance_scale", type=number(1), default=7.5, metavar="SCALE",
        help="Guidance of the teacher and of U-Nets; keep it inside [w_min + 1, w_max + 1] of their training.")
    add("--lora_guidance_scale", type=number(1), default=1.0, metavar="SCALE",
        help="Guidance of LoRAs, which have learned theirs: 1 adds no more.")
    add("--resolution", type=integer(8), metavar="PIXELS",
        help="Width and height of the pictures. If unset: the size of the teacher's U-Net.")
    add("--batch_size", type=integer(1), default=8, metavar="PICTURES",
        help="Pictures that are drawn at once; the seconds per image depend on it.")
    add("--seed", type=integer(0, 2**32 - 1), default=0,
        help="Seed of the noise. The noise of a picture depends only on the seed and the picture's number.")
    add("--dtype", choices=["float32", "float16", "bfloat16"],
        help="Dtype of all networks but CLIP and the feature network. If unset: float16 on a GPU, else float32.")

    add = parser.add_argument_group("measures").add_argument
    add("--clip_model", default="openai/clip-vit-base-patch16", metavar="ID_OR_FOLDER",
        help="The CLIP model of the CLIP score; `none` leaves that column out.")
    add("--feature_network", default="clip", metavar="clip|inception|FILE.py:NAME|none",
        help="The features of the Frechet distance: the embeddings of --clip_model, torchmetrics' Inception (needs "
             "torch-fidelity), or a function or torch module that maps pictures (B, 3, H, W) uint8 to (B, F), also "
             "as module:NAME; `none` leaves the column out.")
    add("--reference_images", metavar="FOLDER_OR_SHARDS",
        help="Reference pictures of the Frechet distance: a folder, or WebDataset shards as in training. If unset: "
             "the teacher's pictures at many steps.")
    add("--num_reference_images", type=integer(2), default=10000, metavar="N",
        help="The most pictures that are read of --reference_images.")
    add("--extra_metric", metavar="FILE.py:NAME",
        help="A function of (pictures (N, 3, H, W) uint8, list of N prompts) that returns a dict of numbers; each "
             "becomes a column. Also module:NAME.")

    args = parser.parse_args(argv, Options())
    given = redact_arguments(sys.argv[1:] if argv is None else argv)  # before shlex quotes them
    args.command = shlex.join(["python", "evaluate_lcm.py", *given])
    check(args, parser)
    args.freeze()
    return args


def check(args: Namespace, parser: Parser) -> None:
    """If options cannot be used together, exit with status 2 and one line that begins with the option."""

    def need(condition: Any, option: str, message: str) -> None:
        if not condition:
            parser.error(f"{option}: {message}")

    args.prompts = read_prompts(parser, "--prompts", args.prompts)
    args.trained = read_labels(parser, "--trained", args.trained)
    need(args.reference_images is None or args.feature_network != "none", "--reference_images",
         f"{args.reference_images!r} given, but --feature_network is none, which compares nothing")  # fmt: skip
    need((args.resolution or 8) % 8 == 0, "--resolution", f"{args.resolution} given; allowed: multiples of 8")
    need(args.clip_model != "none" or args.feature_network != "clip", "--feature_network",
         "clip needs --clip_model, which is none; allowed with it: inception, FILE.py:NAME, none")  # fmt: skip
    need(args.feature_network in ("clip", "inception", "none") or ":" in args.feature_network, "--feature_network",
         f"{args.feature_network!r} given; allowed: clip, inception, FILE.py:NAME, module:NAME, none")  # fmt: skip
    need(args.extra_metric is None or ":" in args.extra_metric, "--extra_metric",
         f"{args.extra_metric!r} given; allowed: FILE.py:NAME, module:NAME")  # fmt: skip
    needed = {"none": (), "inception": ("torchmetrics", "torch_fidelity")}.get(args.feature_network, ("torchmetrics",))
    for package in needed:
        need(importlib.util.find_spec(package), "--feature_network",
             f"{args.feature_network} given, but the package {package} is not installed")  # fmt: skip
    need(not os.path.exists(args.output_dir) or os.path.isdir(args.output_dir), "--output_dir",
         f"{args.output_dir!r} is a file; allowed: a folder, or a path that does not exist yet")  # fmt: skip


def evaluate(args: Namespace) -> None:
    """Draw, measure and write everything. Raises UserError."""
    import torch
    from tqdm.auto import tqdm

    from lcm.evaluation import candidates, sampling
    from lcm.evaluation.measures import Measures
    from lcm.pictures import samplers

    prompts = [args.prompts[i % len(args.prompts)] for i in range(args.num_images)]
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None
    pipeline = candidates.load_teacher(args)
    trained = [candidates.find_trained(pipeline, args, *value) for value in args.trained]
    noise = sampling.starting_noise(pipeline, len(prompts), args.seed, args.resolution)
    measures = Measures(args, prompts, pipeline.device, noise.shape[-1] * pipeline.vae_scale_factor)
    few, shown, rows = args.num_inference_steps, shown_prompts(prompts), []
    progress = tqdm(total=len(prompts) * (1 + len(few) * (1 + len(trained))), unit="picture", dynamic_ncols=True)

    def add_row(network: str, steps: int, sampler: str, scheduler: Any, guidance_scale: float) -> None:
        progress.set_description(f"{network}, {count(steps)}")
        pipeline.scheduler = scheduler
        generators = sampling.picture_generators(len(prompts), args.seed)
        try:
            images, seconds = sampling.sample(
                pipeline, prompts, noise, steps, guidance_scale, generators, args.batch_size, progress
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch_size: {args.batch_size} given, but {first_line(error)}") from error
        row: dict[str, Any] = {"network": network, "steps": steps, "sampler": sampler}
        row |= {"guidance_scale": guidance_scale, "seconds": seconds, **measures(images)}
        rows.append((row, images[shown]))
        progress.write(", ".join(f"{heading} {text}" for heading, text in cells(row).items()))

    own = pipeline.scheduler
    many = args.teacher_num_inference_steps
    with progress:
        for steps, default in [(many, SAMPLER_MANY_STEPS), *((steps, SAMPLER_FEW_STEPS) for steps in few)]:
            name = args.teacher_scheduler or default
            add_row("teacher", steps, name, samplers.make_scheduler(name, own), args.guidance_scale)
        for network in sorted(trained, key=lambda network: not network.is_lora):  # LoRAs need the teacher's own U-Net
            candidates.load_trained(pipeline, network, args)
            for steps in few:
                scale = args.lora_guidance_scale if network.is_lora else args.guidance_scale
                scheduler = samplers.make_scheduler("own", network.scheduler)
                add_row(network.label, steps, network.sampler, scheduler, scale)
            if network.is_lora:
                pipeline.unload_lora_weights()

    order = ["teacher", *(network.label for network in trained)]
    rows.sort(key=lambda row: order.index(row[0]["network"]))
    results = {
        "command": args.command,
        "measured": measures.describe(),
        "reference": measures.reference_name,
        "rows": [row for row, _ in rows],
    }
    results["table"] = as_markdown(results)  # for model cards
    try:
        write(args.output_dir, results, [pictures for _, pictures in rows], [prompts[i] for i in shown])
    except OSError as error:
        raise UserError(f"--output_dir: {error}") from None


# The files that are written.


def count(steps: int) -> str:
    """A number of steps in words: `1 step`, `4 steps`."""
    return f"{steps} step{'s' * (steps > 1)}"


def shown_prompts(prompts: list[str]) -> list[int]:
    """The indices of the prompts in grid.png: at most GRID_ROWS different ones, evenly spaced in the list."""
    different = sorted({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
    rows = min(GRID_ROWS, len(different))
    return [different[round(i * (len(different) - 1) / max(1, rows - 1))] for i in range(rows)]


def cells(row: dict[str, Any], headings: dict[str, str] | None = None) -> dict[str, str]:
    """A row of the table as {heading: text}; `headings` replaces some of them."""
    texts = {}
    for name, value in row.items():
        heading, form = COLUMNS.get(name, (name, "{:.3f}"))
        texts[(headings or {}).get(name, heading)] = "none" if value is None else form.format(value)
    return texts


def as_markdown(results: dict[str, Any]) -> str:
    """The rows of `results` as a Markdown table."""
    headings = {
        "frechet_distance": f"Frechet distance to {results['reference']}",
        "teacher_rmse": f"RMSE to teacher, {count(results['rows'][0]['steps'])}",
    }
    table = [cells(row, headings) for row in results["rows"]]
    lines = [table[0].keys(), ["---"] * len(table[0]), *(row.values() for row in table)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def draw(rows: list[dict[str, Any]], pictures: "list[torch.Tensor]", prompts: list[str]) -> "Image.Image":
    """grid.png: a line for each of P prompts, a column for each of `rows`, whose `pictures` are (P, 3, H, W) uint8."""
    from PIL import Image

    from lcm.pictures.grid import picture_grid

    labels = [
        f"{row['network']}\n{count(row['steps'])}\n{row['sampler']}\nguidance {row['guidance_scale']:g}"
        for row in rows
    ]
    starts = [i for i in range(1, len(rows)) if i == 1 or rows[i]["network"] != rows[i - 1]["network"]]
    grid = [[Image.fromarray(column[i].permute(1, 2, 0).numpy()) for column in pictures] for i in range(len(prompts))]
    return picture_grid(grid, prompts, labels, min(LARGEST_CELL, max(96, grid[0][0].width)), starts)


def write(folder: str, results: dict[str, Any], pictures: "list[torch.Tensor]", prompts: list[str]) -> None:
    """Write grid.png, results.json and README.md to `folder`, and print the table.

    A README.md that is not of an evaluation is kept; the text is then written to evaluation.md.
    """
    from lcm.results.card import mark, report_name

    report = report_name(folder, "evaluation")
    draw(results["rows"], pictures, prompts).save(os.path.join(folder, "grid.png"))
    with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1, ensure_ascii=False)
    table, measured = as_markdown(results), "\n".join(f"- {line}" for line in results["measured"])
    text = f"""\
# Evaluation

{table}

![A row for each of a few prompts, a column for each row of the table](grid.png)

## How it was measured

{measured}

```bash
{results["command"]}
```

{mark("evaluation")}
"""
    with open(os.path.join(folder, report), "w", encoding="utf-8") as file:
        file.write(text)
    print(f"\n{table}\n\n{folder}: {report} with this table, grid.png, results.json")


def main(argv: Sequence[str] | None = None) -> None:
    run(evaluate, parse_args(argv), interrupted="Stopped before the table was written.")


if __name__ == "__main__":
    main()
