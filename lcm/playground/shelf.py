"""The networks of the page. Each is loaded when it is first asked for, and stays in memory."""

import copy
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import diffusers

from lcm.errors import UserError
from lcm.evaluation.candidates import check_unet, load_teacher, load_trained, locate_trained, open_trained
from lcm.models.loading import load_config
from lcm.models.lora import adapter_layers, switch
from lcm.options.checks import default_guidance_scale
from lcm.options.types import Options
from lcm.pictures.samplers import make_scheduler
from lcm.playground.wishes import AS_TRAINED, Wish
from lcm.run.resume import STATE_FILE, list_checkpoints, read_state

TEACHER = "teacher"
GUIDANCE_OF_LORAS = (1.0, 2.0)  # it has learned its guidance; above, the guidance of two is added up
CARD_ROW = re.compile(r"^\| guidance_scale \| [^(]*\(w = (\S+?)(?: to (\S+))?\)", re.M)


@dataclass
class Network:
    """A network of the page. `guidance` is the range of scales that fit its training, None if any does or if it is not
    known. The last three are None until it is loaded."""

    label: str
    source: str
    is_lora: bool
    guidance: tuple[float, float] | None = None
    prompts: tuple[str, ...] = ()  # those of its validation pictures
    unet: Any = None
    scheduler: Any = None
    adapter: str | None = None  # of a LoRA: its name in the teacher's U-Net


def training_options(source: str) -> Namespace:
    """What is known of the options with which the network in a folder was trained; empty if nothing is.

    They are in its checkpoint, else, without a checkpoint, the guidance weights are on its card.
    """
    folders = [source] if os.path.isfile(os.path.join(source, STATE_FILE)) else list_checkpoints(source)
    if folders:
        try:
            return Namespace(**read_state(folders[-1])["options"])
        except UserError:  # a damaged file; the network beside it may be whole
            pass
    for name in ("README.md", "model_card.md"):
        path = os.path.join(source, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                row = CARD_ROW.search(file.read())
            if row:
                return Namespace(w_min=float(row[1]), w_max=float(row[2] or row[1]))
    return Namespace()


def guidance_range(options: Namespace, is_lora: bool) -> tuple[float, float] | None:
    """The guidance scales that fit a training with these options."""
    if getattr(options, "w_max", None) == 0:  # trained without guidance, which then works as it does in the teacher
        return None
    if is_lora:
        return GUIDANCE_OF_LORAS
    return (options.w_min + 1, options.w_max + 1) if "w_min" in options else None


class Shelf:
    """The teacher and the trained networks. LoRAs are adapters in the teacher's own U-Net, of which there is one.

    Only the drawing whose turn it is may load or use a network. Raises UserError for folders without a network.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.pipeline: Any = None  # the teacher's, once it is loaded
        self.layers: list[Any] = []  # of the teacher's U-Net, with adapters
        self.strengths: dict[str, float] = {}  # of the adapters
        index = load_config(diffusers.DiffusionPipeline, args)
        if "unet" not in index:
            raise UserError(
                f"--pretrained_teacher_model: {index.get('_class_name')} has no U-Net; allowed: Stable Diffusion and "
                "SDXL"
            )
        self.networks: dict[str, Network] = {}
        for label, source in args.trained:
            options, is_lora = training_options(source), locate_trained(args, source) is None
            prompts = tuple(getattr(options, "validation_prompts", None) or ())
            self.networks[label] = Network(label, source, is_lora, guidance_range(options, is_lora), prompts)
        self.networks[TEACHER] = Network(TEACHER, args.pretrained_teacher_model, False)

    @property
    def default_guidance_scale(self) -> float:
        """7.5, moved into the range of the first whole U-Net that has one."""
        ranges = [network.guidance for network in self.networks.values() if network.guidance and not network.is_lora]
        low, high = ranges[0] if ranges else (1.0, 7.5)
        return default_guidance_scale(Options(w_min=low - 1, w_max=high - 1))

    def size(self, most: int) -> int:
        """The teacher's own size in pixels a side, at most `most`."""
        config = load_config(diffusers.UNet2DConditionModel, self.args, "unet")
        vae = load_config(diffusers.AutoencoderKL, self.args, "vae")
        return min(config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1), most)

    def missing(self, label: str) -> list[str]:
        """What has to be loaded before a network can draw: the teacher's parts, then its own."""
        parts = [] if self.pipeline else [TEACHER]
        return parts if label == TEACHER or self.networks[label].unet else [*parts, label]

    def load(self, label: str) -> None:
        """Load the teacher, or a network into its pipeline. Raises UserError."""
        network = self.networks[label]
        if label == TEACHER:
            self.pipeline = load_teacher(self.args)
            self.pipeline.set_progress_bar_config(disable=True)
            network.scheduler, network.unet = self.pipeline.scheduler, self.pipeline.unet
            return
        trained = open_trained(self.pipeline.scheduler, self.args, label, network.source)
        pipeline = copy.copy(self.pipeline)
        if not trained.is_lora:
            check_unet(self.pipeline.unet.config, trained, self.args)
            load_trained(pipeline, trained, self.args)
        else:
            earlier = set(getattr(pipeline.unet, "peft_config", ()))
            load_trained(pipeline, trained, self.args)
            (network.adapter,) = set(pipeline.unet.peft_config) - earlier
            self.layers, self.strengths[network.adapter] = adapter_layers(pipeline.unet), 1.0
        network.scheduler, network.unet = trained.scheduler, pipeline.unet

    def use(self, label: str, strength: float) -> None:
        """Make the teacher's U-Net the teacher, or the teacher with one LoRA, before a step of that network."""
        adapter = self.networks[label].adapter
        if adapter is not None and self.strengths[adapter] != strength:
            self.pipeline.unet.set_adapters([adapter], [strength])
            self.strengths[adapter] = strength
        if self.layers:
            switch(self.layers, adapter)

    def make_scheduler(self, label: str, wish: Wish) -> Any:
        """A new scheduler for one picture."""
        scheduler = self.networks[label].scheduler
        if label == TEACHER:
            return make_scheduler(wish.teacher_sampler, scheduler)
        if wish.sampler == AS_TRAINED:
            return make_scheduler("own", scheduler)
        grid = {name: scheduler.config[name] for name in ("original_inference_steps", "timestep_scaling")}
        return make_scheduler(wish.sampler, scheduler, **grid)

    def takes_guidance(self, label: str) -> bool:
        """Whether guidance is an input of a loaded network. A negative prompt then has no effect."""
        return self.networks[label].unet.config.time_cond_proj_dim is not None
