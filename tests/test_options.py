"""The options of the four scripts: names, types, defaults, help, and the one line that a mistake is answered with.

Nothing here loads a model; the answers come from the parser alone.
"""

import importlib
import importlib.util
import os
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
    "vae_encode_batch_size": 32,
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
SDXL = {"use_fix_crop_and_size": False, "resolution": 1024, "w_min": 3.0, "vae_encode_batch_size": 8}
PUBLIC_DEFAULTS = {
    "sd": COMMON | FULL,
    "sdxl": COMMON | FULL | SDXL,
    "lora_sd": COMMON | LORA,
    "lora_sdxl": COMMON | LORA | SDXL,
}
# Ours: unless they are given, the scripts do what the public ones do.
OWN_COMMON = {
    "caption_key": "caption",
    "width_key": None,
    "height_key": None,
    "min_image_size": 0,
    "max_watermark_probability": None,
    "shuffle_buffer_size": 1000,
    "logging_steps": 10,
    "validation_negative_prompt": None,
    "num_validation_images": 1,
    "validation_resolution": None,
    "validation_num_inference_steps": [4],
    "validation_guidance_scale": None,
    "validation_teacher_steps": [4, 25],
    "hub_private": True,
}
OWN_LORA = {"ema_decay": None, "validation_guidance_scale": [1.0]}
DEFAULTS = {
    name: public | OWN_COMMON | (OWN_LORA if name.startswith("lora") else {})
    for name, public in PUBLIC_DEFAULTS.items()
}
# The types of the public options that are unset by default, or 0; the others have the type of their default.
TYPES = {
    "seed": int, "checkpoints_total_limit": int, "max_train_steps": int, "max_train_samples": int,
    "proportion_empty_prompts": float,
}  # fmt: skip
CHOICES = {
    "report_to": ["tensorboard", "wandb", "comet_ml", "all", "none"],
    "interpolation_type": ["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"],
    "lr_scheduler": [
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    ],
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


def error_of(capsys, script, *options):
    """The one line on standard error with which these options are refused."""
    with pytest.raises(SystemExit) as exit_info:
        script.parse_args(list(options))
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err.rstrip("\n")


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


def test_options_of_other_scripts_do_not_exist(name, script, capsys):
    """Taken and ignored, they would be believed."""
    foreign = {option: value for options in DEFAULTS.values() for option, value in options.items()}
    foreign = {option: value for option, value in foreign.items() if option not in DEFAULTS[name]}
    assert len(foreign) == {"sd": 5, "sdxl": 4, "lora_sd": 2, "lora_sdxl": 1}[name]
    for option, value in foreign.items():
        given = f"--{option}" if value is False else f"--{option}={value}"
        assert error_of(capsys, script, *REQUIRED, given).startswith(f"--{option}: no such option"), option


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
    for name, choices in CHOICES.items():
        for choice in choices:
            assert getattr(script.parse_args([*REQUIRED, f"--{name}={choice}"]), name) == choice


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


# What is refused. Each row: the option, values that are refused, values that are taken, what the message says of them.
# A row holds for every script that has the option.

NUMBERS = [
    ("seed", ["-1", "1.5", "x", "4294967296"], ["0", "453645634", "2147483647"], "an integer"),
    ("checkpointing_steps", ["0", "-5", "1e3"], ["1"], "an integer of at least 1"),
    ("checkpoints_total_limit", ["0", "-1"], ["1"], "an integer of at least 1"),
    ("resolution", ["0", "7", "-8", "512.0"], ["8", "1024"], "an integer of at least 8"),
    ("resolution", ["9", "500"], ["504"], "multiples of 8"),
    ("proportion_empty_prompts", ["-0.1", "1.1", "nan"], ["0", "1", "0.5"], "at least 0 and at most 1"),
    ("min_image_size", ["-1", "a"], ["0"], "an integer of at least 0"),
    ("max_watermark_probability", ["-0.1", "2", "nan"], ["0", "1"], "at least 0 and at most 1"),
    ("shuffle_buffer_size", ["0"], ["1"], "an integer of at least 1"),
    ("dataloader_num_workers", ["-1", "two"], ["0", "2"], "an integer of at least 0"),
    ("train_batch_size", ["0", "1.5"], ["1"], "an integer of at least 1"),
    ("gradient_accumulation_steps", ["0"], ["1"], "an integer of at least 1"),
    ("max_train_steps", ["0", "-1", ""], ["1"], "an integer of at least 1"),
    ("num_train_epochs", ["0"], ["1"], "an integer of at least 1"),
    ("max_train_samples", ["0"], ["1"], "an integer of at least 1"),
    ("learning_rate", ["-1e-4", "nan", "inf", "fast"], ["0", "1e-6"], "a number of at least 0"),
    ("lr_warmup_steps", ["-1"], ["0"], "an integer of at least 0"),
    ("adam_beta1", ["-0.1", "1", "nan"], ["0", "0.999"], "at least 0 and less than 1"),
    ("adam_beta2", ["-0.1", "1.5"], ["0", "0.999"], "at least 0 and less than 1"),
    ("adam_weight_decay", ["-1", "inf"], ["0", "1"], "a number of at least 0"),
    ("adam_epsilon", ["0", "-1", "nan"], ["1e-12"], "a number larger than 0"),
    ("max_grad_norm", ["0", "-1", "inf"], ["0.1"], "a number larger than 0"),
    ("w_min", ["-1", "nan"], ["0", "15"], "a number of at least 0"),
    ("w_min", ["15.5"], ["15"], "at most --w_max, 15"),
    ("w_max", ["-1", "inf"], ["5", "20"], "a number of at least 0"),
    ("num_ddim_timesteps", ["0", "1001", "5e1"], ["4", "1000"], "an integer from 1 to 1000"),
    ("huber_c", ["0", "-1", "nan"], ["1e-5"], "a number larger than 0"),
    ("timestep_scaling_factor", ["0", "-10"], ["0.5"], "a number larger than 0"),
    ("vae_encode_batch_size", ["0"], ["1"], "an integer of at least 1"),
    ("unet_time_cond_proj_dim", ["3", "0", "-4"], ["4"], "an integer of at least 4"),
    ("ema_decay", ["-0.1", "1.1", "nan"], ["0", "1"], "at least 0 and at most 1"),
    ("lora_rank", ["0", "-1", "1.5"], ["1", "128"], "an integer of at least 1"),
    ("lora_alpha", ["0", "-8", "0.5"], ["1", "128"], "an integer of at least 1"),
    ("lora_dropout", ["-0.1", "1", "nan"], ["0", "0.9"], "at least 0 and less than 1"),
    ("validation_steps", ["0"], ["1"], "an integer of at least 1"),
    ("validation_num_inference_steps", ["0", "few"], ["1"], "an integer of at least 1"),
    ("validation_num_inference_steps", ["51"], ["50"], "at most --num_ddim_timesteps, 50"),
    ("validation_guidance_scale", ["0.5", "nan"], ["1"], "a number of at least 1"),
    ("local_rank", ["x", "0.5"], ["0", "-1"], "int"),
]


@pytest.mark.parametrize(
    ("option", "refused", "taken", "allowed"), NUMBERS, ids=[f"{row[0]}-{row[1][0]}" for row in NUMBERS]
)
def test_numbers(option, refused, taken, allowed, capsys):
    for name, script in SCRIPTS.items():
        if option not in DEFAULTS[name]:
            continue
        for value in refused:
            message = error_of(capsys, script, *REQUIRED, f"--{option}={value}")
            assert message.startswith(f"--{option}: "), message
            assert (value or "''") in message.replace(f"--{option}", ""), message
            assert allowed in message, message
        for value in taken:
            script.parse_args([*REQUIRED, f"--{option}={value}"])


def test_every_number_has_a_row(name, parser):
    """An option with a type of its own that is not in the table above is one whose bounds nobody tested."""
    rows = {row[0] for row in NUMBERS}
    assert {a.dest for a in parser._actions if a.type is not None} == rows & DEFAULTS[name].keys()
    assert rows <= {option for options in DEFAULTS.values() for option in options}


@pytest.mark.parametrize("option", CHOICES)
def test_choices_that_do_not_exist(option, script, capsys):
    message = error_of(capsys, script, *REQUIRED, f"--{option}=nosuch")
    assert message.startswith(f"--{option}: ") and "nosuch" in message
    assert all(choice in message for choice in CHOICES[option])


@pytest.mark.parametrize(
    ("options", "start", "says"),
    [
        ([SHARDS, STEPS], "--pretrained_teacher_model: ", "required"),
        ([MODEL, STEPS], "--train_shards_path_or_url: ", "required"),
        ([], "--pretrained_teacher_model", "--train_shards_path_or_url"),
        ([MODEL, SHARDS], "--max_train_steps: ", "--max_train_samples"),
        ([*REQUIRED, "--learnig_rate=3"], "--learnig_rate: ", "did you mean --learning_rate?"),
        ([*REQUIRED, "--nothing_like_it"], "--nothing_like_it: ", "no such option"),
        ([*REQUIRED, "stray"], "stray: ", "no such option"),
        ([*REQUIRED, "--w_min=8", "--w_max=7.5"], "--w_min: ", "8 given; allowed: at most --w_max, 7.5"),
        ([*REQUIRED, "--width_key=w"], "--width_key: ", "--height_key"),
        ([*REQUIRED, "--height_key=h"], "--height_key: ", "--width_key"),
        ([*REQUIRED, "--resume_from_checkpoint=checkpoint-7"], "--resume_from_checkpoint: ", "checkpoint-7"),
        ([*REQUIRED, "--resume_from_checkpoint=/nowhere/checkpoint-7"], "--resume_from_checkpoint: ", "/nowhere"),
        ([*REQUIRED, "--report_to=wandb", "--hub_token=hf_x"], "--hub_token: ", "HF_TOKEN"),
        ([*REQUIRED, "--report_to=all", "--hub_token=hf_x"], "--hub_token: ", "HF_TOKEN"),
        # comet_ml records sys.argv as well (`get_command` in its env_logging.py).
        ([*REQUIRED, "--report_to=comet_ml", "--hub_token=hf_x"], "--hub_token: ", "HF_TOKEN"),
        ([*REQUIRED, "--output_dir"], "--output_dir: ", "expected one argument"),
        ([*REQUIRED, "--validation_prompts"], "--validation_prompts: ", "expected at least one argument"),
        ([*REQUIRED, "--resolution=1\n6"], "--resolution: ", "given; allowed: "),
    ],
)  # fmt: skip
def test_mistakes(options, start, says, script, capsys):
    message = error_of(capsys, script, *options)
    assert message.startswith(start) and says in message
    assert "hf_x" not in message


def test_an_ambiguous_beginning_of_a_name(script, capsys):
    message = error_of(capsys, script, *REQUIRED, "--hub=hf_secret")
    assert message.startswith("--hub: ")
    assert "--hub_token" in message and "--hub_model_id" in message
    assert "hf_secret" not in message


@pytest.mark.parametrize("option", ["center_crop", "push_to_hub", "hub_private"])
def test_a_switch_takes_no_value(option, script, capsys):
    message = error_of(capsys, script, *REQUIRED, f"--{option}=yes")
    assert message.startswith(f"--{option}: 'yes' given; allowed: ")


def test_a_misspelt_required_option_is_named(script, capsys):
    """What was typed, and not only what is missing because of it."""
    message = error_of(capsys, script, "--pretrained_teacher_modell=x", SHARDS, STEPS)
    assert "--pretrained_teacher_model" in message


@pytest.mark.parametrize(
    ("option", "package"),
    [("--report_to=tensorboard", "tensorboard"), ("--report_to=wandb", "wandb"), ("--report_to=comet_ml", "comet_ml"),
     ("--use_8bit_adam", "bitsandbytes")],
)  # fmt: skip
def test_packages_that_are_not_installed(option, package, script, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else "there")
    message = error_of(capsys, script, *REQUIRED, option)
    assert message.startswith(option.split("=")[0] + ": ") and f"{package} is not installed" in message
    script.parse_args([*REQUIRED, "--report_to=none"])


def test_output_dir(script, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/inside"):
        message = error_of(capsys, script, *REQUIRED, f"--output_dir={name}")
        assert message.startswith(f"--output_dir: {name!r} ") and "allowed: " in message
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    script.parse_args([*REQUIRED, "--output_dir=folder"])
    script.parse_args([*REQUIRED, "--output_dir=folder/of/a/folder"])
    assert not (tmp_path / "folder" / "of").exists()


def test_resume_folder_is_looked_for_in_the_output_folder_and_as_a_path(script, capsys, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-6").mkdir(parents=True)
    for name in ("checkpoint-5", "other/checkpoint-6", tmp_path / "other" / "checkpoint-6", "latest"):
        script.parse_args([*REQUIRED, "--output_dir=out", f"--resume_from_checkpoint={name}"])
    for name in ("checkpoint-6", ""):
        message = error_of(capsys, script, *REQUIRED, "--output_dir=out", f"--resume_from_checkpoint={name}")
        assert message.startswith(f"--resume_from_checkpoint: {name!r} ") and "allowed: latest" in message


def test_nothing_is_written_by_parsing(script, tmp_path):
    script.parse_args(REQUIRED)
    assert list(tmp_path.iterdir()) == []
