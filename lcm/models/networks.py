"""What was trained, whole U-Nets or a LoRA: its files, and how they are used."""

import json
import os

import torch
from diffusers import UNet2DConditionModel

from lcm.models.lora import EMA, TRAINED
from lcm.models.lora_files import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    STUDENT_FOLDER,
    load_adapter,
    save_for_diffusers,
    save_for_kohya,
)
from lcm.models.sharding import gathered, load_weights
from lcm.options.checks import default_guidance_scale


class FullModel:
    """A whole U-Net that was trained, and its moving average, in the layout of diffusers.

    `networks` maps folder names to the models, unwrapped; `exported` names the one to sample from, which
    `scheduler` fits.
    """

    title = "A latent consistency model"
    tags = ["latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "finetune"

    def __init__(self, args, networks, exported, scheduler):
        self.args, self.networks, self.exported, self.scheduler = args, networks, exported, scheduler
        self.outputs = [*networks, "scheduler"]

    def gathered(self):
        """The same with whole networks, where FSDP splits them over processes; all processes call this together, and
        the first one's is of use."""
        networks = {name: gathered(network) for name, network in self.networks.items()}
        return FullModel(self.args, networks, self.exported, self.scheduler)

    def save(self, folder):
        """Write what a checkpoint needs, and the scheduler, so that it can be sampled from, to `folder`."""
        for name, network in self.networks.items():
            network.save_pretrained(os.path.join(folder, name))
        self.scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def load(self, folder):
        """Read what `save` wrote."""
        for name, network in self.networks.items():
            saved = UNet2DConditionModel.from_pretrained(folder, subfolder=name)
            load_weights(network, saved.state_dict())

    def export(self, folder):
        """Write each network to its own folder in `folder`, in float32 and as fp16 variant."""
        self.save(folder)
        for name, network in self.networks.items():
            weights = {key: tensor.to("cpu", torch.float16) for key, tensor in network.state_dict().items()}
            with torch.device("meta"):  # no second copy in float32, on the GPU or here
                half = type(network).from_config(network.config)
            half.load_state_dict(weights, assign=True)
            half.save_pretrained(os.path.join(folder, name), variant="fp16")

    def describe(self, output_dir):
        """Lines that say what `export` wrote."""
        names = ", ".join(os.path.join(output_dir, name) for name in self.networks)
        return [f'{names}: the networks, also as variant="fp16"; use {self.exported}']

    def pushed_files(self, output_dir):
        """What goes to the Hub, as {path in the repository: path here}: the exported network lies in the root."""
        folder = os.path.join(output_dir, self.exported)
        return {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}

    def usage_code(self, teacher, source, on_hub, machine):
        """Python that samples from `source`, a repository if `on_hub`, else this run's output folder, on a Machine."""
        args = self.args
        where = "" if on_hub else f', subfolder="{self.exported}"'
        where += ', variant="fp16"' if machine.device != "cpu" else ""
        scale, steps = default_guidance_scale(args), min(4, args.num_ddim_timesteps)
        return f"""\
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

{machine.other_kind}
unet = UNet2DConditionModel.from_pretrained("{source}"{where}, {machine.dtype})
scheduler = LCMScheduler.from_pretrained("{source}", subfolder="scheduler")
pipeline = DiffusionPipeline.from_pretrained(
    "{teacher}", unet=unet, scheduler=scheduler, {machine.dtype}
){machine.move}

# Trained for guidance scales from {args.w_min + 1:g} to {args.w_max + 1:g}; a negative prompt has no effect.
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={scale:g}).images[0]
image.save("lcm.png")
"""

    def card_text(self):
        """A sentence on what it is and how it is used."""
        return "This U-Net samples in 1 to 8 steps. The guidance scale is one of its inputs and costs nothing extra."

    def card_rows(self):
        """Rows for the card's table on the training, as a dict."""
        return {"guidance embedding": self.args.unet_time_cond_proj_dim, "EMA decay": self.args.ema_decay}


class LoraModel:
    """A LoRA that was trained, and its moving average if there is one, in the formats that people load.

    `unet` is unwrapped; it holds the adapters. The moving average, if there is one, is what is exported. `scheduler`
    fits it.
    """

    title = "An LCM-LoRA"
    tags = ["lora", "latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "adapter"

    def __init__(self, args, unet, scheduler):
        self.args, self.unet, self.scheduler = args, unet, scheduler
        self.exported = TRAINED if args.ema_decay is None else EMA
        self.outputs = [DIFFUSERS_FILE, KOHYA_FILE, STUDENT_FOLDER, "scheduler"]

    def gathered(self):
        """The same: a LoRA is whole on every process."""
        return self

    def save(self, folder):
        """Write what a checkpoint needs, and the scheduler, so that it can be sampled from, to `folder`."""
        save_for_diffusers(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            save_for_diffusers(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))
        self.scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def load(self, folder):
        """Read what `save` wrote."""
        load_adapter(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            load_adapter(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))

    def export(self, folder):
        """Write the files for diffusers and for kohya's readers to `folder`."""
        self.save(folder)
        save_for_kohya(self.unet, self.exported, os.path.join(folder, KOHYA_FILE))

    def describe(self, output_dir):
        """Lines that say what `export` wrote."""
        lines = [
            f"{os.path.join(output_dir, DIFFUSERS_FILE)}: the LoRA for diffusers, float32",
            f"{os.path.join(output_dir, KOHYA_FILE)}: the same for ComfyUI and A1111, float16",
        ]
        if self.exported != TRAINED:
            lines.append(f"{os.path.join(output_dir, STUDENT_FOLDER)}: as the optimizer left it; the rest is its EMA")
        return lines

    def pushed_files(self, output_dir):
        """What goes to the Hub, as {path in the repository: path here}."""
        return {name: os.path.join(output_dir, name) for name in (DIFFUSERS_FILE, KOHYA_FILE)}

    def usage_code(self, teacher, source, on_hub, machine):
        """Python that samples with what lies at `source`, a repository or this run's output folder, on a Machine."""
        args = self.args
        return f"""\
import torch
from diffusers import DiffusionPipeline, LCMScheduler

{machine.other_kind}
pipeline = DiffusionPipeline.from_pretrained("{teacher}", {machine.dtype}){machine.move}
pipeline.scheduler = LCMScheduler.from_pretrained("{source}", subfolder="scheduler")
pipeline.load_lora_weights("{source}", weight_name="{DIFFUSERS_FILE}")

# Guidance is part of what was learned: 1 adds none; from 1 to 2 a negative prompt has an effect.
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={min(4, args.num_ddim_timesteps)}, guidance_scale=1).images[0]
image.save("lcm.png")
"""

    def card_text(self):
        """A sentence on what it is and how it is used."""
        return (
            "This LoRA lets its base model, and other fine-tunes of it, sample in 1 to 8 steps. "
            f"`{DIFFUSERS_FILE}` is for diffusers, `{KOHYA_FILE}` for ComfyUI and A1111."
        )

    def card_rows(self):
        """Rows for the card's table on the training, as a dict."""
        args = self.args
        rows = {"LoRA": f"rank {args.lora_rank}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"}
        return rows if args.ema_decay is None else {**rows, "EMA decay": args.ema_decay}
