"""Adapters in one U-Net, which is teacher, target and student in turn.

The teacher is the U-Net with its adapter disabled, the target is the U-Net without dropout. So one copy of the base
weights is enough for all three. The base is frozen, in the mixed precision; adapters are float32.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from lcm.errors import UserError, first_line
from lcm.models.lora_files import load_adapter
from lcm.options.types import Options, rank_pattern

logger = logging.getLogger(__name__)

TRAINED, EMA = "lcm", "ema"  # names of the two adapters in the U-Net
DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def find_targets(unet: UNet2DConditionModel, option: str | None) -> list[str]:
    """The layers that get an adapter, as ends of names: those of `--lora_target_modules`, or the default ones.

    Raises UserError for a name that fits no linear or convolutional layer, or that fits other modules too.
    """
    if option is None:
        return list(DEFAULT_TARGETS)
    fits = {name: isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) for name, layer in unet.named_modules()}
    targets = [target.strip() for target in option.split(",")]
    for target in targets:
        matches = [fit for name, fit in fits.items() if name == target or name.endswith(f".{target}")]
        if not matches or not all(matches):
            endings = (name.rpartition(".") for name, fit in fits.items() if fit)
            found = {f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last for head, _, last in endings}
            raise UserError(
                f"--lora_target_modules: {target!r} is no linear or convolutional layer of the U-Net; allowed: names, "
                f"or ends of names, as {', '.join(sorted(found))}"
            )
    return targets


def find_ranks(unet: UNet2DConditionModel, targets: list[str], option: str | None) -> dict[str, int]:
    """The ranks of `--lora_rank_pattern` by ends of names. Raises UserError for a name that fits no adapted layer."""
    pattern = rank_pattern(option)
    adapted = [
        name for name, _ in unet.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    for end in pattern:
        if not any(f".{name}".endswith(f".{end}") for name in adapted):
            raise UserError(
                f"--lora_rank_pattern: {end!r} fits none of the adapted layers; allowed: ends of their names, as "
                f"{', '.join(sorted(targets))}"
            )
    return {re.escape(end): rank for end, rank in pattern.items()}


def load_lora(unet: UNet2DConditionModel, adapter: str, path: str) -> None:
    """Load the LoRA of `--lora_weights` into an adapter. Raises UserError if it has other layers or ranks."""
    try:
        load_adapter(unet, adapter, path)
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise UserError(
            f"--lora_weights: cannot load {path!r}: {first_line(error)}; allowed: a LoRA of the same ranks and layers"
        ) from error


def add_adapters(unet: UNet2DConditionModel, args: Options, seed: int) -> None:
    """Freeze the U-Net and give it a trainable adapter, and with `--ema_decay` a second one for the EMA.

    The adapter starts as a function of the seed, the same on every process: A at random, B zero, so that the student
    is the teacher. Raises UserError for `--lora_target_modules` that do not exist.
    """
    targets = find_targets(unet, args.lora_target_modules)
    pattern = find_ranks(unet, targets, args.lora_rank_pattern)
    alpha = args.lora_alpha * args.lora_rank**0.5 if args.use_rslora else args.lora_alpha
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are wanted
        for name in (EMA, TRAINED) if args.ema_decay is not None else (TRAINED,):  # the last one stays active
            torch.manual_seed(seed)
            unet.add_adapter(
                LoraConfig(
                    r=args.lora_rank,
                    lora_alpha=alpha,  # the files of a LoRA know no other scale than alpha / rank
                    rank_pattern=pattern,
                    alpha_pattern={name: alpha * (rank / args.lora_rank) ** 0.5 for name, rank in pattern.items()}
                    if args.use_rslora
                    else {},
                    lora_dropout=args.lora_dropout,
                    target_modules=targets,
                ),
                name,
            )
            cast_training_params(unet)
    layers = adapter_layers(unet)
    for layer in layers:
        # peft would cast a 16-bit input to the adapter's float32, and autocast would cast it back. Without that,
        # results are the same to the last bit, but for dropout, which is then rounded to 16 bits.
        layer.cast_input_dtype_enabled = False
    ranks = ", ".join([str(args.lora_rank), *(f"{name} {rank}" for name, rank in pattern.items())])
    size = f"rank {ranks}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"
    logger.info("LoRA: %s, in %d layers", size, len(layers))
    if args.lora_weights is not None:
        for name in unet.peft_config:
            load_lora(unet, name, args.lora_weights)
        logger.info("LoRA: starts from %s", args.lora_weights)
    if args.w_min < args.w_max:
        logger.info(
            "--w_min, --w_max: the guidance weight is not an input of a LoRA, which learns an average over [%g, %g]; "
            "a narrow range, or one value for both, gives sharper pictures",
            args.w_min,
            args.w_max,
        )


def adapter_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """The layers of a U-Net that have adapters."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parameters(unet: UNet2DConditionModel, adapter: str) -> dict[str, torch.Tensor]:
    """The parameters of one adapter. The adapter's name is left out of their names, so two adapters have the same."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in unet.named_parameters()
        if f".{adapter}." in name
    }


def switch(layers: list[BaseTunerLayer], adapter: str | None) -> None:
    """Activate `adapter`, or for None no adapter, in `layers`, and leave every requires_grad as it is.

    peft's `set_adapter` and `enable_adapters` also set requires_grad on each weight. That takes most of their time and
    has no effect under no_grad. `torch.nn.Module.__setattr__`, which takes most of the rest, is avoided too. Raises
    RuntimeError if a future peft keeps these states elsewhere; without the check the teacher would
    silently be the student.
    """
    state = {"_disable_adapters": adapter is None} | ({} if adapter is None else {"_active_adapter": [adapter]})
    for layer in layers:
        vars(layer).update(state)
    first = next(iter(layers))
    if first.disable_adapters != (adapter is None) or adapter not in (None, *first.active_adapters):
        raise RuntimeError("this version of peft does not switch adapters by _disable_adapters and _active_adapter")


class AdapterView:
    """The U-Net with one of its adapters, or with none, and without dropout; called under no_grad.

    After a call the U-Net is the student again, with adapter and dropout. The backward pass needs that: gradient
    checkpointing runs the student's layers again, and even without it a layer in the wrong mode would silently give
    wrong gradients.
    """

    def __init__(self, unet: UNet2DConditionModel, adapter: str | None):
        self.unet, self.adapter = unet, adapter
        # Lists, because a walk through all modules of SDXL takes 25 ms.
        self.layers = adapter_layers(unet)
        self.dropouts = [module for module in unet.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]

    @contextlib.contextmanager
    def active(self) -> Iterator[UNet2DConditionModel]:
        """Yield the U-Net with only this adapter and without dropout."""
        was_training = [dropout.training for dropout in self.dropouts]
        try:
            for dropout in self.dropouts:
                vars(dropout)["training"] = False
            if self.adapter != TRAINED:
                switch(self.layers, self.adapter)
            yield self.unet
        finally:
            if self.adapter != TRAINED:
                switch(self.layers, TRAINED)
            for dropout, training in zip(self.dropouts, was_training, strict=True):
                vars(dropout)["training"] = training

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The U-Net's output."""
        with self.active() as unet:
            return unet(*args, **kwargs)
