"""The teacher's U-Net."""

import inspect

import diffusers

from lcm.errors import UserError
from lcm.models.loading import OPTION, load_config, load_part

NO_OTHER_INPUTS = {"class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None}  # of a U-Net


def unet_config(args):
    """The configuration of the teacher's U-Net: the class's defaults, then what the file says."""
    defaults = {name: p.default for name, p in inspect.signature(diffusers.UNet2DConditionModel).parameters.items()}
    return {**defaults, **load_config(diffusers.UNet2DConditionModel, args, "unet")}


def load_unet(args, encode_prompts, dtype):
    """The teacher's U-Net, on the CPU.

    Raises UserError, before its weights are read, if it is not one that this script can distil with `encode_prompts`:
    it takes another conditioning or a guidance embedding, or more channels than it predicts (inpainting, editing).
    """
    config = unet_config(args)
    if config["time_cond_proj_dim"] is not None:
        raise UserError(
            f"{OPTION}: its U-Net takes a guidance embedding, so it is a distilled model already; allowed: one that "
            "is sampled with classifier-free guidance"
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
    unet.register_to_config(_name_or_path="")  # a local path would travel into every saved config.json
    return unet
