"""Whether ComfyUI computes what diffusers does with the scripts' files: python benchmarks/comfyui.py FOLDER

FOLDER is a clone of ComfyUI whose requirements are installed beside those of this project. The U-Nets have the true
shape of Stable Diffusion 1.5 and random weights. ComfyUI loads the files of a whole U-Net and of a LoRA on the CPU,
and predicts noise for the same input as diffusers does in float32. Printed is the root mean square of the difference,
relative to that of the noise that diffusers predicts.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from diffusers import UNet2DConditionModel

from lcm.models import comfyui, lora_files
from lcm.models.lora import TRAINED, AdapterView
from lcm_common import guidance_embedding

SHAPE = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TIMESTEPS = (999, 499)
SCALES = (6.0, 7.5, 16.0)
FP16 = "diffusion_pytorch_model.fp16.safetensors"


def load_comfyui(folder):
    """ComfyUI's modules for files and for memory, on the CPU."""
    sys.argv[1:] = ["--cpu"]  # it reads its options from there
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    return comfy


def difference(found, expected):
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@torch.no_grad()
def predicted_by_comfyui(comfy, model, z, t, prompt):
    """The noise that its denoised latents stand for, at the noise level of timestep `t`."""
    comfy.model_management.load_models_gpu([model])
    sigma = model.model.model_sampling.sigmas[t]
    noisy = z * (sigma.square() + 1).sqrt()
    return (noisy - model.model.apply_model(noisy, sigma.view(1), c_crossattn=prompt)) / sigma


@torch.no_grad()
def predicted_by_diffusers(unet, z, t, prompt, w=None):
    embedding = guidance_embedding(torch.tensor([w]), unet.config.time_cond_proj_dim) if w is not None else None
    return unet(z, t, prompt, timestep_cond=embedding).sample


def with_file(comfy, model, path):
    """As the node LoraLoaderModelOnly does at strength 1."""
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path, safe_load=True), 1.0, 0.0)[0]


def report(comfy, name, plain, changed, expected, inputs):
    """One line: the difference with the file, and without it."""
    z, t, prompt = inputs
    with_it, without = (difference(predicted_by_comfyui(comfy, m, z, t, prompt), expected) for m in (changed, plain))
    print(f"{name}, timestep {t}: {with_it:.2%} with the file, {without:.0%} without")


def compare_whole(comfy, folder, z, prompt):
    unet = UNet2DConditionModel(**SHAPE, time_cond_proj_dim=256).eval()
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)
    comfyui.save_guidance(unet, list(SCALES), folder)
    unet.half().save_pretrained(folder, variant="fp16")
    unet.float()  # of rounded weights, as ComfyUI's
    plain = comfy.sd.load_diffusion_model(os.path.join(folder, FP16))
    for scale in SCALES:
        changed = with_file(comfy, plain, os.path.join(folder, comfyui.guidance_file(scale)))
        for t in TIMESTEPS:
            expected = predicted_by_diffusers(unet, z, t, prompt, scale - 1)
            report(comfy, f"whole U-Net, guidance scale {scale:g}", plain, changed, expected, (z, t, prompt))


def compare_lora(comfy, folder, z, prompt):
    from peft import LoraConfig

    unet = UNet2DConditionModel(**SHAPE).eval()
    unet.half().save_pretrained(folder, variant="fp16")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "conv1", "conv2"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian")
    unet.float().add_adapter(config, TRAINED)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    path = os.path.join(folder, lora_files.KOHYA_FILE)
    lora_files.save_for_kohya(unet, TRAINED, path)
    plain = comfy.sd.load_diffusion_model(os.path.join(folder, FP16))
    changed = with_file(comfy, plain, path)
    for t in TIMESTEPS:
        with AdapterView(unet, TRAINED).active() as adapted:
            expected = predicted_by_diffusers(adapted, z, t, prompt)
        report(comfy, "LoRA", plain, changed, expected, (z, t, prompt))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a clone of ComfyUI")
    comfy = load_comfyui(parser.parse_args().folder)
    torch.manual_seed(0)
    z, prompt = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 768)
    for compare in (compare_whole, compare_lora):
        with tempfile.TemporaryDirectory() as folder:
            compare(comfy, folder, z, prompt)


if __name__ == "__main__":
    main()
