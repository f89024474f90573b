"""The options of the four scripts: names, types, defaults and help.

Nothing here loads a model; the answers come from the parser alone. What is refused is in `test_errors.py`.
"""

import copy
import importlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPTS = {
    name: importlib.import_module(f"train_lcm_distill_{name}_wds") for name in ("sd", "sdxl", "lora_sd", "lora_sdxl")
}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "webdataset", "huggingface_hub"}

MODEL = "--pretrained_teacher_model=some/teacher"
SHARDS = "--train_shards_path_or_url=shards/{000..009}.tar"
STEPS = "--max_train_steps=10"
REQUIRED = [MODEL, SHARDS, STEPS]

# The public scripts' options and defaults, as the contract lists them; None is unset, False is a switch that is off.
# First what all four have, with the defaults of the Stable Diffusion script.
COMMON = {
    "pretrained_vae_model_name_or_path": None,
    "teacher_revision": None,
    "revision": None,
    "output_dir": "lcm-xl-distilled",
    "cache_dir": None,
    "seed": None,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "resolution": 512,
    "interpolation_type": "bilinear",
    "center_crop": False,
    "random_flip": False,
    "dataloader_num_workers": 0,
    "train_batch_size": 16,
    "num_train_epochs": 100,
    "max_train_steps": None,
    "max_train_samples": None,
    "learning_rate": 1e-4,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "gradient_accumulation_steps": 1,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "proportion_empty_prompts": 0,
    "w_min": 5.0,
    "w_max": 15.0,
    "num_ddim_timesteps": 50,
    "loss_type": "l2",
    "huber_c": 0.001,
    "timestep_scaling_factor": 10.0,
    "mixed_precision": None,
    "allow_tf32": False,
    "cast_teacher_unet": False,
    "enable_xformers_memory_efficient_attention": False,
    "gradient_checkpointing": False,
    "local_rank": -1,
    "validation_steps": 200,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "tracker_project_name": "text2image-fine-tune",
}
FULL = {"unet_time_cond_proj_dim": 256, "ema_decay": 0.95}
LORA = {"lora_rank": 64, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": None}
SDXL = {"use_fix_crop_and_size": False, "resolution": 1024, "w_min": 3.0}
PUBLIC_DEFAULTS = {
    "sd": COMMON | FULL,
    "sdxl": COMMON | FULL | SDXL,
    "lora_sd": COMMON | LORA,
    "lora_sdxl": COMMON | LORA | SDXL,
}
# Ours: unless they are given, the scripts do what the public ones do.
OWN_COMMON = {
    "target": "lcm",
    "num_phases": [],
    "num_solver_steps": 1,
    "teacher_negative_prompt": None,
    "vae_encode_batch_size": None,  # theirs is 32, for SDXL 8: the same latents but for rounding, and more memory
    "offload": False,
    "config": None,
    "train_data_dir": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "image_column": "image",
    "caption_column": "text",
    "base_model_precision": "no_change",
    "tracker_run_name": None,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "optimizer": "adamw",
    "aspect_ratio_buckets": None,
    "aspect_bucket_rounding": 64,
    "resolution_type": "area",
    "min_image_area": 0.0,
    "caption_key": "caption",
    "width_key": None,
    "height_key": None,
    "min_image_size": 0,
    "max_watermark_probability": None,
    "shuffle_buffer_size": 1000,
    "shuffle_buffer_mb": 512.0,
    "shard_timeout": 300.0,
    "logging_steps": 10,
    "resume_with_changed_options": False,
    "validation_negative_prompt": None,
    "num_validation_images": 1,
    "validation_resolution": None,
    "validation_num_inference_steps": [4],
    "validation_guidance_scale": None,
    "validation_teacher_steps": [4, 25],
    "hub_private": True,
}
OWN_FULL = {"offload_ema": False}
OWN_LORA = {
    "ema_decay": None,
    "lora_rank_pattern": None,
    "use_rslora": False,
    "lora_weights": None,
    "validation_guidance_scale": [1.0],
}
OWN_SDXL = {"max_watermark_probability": 0.5}
DEFAULTS = {
    name: public
    | OWN_COMMON
    | (OWN_LORA if name.startswith("lora") else OWN_FULL)
    | (OWN_SDXL if "sdxl" in name else {})
    for name, public in PUBLIC_DEFAULTS.items()
}
# The types of the public options that are unset by default, or 0; the others have the type of their default.
TYPES = {
    "seed": int, "checkpoints_total_limit": int, "max_train_steps": int, "max_train_samples": int,
    "vae_encode_batch_size": int, "proportion_empty_prompts": float,
}  # fmt: skip
CHOICES = {
    "report_to": [
        "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "all", "none",
    ],
    "interpolation_type": ["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"],
    "lr_scheduler": [
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    ],
    "resolution_type": ["area", "pixel"],
    "base_model_precision": ["no_change", "int8", "nf4"],
    "optimizer": [
        "adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "adafactor", "prodigy",
    ],
    "target": ["lcm", "phased", "trajectory"],
    "loss_type": ["l2", "huber"],
    "mixed_precision": ["no", "fp16", "bf16"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test starts in an empty folder, with every optional package installed as far as the parser can see."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: f"the package {name}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=SCRIPTS)
def name(request):
    """The name of a script."""
    return request.param


@pytest.fixture
def script(name):
    """Its module."""
    return SCRIPTS[name]


@pytest.fixture
def parser(script, monkeypatch):
    """Its parser, before anything is parsed."""
    with monkeypatch.context() as patch:
        patch.setattr(script, "parse", lambda parser, argv=None: parser)
        return script.parse_args([])


def file_of(script):
    return ROOT / f"{script.__name__}.py"


def bare_python(*arguments):
    """Run an interpreter that sees the standard library and nothing that was installed."""
    return subprocess.run(
        [sys.executable, "-S", "-E", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


# What there is.


def test_help_needs_nothing_but_the_standard_library(name, script):
    """And it explains each option once, and no other."""
    started = time.perf_counter()
    done = bare_python(file_of(script), "--help")
    assert time.perf_counter() - started < 3
    assert (done.returncode, done.stderr) == (0, "")
    assert f"accelerate launch {script.__name__}.py" in done.stdout
    explained = re.findall(r"^  --(\w+)\b", done.stdout.partition("\nmodels:\n")[2], re.MULTILINE)
    required = ["pretrained_teacher_model", "train_shards_path_or_url", "validation_prompts"]
    assert sorted(explained) == sorted([*required, *DEFAULTS[name]])


def test_parsing_imports_nothing_heavy(script):
    code = f"import sys; from {script.__name__} import parse_args; parse_args(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *REQUIRED, "--report_to=none"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert HEAVY & set(done.stdout.split()) == set()


def test_mistakes_are_answered_without_heavy_imports(script):
    done = bare_python(file_of(script), MODEL, SHARDS, "--max_train_steps=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--max_train_steps: '0' given; allowed: an integer of at least 1\n"


def test_every_option_and_its_default(name, script):
    given = vars(script.parse_args([MODEL, SHARDS, "--max_train_samples=100"]))
    assert given.pop("max_train_samples") == 100
    assert given.pop("pretrained_teacher_model") == "some/teacher"
    assert given.pop("train_shards_path_or_url") == ["shards/{000..009}.tar"]
    assert all(isinstance(prompt, str) and prompt for prompt in given.pop("validation_prompts"))
    expected = dict(DEFAULTS[name])
    del expected["max_train_samples"]
    assert given == expected
    assert script.parse_args(REQUIRED).max_train_samples is None


def test_every_public_option_has_its_type(name, script):
    """A value, or for a switch its bare name, comes out as what the public script makes of it."""
    for option, default in PUBLIC_DEFAULTS[name].items():
        kind = TYPES.get(option, str if default is None else type(default))
        text = {int: "8", float: "0.5", str: "text"}.get(kind)
        if option in CHOICES:
            text = CHOICES[option][0]
        text = {"resume_from_checkpoint": "latest", "w_max": "15.5"}.get(option, text)  # the checks want these
        args = script.parse_args([*REQUIRED, f"--{option}" if kind is bool else f"--{option}={text}"])
        value = getattr(args, option)
        assert type(value) is kind and value == (True if kind is bool else kind(text)), option


def test_every_option_is_in_a_named_group_and_has_help(parser):
    unnamed = {"options", "optional arguments", "positional arguments"}
    grouped = [a for group in parser._action_groups if group.title not in unnamed for a in group._group_actions]
    names = [action.dest for action in grouped]
    assert len(names) == len(set(names))
    assert {a.dest for a in parser._actions} == {*names, "help"}
    for action in grouped:
        assert action.help and action.help.rstrip(")").endswith("."), action.dest
        parser._get_formatter()._expand_help(action)  # a stray percent sign would raise


def test_choices(script, parser):
    assert {a.dest: list(a.choices) for a in parser._actions if a.choices} == CHOICES
    more = "--aspect_ratio_buckets=auto"  # without it the shapes need no --resolution_type
    for name, choices in CHOICES.items():
        for choice in choices:
            assert getattr(script.parse_args([*REQUIRED, more, f"--{name}={choice}"]), name) == choice


def test_lists_and_pairs(script):
    more = ["--train_shards_path_or_url=b.tar::c.tar", "--train_shards_path_or_url", "pipe:cat d.tar"]
    args = script.parse_args([*REQUIRED, *more, "--validation_prompts", "one cat", "two", "--no-hub_private"])
    assert args.train_shards_path_or_url == ["shards/{000..009}.tar", "b.tar::c.tar", "pipe:cat d.tar"]
    assert args.validation_prompts == ["one cat", "two"]
    assert args.hub_private is False
    args = script.parse_args([*REQUIRED, "--validation_num_inference_steps", "1", "2", "4"])
    assert args.validation_num_inference_steps == [1, 2, 4]


def test_local_rank_fills_in_for_the_environment(script, monkeypatch):
    """Old launchers give the option, new ones the variable; accelerate reads the variable."""
    script.parse_args(REQUIRED)
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")
    script.parse_args([*REQUIRED, "--local_rank=1"])
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")
    script.parse_args([*REQUIRED, "--local_rank=1"])
    assert os.environ["LOCAL_RANK"] == "1"


# The command of the diffusers guide, and those that the READMEs of the public folder print for the other scripts: the
# lines that all share, then what each adds.
GUIDE_COMMAND = """
--output_dir=path/to/saved/model
--mixed_precision=fp16
--max_train_steps=1000
--max_train_samples=4000000
--dataloader_num_workers=8
--validation_steps=200
--checkpointing_steps=200 --checkpoints_total_limit=10
--train_batch_size=12
--gradient_checkpointing --enable_xformers_memory_efficient_attention
--gradient_accumulation_steps=1
--use_8bit_adam
--resume_from_checkpoint=latest
--report_to=wandb
--seed=453645634
--push_to_hub
"""
GUIDE_SD = "--pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution=512"
GUIDE_SDXL = (
    "--pretrained_teacher_model=stabilityai/stable-diffusion-xl-base-1.0 "
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --resolution=1024 --use_fix_crop_and_size"
)
GUIDE_FULL = "--learning_rate=1e-6 --loss_type=huber --ema_decay=0.95 --adam_weight_decay=0.0"
GUIDE_LORA = "--lora_rank=64 --learning_rate=1e-4 --loss_type=huber --adam_weight_decay=0.0"
GUIDE_COMMANDS = {
    "sd": f"{GUIDE_SD} {GUIDE_FULL}",
    "sdxl": f"{GUIDE_SDXL} {GUIDE_FULL}",
    "lora_sd": f"{GUIDE_SD} {GUIDE_LORA}",
    "lora_sdxl": f"{GUIDE_SDXL} {GUIDE_LORA}",
}
GUIDE_SHARDS = (
    "pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/"
    "{00000..01099}.tar?download=true"
)


def test_commands_of_the_diffusers_guide(name, script):
    command = f"{GUIDE_COMMAND} {GUIDE_COMMANDS[name]}".split()
    given = script.parse_args([*command, f"--train_shards_path_or_url={GUIDE_SHARDS}"])
    is_sdxl = name.endswith("sdxl")
    expected = DEFAULTS[name] | {
        "pretrained_teacher_model": (
            "stabilityai/stable-diffusion-xl-base-1.0" if is_sdxl else "stable-diffusion-v1-5/stable-diffusion-v1-5"
        ),
        "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix" if is_sdxl else None,
        "train_shards_path_or_url": [GUIDE_SHARDS],
        "output_dir": "path/to/saved/model",
        "mixed_precision": "fp16",
        "learning_rate": 1e-4 if name.startswith("lora") else 1e-6,
        "loss_type": "huber",
        "adam_weight_decay": 0.0,
        "max_train_steps": 1000,
        "max_train_samples": 4000000,
        "dataloader_num_workers": 8,
        "checkpointing_steps": 200,
        "checkpoints_total_limit": 10,
        "train_batch_size": 12,
        "gradient_checkpointing": True,
        "enable_xformers_memory_efficient_attention": True,
        "use_8bit_adam": True,
        "resume_from_checkpoint": "latest",
        "report_to": "wandb",
        "seed": 453645634,
        "push_to_hub": True,
    }
    if is_sdxl:
        expected["use_fix_crop_and_size"] = True
    assert {option: getattr(given, option) for option in expected} == expected


def test_nothing_is_written_by_parsing(script, tmp_path):
    script.parse_args(REQUIRED)
    assert list(tmp_path.iterdir()) == []


def test_options_do_not_change_once_they_are_parsed(tmp_path):
    """Nor do those of a copy."""
    script = importlib.import_module("train_lcm_distill_sd_wds")
    needed = ["--pretrained_teacher_model=a", "--train_shards_path_or_url=b", "--max_train_steps=1"]
    args = script.parse_args([*needed, f"--output_dir={tmp_path}"])
    for same in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert vars(same) == vars(args) and same.left_at_default == args.left_at_default
        with pytest.raises(AttributeError, match="max_train_steps: options do not change"):
            same.max_train_steps = 2
