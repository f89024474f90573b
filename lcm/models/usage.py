"""Python that samples from trained networks, for the user to copy."""

import json
from dataclasses import dataclass

from lcm.models.loading import DTYPE
from lcm.models.lora_files import DIFFUSERS_FILE
from lcm.options.checks import default_guidance_scale, span, student_sampler
from lcm.options.choices import SAMPLERS
from lcm.options.types import Options

# What --w_max 0 trains.
WITHOUT_GUIDANCE = "Trained without guidance: guidance_scale and a negative prompt work as they do in the teacher."


@dataclass(frozen=True)
class Machine:
    """The kind of machine that the printed code is for."""

    device: str  # cuda, cpu, mps, ...

    @property
    def dtype(self) -> str:
        """The argument that loads networks in half precision, or in float32 on a CPU, which is slow in half."""
        return f"{DTYPE}=torch.float{32 if self.device == 'cpu' else 16}"

    @property
    def move(self) -> str:
        """The call that moves a pipeline to the device."""
        return "" if self.device == "cpu" else f'.to("{self.device}")'

    @property
    def other_kind(self) -> str:
        """A comment on what to change on other machines."""
        if self.device == "cpu":
            return '# This is for a CPU. On a GPU: torch.float16 in place of torch.float32, and pipeline.to("cuda").'
        return f"# Without a GPU: torch.float32 in place of torch.float16, and no {self.move}."


def shown_steps(args: Options) -> int:
    """The number of steps of the validation pictures that is next to 4."""
    return min(args.validation_num_inference_steps, key=lambda steps: abs(steps - 4))


def unet_code(args: Options, teacher: str, source: str, folder: str | None, machine: Machine) -> str:
    """Code for the U-Net in a `folder` of `source`, or for `folder` None in `source` itself.

    `source` is an output folder or a repository; it has the scheduler too.
    """
    where = "" if folder is None else f', subfolder="{folder}"'
    where += ', variant="fp16"' if machine.device != "cpu" else ""
    scale, scheduler = default_guidance_scale(args), SAMPLERS[student_sampler(args)][0]
    low, high = args.w_min + 1, args.w_max + 1
    guidance = f"Trained for guidance_scale {span(low, high)}; a negative prompt has no effect."
    if args.unet_time_cond_proj_dim is None:
        guidance = WITHOUT_GUIDANCE
    return f"""\
import torch
from diffusers import DiffusionPipeline, {scheduler}, UNet2DConditionModel

{machine.other_kind}
unet = UNet2DConditionModel.from_pretrained("{source}"{where}, {machine.dtype})
scheduler = {scheduler}.from_pretrained("{source}", subfolder="scheduler")
pipeline = DiffusionPipeline.from_pretrained(
    "{teacher}", unet=unet, scheduler=scheduler, {machine.dtype}
){machine.move}

# {guidance}
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={shown_steps(args)}, guidance_scale={scale:g}).images[0]
image.save("lcm.png")
"""


def lora_code(args: Options, teacher: str, source: str, machine: Machine) -> str:
    """Code for the LoRA in `source`, an output folder or a repository."""
    scheduler = SAMPLERS[student_sampler(args)][0]
    guidance = "Guidance is part of what was learned: 1 adds none; from 1 to 2 a negative prompt has an effect."
    if args.w_max == 0:
        guidance = WITHOUT_GUIDANCE
    return f"""\
import torch
from diffusers import DiffusionPipeline, {scheduler}

{machine.other_kind}
pipeline = DiffusionPipeline.from_pretrained("{teacher}", {machine.dtype}){machine.move}
pipeline.scheduler = {scheduler}.from_pretrained("{source}", subfolder="scheduler")
pipeline.load_lora_weights("{source}", weight_name="{DIFFUSERS_FILE}")

# {guidance}
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={shown_steps(args)}, guidance_scale=1).images[0]
image.save("lcm.png")
"""
