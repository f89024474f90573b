"""Options that make networks smaller or faster and do not change their results."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from lcm.errors import first_line
from lcm.models.networks import Networks
from lcm.options.types import Options

# Methods of modules of a U-Net that `checkpoint_gradients` adds to those of diffusers.
CHECKPOINTED = {
    Transformer2DModel: ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"),
    Downsample2D: ("forward",),
    Upsample2D: ("forward",),
}
logger = logging.getLogger(__name__)


def checkpointed(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, which recomputes its activations in the backward pass."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        return checkpoint(method, *args, use_reentrant=False, **kwargs)

    return wrapped


def checkpoint_gradients(unet: diffusers.UNet2DConditionModel) -> None:
    """Keep no activations of a U-Net for the backward pass, but the inputs of its layers.

    diffusers does this for resnets and attention blocks. It leaves out what is around the attention blocks, and the
    layers that change the resolution.
    """
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        for name in CHECKPOINTED.get(type(module), ()):
            setattr(module, name, checkpointed(getattr(module, name)))


def enable_memory_savers(args: Options, accelerator: Accelerator, networks: Networks) -> None:
    """Enable gradient checkpointing for the student, and xformers' attention, where it works, for all networks."""
    for option in ("offload", "offload_ema"):
        if getattr(args, option, False) and accelerator.device.type == "cpu":
            logger.warning("--%s: saves memory of a GPU; on a CPU it has no effect", option)
    if args.gradient_checkpointing:
        checkpoint_gradients(networks.student)
    if args.enable_xformers_memory_efficient_attention:
        if accelerator.device.type != "cuda" or not diffusers.utils.is_xformers_available():
            logger.warning(
                "--enable_xformers_memory_efficient_attention: needs xformers and CUDA; using PyTorch's own attention"
            )
        else:
            try:
                for network in networks.networks:
                    network.enable_xformers_memory_efficient_attention()
            except Exception as error:  # built for another torch or GPU: diffusers tries it and fails
                for network in networks.networks:
                    network.disable_xformers_memory_efficient_attention()
                logger.warning("--enable_xformers_memory_efficient_attention: %s; using PyTorch's", first_line(error))
