"""The model card, with the curves and the pictures of the run, its command, and an evaluation if there is one."""

import contextlib
import itertools
import json
import os
import re
import shlex
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lcm.models.networks import Networks
from lcm.options.checks import span, target_in_words
from lcm.options.plan import Plan
from lcm.options.types import Options

PAPERS = {"lcm": "2310.04378", "phased": "2405.18407", "trajectory": "2402.19159"}  # of each target
WIDGET_PROMPTS = 12  # the most that the Hub's page offers
# Names of folders that say nothing about the model in them.
GENERIC_NAMES = r"teacher|models?|unet|base|sd|sdxl|output|results?|diffusers|pretrained|checkpoint(-\d+)?|[\W\d]+"


def teacher_name(args: Options) -> str:
    """The teacher's Hub id; for a local folder the last part of its path, or the last two: a card is published.

    For a folder in the Hub client's cache it is the id that was downloaded.
    """
    teacher = args.pretrained_teacher_model
    if not os.path.isdir(teacher):
        return teacher
    path = os.path.abspath(teacher)
    parent, name = os.path.basename(os.path.dirname(path)), os.path.basename(path)
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return f"{parent}/{name}" if re.fullmatch(GENERIC_NAMES, name, re.IGNORECASE) and parent else name


def base_licence(args: Options) -> str | None:
    """The licence on the teacher's card on the Hub, None if it cannot be read."""
    try:
        return ModelCard.load(args.pretrained_teacher_model).data.license
    except Exception:  # no card, no network
        return None


def mark(kind: str) -> str:
    """The line that marks a report as ours: `kind` is model_card or evaluation."""
    return f"<!-- {kind}: the next one in this folder replaces this file -->"


def paper(target: str) -> str:
    """A link to the paper of a `--target`."""
    return f"[arXiv {PAPERS[target]}](https://arxiv.org/abs/{PAPERS[target]})"


def report_name(folder: str, kind: str) -> str:
    """The file name for a report in `folder`: README.md, or if that file is not ours {kind}.md, {kind}-2.md, ...

    It is the first name that is free, or whose file has the `mark` of that kind.
    """

    def can_be_written(name: str) -> bool:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            return True
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            return mark(kind) in file.read().splitlines()
        return False

    names = itertools.chain(["README.md", f"{kind}.md"], (f"{kind}-{i}.md" for i in itertools.count(2)))
    return next(filter(can_be_written, names))


def sampling_parameters(code: str) -> dict[str, float]:
    """The steps and the guidance scale of the code that samples."""
    found = re.findall(r"(num_inference_steps|guidance_scale)=([\d.]+)", code)
    return {name: float(value) if "." in value else int(value) for name, value in found}


def training_command(args: Options) -> str:
    """The command of the run, with the options of its `--config` file in place of that option."""
    words, line = list(args.command_line), ["accelerate", "launch", args.script]
    while words:
        word = words.pop(0)
        if word == "--config":
            del words[:1]
        elif not word.startswith("--config="):
            line.append(word)
    return shlex.join(line)


def without_folders(text: str) -> str:
    """`text` with each absolute path on this machine as its last part: a card is published."""
    return re.sub(r"(?:(?<=pipe:)|(?<=::)|(?<=file:)|(?<![\w:/.*\\-]))(?:~[\w.-]*)?/(?:[^\s/:'\"]+/)*", "", text)


def evaluation(output_dir: str) -> dict[str, Any] | None:
    """What evaluate_lcm.py left in the output folder, None if nothing, or if a later checkpoint was saved."""
    path = os.path.join(output_dir, "results.json")
    states = [os.path.join(folder.path, "training_state.json") for folder in os.scandir(output_dir) if folder.is_dir()]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(path, encoding="utf-8") as file:
            results: dict[str, Any] = json.load(file)
        times = [os.path.getmtime(state) for state in states if os.path.isfile(state)]
        if times and max(times) < os.path.getmtime(path) and results["table"] and results["command"]:
            return results
    return None


def evaluation_text(results: dict[str, Any]) -> str:
    """The section of the card about an evaluation: its table, how it was measured, its command."""
    how = "\n".join(f"- {line}" for line in results["measured"])
    return f"\n## Evaluation\n\n{results['table']}\n\n{how}\n\n```bash\n{results['command']}\n```\n"


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The rows of an evaluation for the card's `model-index`; none if it compared several trained networks."""
    rows = [row for row in results["rows"] if row["network"] != "teacher"]
    if len({row["network"] for row in rows}) != 1:
        return []
    setting = ("network", "steps", "sampler", "guidance_scale")
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="custom",
            dataset_name=without_folders(results["reference"]),
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, steps {row['steps']}, guidance scale {row['guidance_scale']:g}",
            metric_value=value,
        )
        for row in rows
        for name, value in row.items()
        if name not in setting and value is not None
    ]


def model_card(
    args: Options,
    plan: Plan,
    networks: Networks,
    code: str,
    steps: int,
    pictures: dict[str, list[str]],
    is_published: bool = False,
) -> ModelCard:
    """The model card: what the networks are, how to sample from them (`code`), how they were trained.

    `pictures` has the addresses of the existing ones: `validation`, one for each page, and `training`. A card that
    `is_published` has no paths of this machine.
    """
    is_local = os.path.isdir(args.pretrained_teacher_model)
    shown = without_folders if is_published else str
    results = evaluation(args.output_dir)
    measured_rows = eval_results(results) if results else []
    # What the Hub's page of the model offers to draw; the first picture stands for the model in lists.
    prompts = [prompt for prompt in dict.fromkeys(args.validation_prompts) if prompt][:WIDGET_PROMPTS]
    widget: list[dict[str, Any]] = [{"text": prompt} for prompt in prompts]
    if widget and pictures["validation"]:
        widget[0]["output"] = {"url": pictures["validation"][0]}
    data = ModelCardData(
        license=None if is_local else base_licence(args),
        base_model=None if is_local else args.pretrained_teacher_model,
        base_model_relation=None if is_local else networks.relation,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=networks.tags,
        model_name=f"{networks.title} of {teacher_name(args)}" if measured_rows else None,
        eval_results=measured_rows or None,
        widget=widget or None,
        inference={"parameters": sampling_parameters(code)},
    )
    options = {
        "optimizer steps": steps,
        "samples a step and process": args.train_batch_size * plan.gradient_accumulation_steps,
        "resolution": args.resolution,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
        "target": target_in_words(args),
        "guidance_scale": f"{span(args.w_min + 1, args.w_max + 1)} (w = {span(args.w_min, args.w_max)})",
        "DDIM grid": f"{args.num_ddim_timesteps} steps"
        + (f", {args.num_solver_steps} of the teacher between two points" if args.num_solver_steps > 1 else ""),
        "loss": args.loss_type + (f", c = {args.huber_c:g}" if args.loss_type == "huber" else ""),
        **networks.card_rows(),
        "mixed precision": plan.mixed_precision,
        "seed": plan.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in options.items())
    first, others = pictures["validation"][:1], pictures["validation"][1:]
    validation = "".join(f"\n![Validation pictures]({address})\n" for address in first)
    if others:
        pages = ", ".join(f"[{number}]({address})" for number, address in enumerate(others, 2))
        validation += f"\nThe other pages of them: {pages}.\n"
    curves = "".join(f"\n![Curves of the training]({address})\n" for address in pictures["training"])
    other = "" if args.target == "lcm" else f", to the target `{target_in_words(args)}` ({paper(args.target)}),"
    measured = "" if results is None else shown(evaluation_text(results))
    return ModelCard(f"""\
---
{data.to_yaml()}
---

# {networks.title} of {teacher_name(args)}

{networks.card_text()} It was distilled from {teacher_name(args)} with latent consistency distillation
({paper("lcm")}){other} and falls under the licence of that model.
{validation}
## How to use it

```python
{code}```

## How it was trained
{curves}
| | |
| --- | --- |
{table}

```bash
{shown(training_command(args))}
```
{measured}
{mark("model_card")}
""")
