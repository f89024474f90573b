"""The files of a LoRA, in the formats of diffusers and kohya."""

import os

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

# diffusers looks for the first name. The second must not end in the first, or diffusers would take it instead.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lcm_lora_kohya.safetensors"
STUDENT_FOLDER = "student"  # the student's own weights, if the output folder holds their moving average


def adapter_weights(unet: UNet2DConditionModel, adapter: str) -> dict[str, torch.Tensor]:
    """One adapter's tensors under peft's own keys, `down_blocks.0. ... .to_q.lora_A.weight`, float32, on the CPU."""
    weights = get_peft_model_state_dict(unet, adapter_name=adapter)
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}


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
            "rank_pattern": config.rank_pattern,  # diffusers before 0.40 requires it
            **({"alpha_pattern": config.alpha_pattern} if config.alpha_pattern else {}),
        },
        weight_name=DIFFUSERS_FILE,
    )


def save_for_kohya(unet: UNet2DConditionModel, adapter: str, path: str) -> None:
    """Write a file for ComfyUI and A1111 in float16: kohya's keys, `lora_unet_ ... .lora_down.weight`, and alphas."""
    config = unet.peft_config[adapter]
    weights = {f"unet.{name}": tensor.half() for name, tensor in adapter_weights(unet, adapter).items()}
    weights = convert_state_dict_to_kohya(weights)
    scales = {
        "lora_unet_" + name.replace(".", "_"): (layer.scaling[adapter], layer.r[adapter])
        for name, layer in unet.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    for name in weights:
        if name.endswith(".alpha"):
            scale, rank = scales[name.removesuffix(".alpha")]
            weights[name] = as_small_as_exact(scale * rank)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": f"{config.lora_alpha:g}",
    }
    save_file(weights, path, metadata)


def as_small_as_exact(value: float) -> torch.Tensor:
    """A number as float16, or as float32 if it would be rounded."""
    half = torch.tensor(value, dtype=torch.float16)
    return half if half.item() == value else torch.tensor(value)


def load_adapter(unet: UNet2DConditionModel, adapter: str, folder: str) -> None:
    """Load a file of `save_for_diffusers`, or the one in a folder, into an adapter. Raises ValueError unless keys and
    shapes are the adapter's."""
    weights = load_file(os.path.join(folder, DIFFUSERS_FILE) if os.path.isdir(folder) else folder)
    weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=adapter)
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{DIFFUSERS_FILE} and the U-Net's adapter differ in {len(odd)} tensors, such as {odd[0]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise ValueError(f"{DIFFUSERS_FILE} and the U-Net's adapter differ: {name} is {shapes}")
    set_peft_model_state_dict(unet, weights, adapter_name=adapter)
