"""docs/simpletuner.md has every key of SimpleTuner's quickstart, and each of its options takes the value."""

import importlib
import re

import pytest
from conftest import ROOT

from lcm.options.shapes import training_shapes

PAGE = (ROOT / "docs" / "simpletuner.md").read_text()
# The keys of the quickstart's two files, and the values of those that a run here has too.
CONFIG = {
    "model_type": "lora", "model_family": "sdxl", "output_dir": "/home/user/output/sdxl-lcm",
    "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "distillation_method": "lcm",
    "distillation_config": None, "num_ddim_timesteps": 50, "w_min": 1.0, "w_max": 12.0, "loss_type": "l2",
    "huber_c": 0.001, "timestep_scaling_factor": 10.0, "resolution": 1024, "resolution_type": "pixel",
    "validation_resolution": [(1024, 1024), (1280, 768), (768, 1280)], "aspect_bucket_rounding": 64,
    "minimum_image_size": 0.5, "maximum_image_size": 1.0, "learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1000, "max_train_steps": 10000, "train_batch_size": 1,
    "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "mixed_precision": "bf16",
    "lora_type": "standard", "lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "validation_step_interval": 250,
    "validation_num_inference_steps": [4], "validation_guidance": [1.0],
    "validation_prompt":
        ["A portrait of a woman with flowers in her hair, highly detailed, professional photography"],
    "validation_negative_prompt": "blurry, low quality, distorted, amateur", "checkpoint_step_interval": 500,
    "checkpoints_total_limit": 5, "resume_from_checkpoint": "latest", "optimizer": "adamw_bf16", "adam_beta1": 0.9,
    "adam_beta2": 0.99, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "seed": 42,
    "push_to_hub": True, "hub_model_id": "your-username/sdxl-lcm-distilled", "report_to": "wandb",
    "tracker_project_name": "sdxl-lcm-distillation", "tracker_run_name": "sdxl-lcm-4step",
    "base_model_precision": "no_change", "text_encoder_1_precision": None, "text_encoder_2_precision": None,
}  # fmt: skip
BACKEND = [
    "id", "type", "crop", "crop_aspect", "crop_style", "resolution", "minimum_image_size", "maximum_image_size",
    "target_downsample_size", "resolution_type", "cache_dir_vae", "instance_data_dir", "disabled", "caption_strategy",
    "metadata_backend", "dataset_type", "default", "cache_dir", "write_batch_size",
]  # fmt: skip
# Keys that choose the script; and one that the other file has with another value, which is in effect.
OTHER = {"model_type", "model_family", "distillation_method", "resolution_type"}


def rows(heading):
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.M))


def test_every_key_has_a_row():
    assert list(rows("config.json")) == list(CONFIG)
    assert list(rows("multidatabackend.json")) == BACKEND


@pytest.fixture(scope="module")
def args():
    module = importlib.import_module("train_lcm_distill_lora_sdxl_wds")
    return module.parse_args(["--config", str(ROOT / "configs" / "simpletuner_lora_sdxl.yaml")])


@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if value is not None and key not in OTHER])
def test_the_translated_run_has_the_value(args, key):
    here = rows("config.json")[key]
    if here == "nothing to set":
        return
    (option,) = re.findall(r"`--(\w+)`", here)
    assert getattr(args, option) == CONFIG[key]


@pytest.mark.parametrize("key", BACKEND)
def test_rows_of_the_data(args, key):
    """Options of the rows are those of the training, of make_shards.py or of precompute_lcm.py."""
    here = rows("multidatabackend.json")[key]
    if here != "nothing to set":
        (option,) = re.findall(r"`--(\w+)`", here)
        texts = [(ROOT / "docs" / "options.md").read_text()]
        assert f"| `--{option}` |" in texts[0]


def test_shapes_of_the_data(args):
    """`crop` false and `resolution_type` area: buckets."""
    assert (args.aspect_ratio_buckets, args.resolution_type, args.min_image_area) == ("auto", "area", 0.5)
    assert args.center_crop and len(training_shapes(args)) == 11


def test_variants_of_the_guide():
    """And the variants that it names."""
    module = importlib.import_module("train_lcm_distill_lora_sdxl_wds")
    config = ["--config", str(ROOT / "configs" / "simpletuner_lora_sdxl.yaml")]
    for kind in ("pixel", "area"):
        more = ["--aspect_bucket_rounding=64", f"--resolution_type={kind}"]
        assert module.parse_args([*config, *more]).resolution_type == kind
    for name in ("lion", "adamw8bit"):
        assert module.parse_args([*config, f"--optimizer={name}"]).optimizer == name
    assert module.parse_args([*config, "--base_model_precision=int8"]).base_model_precision == "int8"
