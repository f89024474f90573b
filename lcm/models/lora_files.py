"""The files of a LoRA, in the formats of diffusers and kohya."""

import os

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

# diffusers looks for the first name. The second must not end in the first, or diffusers would take it instead.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lcm_lora_kohya.safetensors"
STUDENT_FOLDER = "student"  # the student's own weights, if the output folder holds their moving average


def adapter_weights(unet: UNet2DConditionModel, adapter: str) -> dict[str, torch.Tensor]:
    """One adapter's tensors under peft's own keys, `down_blocks.0. ... .to_q.lora_A.weight`, on the CPU."""
    weights = get_peft_model_state_dict(unet, adapter_name=adapter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_for_diffusers(unet: UNet2DConditionModel, adapter: str, folder: str) -> None:
    """Write the file that `pipeline.load_lora_weights(folder)` reads, for Stable Diffusion and SDXL.

    Rank and alpha are metadata, since diffusers refuses them as tensors. The keys are peft's own: with convolutions
    among the targets, `convert_state_dict_to_diffusers` mixes two styles of keys, and the loader then drops every
    attention layer with only a warning.
    """
    config = unet.peft_config[adapter]
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=adapter_weights(unet, adapter),
        # Only these: an older peft refuses entries that it does not know.
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
            "rank_pattern": {},  # diffusers before 0.40 requires it
        },
        weight_name=DIFFUSERS_FILE,
    )


def save_for_kohya(unet: UNet2DConditionModel, adapter: str, path: str) -> None:
    """Write a file for ComfyUI and A1111 in float16: kohya's keys, `lora_unet_ ... .lora_down.weight`, and alphas."""
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


def load_adapter(unet: UNet2DConditionModel, adapter: str, folder: str) -> None:
    """Load a file of `save_for_diffusers` into an adapter. Raises ValueError unless the keys are the adapter's."""
    weights = load_file(os.path.join(folder, DIFFUSERS_FILE))
    weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=adapter)
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{DIFFUSERS_FILE} and the U-Net's adapter differ in {len(odd)} tensors, such as {odd[0]}")
    set_peft_model_state_dict(unet, weights, adapter_name=adapter)
