"""Folders with the configurations of SD 1.5 and SDXL, without weights: for a dry run where the Hub cannot be reached.

    python benchmarks/configs.py FOLDER

Writes FOLDER/sd15, FOLDER/sdxl and FOLDER/sdxl-vae-fp16-fix. A dry run reads nothing else of a teacher but its
tokenizers; those of the demo's teacher stand in, padded to 77 tokens.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

DEMO_TEACHER = Path(__file__).resolve().parent.parent / "demo" / "teacher"

SD: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL: dict[str, Any] = {
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
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def vae(scaling_factor: float, sample_size: int) -> dict[str, Any]:
    return {
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_teacher(folder: Path, pipeline: str, parts: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Write the configurations of a teacher; `parts` are {subfolder: (class, its configuration)}."""
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    shutil.copytree(DEMO_TEACHER / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    for name, (kind, config) in parts.items():
        library = "transformers" if kind.startswith("CLIP") else "diffusers"
        index[name] = [library, kind]
        known = {"model_type": "clip_text_model", "architectures": [kind]} if library == "transformers" else {}
        write(folder / name / "config.json", {"_class_name": kind, **known, **config})
        if library == "transformers":
            tokenizer = name.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            shutil.copytree(DEMO_TEACHER / "tokenizer", folder / tokenizer, dirs_exist_ok=True)
            settings = folder / tokenizer / "tokenizer_config.json"
            write(settings, json.loads(settings.read_text()) | {"model_max_length": 77})
    write(folder / "model_index.json", index)


def main(folder: Path) -> None:
    write_teacher(
        folder / "sd15",
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", SD),
            "vae": ("AutoencoderKL", vae(0.18215, 512)),
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
    )
    write_teacher(
        folder / "sdxl",
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", SDXL),
            "vae": ("AutoencoderKL", vae(0.13025, 1024)),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
    )
    write(folder / "sdxl-vae-fp16-fix" / "config.json", {"_class_name": "AutoencoderKL", **vae(0.13025, 1024)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they are written")
    folder = parser.parse_args().folder
    main(folder)
    print(f"Wrote {', '.join(str(path) for path in sorted(folder.iterdir()) if path.is_dir())}")
