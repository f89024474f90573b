"""What a finished run leaves behind: networks, the matching scheduler, a model card, and all of it on the Hub."""

import json
import logging
import os
import shutil
import tempfile

import torch
from diffusers import LCMScheduler
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

import lcm_data
from lcm_checkpoint import whole_folder
from lcm_options import UserError, default_guidance_scale, first_line

logger = logging.getLogger(__name__)


def lcm_scheduler(noise_schedule, args):
    """The LCMScheduler that samples on the grid, and with the boundary scalings, that were trained."""
    return LCMScheduler.from_config(
        noise_schedule.config,
        original_inference_steps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )


def usage_code(args, teacher, source, subfolder=None):
    """Python that samples from the U-Net at `source`, a folder or repository of this run's."""
    low, high = args.w_min + 1, args.w_max + 1
    scale, steps = default_guidance_scale(args), min(4, args.num_ddim_timesteps)
    unet = f'"{source}", subfolder="{subfolder}"' if subfolder else f'"{source}", variant="fp16"'
    return f"""\
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained({unet}, dtype=torch.float16)
scheduler = LCMScheduler.from_pretrained("{source}", subfolder="scheduler")
pipeline = DiffusionPipeline.from_pretrained(
    "{teacher}", unet=unet, scheduler=scheduler, dtype=torch.float16
).to("cuda")

# Trained for guidance scales from {low:g} to {high:g}.
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={scale:g}).images[0]
"""


def teacher_name(args):
    """The teacher's Hub id; of a local folder only its last part, since cards travel."""
    teacher = args.pretrained_teacher_model
    return os.path.basename(os.path.normpath(teacher)) if os.path.isdir(teacher) else teacher


def base_licence(args):
    """The licence on the teacher's card on the Hub, None where it cannot be had."""
    try:
        return ModelCard.load(args.pretrained_teacher_model).data.license
    except Exception:  # no card, no network
        return None


def model_card(args, code, picture, steps):
    """The model card: what this is, how to sample from it (`code`), how it was trained."""
    is_local = os.path.isdir(args.pretrained_teacher_model)
    data = ModelCardData(
        license=None if is_local else base_licence(args),
        base_model=None if is_local else args.pretrained_teacher_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["latent-consistency-model", "stable-diffusion", "text-to-image"],
    )
    options = {
        "optimizer steps": steps,
        "samples a step and process": args.train_batch_size * args.gradient_accumulation_steps,
        "resolution": args.resolution,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
        "guidance_scale": f"{args.w_min + 1:g} to {args.w_max + 1:g}",
        "DDIM grid": f"{args.num_ddim_timesteps} steps",
        "loss": args.loss_type + (f", c = {args.huber_c:g}" if args.loss_type == "huber" else ""),
        "EMA decay": args.ema_decay,
        "mixed precision": args.mixed_precision,
        "seed": args.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in options.items())
    return ModelCard(f"""\
---
{data.to_yaml()}
---

# A latent consistency model of {teacher_name(args)}

This U-Net samples in 1 to 8 steps. It was distilled from {teacher_name(args)} with latent consistency distillation
([arXiv 2310.04378](https://arxiv.org/abs/2310.04378)) and falls under the licence of that model.

![Validation pictures]({picture})

## How to use it

```python
{code}```

## How it was trained

| | |
| --- | --- |
{table}
""")


class Export:
    """Saves what was trained and, if asked, pushes it. The repository is made at once, so that a wrong name or a
    missing token shows before training; raises UserError then.

    `networks` maps folder names to the diffusers models, unwrapped; `pushed` names the one for the Hub.
    """

    def __init__(self, accelerator, args, networks, scheduler, pushed):
        self.accelerator, self.args, self.scheduler, self.pushed = accelerator, args, scheduler, pushed
        self.networks = networks
        if args.push_to_hub and accelerator.is_main_process:
            name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
            try:
                self.repo_id = create_repo(name, exist_ok=True, private=args.hub_private, token=args.hub_token).repo_id
            except Exception as error:
                raise UserError(f"--push_to_hub: cannot make {name!r} on the Hub: {first_line(error)}") from error

    def finish(self, steps, seconds, data):
        """Write the networks, the scheduler and the card to `output_dir`, push, and say where everything is."""
        num_used, skipped = data.totals()
        if self.accelerator.is_main_process:
            output_dir = self.args.output_dir
            code = usage_code(self.args, self.args.pretrained_teacher_model, output_dir, self.pushed)
            try:
                for name, part in {**self.networks, "scheduler": self.scheduler}.items():
                    with whole_folder(os.path.join(output_dir, name)) as folder:
                        part.save_pretrained(folder)
                card = model_card(self.args, code, f"validation/step-{steps:06d}.png", steps)
                card.save(os.path.join(output_dir, "README.md"))
            except Exception as error:  # for a full disk safetensors raises an error of its own
                raise UserError(
                    f"--output_dir: cannot write to {output_dir!r}: {first_line(error)}; checkpoints are intact"
                ) from error
            print(
                f"\nTrained to step {steps}, {seconds:.0f} s in this session; {num_used} samples used, "
                f"skipped: {lcm_data.describe(skipped)}.\n"
                f"{', '.join(f'{output_dir}/{name}' for name in self.networks)}: the networks; use {self.pushed}\n"
                f"{output_dir}/scheduler: the scheduler that fits them\n"
                f"{output_dir}/validation: pictures; {output_dir}/{self.args.logging_dir}: logs\n\n"
                f"{code}"
            )
        self.accelerator.end_training()  # the trackers' run is complete, whatever becomes of the upload
        if self.args.push_to_hub and self.accelerator.is_main_process:
            self.push(steps)

    def push(self, steps):
        """Upload the pushed network to the repository's root, in float32 and as fp16 variant, with scheduler and card.

        Nothing else: no optimizer states, logs or local paths. Raises UserError if the upload still fails after the
        client's own retries; everything is on disk by then.
        """
        network = self.networks[self.pushed]
        picture = os.path.join(self.args.output_dir, "validation", f"step-{steps:06d}.png")
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            half = type(network).from_pretrained(folder, dtype=torch.float16)  # on the CPU: the GPU may be full
            half.register_to_config(_name_or_path="")
            half.save_pretrained(folder, variant="fp16")
            self.scheduler.save_pretrained(os.path.join(folder, "scheduler"))
            if os.path.isfile(picture):
                shutil.copy(picture, os.path.join(folder, "validation.png"))
            card = model_card(
                self.args, usage_code(self.args, teacher_name(self.args), self.repo_id), "validation.png", steps
            )
            card.save(os.path.join(folder, "README.md"))
            try:
                upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    commit_message="End of training",
                    token=self.args.hub_token,
                )
            except Exception as error:
                reason = f"the upload failed ({first_line(error)}); everything is in {self.args.output_dir!r}"
                raise UserError(f"--push_to_hub: {reason}") from error
        print(f"Pushed to {self.repo_id}")
