"""The training report: a model card with the curves and the pictures, in the output folder and on the Hub."""

import contextlib
import itertools
import os
import re
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from lcm.models.loading import DTYPE

GENERIC_NAMES = r"teacher|models?|unet|base|sd|sdxl|output|results?|diffusers|pretrained|checkpoint(-\d+)?|[\W\d]+"


def teacher_name(args):
    """The teacher's Hub id; of a local folder the last part of its path, or two, since cards travel.

    A folder of the Hub client's cache gives the id that it was downloaded under.
    """
    teacher = args.pretrained_teacher_model
    if not os.path.isdir(teacher):
        return teacher
    *_, parent, name = "/", *os.path.abspath(teacher).strip("/").split("/")
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", os.path.abspath(teacher))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return f"{parent}/{name}" if re.fullmatch(GENERIC_NAMES, name, re.IGNORECASE) and parent != "/" else name


@dataclass(frozen=True)
class Machine:
    """The kind of machine that printed code is for."""

    device: str  # cuda, cpu, mps, ...

    @property
    def dtype(self):
        """The argument that loads networks in half precision, or for a CPU, which is slow in it, in float32."""
        return f"{DTYPE}=torch.float{32 if self.device == 'cpu' else 16}"

    @property
    def move(self):
        """The call that moves a pipeline to the device."""
        return "" if self.device == "cpu" else f'.to("{self.device}")'

    @property
    def other_kind(self):
        """A comment on what to change elsewhere."""
        if self.device == "cpu":
            return '# This is for a CPU. On a GPU: torch.float16 in place of torch.float32, and pipeline.to("cuda").'
        return f"# Without a GPU: torch.float32 in place of torch.float16, and no {self.move}."


def base_licence(args):
    """The licence on the teacher's card on the Hub, None where it cannot be had."""
    try:
        return ModelCard.load(args.pretrained_teacher_model).data.license
    except Exception:  # no card, no network
        return None


def mark(kind):
    """The line by which a report of ours is known: `kind` is model_card or evaluation."""
    return f"<!-- {kind}: the next one in this folder replaces this file -->"


def report_name(folder, kind):
    """The name under which a report goes into `folder`: README.md, unless that is not ours; then model_card.md, ...

    The first name that is free, or whose file has the `mark` of that kind.
    """
    names = itertools.chain(["README.md", f"{kind}.md"], (f"{kind}-{i}.md" for i in itertools.count(2)))
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            return name
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            if mark(kind) in file.read().splitlines():
                return name


def model_card(args, plan, networks, code, steps, pictures):
    """The model card: what the networks are, how to sample from them (`code`), how they were networks.

    `pictures` has the addresses of those that there are: `validation`, one for each page, `training`.
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
        "guidance_scale": f"{args.w_min + 1:g} to {args.w_max + 1:g} (w = {args.w_min:g} to {args.w_max:g})",
        "DDIM grid": f"{args.num_ddim_timesteps} steps",
        "loss": args.loss_type + (f", c = {args.huber_c:g}" if args.loss_type == "huber" else ""),
        **networks.card_rows(),
        "mixed precision": plan.mixed_precision,
        "seed": plan.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in options.items())
    first, *others = pictures["validation"] or [None]
    validation = f"\n![Validation pictures]({first})\n" if first else ""
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
