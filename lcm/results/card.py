"""The model card, with the curves and the pictures of the run."""

import contextlib
import itertools
import os
import re

from huggingface_hub import ModelCard, ModelCardData

from lcm.models.networks import Networks
from lcm.options.checks import target_in_words
from lcm.options.plan import Plan
from lcm.options.types import Options

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


def model_card(
    args: Options, plan: Plan, networks: Networks, code: str, steps: int, pictures: dict[str, list[str]]
) -> ModelCard:
    """The model card: what the networks are, how to sample from them (`code`), how they were trained.

    `pictures` has the addresses of the existing ones: `validation`, one for each page, and `training`.
    """
    is_local = os.path.isdir(args.pretrained_teacher_model)
    data = ModelCardData(
        license=None if is_local else base_licence(args),
        base_model=None if is_local else args.pretrained_teacher_model,
        base_model_relation=None if is_local else networks.relation,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=networks.tags,
    )
    options = {
        "optimizer steps": steps,
        "samples a step and process": args.train_batch_size * plan.gradient_accumulation_steps,
        "resolution": args.resolution,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
        "target": target_in_words(args),
        "guidance_scale": f"{args.w_min + 1:g} to {args.w_max + 1:g} (w = {args.w_min:g} to {args.w_max:g})",
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
    return ModelCard(f"""\
---
{data.to_yaml()}
---

# {networks.title} of {teacher_name(args)}

{networks.card_text()} It was distilled from {teacher_name(args)} with latent consistency distillation
([arXiv 2310.04378](https://arxiv.org/abs/2310.04378)) and falls under the licence of that model.
{validation}
## How to use it

```python
{code}```

## How it was trained
{curves}
| | |
| --- | --- |
{table}

{mark("model_card")}
""")
