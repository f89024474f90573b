"""Teacher, student and target, for a whole U-Net and for a LoRA: their weights, files, and how these are used."""

import contextlib
import copy
import json
import os
from functools import cached_property, partial

import torch
from diffusers import UNet2DConditionModel

from lcm.models.lora import EMA, TRAINED, adapter_parameters
from lcm.models.lora_files import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    STUDENT_FOLDER,
    load_adapter,
    save_for_diffusers,
    save_for_kohya,
)
from lcm.models.sharding import gathered, is_sharded, load_weights, shard_like_student
from lcm.options.checks import default_guidance_scale


class Networks:
    """Teacher, student and target of a run, and the files of what was trained.

    `teacher`, `student` and `target` are called as a UNet2DConditionModel is; after `prepare` the student is the one
    that accelerate wrapped, and `unet` the same without wrappers. `networks` are all U-Nets in memory, each once.
    `weights` and `averaged` are the parameters of the student and of its EMA by the same names, once the student is
    prepared; the second is empty without an EMA. For pictures, `teacher_view` and the values of `views`, by label,
    return a context manager: entering it gives a U-Net ready for sampling, leaving it restores the training state.
    `outputs` are the names that a run writes in the output folder.
    """

    title: str  # of the model card, as are:
    tags: list
    relation: str  # of base and result, in the Hub's terms
    takes_guidance: bool  # whether the guidance scale is an input of the student
    outputs: list

    def __init__(self, args, teacher, student, target):
        self.args, self.teacher, self.student, self.target = args, teacher, student, target
        self.unet = student

    def trainable_parameters(self):
        """The parameters that the optimizer is given, in a list."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def prepare(self, accelerator, optimizer):
        """Have accelerate wrap the student for the processes of this run; returns the wrapped optimizer."""
        self.student, optimizer = accelerator.prepare(self.student, optimizer)
        # Without the wrappers of DistributedDataParallel and torch.compile: the same weights under their plain names.
        self.unet = accelerator.unwrap_model(self.student, keep_torch_compile=False)
        return optimizer

    @property
    def is_sharded(self):
        """Whether FSDP splits the weights over processes; all of them have to call the networks together then."""
        return is_sharded(self.student)

    def gathered(self):
        """The same with complete weights, for files. All processes call this together; the first one's is of use."""
        return self


@contextlib.contextmanager
def eval_mode(network):
    """Yield a network in eval mode; its mode is restored afterwards."""
    was_training = network.training
    try:
        yield network.eval()
    finally:
        network.train(was_training)


class WholeUNet(Networks):
    """A whole U-Net that is trained, and its EMA, which is the target. Files are in the layout of diffusers."""

    title = "A latent consistency model"
    tags = ["latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "finetune"
    takes_guidance = True
    exported = "unet_target"  # the folder of the network to sample from
    outputs = ["unet", exported, "scheduler"]

    @property
    def networks(self):
        return [self.student, self.teacher, self.target]

    @property
    def saved(self):
        """{folder: network}"""
        return {"unet": self.unet, self.exported: self.target}

    @property
    def teacher_view(self):
        return partial(eval_mode, self.teacher)

    @cached_property
    def weights(self):
        return dict(self.unet.named_parameters())

    @cached_property
    def averaged(self):
        return dict(self.target.named_parameters())

    @property
    def views(self):
        return {"student": partial(eval_mode, self.unet), "EMA": partial(eval_mode, self.target)}

    def prepare(self, accelerator, optimizer):
        """Have accelerate wrap the student, and shard the target in the same way; returns the wrapped optimizer."""
        optimizer = super().prepare(accelerator, optimizer)
        if self.is_sharded:
            self.target = shard_like_student(accelerator, self.target)
        return optimizer

    def gathered(self):
        """The same with complete weights, for files. All processes call this together; the first one's is of use."""
        complete = copy.copy(self)
        complete.unet, complete.target = gathered(self.unet), gathered(self.target)
        return complete

    def save(self, folder):
        """Write what a checkpoint needs to `folder`."""
        for name, network in self.saved.items():
            network.save_pretrained(os.path.join(folder, name))

    def load(self, folder):
        """Read what `save` wrote."""
        for name, network in self.saved.items():
            saved = UNet2DConditionModel.from_pretrained(folder, subfolder=name)
            load_weights(network, saved.state_dict())

    def export(self, folder):
        """Write each network to its own folder in `folder`, in float32 and as fp16 variant."""
        self.save(folder)
        for name, network in self.saved.items():
            weights = {key: tensor.to("cpu", torch.float16) for key, tensor in network.state_dict().items()}
            with torch.device("meta"):  # no second copy in float32, on the GPU or here
                half = type(network).from_config(network.config)
            half.load_state_dict(weights, assign=True)
            half.save_pretrained(os.path.join(folder, name), variant="fp16")

    def describe(self, output_dir):
        """Lines that say what `export` wrote."""
        names = ", ".join(os.path.join(output_dir, name) for name in self.saved)
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


class Lora(Networks):
    """A LoRA that is trained in the teacher's own U-Net, and its EMA if there is one, in the formats that people load.

    `student` holds the adapters; `teacher` and `target` are AdapterViews of it. The EMA, if there is one, is exported.
    """

    title = "An LCM-LoRA"
    tags = ["lora", "latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "adapter"
    takes_guidance = False
    outputs = [DIFFUSERS_FILE, KOHYA_FILE, STUDENT_FOLDER, "scheduler"]

    def __init__(self, args, teacher, student, target):
        super().__init__(args, teacher, student, target)
        self.exported = TRAINED if args.ema_decay is None else EMA

    @property
    def networks(self):
        return [self.student]

    @property
    def teacher_view(self):
        return self.teacher.active

    @property
    def views(self):
        return {"LoRA": self.target.active}

    @cached_property
    def weights(self):
        return adapter_parameters(self.unet, TRAINED)

    @cached_property
    def averaged(self):
        return adapter_parameters(self.unet, EMA)

    def save(self, folder):
        """Write what a checkpoint needs to `folder`."""
        save_for_diffusers(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            save_for_diffusers(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))

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
