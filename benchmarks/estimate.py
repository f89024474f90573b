"""How much GPU memory the four scripts need for weights, gradients and optimizer, computed from parameter counts.

    python benchmarks/estimate.py

Nothing is downloaded or allocated: the networks of SD 1.5 and SDXL are built without memory, and their parameters are
counted. Activations are not included; they depend on batch size and resolution, and `--gradient_checkpointing` makes
them small. An estimate, not a measurement: bitsandbytes' 8-bit states count as one byte each, a value in mixed
precision as two bytes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

FLOAT, HALF = 4, 2
ADAM, ADAM_8BIT = 8, 2  # bytes for the two moments of a parameter

SD = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def count(network: torch.nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained_only)


def parameter_counts(is_sdxl: bool, lora_rank: int = 64) -> tuple[int, int, int]:
    """Numbers of parameters: (U-Net, LoRA, text encoders and VAE)."""
    import diffusers
    import transformers

    from lcm.models import lora as lcm_lora

    args = SimpleNamespace(
        lora_rank=lora_rank, lora_alpha=lora_rank, lora_dropout=0.0, lora_target_modules=None, ema_decay=None,
        seed=0, w_min=0, w_max=0,
    )  # fmt: skip
    with torch.device("meta"):
        clip_l = transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        clip_g = transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        frozen = count(transformers.CLIPTextModel(clip_l))
        frozen += count(transformers.CLIPTextModelWithProjection(clip_g)) if is_sdxl else 0
        frozen += count(
            diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
        )
        unet = diffusers.UNet2DConditionModel(**(SDXL if is_sdxl else SD))
        size = count(unet)
        lcm_lora.add_adapters(unet, args, seed=0)
        return size, count(unet, trained_only=True), frozen


def full_model_bytes(unet: int, frozen: int, teacher: int, adam: int) -> int:
    """Teacher, student, its half-precision copy for the backward pass, gradients, moments, target, frozen parts."""
    return unet * (teacher + FLOAT + HALF + FLOAT + adam + FLOAT) + frozen * HALF


def lora_bytes(unet: int, lora: int, frozen: int, adam: int) -> int:
    """One U-Net, the LoRA, its half-precision copy, gradients, moments, frozen parts."""
    return unet * HALF + lora * (FLOAT + HALF + FLOAT + adam) + frozen * HALF


def main() -> None:
    print("| script, in fp16 or bf16 | U-Net | trained | with AdamW | with --use_8bit_adam |")
    print("| --- | --- | --- | --- | --- |")
    for name, is_sdxl in (("sd", False), ("sdxl", True)):
        unet, lora, frozen = parameter_counts(is_sdxl)
        rows = [
            (f"{name}", unet, [full_model_bytes(unet, frozen, FLOAT, adam) for adam in (ADAM, ADAM_8BIT)]),
            (f"{name}, --cast_teacher_unet", unet,
             [full_model_bytes(unet, frozen, HALF, adam) for adam in (ADAM, ADAM_8BIT)]),
            (f"lora_{name}, rank 64", lora, [lora_bytes(unet, lora, frozen, adam) for adam in (ADAM, ADAM_8BIT)]),
        ]  # fmt: skip
        for label, trained, totals in rows:
            gigabytes = " | ".join(f"{total / 1e9:.1f} GB" for total in totals)
            print(f"| {label} | {unet / 1e6:.0f} M | {trained / 1e6:.0f} M | {gigabytes} |")


if __name__ == "__main__":
    main()
