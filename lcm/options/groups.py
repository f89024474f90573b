"""The options of the training scripts, in groups, and the checks that need nothing heavy.

Only the standard library is imported here, so that `--help` and a mistyped option answer at once.
A script picks the groups it needs and passes its own defaults where the four scripts differ.
"""

import argparse
import difflib
import importlib.util
import logging
import math
import os
import re
import sys

from lcm.options.secrets import redact

VALIDATION_PROMPTS = [
    "a watercolour of a lighthouse on a cliff at dusk, gentle waves, warm light in the windows",
    "portrait of an old fisherman in a yellow raincoat, shallow depth of field, overcast morning",
    "a bowl of ramen on a wooden counter, steam, neon signs out of focus behind it",
    "a small red fox asleep in fresh snow, soft light, detailed fur",
]

# Samplers: the class in diffusers, and what it does not take over from the teacher's own scheduler.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "dpm++-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc-trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
}

# What accelerate can log to, and the packages of which each needs one.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in (
        "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio",
    )},
}  # fmt: skip

BEFORE_ERROR = []  # callables that `run` calls before it prints an error; the progress bar puts its `close` here
AT_END = []  # and those that it calls when all that `train` built is gone


class UserError(Exception):
    """Something the user can mend; scripts print it in one line and exit with status 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that begins with the option."""

    def error(self, message):
        message = re.sub(r"^argument (--\w+)(/[^:]+)?: ", r"\1: ", message)
        message = re.sub(r"^the following arguments are required: (.+)$", r"\1: required, but not given", message)
        message = re.sub(r"^(--\w+): ignored explicit argument (.+)$", r"\1: \2 given; allowed: no value", message)
        ambiguous = re.match(r"^ambiguous option: ([^\s=]+)\S* could match (.+)$", message)
        if ambiguous:  # without the value, which may be a token
            message = f"{ambiguous[1]}: ambiguous; allowed: {ambiguous[2]}"
        unknown = re.match(r"^unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"{name}: no such option" + (f"; did you mean {close[0]}?" if close else "; see --help")
        self.exit(2, redact(message).replace("\n", " ") + "\n")


class Options(argparse.Namespace):
    """A script's options, as `vars()` has them; and beside them, for a resume: the file name of the `script`, the
    parser's `defaults` by name, and the names of those `left_at_default`, also where a value is filled in later."""

    __slots__ = ("defaults", "left_at_default", "script")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and adds each default that is worth saying."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.required:
            return action.help
        if isinstance(action.default, list):
            quoted = (f'"{value}"' if isinstance(value, str) else f"{value:g}" for value in action.default)
            return f"{action.help} (default: {' '.join(quoted)})"
        return super()._get_help_string(action)


def integer(low, high=None):
    """An argparse type: an integer in [low, high]."""
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; allowed: {allowed}")
        return value

    return parse


def number(low, high=math.inf, below=math.inf, above=-math.inf):
    """An argparse type: a finite number in [low, high], smaller than `below` and larger than `above`."""
    upper = f" and at most {high:g}" if high < math.inf else f" and less than {below:g}" if below < math.inf else ""
    allowed = (f"a number larger than {above:g}" if above > -math.inf else f"a number of at least {low:g}") + upper

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} given; allowed: {allowed}")
        return value

    return parse


def sizes(value):
    """An argparse type: `1024x1024,1280x768` or `1024` as a list of (width, height) in pixels, multiples of 8."""
    found = [re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip()) for part in value.split(",")]
    pairs = [(int(match[1]), int(match[2] or match[1])) for match in found if match]
    if len(pairs) < len(found) or not all(side >= 8 and side % 8 == 0 for pair in pairs for side in pair):
        raise argparse.ArgumentTypeError(
            f"{value!r} given; allowed: WIDTHxHEIGHT, or one number, in multiples of 8, joined by commas"
        )
    return pairs


def text(value):
    """An argparse type: some text. An empty one is most often a variable of the shell that is not set."""
    if not value.strip():
        raise argparse.ArgumentTypeError(f"{value!r} given; allowed: some text")
    return value


def names(value):
    """An argparse type: names joined by commas."""
    if not all(name.strip() for name in value.split(",")):
        raise argparse.ArgumentTypeError(f"{value!r} given; allowed: names joined by commas, none of them empty")
    return value


def make_parser(description, script=None):
    """An empty parser with the script's docstring as its description, and its file name as the program's."""
    return Parser(script and os.path.basename(script), description=description, formatter_class=HelpFormatter)


def add_model_options(parser):
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--pretrained_teacher_model", type=text, required=True, metavar="ID_OR_FOLDER",
        help="The model to distil: a Hub id or a local folder in the layout of diffusers.")
    add("--pretrained_vae_model_name_or_path", type=text, metavar="ID_OR_FOLDER",
        help="A VAE to use instead of the teacher's own, at its default revision.")
    add("--teacher_revision", type=text, metavar="REV",
        help="Revision (branch, tag or commit) of the teacher on the Hub, for all of its parts.")
    add("--revision", type=text, metavar="REV",
        help="The same; used where --teacher_revision is not given.")
    add("--cache_dir", type=text, metavar="FOLDER",
        help="Where downloaded models are kept, instead of the Hub client's own cache.")


def add_output_options(parser):
    group = parser.add_argument_group("output, logging and resuming")
    add = group.add_argument
    add("--output_dir", type=text, default="lcm-xl-distilled", metavar="FOLDER",
        help="Where networks, checkpoints, pictures and logs are written.")
    add("--seed", type=integer(0, 2**32 - 1),
        help="Decides data order, noise, timesteps and guidance. Drawn, logged and stored if not given.")
    add("--logging_dir", type=text, default="logs", metavar="FOLDER",
        help="Folder of the trackers' files, inside --output_dir.")
    add("--report_to", default="tensorboard", choices=[*TRACKERS, "all", "none"],
        help="Where metrics and pictures are logged; `all` takes every tracker that is installed. mlflow, dvclive and "
             "trackio get metrics alone.")
    add("--tracker_project_name", type=text, default="text2image-fine-tune", metavar="NAME",
        help="The project under which the trackers file this run.")
    add("--logging_steps", type=integer(1), default=10, metavar="STEPS",
        help="Log metrics every so many optimizer steps, as means over them, to the trackers and metrics.jsonl.")
    add("--checkpointing_steps", type=integer(1), default=500, metavar="STEPS",
        help="Save everything needed to go on exactly, every so many optimizer steps.")
    add("--checkpoints_total_limit", type=integer(1), metavar="N",
        help="Keep the newest N checkpoints; older ones go once the new one is safe. All are kept if unset.")
    add("--resume_from_checkpoint", metavar="latest|FOLDER",
        help="Go on from a checkpoint, by name in --output_dir or by path. `latest` starts anew if there is none.")
    add("--resume_with_changed_options", action="store_true",
        help="Resume although options, or the number of processes, differ from the checkpoint's: each difference is a "
             "warning, not an error. It costs exactness: the run is not bit for bit the one that it would have been. "
             "Where this changes the order of the data, a new pass over all of it begins. The script and the shape of "
             "what is trained cannot change.")


def add_data_options(parser, resolution, max_watermark_probability=None):
    """Adds the options of the data, and returns their group for those of one script only."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_shards_path_or_url", action="append", required=True, metavar="SHARDS",
        help="WebDataset shards: paths, http(s):// or pipe: addresses, with {000..123} ranges and :: between several. "
             "May be repeated. Only pictures, captions and JSON are read; nothing is unpickled.")
    add("--resolution", type=integer(8), default=resolution, metavar="PIXELS",
        help="Pictures are resized so that their shorter side has this length, then cropped to a square.")
    add("--interpolation_type", default="bilinear",
        choices=["bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos"],
        help="How Pillow resizes.")
    add("--center_crop", action="store_true",
        help="Crop the middle; otherwise the crop's place is random.")
    add("--random_flip", action="store_true",
        help="Mirror half of the pictures.")
    add("--proportion_empty_prompts", type=number(0, 1), default=0, metavar="P",
        help="Share of captions that are replaced by an empty one.")
    add("--caption_key", type=text, default="caption", metavar="KEY",
        help="Key of the caption in a sample's JSON, used where there is no .txt, .text or .caption.")
    add("--width_key", type=text, metavar="KEY",
        help="Key of the picture's original width in the JSON. Measured on the picture if unset.")
    add("--height_key", type=text, metavar="KEY",
        help="Key of the picture's original height in the JSON. Measured on the picture if unset.")
    add("--min_image_size", type=integer(0), default=0, metavar="PIXELS",
        help="Skip, and count, pictures whose shorter side is smaller.")
    add("--max_watermark_probability", type=number(0, 1), default=max_watermark_probability, metavar="P",
        help="Skip, and count, samples whose JSON gives a larger `pwatermark`. Those without are kept, and counted.")
    add("--shuffle_buffer_size", type=integer(1), default=1000, metavar="SAMPLES",
        help="Samples are shuffled in blocks of this many, in each data worker; a resume re-reads one such block.")
    add("--shuffle_buffer_mb", type=number(0, above=0), default=512.0, metavar="MB",
        help="A block ends early once its samples take this much memory, as they lie in the shard (10^6 bytes).")
    add("--shard_timeout", type=number(0, high=86400, above=0), default=300.0, metavar="SECONDS",
        help="A shard's command that gives no byte for so long is ended, and the shard counted as unreadable. An "
             "http(s):// connection is opened anew sooner.")
    add("--dataloader_num_workers", type=integer(0), default=0, metavar="N",
        help="Processes that read data; 0 reads in the training process.")
    return group


def add_training_options(parser):
    group = parser.add_argument_group("length and batches")
    add = group.add_argument
    add("--train_batch_size", type=integer(1), default=16, metavar="SAMPLES",
        help="Samples per process in one forward and backward pass.")
    add("--gradient_accumulation_steps", type=integer(1), default=1, metavar="N",
        help="Passes per optimizer step. A value in `accelerate config` overrides this one; the log says so.")
    add("--max_train_steps", type=integer(1), metavar="STEPS",
        help="Optimizer steps of the whole run. If unset: --num_train_epochs times the steps of an epoch.")
    add("--num_train_epochs", type=integer(1), default=100, metavar="N",
        help="Length of the run where --max_train_steps is not given.")
    add("--max_train_samples", type=integer(1), metavar="SAMPLES",
        help="The length of an epoch. Not a subset: all shards are read. Needed unless --max_train_steps is given.")
    add("--local_rank", type=integer(-1), default=-1, metavar="N",
        help="Set by some launchers; the environment's LOCAL_RANK wins.")

    group = parser.add_argument_group("optimizer and learning rate")
    add = group.add_argument
    add("--learning_rate", type=number(0), default=1e-4, metavar="LR",
        help="Learning rate after the warm-up.")
    add("--scale_lr", action="store_true",
        help="Multiply the learning rate by processes x accumulation x batch size.")
    add("--lr_scheduler", default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        help="Course of the learning rate. `constant` has no warm-up.")
    add("--lr_warmup_steps", type=integer(0), default=500, metavar="STEPS",
        help="Optimizer steps over which the rate rises from 0, for every course but `constant`.")
    add("--use_8bit_adam", action="store_true",
        help="bitsandbytes' 8-bit AdamW: a quarter of the optimizer's memory.")
    add("--adam_beta1", type=number(0, below=1), default=0.9, metavar="BETA",
        help="Decay of AdamW's first moment.")
    add("--adam_beta2", type=number(0, below=1), default=0.999, metavar="BETA",
        help="Decay of AdamW's second moment.")
    add("--adam_weight_decay", type=number(0), default=1e-2, metavar="DECAY",
        help="AdamW's weight decay.")
    add("--adam_epsilon", type=number(0, above=0), default=1e-8, metavar="EPS",
        help="AdamW's epsilon.")
    add("--max_grad_norm", type=number(0, above=0), default=1.0, metavar="NORM",
        help="Gradients are scaled down to this norm.")


def add_distillation_options(parser, w_min, vae_encode_batch_size):
    """Adds the options of the method, and returns their group for those of one script only."""
    group = parser.add_argument_group("latent consistency distillation")
    add = group.add_argument
    add("--w_min", type=number(0), default=w_min, metavar="W",
        help="Smallest guidance weight. guided = cond + w (cond - uncond), so w is a pipeline's guidance_scale - 1.")
    add("--w_max", type=number(0), default=15.0, metavar="W",
        help="Largest guidance weight; w is drawn evenly between the two.")
    add("--num_ddim_timesteps", type=integer(1, 1000), default=50, metavar="N",
        help="Points of the teacher's DDIM grid. The student learns to jump along the grid, and to sample on it.")
    add("--loss_type", default="l2", choices=["l2", "huber"],
        help="Squared error, or sqrt(d^2 + c^2) - c, which outliers sway less.")
    add("--huber_c", type=number(0, high=1e6, above=0), default=0.001, metavar="C",
        help="The c of the Huber loss.")
    add("--timestep_scaling_factor", type=number(0, above=0), default=10.0, metavar="S",
        help="Scale of t in the boundary conditions; the saved scheduler carries it.")
    add("--vae_encode_batch_size", type=integer(1), default=vae_encode_batch_size, metavar="SAMPLES",
        help="Pictures that the VAE encodes at once.")
    return group


def add_full_model_options(group):
    """Options of the two scripts that train a whole U-Net."""
    add = group.add_argument
    add("--unet_time_cond_proj_dim", type=integer(4), default=256, metavar="DIM",
        help="Size of the guidance embedding that the student is fed.")
    add("--ema_decay", type=number(0, 1), default=0.95, metavar="DECAY",
        help="Decay of the student's moving average: the target network, and the one to sample from.")
    add("--cast_teacher_unet", action="store_true",
        help="Hold the teacher's weights in the mixed precision too: half its memory.")


def add_lora_options(group):
    """Options of the two scripts that train a LoRA."""
    add = group.add_argument
    add("--lora_rank", type=integer(1), default=64, metavar="RANK",
        help="Rank of the adapter in each layer.")
    add("--lora_alpha", type=integer(1), default=64, metavar="ALPHA",
        help="The adapter's output is scaled by alpha / rank.")
    add("--lora_dropout", type=number(0, below=1), default=0.0, metavar="P",
        help="Dropout on the adapter's input, for the student alone: neither teacher nor target sees it.")
    add("--lora_target_modules", type=names, metavar="NAMES",
        help="Names, or ends of names, of the layers that are adapted, joined by commas. If unset: the linear and "
             "convolutional layers of all blocks.")
    add("--ema_decay", type=number(0, 1), metavar="DECAY",
        help="Keep a moving average of the LoRA as target network, and save that one. Off if unset.")
    add("--cast_teacher_unet", action="store_true",
        help="Changes nothing: the teacher is the LoRA's own base, and is held in the mixed precision in any case.")


def add_sdxl_options(group):
    """Options of the two scripts for SDXL."""
    add = group.add_argument
    add("--use_fix_crop_and_size", action="store_true",
        help="Tell the networks that each picture is whole: original size = resolution, crop at (0, 0).")


def add_precision_options(parser):
    group = parser.add_argument_group("precision, memory and speed")
    add = group.add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the networks' arithmetic. If unset, what `accelerate config` says. Trained weights stay "
             "float32. fp16 needs a GPU.")
    add("--allow_tf32", action="store_true",
        help="Let float32 matrix products on Ampere and later run as TF32, as PyTorch lets convolutions anyway.")
    add("--gradient_checkpointing", action="store_true",
        help="Recompute activations in the backward pass: less memory, more time.")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="Use xformers' attention on CUDA. PyTorch's own, the default, is usually as fast.")


def add_validation_options(parser, guidance_scale=None):
    """`guidance_scale` is the default; None takes it from the range of the training."""
    group = parser.add_argument_group("validation pictures")
    add = group.add_argument
    add("--validation_steps", type=integer(1), default=200, metavar="STEPS",
        help="Draw pictures every so many optimizer steps, and at the end.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, metavar="PROMPT",
        help="What to draw, one row each. The name of a text file stands for its lines.")
    add("--validation_negative_prompt", type=text, metavar="PROMPT",
        help="What not to draw. Has an effect on the teacher, and on a LoRA at a guidance scale above 1.")
    add("--num_validation_images", type=integer(1), default=1, metavar="N",
        help="Rows for each prompt, each from noise of its own; all columns start from the same.")
    add("--validation_resolution", type=sizes, metavar="WxH,...",
        help="Sizes in pixels, as 1024x1024,1280x768, one row each. If unset: --resolution.")
    add("--validation_num_inference_steps", nargs="+", type=integer(1), default=[4], metavar="STEPS",
        help="With how many steps, one column each.")
    add("--validation_guidance_scale", nargs="+", type=number(1),
        default=None if guidance_scale is None else [guidance_scale], metavar="SCALE",
        help="A pipeline's guidance_scale, one column each." + (
            " If unset: 7.5, moved into [w_min + 1, w_max + 1]." if guidance_scale is None else ""))
    add("--validation_teacher_steps", nargs="*", type=integer(1, 1000), metavar="STEPS",
        help="With how many steps of DDIM the teacher draws the same once, for columns beside. If unset: the most of "
             "--validation_num_inference_steps, and 25. Nothing after the option: no columns.")


def add_hub_options(parser):
    group = parser.add_argument_group("Hugging Face Hub")
    add = group.add_argument
    add("--push_to_hub", action="store_true",
        help="Upload what was trained, with a model card, at the end.")
    add("--hub_model_id", type=text, metavar="NAME",
        help="Repository to push to; the name of --output_dir if unset.")
    add("--hub_token", type=text, metavar="TOKEN",
        help="Access token. Better: `hf auth login`, or HF_TOKEN in the environment. Never logged or stored.")
    add("--hub_private", action=argparse.BooleanOptionalAction, default=True,
        help="Whether a repository that is made here is private.")


def parse(parser, argv=None):
    """Parse and check; on a wrong option print one line that begins with its name, and exit with status 2."""
    args = parser.parse_args(argv, Options())
    args.script = parser.prog
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    args.left_at_default = {name for name, value in vars(args).items() if value == args.defaults[name]}

    def need(condition, option, message):
        if not condition:
            parser.error(f"{option}: {message}")

    need(args.w_min <= args.w_max, "--w_min", f"{args.w_min:g} given; allowed: at most --w_max, {args.w_max:g}")
    need(args.resolution % 8 == 0, "--resolution", f"{args.resolution} given; allowed: multiples of 8")
    need(args.max_train_steps or args.max_train_samples, "--max_train_steps",
         "not given; allowed: a number of steps, or --max_train_samples for the length of an epoch")
    for name, other in (("width_key", "height_key"), ("height_key", "width_key")):
        value = getattr(args, name)
        need(value is None or getattr(args, other) is not None, f"--{name}",
             f"{value!r} given without --{other}; allowed: both or neither")
    most = max(args.validation_num_inference_steps)
    need(most <= args.num_ddim_timesteps, "--validation_num_inference_steps",
         f"{most} given; allowed: at most --num_ddim_timesteps, {args.num_ddim_timesteps}")
    need(not args.use_8bit_adam or importlib.util.find_spec("bitsandbytes"), "--use_8bit_adam",
         "the package bitsandbytes is not installed")
    need(args.report_to in ("all", "none") or any(map(importlib.util.find_spec, TRACKERS[args.report_to])),
         "--report_to", f"{args.report_to} given, but the package {args.report_to} is not installed")
    need(args.report_to in ("tensorboard", "none") or not args.hub_token, "--hub_token",
         "trackers may record it with the command line; use `hf auth login` or HF_TOKEN instead")
    name = repository_name(args)
    need(not args.push_to_hub or is_repository_name(name), "--hub_model_id",
         f"{name!r} is no name on the Hub; allowed: NAME or USER/NAME, of letters, digits, -, _ and .")
    for option, folder in (("output_dir", args.output_dir), ("cache_dir", args.cache_dir),
                           ("logging_dir", os.path.join(args.output_dir, args.logging_dir))):
        existing, given = existing_parent(folder or "."), getattr(args, option)
        need(os.path.isdir(existing), f"--{option}",
             f"{given!r} given, but {existing!r} is a file; allowed: a folder, or a path where one can be made")
        need(option == "cache_dir" or os.access(existing, os.W_OK | os.X_OK), f"--{option}",
             f"{given!r} given, but {existing!r} cannot be written to; allowed: a folder that can")
    resume = args.resume_from_checkpoint
    need(resume in (None, "latest") or find_checkpoint(args.output_dir, resume), "--resume_from_checkpoint",
         f"{resume!r} is neither a folder in {args.output_dir!r} nor a path; allowed: latest, or a folder")
    need(resume or not args.resume_with_changed_options, "--resume_with_changed_options",
         "given without --resume_from_checkpoint; allowed: both, or neither")
    args.validation_prompts = read_prompts(parser, "--validation_prompts", args.validation_prompts)
    if args.validation_teacher_steps is None:
        args.validation_teacher_steps = sorted({most, 25})
    if args.local_rank != -1:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def read_prompts(parser, option, values):
    """The values of `option`, those that name a text file replaced by its lines, empty ones left out."""
    prompts = []
    for value in values:
        if not os.path.isfile(value):
            if value.endswith(".txt") or os.path.isdir(value):
                parser.error(f"{option}: {value!r} is no file; allowed: prompts, or a text file with one a line")
            prompts.append(value)
            continue
        try:
            with open(value, encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{option}: cannot read {value!r} as text in UTF-8: {error}")
        if not lines:
            parser.error(f"{option}: {value!r} holds no prompt; allowed: prompts, or a text file with one a line")
        prompts += lines
    return prompts


def existing_parent(path):
    """What there is at `path`, or else the nearest of the folders above it."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def find_checkpoint(output_dir, name):
    """The folder that a checkpoint's name or path stands for, None if there is none."""
    return next((path for path in (os.path.join(output_dir, name), name) if name and os.path.isdir(path)), None)


def repository_name(args):
    """The repository to push to."""
    return args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))


def is_repository_name(name):
    """Whether the Hub can have a repository of that name, with or without its owner's."""
    fits = re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", name, re.ASCII)
    return bool(fits) and not re.search(r"--|\.\.|\.git$", name)


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def without_secrets(value):
    """An option's value with the secrets in it redacted."""
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def public_options(args):
    """The options as a dict that may be logged, stored and shown: without secrets."""
    return {name: without_secrets(value) for name, value in vars(args).items() if name != "hub_token"}


def default_guidance_scale(args):
    """What a pipeline is given where nobody asks for more: 7.5, moved into the range of the training."""
    return min(max(7.5, args.w_min + 1), args.w_max + 1)


def run(train, args, interrupted="Stopped before the first step."):
    """Call `train(args)`; a UserError becomes one line on standard error and exit status 1.

    `interrupted` is what Ctrl-C prints; a training run takes it as a signal from its first step to its end.
    """
    # What the libraries say while they are imported (absent torchvision, absent kernels) concerns nothing here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    BEFORE_ERROR.clear()
    AT_END.clear()
    try:
        train(args)
    except UserError as error:
        for call in BEFORE_ERROR:
            call()
        print(redact(str(error)).replace("\n", " "), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    BEFORE_ERROR.clear()  # the last reference to what the run built
    for call in AT_END:
        call()
