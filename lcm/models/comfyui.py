"""The guidance of a whole U-Net for ComfyUI, whose U-Net has no input for it: one small LoRA file for each scale."""

import math
import os
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from lcm.options.checks import default_guidance_scale
from lcm.options.types import Options
from lcm_common import guidance_embedding

COMFYUI_FOLDER = "comfyui"
# What ComfyUI adds to the bias of that layer: `load_lora` and `model_lora_keys_unet` in its comfy/lora.py.
BIAS_KEY = "lora_unet_time_embedding_linear_1.diff_b"


def guidance_file(scale: float) -> str:
    """The name of the file for a guidance scale."""
    return f"lcm_guidance_{scale:g}.safetensors"


def guidance_scales(args: Options) -> list[float]:
    """The scales that get a file: each whole number that was trained, and the one of the printed code; ascending."""
    whole = range(math.ceil(args.w_min + 1), math.floor(args.w_max + 1) + 1)
    return sorted({default_guidance_scale(args), *map(float, whole)})


def save_guidance(unet: UNet2DConditionModel, scales: list[float], folder: str) -> None:
    """Write a file of a few kB to `folder` for each guidance scale of a U-Net with a guidance embedding.

    The U-Net computes linear_1(t + P e(w)), with e(w) the embedding of the guidance weight, and P without bias. With
    linear_1(x) = W x + b that is linear_1(t) + W P e(w). So a constant is added to b, which is exact but for rounding.
    It is float32, of the shape of b.
    """
    embedder = unet.time_embedding
    to_embedding, first = (layer.weight.detach().cpu().float() for layer in (embedder.cond_proj, embedder.linear_1))
    os.makedirs(folder, exist_ok=True)
    for scale in scales:
        embedding = guidance_embedding(torch.tensor([scale - 1.0]), to_embedding.shape[1])
        constant = first @ (to_embedding @ cast(torch.Tensor, embedding)[0])
        save_file({BIAS_KEY: constant}, os.path.join(folder, guidance_file(scale)), {"guidance_scale": f"{scale:g}"})
