"""Everything that is wrong with an option, a model folder, shards or a checkpoint, in one table.

A row is a run of a script's own `main` in this process; what has to hold for every row is in `test_errors` alone. A
wrong option: status 2, one line, before anything is loaded. A broken input: status 1, one line. Both begin with the
option that they are about, no weight is touched, and whatever was written before is as it was.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO_TEACHER, SCRIPTS, Script, encode_image, make_vae, write_tar
from safetensors.torch import load_file, save_file
from test_options import CHOICES
from torch.optim.optimizer import register_optimizer_step_pre_hook

ALL = tuple(SCRIPTS)
FULL, LORA, SDXL = ("sd", "sdxl"), ("lora_sd", "lora_sdxl"), ("sdxl", "lora_sdxl")
BOTH = ("sd", "lora_sdxl")  # where the code is the same for all: one script of each kind
TEACHER, VAE = "--pretrained_teacher_model", "--pretrained_vae_model_name_or_path"
SHARDS, RESUME = "--train_shards_path_or_url", "--resume_from_checkpoint"


@dataclass
class Place:
    """Where a case is prepared: an empty folder, which is the current one, and in it the output folder of the run."""

    script: Script
    folder: Path
    output: Path
    patch: pytest.MonkeyPatch
    checkpoint: callable  # by a script's name: a folder with its first checkpoint, which is not to be changed


@dataclass(frozen=True)
class Case:
    """`prepare(place)` breaks something and returns the options that name it, after `options`."""

    id: str
    start: str  # the option that the error begins with, before a colon; or the whole beginning
    says: str | tuple = ""
    options: tuple = ()
    prepare: callable = None
    scripts: tuple = ("sd",)
    status: int = 1
    drop: tuple = ()  # standard options that are not given
    env: dict = field(default_factory=dict)
    steps: int = 0  # optimizer steps before the error
    saved: int = 0  # and checkpoints


def actions(name):
    """The options of a script, as argparse has them, by name."""
    module = Script(name, None, None, None).module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse", lambda parser, argv=None: parser)
        return {action.dest: action for action in module.parse_args([])._actions if action.dest != "help"}


ACTIONS = {name: actions(name) for name in SCRIPTS}
OPTIONS = sorted(set().union(*ACTIONS.values()))


def scripts_with(option):
    return tuple(name for name in SCRIPTS if option in ACTIONS[name])


# Wrong options: status 2. Each row: the option, values that are refused, values that are taken, what is said of them.
# A row holds for every script that has the option.

AT_LEAST_1, SOME_TEXT, A_MODEL = "an integer of at least 1", "some text", "a folder, or an id on the Hub"
VALUES = [
    ("config", [""], [], SOME_TEXT),
    ("pretrained_teacher_model", ["", " ", "./nosuch", "no/such/folder"], ["some/teacher"], A_MODEL),
    ("pretrained_vae_model_name_or_path", ["", "/nosuch"], ["some/vae"], A_MODEL),
    ("teacher_revision", [""], ["fp16"], SOME_TEXT),
    ("revision", [""], ["main"], SOME_TEXT),
    ("cache_dir", [""], ["cache"], SOME_TEXT),
    ("output_dir", ["", " "], ["folder", "earlier/of/a/folder"], SOME_TEXT),
    ("logging_dir", [""], ["scalars"], SOME_TEXT),
    ("tracker_project_name", [""], ["mine"], SOME_TEXT),
    ("train_data_dir", [""], [], SOME_TEXT),
    ("dataset_name", [""], [], SOME_TEXT),
    ("dataset_config_name", [""], [], SOME_TEXT),
    ("image_column", [""], [], SOME_TEXT),
    ("caption_column", [""], [], SOME_TEXT),
    ("lora_rank_pattern", ["", "conv1", "conv1=0", "=4", "conv1=4,", "conv1=x"], ["conv1=4", "conv1=4, to_q=8"],
     "NAME=RANK joined by commas"),
    ("lora_weights", [""], ["some/lora"], SOME_TEXT),
    ("tracker_run_name", [""], [], SOME_TEXT),
    ("caption_key", [""], ["title"], SOME_TEXT),
    ("width_key", [""], [], SOME_TEXT),
    ("height_key", [""], [], SOME_TEXT),
    ("hub_model_id", [""], ["user/name"], SOME_TEXT),
    ("hub_token", [""], ["hf_x"], SOME_TEXT),
    ("lora_target_modules", ["", ",", "to_q,", "to_q,,to_k"], ["to_q", "to_q, to_k"], "names joined by commas"),
    ("seed", ["-1", "1.5", "x", "4294967296"], ["0", "453645634", "2147483647"], "an integer"),
    ("checkpointing_steps", ["0", "-5", "1e3"], ["1"], AT_LEAST_1),
    ("logging_steps", ["0", "x"], ["1"], AT_LEAST_1),
    ("checkpoints_total_limit", ["0", "-1"], ["1"], AT_LEAST_1),
    ("resolution", ["0", "7", "-8", "512.0", "1\n6"], ["8", "1024"], "an integer of at least 8"),
    ("resolution", ["9", "500"], ["504"], "multiples of 8"),
    ("aspect_ratio_buckets", ["", "16", "16,", "16x24", "16,24;0,8", "16,12", "square"],
     ["16,24", "16, 24; 24, 16;"], "auto, or HEIGHT,WIDTH in multiples of 8"),
    ("aspect_bucket_rounding", ["0", "7", "64.0"], [], "an integer of at least 8"),
    ("min_image_area", ["-1", "nan"], ["0", "0.5"], "a number of at least 0"),
    ("proportion_empty_prompts", ["-0.1", "1.1", "nan"], ["0", "1", "0.5"], "at least 0 and at most 1"),
    ("min_image_size", ["-1", "a"], ["0"], "an integer of at least 0"),
    ("max_watermark_probability", ["-0.1", "2", "nan"], ["0", "1"], "at least 0 and at most 1"),
    ("shuffle_buffer_size", ["0"], ["1"], AT_LEAST_1),
    ("shuffle_buffer_mb", ["0", "-1", "nan"], ["0.1", "4000"], "a number larger than 0"),
    ("shard_timeout", ["0", "-1", "inf", "1e9"], ["0.5", "86400"], "a number larger than 0 and at most 86400"),
    ("dataloader_num_workers", ["-1", "two"], ["0", "2"], "an integer of at least 0"),
    ("train_batch_size", ["0", "1.5"], ["1"], AT_LEAST_1),
    ("gradient_accumulation_steps", ["0"], ["1"], AT_LEAST_1),
    ("max_train_steps", ["0", "-1", ""], ["1"], AT_LEAST_1),
    ("num_train_epochs", ["0"], ["1"], AT_LEAST_1),
    ("max_train_samples", ["0"], ["1"], AT_LEAST_1),
    ("learning_rate", ["-1e-4", "nan", "inf", "fast"], ["0", "1e-6"], "a number of at least 0"),
    ("lr_warmup_steps", ["-1"], ["0"], "an integer of at least 0"),
    ("lr_num_cycles", ["0", "x"], [], AT_LEAST_1),
    ("lr_power", ["0", "nan"], [], "a number larger than 0"),
    ("adam_beta1", ["-0.1", "1", "nan"], ["0", "0.999"], "at least 0 and less than 1"),
    ("adam_beta2", ["-0.1", "1.5"], ["0", "0.999"], "at least 0 and less than 1"),
    ("adam_weight_decay", ["-1", "inf"], ["0", "1"], "a number of at least 0"),
    ("adam_epsilon", ["0", "-1", "nan"], ["1e-12"], "a number larger than 0"),
    ("max_grad_norm", ["0", "-1", "inf"], ["0.1"], "a number larger than 0"),
    ("w_min", ["-1", "nan"], ["0", "15"], "a number of at least 0"),
    ("w_min", ["15.5"], ["15"], "at most --w_max, 15"),
    ("w_max", ["-1", "inf"], ["5", "20"], "a number of at least 0"),
    ("num_ddim_timesteps", ["0", "1001", "5e1"], ["4", "1000"], "an integer from 1 to 1000"),
    ("num_solver_steps", ["0", "1001", "x"], ["1", "2"], "an integer from 1 to 1000"),
    ("num_phases", ["0", "1001", "few"], [], "an integer from 1 to 1000"),
    ("teacher_negative_prompt", [""], ["blurry"], SOME_TEXT),
    ("huber_c", ["0", "-1", "nan", "1e300"], ["1e-5", "1e6"], "a number larger than 0 and at most 1e+06"),
    ("timestep_scaling_factor", ["0", "-10"], ["0.5"], "a number larger than 0"),
    ("vae_encode_batch_size", ["0"], ["1"], AT_LEAST_1),
    ("unet_time_cond_proj_dim", ["3", "0", "-4"], ["4"], "an integer of at least 4"),
    ("ema_decay", ["-0.1", "1.1", "nan"], ["0", "1"], "at least 0 and at most 1"),
    ("lora_rank", ["0", "-1", "1.5"], ["1", "128"], AT_LEAST_1),
    ("lora_alpha", ["0", "-8", "0.5"], ["1", "128"], AT_LEAST_1),
    ("lora_dropout", ["-0.1", "1", "nan"], ["0", "0.9"], "at least 0 and less than 1"),
    ("validation_steps", ["0"], ["1"], AT_LEAST_1),
    ("validation_negative_prompt", [""], ["blurry"], SOME_TEXT),
    ("num_validation_images", ["0"], ["1"], AT_LEAST_1),
    ("validation_resolution", ["0", "12", "16x", "x16", "16x20", "16x24x32", "16,", "a"], ["16", "16x24,32"],
     "in multiples of 8"),
    ("validation_teacher_steps", ["0", "1001", "few"], ["1", "1000"], "an integer from 1 to 1000"),
    ("validation_num_inference_steps", ["0", "few"], ["1"], AT_LEAST_1),
    ("validation_num_inference_steps", ["51"], ["50"], "at most --num_ddim_timesteps, 50"),
    ("validation_guidance_scale", ["0.5", "nan"], ["1"], "a number of at least 1"),
    ("local_rank", ["x", "0.5", "-2"], ["0", "-1"], "an integer of at least -1"),
]


def wrong(id, start, says="", *options, prepare=None, scripts=ALL, drop=()):
    """A wrong option."""
    return Case(f"option-{id}", start, says, options, prepare, scripts, 2, drop)


def wrong_value(option, value, says):
    shown = repr(value) if not value.strip() or "\n" in value else value
    given = f"--{option}={value}"
    return wrong(f"{option}={value}", f"--{option}", (shown, says), given, scripts=scripts_with(option))


def without_package(name):
    def prepare(place):
        place.patch.setattr(importlib.util, "find_spec", lambda package: None if name in package else "there")
        return []

    return prepare


def file_at(path, *options):
    """Put a file where a folder has to be."""

    def prepare(place):
        (place.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / path).write_text("mine")
        return options

    return prepare


def text_file(name, content):
    def prepare(place):
        (place.folder / name).write_bytes(content)
        return []

    return prepare


def read_only(place):
    """For root every folder can be written to, so the system's answer is made up."""
    place.patch.setattr(os, "access", lambda path, mode: False)
    return []


WRONG_OPTIONS = [
    *(wrong_value(option, value, says) for option, refused, _, says in VALUES for value in refused),
    *(wrong(f"{option}=nosuch", f"--{option}", ("nosuch", *values), f"--{option}=nosuch")
      for option, values in CHOICES.items()),
    *(wrong(f"{option}=yes", f"--{option}", "'yes' given; allowed: ", f"--{option}=yes", scripts=scripts_with(option))
      for option in OPTIONS if ACTIONS[scripts_with(option)[0]][option].nargs == 0),
    *(wrong(f"foreign-{option}", f"--{option}", "no such option", f"--{option}=1",
            scripts=tuple(name for name in SCRIPTS if option not in ACTIONS[name])) for option in OPTIONS),
    wrong("no-teacher", TEACHER, "required", drop=(TEACHER,)),
    wrong("no-shards", SHARDS, "required", drop=(SHARDS,)),
    wrong("nothing", TEACHER, "required", drop=None),
    wrong("no-pictures", SHARDS, "required, but not given; allowed: that, or --train_data_dir", drop=(SHARDS,)),
    wrong("no-name-of-nothing", "--tracker_run_name", "given, but --report_to none has no names of runs",
          "--tracker_run_name=a", "--report_to=none"),
    wrong("no-name-of-aim", "--tracker_run_name", "allowed with all, tensorboard, wandb", "--tracker_run_name=a",
          "--report_to=aim"),
    wrong("no-base-precision", "--base_model_precision", "invalid choice: 'fp4'", "--base_model_precision=fp4"),
    wrong("no-bitsandbytes-for-the-base", "--base_model_precision", "bitsandbytes is not installed",
          "--base_model_precision=nf4", prepare=without_package("bitsandbytes")),
    wrong("moved-and-quantized", "--base_model_precision", "nf4 given, but --offload moves the teacher",
          "--base_model_precision=nf4", "--offload", scripts=FULL),
    wrong("two-optimizers", "--use_8bit_adam", "given, but --optimizer is lion", "--use_8bit_adam",
          "--optimizer=lion"),
    wrong("no-lion", "--optimizer", "the package bitsandbytes is not installed", "--optimizer=lion",
          prepare=without_package("bitsandbytes")),
    wrong("no-such-optimizer", "--optimizer", "invalid choice: 'sgd'", "--optimizer=sgd"),
    wrong("epsilon-of-lion", "--adam_epsilon", "given, but --optimizer lion has none", "--adam_epsilon=1e-6",
          "--optimizer=lion"),
    wrong("cycles-of-constant", "--lr_num_cycles", "given, but --lr_scheduler constant has none", "--lr_num_cycles=2"),
    wrong("power-of-constant", "--lr_power", "given, but --lr_scheduler constant has none", "--lr_power=2"),
    wrong("shapes-by-hand", "--resolution_type", "given, but only --aspect_ratio_buckets auto makes shapes",
          "--resolution_type=pixel"),
    wrong("rounding-of-nothing", "--aspect_bucket_rounding", "given, but only --aspect_ratio_buckets auto",
          "--aspect_bucket_rounding=32", "--aspect_ratio_buckets=16,16"),
    wrong("rounding-of-twelve", "--aspect_bucket_rounding", "12 given; allowed: multiples of 8",
          "--aspect_bucket_rounding=12", "--aspect_ratio_buckets=auto"),
    wrong("rounding-too-large", "--aspect_bucket_rounding", "24 given; allowed: at most --resolution",
          "--aspect_bucket_rounding=24", "--aspect_ratio_buckets=auto"),
    wrong("two-sources", "--train_data_dir", f"given beside {SHARDS}; allowed: one", "--train_data_dir=x"),
    wrong("columns-of-nothing", "--image_column", "given, but --dataset_name is not", "--image_column=x"),
    wrong("misspelt-required", TEACHER, "required", f"{TEACHER}l=x", drop=(TEACHER,)),
    wrong("no-length", "--max_train_steps", "--max_train_samples", drop=("--max_train_steps",)),
    wrong("misspelt", "--learnig_rate", "did you mean --learning_rate?", "--learnig_rate=3"),
    wrong("unlike-any", "--nothing_like_it", "no such option", "--nothing_like_it"),
    wrong("stray", "stray", "no such option", "stray"),
    wrong("ambiguous", "--hub", ("--hub_token", "--hub_model_id"), "--hub=hf_secret"),
    wrong("w-range", "--w_min", "8 given; allowed: at most --w_max, 7.5", "--w_min=8", "--w_max=7.5"),
    wrong("phases-alone", "--num_phases", "--target lcm has no phases", "--num_phases=4"),
    wrong("phases-of-trajectory", "--num_phases", "--target trajectory has no phases", "--num_phases=4",
          "--target=trajectory"),
    wrong("many-phases", "--num_phases", "51 given; allowed: at most --num_ddim_timesteps, 50", "--target=phased",
          "--num_phases", "4", "51", "2"),
    wrong("nothing-to-guide", "--teacher_negative_prompt", "with --w_max 0 nothing is guided", "--w_min=0",
          "--w_max=0", "--teacher_negative_prompt=blurry"),
    wrong("width-alone", "--width_key", "--height_key", "--width_key=w"),
    wrong("height-alone", "--height_key", "--width_key", "--height_key=h"),
    wrong("few-grid-points", "--validation_num_inference_steps", "at most --num_ddim_timesteps, 2",
          "--num_ddim_timesteps=2", "--validation_num_inference_steps=4"),
    wrong("no-value", "--output_dir", "expected one argument", "--output_dir"),
    wrong("no-prompt", "--validation_prompts", "expected at least one argument", "--validation_prompts"),
    *(wrong(f"prompts-{kind}", "--validation_prompts", ("prompts.txt", says), "--validation_prompts=prompts.txt",
            prepare=text_file("prompts.txt", content))
      for kind, content, says in (("empty", b"\n \n", "has no prompts"), ("latin1", b"caf\xe9", "UTF-8"))),
    wrong("no-file", "--validation_prompts", "'prompts.txt' is not a file", "--validation_prompts=prompts.txt"),
    # comet_ml records sys.argv as well (`get_command` in its env_logging.py).
    *(wrong(f"token-with-{tracker}", "--hub_token", "HF_TOKEN", f"--report_to={tracker}", "--hub_token=hf_secret")
      for tracker in ("wandb", "comet_ml", "mlflow", "all")),
    *(wrong(f"no-{name}", "--report_to", f"{name} is not installed", f"--report_to={name}",
            prepare=without_package(name)) for name in ("tensorboard", "wandb", "comet_ml", "mlflow")),
    wrong("no-bitsandbytes", "--use_8bit_adam", "bitsandbytes is not installed", "--use_8bit_adam",
          prepare=without_package("bitsandbytes")),
    *(wrong(f"hub-name-{name}", "--hub_model_id", (repr(name), "allowed: NAME or USER/NAME"), "--push_to_hub",
            f"--hub_model_id={name}", scripts=BOTH)
      for name in ("a b", "a/b/c", "a--b", "a..b", "x.git", "-a", "a.", "ä", "x" * 97, "/a", "a/")),
    wrong("hub-name-of-output-dir", "--hub_model_id", "'my models' is no name", "--push_to_hub",
          "--output_dir=my models", scripts=BOTH),
    wrong("output-is-a-file", "--output_dir", "'file' given", prepare=file_at("file", "--output_dir=file")),
    wrong("output-below-a-file", "--output_dir", "'file/x' given", prepare=file_at("file", "--output_dir=file/x")),
    wrong("output-read-only", "--output_dir", "cannot be written to", prepare=read_only),
    wrong("cache-is-a-file", "--cache_dir", "'file' given", prepare=file_at("file", "--cache_dir=file")),
    wrong("logs-are-a-file", "--logging_dir", "'logs' given", "--report_to=tensorboard", prepare=file_at("out/logs")),
    wrong("logs-below-a-file", "--logging_dir", "'logs/x' given", "--logging_dir=logs/x", "--report_to=tensorboard",
          prepare=file_at("out/logs")),
    *(wrong(f"resume={name}", RESUME, (repr(name), "allowed: latest"), f"{RESUME}={name}")
      for name in ("checkpoint-9", "nowhere/checkpoint-7", "")),
    wrong("changed-options-of-nothing", "--resume_with_changed_options", "without --resume_from_checkpoint",
          "--resume_with_changed_options"),
    wrong("resume-is-a-file", RESUME, "'file'", prepare=file_at("file", f"{RESUME}=file")),
]  # fmt: skip


# Broken teachers: status 1.


def in_teacher(change):
    """Change a copy of the script's teacher."""

    def prepare(place):
        folder = shutil.copytree(place.script.teacher, place.folder / "teacher")
        change(folder)
        return [f"{TEACHER}={folder}"]

    return prepare


def edit(file, **changes):
    """Give a JSON file other entries; None takes one out."""

    def change(folder):
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(file, content):
    def change(folder):
        (folder / file).write_bytes(content)

    return change


def cut(file):
    """Leave the first half of a file."""

    def change(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return change


def remove(path):
    def change(folder):
        (shutil.rmtree if (folder / path).is_dir() else os.remove)(folder / path)

    return change


def tensors(file, change_tensors):
    """Put other tensors into a file of weights: what `change_tensors` makes of those that are there."""

    def change(folder):
        save_file(change_tensors(load_file(folder / file)), folder / file, {"format": "pt"})

    return change


def less_one(weights):
    return {name: weights[name] for name in sorted(weights)[1:]}


def one_of_other_shape(weights):
    return {**weights, min(weights): torch.zeros(3, 3)}


def all_nan(weights):
    return {name: tensor * torch.nan for name, tensor in weights.items()}


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
OTHER_FILES = {
    "unet": "config.json",
    "vae": "config.json",
    "tokenizer": "tokenizer.json",
    "tokenizer_2": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}
PARTS = [*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler"]
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"


def broken(id, says, change, scripts=("sd",), start=TEACHER, options=()):
    """A broken teacher."""
    return Case(f"teacher-{id}", start, says, options, in_teacher(change), scripts)


def damages(part):
    """Each way to break one part, for a script that has it; none may train: a made-up part looks like a run."""
    scripts, says = ("lora_sdxl",) if part.endswith("_2") else ("sd",), f"part '{part}'"
    yield broken(f"{part}-absent", says, remove(part), scripts)
    for file in filter(None, (WEIGHTS.get(part), OTHER_FILES.get(part))):
        path = f"{part}/{file}"
        yield broken(f"{path}-absent", says, remove(path), scripts)
        yield broken(f"{path}-cut", says, cut(path), scripts)
        yield broken(f"{path}-empty", says, write(path, b""), scripts)
        yield broken(f"{path}-html", says, write(path, b"<!doctype html><html>Not found</html>"), scripts)
        if file in WEIGHTS.values():
            yield broken(f"{path}-lacks-one", says, tensors(path, less_one), scripts)
            yield broken(f"{path}-shape", says, tensors(path, one_of_other_shape), scripts)
        else:
            for content in (b"[]", b'"text"', b"null", b"\xff\xfe"):
                yield broken(f"{path}={content}", says, write(path, content), scripts)


def flow_matching(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


def published_tokenizer_without(name):
    """The files are those of the published models."""

    def change(folder):
        shutil.rmtree(folder / "tokenizer")
        shutil.copytree(DEMO_TEACHER / "tokenizer", folder / "tokenizer")
        (folder / "tokenizer" / name).unlink()

    return change


def tokenizer_of_words(folder):
    """Of another kind, with more entries than the text encoder has."""
    vocabulary = {f"word{i}": i for i in range(2000)}
    edit("tokenizer/tokenizer.json", model={"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"})(folder)


def other_layout(place):
    other = place.checkpoint.teachers[not place.script.is_sdxl]
    return [f"{TEACHER}={other}"]


def vae(**config):
    def prepare(place):
        make_vae(**config).save_pretrained(place.folder / "vae")
        return [f"{VAE}={place.folder / 'vae'}"]

    return prepare


def empty_folder(place):
    (place.folder / "empty").mkdir()
    return [f"{TEACHER}=empty"]


def mistyped(place):
    empty_folder(place)
    return [f"{TEACHER}=empti"]


UNETS = [
    ({"in_channels": 9}, "takes 9 channels and predicts 4"),  # for inpainting
    ({"time_cond_proj_dim": 16}, "a guidance embedding"),  # distilled already
    ({"cross_attention_dim": 768}, "cross_attention_dim = 768"),  # for other text encoders
    ({"addition_embed_type": "text"}, "addition_embed_type = text"),
    ({"class_embed_type": "timestep"}, "class_embed_type = timestep"),
    ({"num_class_embeds": 7}, "num_class_embeds = 7"),
    ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}, "encoder_hid_dim_type = image_proj"),
]
SDXL_UNETS = [
    ({"projection_class_embeddings_input_dim": 61}, "projection_class_embeddings_input_dim = 61"),
    ({"addition_time_embed_dim": 9}, "projection_class_embeddings_input_dim = 60"),
]
REFINERS = [
    {"requires_aesthetics_score": True},
    {"text_encoder": [None, None]},
    {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True},
    {"text_encoder": None},
]
SCHEDULES = [
    ({"rescale_betas_zero_snr": True}, TEACHER, "zero terminal SNR"),
    ({"prediction_type": "flow"}, TEACHER, "'flow'; allowed: epsilon, v_prediction, sample"),
    ({"num_train_timesteps": 20}, "--num_ddim_timesteps", "50 given; allowed: at most the schedule's 20"),
    ({"num_train_timesteps": 0}, "--num_ddim_timesteps", "50 given; allowed: at most the schedule's 0"),
    ({"trained_betas": [0.1] * 5}, "--num_ddim_timesteps", "50 given; allowed: at most the schedule's 5"),
    ({"num_train_timesteps": "many"}, TEACHER, "part 'scheduler'"),
    ({"beta_schedule": "nosuch"}, TEACHER, "nosuch"),
    ({"beta_end": 5.0}, TEACHER, "betas"),
    ({"beta_end": float("nan")}, TEACHER, "betas"),
    ({"beta_start": 0, "beta_end": 0}, TEACHER, "betas"),
    ({"beta_schedule": None}, TEACHER, "no beta schedule"),
]

TEACHERS = [
    *(Case(f"teacher-{value}", TEACHER, f"cannot load {value!r}", (f"{TEACHER}={value}",), scripts=BOTH)
      for value in ("nosuch", "folder/nosuch", "org/unknown")),
    Case("teacher-mistyped", TEACHER, "Did you mean the folder 'empty'?", (), mistyped),
    Case("teacher-revision", TEACHER, "at revision 'v9'", (f"{TEACHER}=org/unknown", "--revision=v9")),
    Case("teacher-file", TEACHER, "cannot load 'file'", prepare=file_at("file", f"{TEACHER}=file"), scripts=BOTH),
    Case("teacher-empty-folder", TEACHER, "cannot load 'empty'", prepare=empty_folder, scripts=BOTH),
    Case("teacher-other-layout-sd", TEACHER, "Stable Diffusion 1.x or 2.x", (), other_layout, ("sd", "lora_sd")),
    Case("teacher-other-layout-sdxl", TEACHER, "layout of SDXL", (), other_layout, SDXL),
    *(case for part in PARTS for case in damages(part)),
    *(broken(f"{INDEX}-{id}", f"part '{INDEX}'", change, SDXL) for id, change in (
        ("absent", remove(INDEX)), ("cut", cut(INDEX)), ("list", write(INDEX, b"[]")),
        ("text", write(INDEX, b'"text"')))),
    broken(f"{INDEX}-one-encoder", "layout of SDXL", edit(INDEX, text_encoder_2=None), SDXL),
    *(broken(f"refiner-{i}", "refiner", edit(INDEX, **changes), SDXL) for i, changes in enumerate(REFINERS)),
    *(broken(f"unet-{says}", says, edit("unet/config.json", **changes), ALL) for changes, says in UNETS),
    *(broken(f"unet-{says}", says, edit("unet/config.json", **changes), SDXL) for changes, says in SDXL_UNETS),
    *(broken(f"schedule-{changes}", says, edit(SCHEDULER, **changes), start=start)
      for changes, start, says in SCHEDULES),
    Case("many-solver-steps", "--num_solver_steps", "21 given; allowed: at most 20, the timesteps between two points",
         ("--num_solver_steps=21",)),
    broken("flow-matching", "FlowMatchEulerDiscreteScheduler", flow_matching),
    *(broken(f"tokenizer-without-{name}", "tokenizer", published_tokenizer_without(name))
      for name in ("vocab.json", "merges.txt")),
    broken("tokenizer-of-words", ("vocabulary is ", "allowed: 3 to "), tokenizer_of_words),
    *(broken(f"tokenizer-of-{length}-tokens", (f"model_max_length is {length}", "allowed: 3 to 16"),
             edit("tokenizer/tokenizer_config.json", model_max_length=length), BOTH) for length in (0, 17, 1000)),
    broken("tokenizer-without-length", "model_max_length", remove("tokenizer/tokenizer_config.json"), BOTH),
    broken("tokenizer-2-of-1000-tokens", "part 'text_encoder_2'",
           edit("tokenizer_2/tokenizer_config.json", model_max_length=1000), SDXL),
    *(broken(f"{part}-nan", "at step 1", tensors(f"{part}/{WEIGHTS[part]}", all_nan), start="the loss is nan")
      for part in ("unet", "vae", "text_encoder")),
    *(Case(f"vae-{config}", VAE, says, (), vae(**config), BOTH) for config, says in (
        ({"latent_channels": 16}, "16 channels; allowed: 4"),
        ({"in_channels": 1}, "takes 1 channels and gives 3"), ({"out_channels": 1}, "takes 3 channels and gives 1"))),
    Case("vae-nosuch", VAE, "cannot load 'nosuch': ", (f"{VAE}=nosuch",), scripts=ALL),
    Case("vae-file", VAE, "cannot load 'file': ", prepare=file_at("file", f"{VAE}=file")),
    Case("vae-is-a-unet", VAE, "cannot load ", (), lambda place: [f"{VAE}={place.script.teacher / 'unet'}"], ALL),
    *(Case(f"lora-{name}", "--lora_target_modules", (f"{wrong_name!r} is no ", "to_q"),
           (f"--lora_target_modules={name}",), scripts=LORA)
      for name, wrong_name in (("to_q,nosuch", "nosuch"), ("o_q", "o_q"), ("down_blocks.0", "down_blocks.0"),
                               ("0", "0"))),  # the ending of `to_out.0`, a linear layer, and of `down_blocks.0`
]  # fmt: skip


# Shards without use: status 1.

PICTURE = encode_image(np.zeros((20, 24, 3), dtype=np.uint8))


def shard(content):
    """One shard: bytes, or the members of a tar."""

    def prepare(place):
        path = place.folder / "a.tar"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_tar(path, content)
        return [f"{SHARDS}={path}"]

    return prepare


def folder_as_shard(place):
    (place.folder / "a.tar").mkdir()
    return [f"{SHARDS}={place.folder / 'a.tar'}"]


def no_shards(id, says, prepare=None, options=(), scripts=BOTH, **more):
    return Case(f"shards-{id}", SHARDS, says, options, prepare, scripts, drop=(SHARDS,), **more)


NO_SHARDS = [
    *(no_shards(pattern, "matches no shard", options=(f"{SHARDS}={pattern}",))
      for pattern in ("nosuch-{0..3}.tar", "*.tar", "", "::", "a.tar::b.tar")),
    no_shards("brace", "'{0..'", options=(f"{SHARDS}=" + "{0..",)),
    no_shards("folder", "is a folder; allowed: its shards, such as", folder_as_shard),
    *(no_shards(id, ("no usable sample", says), shard(content)) for id, content, says in (
        ("text", b"no tar at all\n" * 1000, "shard unreadable"),
        ("html", b"<html>Not found</html>", "shard unreadable"),
        ("0-bytes", b"", "shard unreadable"),
        ("empty-tar", [], "Skipped: none"),
        ("pickles", [(f"{i}.{suffix}", b"\x80\x04.") for i in range(3) for suffix in ("pyd", "pickle")],
         "3 x no picture"),
        ("no-captions", [(f"{i}.png", PICTURE) for i in range(3)], "3 x no caption"),
        ("no-pictures", [(f"{i}.txt", b"a") for i in range(3)], "3 x no picture"),
        ("no-pixels", [("a.png", b"no picture"), ("a.txt", b"a")], "1 x picture unreadable"))),
    no_shards("text-in-workers", "shard unreadable", shard(b"no tar"), ("--dataloader_num_workers=2",), ("sd",)),
    *(no_shards(address, "1 x shard unreadable", options=(f"{SHARDS}={address}",), scripts=("sd",))
      for address in ("pipe:false", "pipe:", "nosuch://bucket/a.tar")),
    Case("shards-filtered", SHARDS, "30 x smaller than --min_image_size", ("--min_image_size=21",)),
]  # fmt: skip


# Checkpoints that cannot be gone on from: status 1.


def in_checkpoint(change, of=None):
    """Change a copy of the first checkpoint of the script, or of another one."""

    def prepare(place):
        folder = shutil.copytree(place.checkpoint(of or place.script.name), place.folder / "saved" / "checkpoint-1")
        change(folder)
        return [f"{RESUME}={folder}"]

    return prepare


def as_it_is(folder):
    """Change nothing."""


def resume(id, start, says, change=as_it_is, options=(), scripts=("sd",), of=None, **more):
    return Case(f"resume-{id}", start, says, options, in_checkpoint(change, of), scripts, **more)


STATE, OPTIMIZER, RANDOM = "training_state.json", "optimizer.bin", "random_states_0.pkl"
STUDENT, ADAPTER = "unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
PLACE = {"empty_passes": [0], "next_stream": 0, "num_used": 0, "skipped": {}}
POSITION = {"pass_index": 0, "shard_index": 0, "member_index": 0, "block_index": 0, "taken": 0}
DATA = [{}, 5, "x", {**PLACE, "positions": [3]}, {**PLACE, "positions": [{"nosuch": 1}]},
        {**PLACE, "positions": [{**POSITION, "pass_index": -1}]},
        {**PLACE, "positions": [POSITION], "next_stream": "x"}]  # fmt: skip


def other_moments(folder):
    """Those of weights of other shapes, but as many."""
    state = torch.load(folder / OPTIMIZER)
    for moments in state["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    torch.save(state, folder / OPTIMIZER)


def own_teacher(place):
    folder = shutil.copytree(place.script.teacher, place.folder / "teacher")
    return [*in_checkpoint(as_it_is)(place), f"{TEACHER}={folder}"]


def empty_checkpoint(place):
    (place.folder / "empty").mkdir()
    return [f"{RESUME}=empty"]


def latest(change):
    """The broken checkpoint is the newest one in the output folder."""

    def prepare(place):
        change(shutil.copytree(place.checkpoint(place.script.name), place.output / "checkpoint-8"))
        return [f"{RESUME}=latest"]

    return prepare


NOT_OURS, CANNOT_LOAD, ANOTHER_RUN = "is not one of our checkpoints", "cannot load", "the checkpoint was trained with"
CHECKPOINTS = [
    Case("resume-empty-folder", RESUME, NOT_OURS, prepare=empty_checkpoint, scripts=ALL),
    *(resume(f"state-{content}", RESUME, NOT_OURS, write(STATE, content))
      for content in (b"not JSON", b"[]", b'"step"', b"null", b"", b"\xff\xfe", b'{"step": 2}')),
    *(resume(f"{name}={value}", RESUME, NOT_OURS, edit(STATE, **{name: value})) for name, value in (
        ("step", -3), ("step", "1"), ("step", 1.5), ("step", True), ("options", []), ("options", {}), ("options", "x"),
        ("data", "x"), ("data", {}), ("lr_scheduler", []))),
    *(resume(f"without-{name}", RESUME, NOT_OURS, edit(STATE, **{name: None}))
      for name in ("step", "options", "data", "lr_scheduler")),
    resume("options-without-a-seed", RESUME, NOT_OURS, edit(STATE, options=[]), drop=("--seed",)),
    resume("lr_scheduler={}", RESUME, CANNOT_LOAD, edit(STATE, lr_scheduler={})),
    *(resume(f"data={data}", RESUME, CANNOT_LOAD, edit(STATE, data=[data])) for data in DATA),
    resume("no-process", RESUME, "saved by 0 processes, but 1 are running", edit(STATE, data=[])),
    resume("two-processes", RESUME, "saved by 2 processes, but 1 are running", edit(STATE, data=[{}, {}])),
    *(resume(f"{kind}-{file}", RESUME, CANNOT_LOAD, change) for file in (STUDENT, OPTIMIZER, RANDOM)
      for kind, change in (("no", remove(file)), ("half", cut(file)), ("html", write(file, b"<html>")))),
    *(resume(f"{kind}-{file}", RESUME, CANNOT_LOAD, change, scripts=("lora_sdxl",)) for file in (ADAPTER, RANDOM)
      for kind, change in (("no", remove(file)), ("half", cut(file)))),
    resume("no-target", RESUME, CANNOT_LOAD, remove("unet_target")),
    resume("no-student", RESUME, CANNOT_LOAD, remove("student"), scripts=("lora_sdxl",)),
    resume("student-lacks-one", RESUME, CANNOT_LOAD, tensors(STUDENT, less_one)),
    resume("adapter-lacks-one", RESUME, CANNOT_LOAD, tensors(ADAPTER, less_one), scripts=("lora_sd",)),
    resume("student-shape", RESUME, CANNOT_LOAD, tensors(STUDENT, one_of_other_shape)),
    resume("student-nan", "the loss is nan", "at step 2", tensors(STUDENT, all_nan)),
    resume("optimizer-of-nothing", RESUME, CANNOT_LOAD, lambda folder: torch.save({}, folder / OPTIMIZER)),
    resume("optimizer-shapes", RESUME, CANNOT_LOAD, other_moments, scripts=("sd", "lora_sd")),
    Case("resume-latest", RESUME, CANNOT_LOAD, prepare=latest(cut(OPTIMIZER))),
    *(resume(f"from-{other}", RESUME, "another script", scripts=tuple(name for name in SCRIPTS if name != other),
             of=other) for other in SCRIPTS),
    Case("resume-other-teacher", TEACHER, ANOTHER_RUN, prepare=own_teacher, scripts=BOTH),
    resume("later-step", "--max_train_steps", ("2 given", "step 9", "allowed: "), edit(STATE, step=9),
           ("--max_train_steps=2",), BOTH),
    resume("later-step-than-epochs", "--max_train_steps", ("1 given", "step 9"), edit(STATE, step=9),
           ("--max_train_samples=2", "--num_train_epochs=1"), drop=("--max_train_steps",)),
    resume("workers", "--dataloader_num_workers", "2 given", as_it_is, ("--dataloader_num_workers=2",)),
    *(resume(f"with-{option}", f"--{option.partition('=')[0]}", ANOTHER_RUN, as_it_is, (f"--{option}",))
      for option in ("w_max=9", "num_ddim_timesteps=25", "ema_decay=0.9", "seed=5", "learning_rate=1e-5")),
    *(resume(f"with-{option}", f"--{option.partition('=')[0]}", ANOTHER_RUN, as_it_is, (f"--{option}",),
             ("lora_sdxl",))
      for option in ("lora_rank=2", "lora_alpha=9", "lora_dropout=0.1", "lora_target_modules=to_q", "ema_decay=0.9",
                     "use_fix_crop_and_size")),
]  # fmt: skip


# What surrounds a run, and numbers that are none: status 1.


def breaks_at(owner, name, call, factor):
    """The result of one call of a function is multiplied by `factor`."""

    def prepare(place):
        module, _, attribute = owner.partition(":")
        target = importlib.import_module(module)
        target = getattr(target, attribute) if attribute else target
        original, calls = getattr(target, name), []

        def breaking(*args):
            calls.append(1)
            return original(*args) * (factor if len(calls) == call else 1.0)

        place.patch.setattr(target, name, breaking)
        return ["--checkpointing_steps=1", "--max_train_steps=6"]

    return prepare


def configured(id, start, says, **env):
    return Case(f"accelerate-{id}", start, says, env=env, scripts=BOTH)


SURROUNDINGS = [
    configured("fp7", "--mixed_precision", "says fp7; allowed: no, fp16, bf16", ACCELERATE_MIXED_PRECISION="fp7"),
    *(configured(f"accumulation={steps}", "--gradient_accumulation_steps", f"says {steps}; allowed: at least 1",
                 ACCELERATE_GRADIENT_ACCUMULATION_STEPS=steps) for steps in ("0", "-2")),
    configured("accumulation=x", "accelerate cannot start", ("'x'", "`accelerate config`"),
               ACCELERATE_GRADIENT_ACCUMULATION_STEPS="x"),
    configured("dynamo", "accelerate cannot start", "NONSENSE", ACCELERATE_DYNAMO_BACKEND="nonsense"),
    configured("device", "accelerate cannot start", "maybe", ACCELERATE_USE_CPU="maybe"),
    configured("rank", "accelerate cannot start", "'x'", LOCAL_RANK="x"),
    configured("deepspeed", "accelerate c", "`accelerate config`", ACCELERATE_USE_DEEPSPEED="true"),
    Case("output-cannot-be-made", "--output_dir", "nosuch", ("--output_dir=/proc/nosuch/folder",), scripts=BOTH),
    Case("checkpoint-is-a-file", "--output_dir", "checkpoint-1", ("--checkpointing_steps=1",),
         file_at("out/checkpoint-1"), BOTH, steps=1),
    Case("partial-is-a-file", "--output_dir", "checkpoint-1.partial", ("--checkpointing_steps=1",),
         file_at("out/checkpoint-1.partial"), BOTH, steps=1),
    Case("loss-nan", "the loss is nan at step 4", "--learning_rate", (),
         breaks_at("lcm_common", "consistency_loss", 4, torch.nan), ALL, steps=3, saved=3),
    Case("gradient-inf", "the norm of the gradients is inf at step 3", "--learning_rate", (),
         breaks_at("accelerate:Accelerator", "clip_grad_norm_", 3, torch.inf), ALL, steps=2, saved=2),
]  # fmt: skip


# All of them alike.

CASES = [*WRONG_OPTIONS, *TEACHERS, *NO_SHARDS, *CHECKPOINTS, *SURROUNDINGS]


@pytest.fixture(scope="module")
def checkpoint(teacher, sdxl_teacher, shards, tmp_path_factory):
    """checkpoint(name): the first checkpoint of a run of that script, which is made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "out"
            script = Script(name, make.teachers["sdxl" in name], shards, SCRIPTS[name])
            script.main(made[name], "--checkpointing_steps=1", "--max_train_steps=1", "--validation_steps=99")
        return made[name] / "checkpoint-1"

    make.teachers = {False: teacher, True: sdxl_teacher}
    return make


@pytest.fixture
def place(checkpoint, shards, tmp_path, monkeypatch):
    """place(name): where a case of that script is prepared, with earlier work in the output folder."""

    def make(name):
        output = tmp_path / "out"
        for file in ("notes.txt", "unet/weights", "checkpoint-7/weights", "validation/step-000007.png"):
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            (output / file).write_text(f"earlier {file}")
        monkeypatch.chdir(tmp_path)
        script = Script(name, checkpoint.teachers["sdxl" in name], shards, SCRIPTS[name])
        return Place(script, tmp_path, output, monkeypatch, checkpoint)

    return make


@pytest.fixture
def optimizer_steps():
    """A list that gets an entry with each step of any optimizer."""
    steps = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    yield steps
    handle.remove()


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(case, name, id=f"{name}-{case.id}") for case in CASES for name in case.scripts]
)
def test_errors(case, name, place, optimizer_steps, capsys):
    place = place(name)
    for variable in ("LOCAL_RANK", *case.env):
        place.patch.setenv(variable, case.env.get(variable, ""))
    if "LOCAL_RANK" not in case.env:
        place.patch.delenv("LOCAL_RANK")
    if case.status == 2:
        place.patch.setattr(place.script.module, "train", lambda args: pytest.fail("the options were taken"))
        place.patch.setattr(importlib.util, "find_spec", lambda name, package=None: "there")
    given = place.script.options(place.output, *case.options, *(case.prepare(place) if case.prepare else ()))
    standard = place.script.options(place.output)
    if case.drop is None:
        given, standard = [], []
    given = [option for option in given if option not in standard or option.split("=")[0] not in (case.drop or ())]
    before = files_in(place.folder)
    capsys.readouterr()
    optimizer_steps.clear()

    with pytest.raises(SystemExit) as stop:
        place.script.module.main(given)

    out, err = capsys.readouterr()
    error = re.split(r"[\r\n]+", err.rstrip("\n"))[-1]
    assert stop.value.code == case.status, err
    assert "Traceback" not in err and err.endswith("\n")
    assert case.status == 1 or (out == "" and err == f"{error}\n"), err
    assert error.startswith(case.start if " " in case.start and case.status == 1 else f"{case.start}: "), err
    for text in [case.says] if isinstance(case.says, str) else case.says:
        assert text in error.removeprefix(f"{case.start}: "), error
    assert "hf_secret" not in out + err
    assert len(optimizer_steps) == case.steps
    after = files_in(place.folder)
    assert {path: after.get(path) for path in before} == before
    new = {path.parts[:2] for path in after.keys() - before.keys()} - {("out", "metrics.jsonl")}
    assert new == {("out", f"checkpoint-{step + 1}") for step in range(case.saved)}


@pytest.mark.parametrize("row", VALUES, ids=[f"{row[0]}-{row[1][0]}" for row in VALUES])
def test_values_next_to_them_are_taken(row, place):
    option, _, taken, _ = row
    for name in scripts_with(option):
        script = place(name).script
        for value in taken:
            script.module.parse_args(script.options("out", f"--{option}={value}"))


def test_other_places_are_taken(place):
    """What is next to the refused folders: checkpoints by name, by path and as `latest`, whole names on the Hub."""
    here = place("sd")
    (here.folder / "other" / "checkpoint-6").mkdir(parents=True)
    folders = ("checkpoint-7", "other/checkpoint-6", here.output / "checkpoint-7", "latest")
    for more in (
        *([f"{RESUME}={name}"] for name in folders),
        *(["--push_to_hub", f"--hub_model_id={name}"] for name in ("a", "user/my_model-1.5", "x" * 96)),
    ):
        here.script.module.parse_args(here.script.options("out", *more))
    assert not (here.folder / "cache").exists()


# And nothing was forgotten.


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_with_a_type_has_a_row(name):
    """One that is not in the table of values is one whose bounds nobody tested."""
    rows = {row[0] for row in VALUES}
    typed = {option for option, action in ACTIONS[name].items() if action.type is not None}
    assert typed == rows & ACTIONS[name].keys()
    assert rows <= set(OPTIONS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_begins_an_error(name):
    """No option is free text for which nothing is wrong: even a name on a tracker must not be empty."""
    begun = {case.start for case in CASES if name in case.scripts and "no such option" not in case.says}
    assert {f"--{option}" for option in ACTIONS[name]} <= begun
