"""Teacher, student and target of a run, and their files: for a whole U-Net, and for a LoRA."""

import contextlib
import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel

from lcm.models.comfyui import COMFYUI_FOLDER, guidance_file, guidance_scales, save_guidance
from lcm.models.lora import EMA, TRAINED, AdapterView, adapter_parameters
from lcm.models.lora_files import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    STUDENT_FOLDER,
    load_adapter,
    save_for_diffusers,
    save_for_kohya,
)
from lcm.models.offload import while_called
from lcm.models.sharding import gathered, is_sharded, load_weights, shard_like_student
from lcm.models.usage import Machine, lora_code, unet_code
from lcm.options.types import Options

View = Callable[[], AbstractContextManager[UNet2DConditionModel]]


class Networks(ABC):
    """Teacher, student and target of a run, and the files of the trained networks.

    `teacher`, `student` and `target` are called as a UNet2DConditionModel is; after `prepare` the student is the one
    that accelerate wrapped, and `unet` the same without wrappers. `networks` are all U-Nets in memory, each once.
    `weights` and `averaged` are the parameters of the student and of its EMA by the same names, once the student is
    prepared; the second is empty without an EMA. For pictures, `teacher_view` and the values of `views`, by label,
    return a context manager: entering it gives a U-Net ready for sampling, leaving it restores the training state.
    `outputs` are the names that a run writes in the output folder.
    """

    title: str  # for the model card
    tags: list[str]  # for the model card
    relation: str  # of the result to the teacher, as the Hub calls it
    takes_guidance: bool  # whether the guidance scale is an input of the student
    outputs: list[str]
    networks: list[UNet2DConditionModel]
    teacher_view: View
    views: dict[str, View]
    weights: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor]

    def __init__(self, args: Options, teacher: Any, student: Any, target: Any):
        self.args, self.teacher, self.student, self.target = args, teacher, student, target
        self.unet = student

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters for the optimizer."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Let accelerate wrap the student for the processes of this run; returns the wrapped optimizer."""
        self.student, optimizer = accelerator.prepare(self.student, optimizer)
        # Without the wrappers of DistributedDataParallel and torch.compile: the same weights under their plain names.
        self.unet = accelerator.unwrap_model(self.student, keep_torch_compile=False)
        return optimizer

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the weights. If so, all processes have to call the networks together."""
        return is_sharded(self.student)

    def gathered(self) -> Self:
        """These networks with complete weights, for files; only those on the main process. All processes call this."""
        return self

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write the networks for a checkpoint to `folder`."""

    @abstractmethod
    def load(self, folder: str) -> None:
        """Read the files of `save`."""

    @abstractmethod
    def export(self, folder: str) -> None:
        """Write the networks for users to `folder`."""

    @abstractmethod
    def describe(self, output_dir: str) -> list[str]:
        """Lines that say which files `export` wrote."""

    @abstractmethod
    def pushed_files(self, output_dir: str) -> dict[str, str]:
        """The files for the Hub, {path in the repository: path here}."""

    @abstractmethod
    def usage_code(self, teacher: str, source: str, on_hub: bool, machine: Machine) -> str:
        """Python that samples from `source`: a repository if `on_hub`, else the output folder of this run."""

    @abstractmethod
    def card_text(self) -> str:
        """What it is and how it is used, for the model card."""

    @abstractmethod
    def card_rows(self) -> dict[str, Any]:
        """Rows for the model card's table of options."""


@contextlib.contextmanager
def eval_mode(network: UNet2DConditionModel, on_device: AbstractContextManager[Any]) -> Iterator[UNet2DConditionModel]:
    """Yield a network in eval mode, within the context that holds it on the device; its mode is then restored."""
    was_training = network.training
    try:
        with on_device:
            yield network.eval()
    finally:
        network.train(was_training)


class WholeUNet(Networks):
    """A U-Net that is trained with all its weights, and its EMA, which is the target. Files are diffusers'."""

    title = "A latent consistency model"
    tags = ["latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "finetune"
    exported = "unet_target"  # the folder of the network to sample from
    outputs = ["unet", exported, COMFYUI_FOLDER, "scheduler"]

    def __init__(self, args: Options, teacher: Any, student: Any, target: Any):
        super().__init__(args, teacher, student, target)
        self.networks = [student, teacher, target]
        self.takes_guidance = args.unet_time_cond_proj_dim is not None

    @property
    def saved(self) -> dict[str, UNet2DConditionModel]:
        """{folder: network}"""
        return {"unet": self.unet, self.exported: self.target}

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """Let accelerate wrap the student, and shard the target in the same way; returns the wrapped optimizer."""
        optimizer = super().prepare(accelerator, optimizer)
        if self.is_sharded:
            self.target = shard_like_student(accelerator, self.target)
        teacher_on_device = while_called("teacher", self.teacher, self.args.offload, accelerator.device)
        self.target_on_device = while_called("moving average", self.target, self.args.offload_ema, accelerator.device)
        self.teacher_view = partial(eval_mode, self.teacher, teacher_on_device)
        self.views = {
            "student": partial(eval_mode, self.unet, contextlib.nullcontext()),
            "EMA": partial(eval_mode, self.target, self.target_on_device),
        }
        self.weights, self.averaged = dict(self.unet.named_parameters()), dict(self.target.named_parameters())
        return optimizer

    def gathered(self) -> Self:
        """These networks with complete weights, for files; only those on the main process. All processes call this."""
        self.target_on_device.wait_for_copies()
        complete = copy.copy(self)
        complete.unet, complete.target = gathered(self.unet), gathered(self.target)
        return complete

    def save(self, folder: str) -> None:
        for name, network in self.saved.items():
            network.save_pretrained(os.path.join(folder, name))

    def load(self, folder: str) -> None:
        for name, network in self.saved.items():
            saved = UNet2DConditionModel.from_pretrained(folder, subfolder=name)
            load_weights(network, saved.state_dict())

    def export(self, folder: str) -> None:
        self.save(folder)
        for name, network in self.saved.items():
            weights = {key: tensor.to("cpu", torch.float16) for key, tensor in network.state_dict().items()}
            with torch.device("meta"):  # no second copy in float32, on the GPU or here
                half = type(network).from_config(network.config)
            half.load_state_dict(weights, assign=True)
            half.save_pretrained(os.path.join(folder, name), variant="fp16")
        if self.takes_guidance:
            save_guidance(self.target, guidance_scales(self.args), os.path.join(folder, COMFYUI_FOLDER))

    def describe(self, output_dir: str) -> list[str]:
        names = ", ".join(os.path.join(output_dir, name) for name in self.saved)
        lines = [f'{names}: the networks, also as variant="fp16"; use {self.exported}']
        if self.takes_guidance:
            lines.append(f"{os.path.join(output_dir, COMFYUI_FOLDER)}: its guidance scales, for ComfyUI")
        return lines

    def pushed_files(self, output_dir: str) -> dict[str, str]:
        folder = os.path.join(output_dir, self.exported)
        files = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
        if self.takes_guidance:
            names = (f"{COMFYUI_FOLDER}/{guidance_file(scale)}" for scale in guidance_scales(self.args))
            files |= {name: os.path.join(output_dir, name) for name in names}
        return files

    def usage_code(self, teacher: str, source: str, on_hub: bool, machine: Machine) -> str:
        folder = None if on_hub else self.exported
        return unet_code(self.args, teacher, source, folder, machine)

    def card_text(self) -> str:
        guidance = " The guidance scale is one of its inputs and costs nothing extra." if self.takes_guidance else ""
        return f"This U-Net samples in 1 to 8 steps.{guidance}"

    def card_rows(self) -> dict[str, Any]:
        dim = self.args.unet_time_cond_proj_dim
        return {"guidance embedding": "none" if dim is None else dim, "EMA decay": self.args.ema_decay}


class Lora(Networks):
    """A LoRA that is trained in the teacher's own U-Net. With an EMA, the EMA is exported.

    `student` is the U-Net with the adapters; `teacher` and `target` are AdapterViews of it.
    """

    title = "An LCM-LoRA"
    tags = ["lora", "latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "adapter"
    takes_guidance = False
    outputs = [DIFFUSERS_FILE, KOHYA_FILE, STUDENT_FOLDER, "scheduler"]

    def __init__(self, args: Options, teacher: AdapterView, student: UNet2DConditionModel, target: AdapterView):
        super().__init__(args, teacher, student, target)
        self.exported = TRAINED if args.ema_decay is None else EMA
        self.networks = [student]
        self.teacher_view, self.views = teacher.active, {"LoRA": target.active}

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        optimizer = super().prepare(accelerator, optimizer)
        self.weights, self.averaged = adapter_parameters(self.unet, TRAINED), adapter_parameters(self.unet, EMA)
        return optimizer

    def save(self, folder: str) -> None:
        save_for_diffusers(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            save_for_diffusers(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))

    def load(self, folder: str) -> None:
        load_adapter(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            load_adapter(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))

    def export(self, folder: str) -> None:
        self.save(folder)
        save_for_kohya(self.unet, self.exported, os.path.join(folder, KOHYA_FILE))

    def describe(self, output_dir: str) -> list[str]:
        lines = [
            f"{os.path.join(output_dir, DIFFUSERS_FILE)}: the LoRA for diffusers, float32",
            f"{os.path.join(output_dir, KOHYA_FILE)}: the same for ComfyUI and A1111, float16",
        ]
        if self.exported != TRAINED:
            lines.append(f"{os.path.join(output_dir, STUDENT_FOLDER)}: as the optimizer left it; the rest is its EMA")
        return lines

    def pushed_files(self, output_dir: str) -> dict[str, str]:
        return {name: os.path.join(output_dir, name) for name in (DIFFUSERS_FILE, KOHYA_FILE)}

    def usage_code(self, teacher: str, source: str, on_hub: bool, machine: Machine) -> str:
        return lora_code(self.args, teacher, source, machine)

    def card_text(self) -> str:
        return (
            "This LoRA lets its base model, and other fine-tunes of it, sample in 1 to 8 steps. "
            f"`{DIFFUSERS_FILE}` is for diffusers, `{KOHYA_FILE}` for ComfyUI and A1111."
        )

    def card_rows(self) -> dict[str, Any]:
        args = self.args
        rows = {"LoRA": f"rank {args.lora_rank}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"}
        return rows if args.ema_decay is None else {**rows, "EMA decay": args.ema_decay}
