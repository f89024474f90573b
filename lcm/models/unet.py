"""The teacher's U-Net."""

import inspect
from argparse import Namespace
from typing import Any

import diffusers
import torch

from lcm.errors import UserError
from lcm.models.loading import OPTION, load_config, load_part
from lcm.models.prompts import PromptEncoder, SDXLPromptEncoder


def unet_config(args: Namespace) -> dict[str, Any]:
    """The configuration of the teacher's U-Net: its file, with the class's defaults for missing entries."""
    defaults = {name: p.default for name, p in inspect.signature(diffusers.UNet2DConditionModel).parameters.items()}
    return {**defaults, **load_config(diffusers.UNet2DConditionModel, args, "unet")}


def load_unet(
    args: Namespace, encode_prompts: PromptEncoder | SDXLPromptEncoder, dtype: torch.dtype
) -> diffusers.UNet2DConditionModel:
    """The teacher's U-Net, on the CPU.

    Raises UserError, before its weights are read, if this script cannot distil it: it takes another conditioning than
    `encode_prompts` returns, a guidance embedding, or more channels than it predicts (inpainting, editing).
    """
    config = unet_config(args)
    if config["time_cond_proj_dim"] is not None:
        raise UserError(
            f"{OPTION}: its U-Net takes a guidance embedding, so it is already a distilled model; allowed: a model "
            "that is sampled with classifier-free guidance"
        )
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"{OPTION}: its U-Net takes {config['in_channels']} channels and predicts {config['out_channels']}, as "
            "for inpainting or editing; allowed: a text-to-image model"
        )
    for name, expected in encode_prompts.unet_config(config).items():
        if config[name] != expected:
            raise UserError(
                f"{OPTION}: its U-Net has {name} = {config[name]}; allowed here: {expected}, as in "
                f"{encode_prompts.layout}"
            )
    unet = load_part(diffusers.UNet2DConditionModel, args, "unet", dtype=dtype)
    unet.register_to_config(_name_or_path="")  # else every saved config.json would contain a local path
    return unet
