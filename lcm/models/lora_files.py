"""The files that a LoRA is saved in: diffusers' and kohya's."""

import os

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

# diffusers looks for the first name. The second must not end in the first, or diffusers would take it instead.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lcm_lora_kohya.safetensors"
STUDENT_FOLDER = "student"  # beside a moving average: the weights as the optimizer left them


def adapter_weights(unet, adapter):
    """One adapter's tensors under peft's plain keys, `down_blocks.0. ... .to_q.lora_A.weight`, on the CPU."""
    weights = get_peft_model_state_dict(unet, adapter_name=adapter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_for_diffusers(unet, adapter, folder):
    """Write what `pipeline.load_lora_weights(folder)` takes, for Stable Diffusion and SDXL alike.

    Rank and alpha travel as metadata; diffusers refuses them as tensors. peft's plain keys, because
    `convert_state_dict_to_diffusers` mixes two styles where convolutions are among the targets, and the loader then
    drops every attention layer with no more than a warning.
    """
    config = unet.peft_config[adapter]
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=adapter_weights(unet, adapter),
        # Only these: what an older peft does not know of, it would refuse.
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
            "rank_pattern": {},  # diffusers before 0.40 reads it unasked
        },
        weight_name=DIFFUSERS_FILE,
    )


def save_for_kohya(unet, adapter, path):
    """Write what ComfyUI and A1111 take, in float16: kohya's keys, `lora_unet_ ... .lora_down.weight`, and alphas."""
    config = unet.peft_config[adapter]
    weights = {f"unet.{name}": tensor.half() for name, tensor in adapter_weights(unet, adapter).items()}
    weights = convert_state_dict_to_kohya(weights)
    alpha = torch.tensor(float(config.lora_alpha), dtype=torch.float16)
    weights = {name: alpha.clone() if name.endswith(".alpha") else tensor for name, tensor in weights.items()}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
    }
    save_file(weights, path, metadata)


def load_adapter(unet, adapter, folder):
    """Read what `save_for_diffusers` wrote back into an adapter. Raises ValueError unless every key fits."""
    weights = load_file(os.path.join(folder, DIFFUSERS_FILE))
    weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=adapter)
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{DIFFUSERS_FILE} and the U-Net's adapter differ in {len(odd)} tensors, such as {odd[0]}")
    set_peft_model_state_dict(unet, weights, adapter_name=adapter)
