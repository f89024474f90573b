"""Parsing, and the checks that concern several options or need the file system."""

import importlib.util
import os
import sys

from lcm.options.choices import ADAM, LR_SCHEDULES, LR_SHAPE, OPTIMIZERS, RUN_NAMES, TRACKERS
from lcm.options.config import expand
from lcm.options.files import existing_parent, find_checkpoint, read_prompts, repository_name
from lcm.options.shapes import AUTO, bucket_shapes
from lcm.options.types import Options, Parser, is_repository_name
from lcm.secrets import redact_arguments

# Options whose defaults an optimizer may replace.
OWN_DEFAULTS = ("learning_rate", "adam_beta2")
SOURCES = ("train_shards_path_or_url", "train_data_dir", "dataset_name")


def parse(parser: Parser, argv: list[str] | None = None) -> Options:
    """Parse and check; on a wrong option print one line that begins with its name, and exit with status 2."""
    args = parser.parse_args(argv, Options(**dict.fromkeys(OWN_DEFAULTS)))  # these are None if they are not given
    for name in OWN_DEFAULTS:
        if getattr(args, name) is None:
            own = OPTIMIZERS[optimizer_name(args)].defaults
            setattr(args, name, own.get(name, parser.get_default(name)))
    args.script = parser.prog
    args.command_line = redact_arguments(expand(parser, sys.argv[1:] if argv is None else argv))
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    args.left_at_default = {name for name, value in vars(args).items() if value == args.defaults[name]}

    def need(condition: object, option: str, message: str) -> None:
        if not condition:
            parser.error(f"{option}: {message}")

    need(importlib.util.find_spec("torch"), parser.prog,
         "the package torch is not installed; allowed: an environment with the packages of requirements.txt")
    sources = [f"--{name}" for name in SOURCES if getattr(args, name) is not None]
    need(sources, f"--{SOURCES[0]}", f"required, but not given; allowed: that, or --{' or --'.join(SOURCES[1:])}")
    need(len(sources) == 1, (sources or [""])[-1], f"given beside {(sources or [''])[0]}; allowed: one of the two")
    for name in ("dataset_config_name", "image_column", "caption_column"):
        unused = args.dataset_name is None and (name != "caption_column" or args.train_data_dir is None)
        need(not unused or name in args.left_at_default, f"--{name}",
             "given, but --dataset_name is not; allowed: both, or neither")
    need(args.dataset_name is None or importlib.util.find_spec("datasets"), "--dataset_name",
         "the package datasets is not installed")
    need(args.w_min <= args.w_max, "--w_min", f"{args.w_min:g} given; allowed: at most --w_max, {args.w_max:g}")
    need(args.w_max > 0 or args.teacher_negative_prompt is None, "--teacher_negative_prompt",
         f"{args.teacher_negative_prompt!r} given, but with --w_max 0 nothing is guided; allowed: one of the two")
    need(args.target == "phased" or args.num_phases is None, "--num_phases",
         f"given, but --target {args.target} has no phases; allowed with --target phased")
    if args.num_phases is None:
        args.num_phases = [4] if args.target == "phased" else []
    most_phases = max(args.num_phases, default=0)
    need(most_phases <= args.num_ddim_timesteps, "--num_phases",
         f"{most_phases} given; allowed: at most --num_ddim_timesteps, {args.num_ddim_timesteps}")
    if "unet_time_cond_proj_dim" in args and args.unet_time_cond_proj_dim is None and args.w_max > 0:
        args.unet_time_cond_proj_dim = 256
    need(args.resolution % 8 == 0, "--resolution", f"{args.resolution} given; allowed: multiples of 8")
    check_buckets(parser, args)
    need(args.max_train_steps or args.max_train_samples, "--max_train_steps",
         "not given; allowed: a number of steps, or --max_train_samples for the length of an epoch")
    for name, other in (("width_key", "height_key"), ("height_key", "width_key")):
        value = getattr(args, name)
        need(value is None or getattr(args, other) is not None, f"--{name}",
             f"{value!r} given without --{other}; allowed: both or neither")
    most = max(args.validation_num_inference_steps)
    need(most <= args.num_ddim_timesteps, "--validation_num_inference_steps",
         f"{most} given; allowed: at most --num_ddim_timesteps, {args.num_ddim_timesteps}")
    need(not args.use_8bit_adam or args.optimizer in ("adamw", "adamw8bit"), "--use_8bit_adam",
         f"given, but --optimizer is {args.optimizer}; allowed: one of the two")
    optimizer = OPTIMIZERS[optimizer_name(args)]
    package = optimizer.module.partition(".")[0]
    need(importlib.util.find_spec(package), "--use_8bit_adam" if args.use_8bit_adam else "--optimizer",
         f"the package {package} is not installed")
    shape = LR_SCHEDULES[args.lr_scheduler]
    for names, choice, has in ((ADAM, "optimizer", optimizer.options), (LR_SHAPE, "lr_scheduler", shape)):
        for name in names:
            need(name in has or name in args.left_at_default, f"--{name}",
                 f"given, but --{choice} {getattr(args, choice)} has none; allowed: one of the two")
    is_quantized = args.base_model_precision != "no_change"
    need(not is_quantized or importlib.util.find_spec("bitsandbytes"), "--base_model_precision",
         "the package bitsandbytes is not installed")
    need(not is_quantized or not args.offload or "lora_rank" in args, "--base_model_precision",
         f"{args.base_model_precision} given, but --offload moves the teacher; allowed: one of the two")
    need(args.report_to in ("all", "none") or any(map(importlib.util.find_spec, TRACKERS[args.report_to])),
         "--report_to", f"{args.report_to} given, but the package {args.report_to} is not installed")
    need(args.tracker_run_name is None or args.report_to in (*RUN_NAMES, "all"), "--tracker_run_name",
         f"given, but --report_to {args.report_to} has no names of runs; allowed with all, {', '.join(RUN_NAMES)}")
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
    args.freeze()
    return args


def check_buckets(parser: Parser, args: Options) -> None:
    """Exit with one line if the options of the shapes of pictures do not fit together."""
    if args.aspect_ratio_buckets != AUTO:
        for name in ("aspect_bucket_rounding", "resolution_type"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name}: given, but only --aspect_ratio_buckets auto makes shapes; allowed: both")
    if args.aspect_bucket_rounding % 8:
        parser.error(f"--aspect_bucket_rounding: {args.aspect_bucket_rounding} given; allowed: multiples of 8")
    if args.aspect_ratio_buckets == AUTO and args.resolution is not None and not bucket_shapes(args):
        parser.error(f"--aspect_bucket_rounding: {args.aspect_bucket_rounding} given; allowed: at most --resolution")


def optimizer_name(args: Options) -> str:
    """The name in `OPTIMIZERS` of the optimizer."""
    return "adamw8bit" if args.use_8bit_adam else args.optimizer


def target_in_words(args: Options) -> str:
    """`--target` with what belongs to it: lcm, phased (8, 4, 2, 1 phases)."""
    phases = f" ({', '.join(map(str, args.num_phases))} phases)" if args.num_phases else ""
    return f"{args.target}{phases}"


def student_sampler(args: Options) -> str:
    """The name in `SAMPLERS` of the sampler that fits what `--target` trains.

    A single phase, like LCM, always lands at the clean picture. Noise is then added again for the next step.
    """
    return "lcm" if args.target == "lcm" or args.num_phases[-1:] == [1] else "tcd"


def steps_in_words(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step{'s' * (count != 1)}"


def span(low: float, high: float) -> str:
    """`3 to 4`, or `3` if both are the same."""
    return f"{low:g} to {high:g}" if low < high else f"{low:g}"


def default_guidance_scale(args: Options) -> float:
    """A pipeline's guidance scale if none is given: 7.5, moved into the range of the training."""
    return min(max(7.5, args.w_min + 1), args.w_max + 1)
