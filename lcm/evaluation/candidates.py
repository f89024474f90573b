"""Loads the teacher and the trained networks as their users do."""

import logging
import os
import textwrap
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from lcm.errors import UserError, first_line
from lcm.models.loading import DTYPE, TEACHER, close_folder, load_config, load_part, load_pretrained
from lcm.models.lora import adapter_layers
from lcm.models.lora_files import DIFFUSERS_FILE
from lcm.options.choices import SAMPLERS, STUDENT_SAMPLERS
from lcm.pictures.samplers import make_scheduler

logger = logging.getLogger(__name__)


def dtype_name(args: Namespace) -> str:
    """`--dtype`, or its default on this machine."""
    return args.dtype or ("float16" if torch.cuda.is_available() else "float32")


def load_teacher(args: Namespace, device: torch.device | str | None = None) -> diffusers.DiffusionPipeline:
    """The teacher's pipeline without a safety checker, which would blacken pictures, on a GPU or on `device`.

    Raises UserError if the teacher cannot be loaded, or has no U-Net or no betas.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype_name(args))
    parts: dict[str, Any] = {DTYPE: dtype, "variant": args.variant}
    index = load_config(diffusers.DiffusionPipeline, args)
    if "unet" not in index:
        raise UserError(f"{TEACHER}: {index.get('_class_name')} has no U-Net; allowed: Stable Diffusion and SDXL")
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    if args.pretrained_vae_model_name_or_path:
        path = args.pretrained_vae_model_name_or_path
        parts["vae"] = load_part(diffusers.AutoencoderKL, args, None, path, dtype=dtype)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised as well
    transformers.utils.logging.disable_progress_bar()
    source, revision = args.pretrained_teacher_model, args.teacher_revision or args.revision
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source, revision=revision, cache_dir=args.cache_dir, **parts
        )
    except Exception as error:  # the libraries raise nearly anything for a broken folder
        raise UserError(f"{TEACHER}: cannot load {source!r}: {first_line(error)}") from error
    if not hasattr(pipeline.scheduler, "betas"):
        kind = type(pipeline.scheduler).__name__
        raise UserError(f"{TEACHER}: its scheduler, {kind}, has no betas; allowed: the teacher of a training script")
    return pipeline.to(device)


@dataclass
class Trained:
    """A trained U-Net or LoRA, and the scheduler to sample it with."""

    label: str
    source: str  # a folder or a Hub id
    subfolder: str | None  # of a U-Net, "" if it is in `source` itself; None for a LoRA
    sampler: str  # the name of its scheduler in STUDENT_SAMPLERS
    scheduler: diffusers.SchedulerMixin

    @property
    def is_lora(self) -> bool:
        return self.subfolder is None


def has_file(source: str, name: str, cache_dir: str | None) -> bool:
    """Whether a folder, or a repository on the Hub, has a file. Raises UserError if there is no such repository."""
    if os.path.isdir(source):
        return os.path.isfile(os.path.join(source, name))
    try:
        return bool(hf_hub_download(source, name, cache_dir=cache_dir))
    except Exception as error:  # an invalid name, no access, no network
        is_local = isinstance(error, LocalEntryNotFoundError)  # not in the cache, and the Hub cannot be reached
        if isinstance(error, EntryNotFoundError) and is_local == constants.HF_HUB_OFFLINE:
            return False
        reason = f"is neither a folder nor available on the Hub: {first_line(error)}{close_folder(source)}"
        raise UserError(f"--trained: {source!r} {reason}") from error


def locate_trained(args: Namespace, source: str) -> str | None:
    """The `Trained.subfolder` of the network in an output folder, a checkpoint, a U-Net's own folder or a Hub
    repository. Raises UserError if there is no network."""
    has = partial(has_file, source, cache_dir=args.cache_dir)
    if has(DIFFUSERS_FILE):
        return None
    configs = {"unet_target": "unet_target/config.json", "": "config.json", "unet": "unet/config.json"}
    for subfolder, config in configs.items():
        if has(config):
            return subfolder
    raise UserError(
        f"--trained: {source!r} holds neither {DIFFUSERS_FILE} nor a U-Net (unet_target/, or config.json); "
        "allowed: an output folder of a training script, one of its checkpoints, or a Hub id"
    )


def open_trained(reference: diffusers.SchedulerMixin, args: Namespace, label: str, source: str) -> Trained:
    """The trained network at `source`, with its scheduler and without its weights. Where it has no scheduler it gets
    one with the noise schedule of `reference`, the teacher's. Raises UserError."""
    subfolder = locate_trained(args, source)
    if has_file(source, "scheduler/scheduler_config.json", args.cache_dir):
        place = {"subfolder": "scheduler", "cache_dir": args.cache_dir}
        sampler = find_sampler(source, **place)
        scheduler = load_pretrained(getattr(diffusers, SAMPLERS[sampler][0]), "--trained", source, **place)
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            logger.warning("--trained: the scheduler/ of %r clips latents, unlike training; this is ignored", source)
    else:
        sampler = "lcm"
        scheduler = make_scheduler(sampler, reference)
        grid = scheduler.config.original_inference_steps
        logger.warning("--trained: %r has no scheduler/; a grid of %d points is assumed", source, grid)
    return Trained(label, source, subfolder, sampler, scheduler)


def find_trained(pipeline: diffusers.DiffusionPipeline, args: Namespace, label: str, source: str) -> Trained:
    """`open_trained`, checked for `evaluate_lcm.py`.

    Raises UserError also if the network does not fit the teacher, or if its grid has fewer points than
    --num_inference_steps.
    """
    trained = open_trained(pipeline.scheduler, args, label, source)
    steps, grid = max(args.num_inference_steps), trained.scheduler.config.original_inference_steps
    if steps > grid:
        raise UserError(
            f"--num_inference_steps: {steps} given, but {source!r} was trained on a grid of {grid} points; allowed: "
            f"at most {grid}"
        )
    if trained.is_lora:  # only loading it shows whether it fits
        load_trained(pipeline, trained, args)
        pipeline.unload_lora_weights()
    else:
        check_unet(pipeline.unet.config, trained, args)
    return trained


def trained_config(kind: Any, source: str, **place: Any) -> dict[str, Any]:
    """The config of a part of a trained network, read by the class `kind`. Raises UserError."""
    try:
        return kind.load_config(source, **place)
    except Exception as error:
        raise UserError(f"--trained: cannot load {source!r}: {first_line(error)}") from error


def find_sampler(source: str, **place: Any) -> str:
    """The name in STUDENT_SAMPLERS of the scheduler in a folder or repository. Raises UserError for another one."""
    found = trained_config(diffusers.LCMScheduler, source, **place).get("_class_name")
    by_class = {SAMPLERS[name][0]: name for name in STUDENT_SAMPLERS}
    if found not in by_class:
        raise UserError(f"--trained: {source!r} has a scheduler {found}; allowed: {', '.join(by_class)}")
    return by_class[found]


def check_unet(expected: dict[str, Any], trained: Trained, args: Namespace) -> None:
    """Raise UserError if a trained U-Net cannot replace one whose config is `expected`."""
    place = {"subfolder": trained.subfolder or None, "cache_dir": args.cache_dir}
    found = trained_config(diffusers.UNet2DConditionModel, trained.source, **place)
    names = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
    wanted = {"_class_name": "UNet2DConditionModel", **{name: expected[name] for name in names}}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"--trained: the network in {trained.source!r} has {name} = {found.get(name)}; allowed: {value}, as "
                "the teacher's U-Net"
            )


def load_trained(pipeline: diffusers.DiffusionPipeline, trained: Trained, args: Namespace) -> None:
    """Load a LoRA into a pipeline, or replace its U-Net by a trained one. Raises UserError."""
    if trained.is_lora:
        try:
            pipeline.load_lora_weights(trained.source, weight_name=DIFFUSERS_FILE, cache_dir=args.cache_dir)
        except Exception as error:
            reason = textwrap.shorten(str(error), 300)  # the first line alone does not help
            raise UserError(f"--trained: the LoRA in {trained.source!r} does not fit the teacher: {reason}") from error
        if not adapter_layers(pipeline.unet):
            raise UserError(f"--trained: the LoRA in {trained.source!r} has no weights for the teacher's U-Net")
        return
    place = {"subfolder": trained.subfolder or None, "cache_dir": args.cache_dir}
    device, dtype = pipeline.device, pipeline.unet.dtype
    pipeline.unet = None  # freed before the next one is read: memory may not suffice for two
    unet = load_pretrained(diffusers.UNet2DConditionModel, "--trained", trained.source, dtype=dtype, **place)
    pipeline.unet = unet.to(device)
