"""Make shards for a training: from your own pictures, from a data set, or from prompts that the teacher draws.

accelerate launch make_shards.py --train_data_dir=path/to/pictures --output_dir=shards
accelerate launch make_shards.py --dataset_name=path/or/name --caption_column=text --output_dir=shards
accelerate launch make_shards.py --prompts=prompts.txt --num_images=50000 --output_dir=shards \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5

Writes output_dir/00000.tar, 00001.tar, ... with pictures, captions and JSON, for --train_shards_path_or_url of the
training scripts, and output_dir/make_shards.json, which says how they were made. The same command again makes what is
missing. Several processes, as `accelerate config` has them, share the shards.
"""

import os
from collections.abc import Sequence

from lcm.errors import run
from lcm.options.choices import PICTURE_FORMATS, SAMPLERS, STUDENT_SAMPLERS
from lcm.options.files import existing_parent, read_prompts
from lcm.options.groups import add_model_options, add_picture_options
from lcm.options.types import Options, integer, make_parser, number, text
from lcm.secrets import public_options

# Options that may differ when a folder is completed: they do not change what is drawn.
MAY_CHANGE = {"config", "output_dir", "batch_size", "cache_dir"}
SOURCES = ("train_data_dir", "dataset_name", "prompts")
PICTURES = ("train_data_dir", "dataset_name", "dataset_config_name", "image_column", "caption_column", "streaming",
            "max_shorter_side")  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """The checked options. Heavy imports come later, so that a wrong option is reported at once."""
    parser = make_parser(__doc__, __file__)
    add_picture_options(parser.add_argument_group("data"))
    models = add_model_options(parser, required=False)
    group = parser.add_argument_group("pictures that the teacher draws")
    add = group.add_argument
    add("--variant", type=text, metavar="NAME", help="Variant of the teacher's weight files, such as fp16.")
    add(
        "--prompts",
        nargs="+",
        metavar="PROMPT_OR_FILE",
        help="Prompts, or a text file with one prompt in each line. They become the captions.",
    )
    add(
        "--num_images",
        type=integer(1),
        metavar="N",
        help="Number of pictures; the prompts are repeated in order, each time with other noise. If unset: one each.",
    )
    add("--num_inference_steps", type=integer(1, 1000), default=25, metavar="STEPS", help="Steps of the sampler.")
    add("--guidance_scale", type=number(1), default=7.5, metavar="SCALE", help="A pipeline's guidance_scale.")
    add("--negative_prompt", type=text, metavar="PROMPT", help="What not to draw.")
    add(
        "--scheduler",
        choices=[*(name for name in SAMPLERS if name not in STUDENT_SAMPLERS), "own"],
        default="dpm++",
        help="The sampler; `own` is that of the teacher's scheduler/.",
    )
    add(
        "--resolution",
        type=integer(8),
        metavar="PIXELS",
        help="Width and height of the pictures. If unset: the size of the teacher's U-Net.",
    )
    add(
        "--seed",
        type=integer(0, 2**32 - 1),
        default=0,
        help="Seed of the noise. The noise of a picture depends only on the seed and the picture's number.",
    )
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Dtype of all networks. If unset: float16 on a GPU, else float32.",
    )
    add("--batch_size", type=integer(1), default=8, metavar="PICTURES", help="Pictures that are drawn at once.")
    drawing = [action.dest for action in group._group_actions]
    add = parser.add_argument_group("shards").add_argument
    add("--output_dir", type=text, required=True, metavar="FOLDER", help="Where the shards are written.")
    add(
        "--streaming",
        action="store_true",
        help="Read a data set while the shards are written, instead of downloading and storing all of it first.",
    )
    add(
        "--shard_size",
        type=integer(1, 100_000),
        default=1000,
        metavar="PICTURES",
        help="Pictures a shard. If the run is stopped, those of unfinished shards are lost.",
    )
    add(
        "--max_shorter_side",
        type=integer(8),
        metavar="PIXELS",
        help="Pictures whose shorter side is longer are made this small. The JSON has their original size. If unset, "
        "pictures are copied as they are.",
    )
    add(
        "--picture_format",
        choices=PICTURE_FORMATS,
        default="jpg",
        help="Format of pictures that are not copied: jpg and webp at quality 95, or png without loss.",
    )

    args = parser.parse_args(argv, Options())
    given = [name for name in SOURCES if getattr(args, name) is not None]
    if len(given) != 1:
        allowed = "one of " + ", ".join(f"--{name}" for name in SOURCES)
        parser.error(
            f"--{given[1] if given else SOURCES[0]}: {len(given)} sources of pictures given; allowed: {allowed}"
        )
    drawing += [action.dest for action in models._group_actions if action.dest != "config"]
    for name in PICTURES if args.prompts else drawing:
        is_used = name in given or (name == "cache_dir" and args.dataset_name is not None)
        if not is_used and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: given, but it has no effect with --{given[0]}")
    if args.streaming and args.dataset_name is None:
        parser.error(f"--streaming: given, but it has no effect with --{given[0]}")
    if args.prompts:
        if args.pretrained_teacher_model is None:
            parser.error("--pretrained_teacher_model: required with --prompts, but not given")
        args.prompts = read_prompts(parser, "--prompts", args.prompts)
        args.num_images = args.num_images or len(args.prompts)
    existing = existing_parent(args.output_dir)
    if not os.path.isdir(existing):
        parser.error(f"--output_dir: {args.output_dir!r} given, but {existing!r} is a file; allowed: a folder")
    if args.resolution is not None and args.resolution % 8:
        parser.error(f"--resolution: {args.resolution} given; allowed: multiples of 8")
    args.freeze()
    return args


def make_shards(args: Options) -> None:
    """Make the shards that are missing. Raises UserError."""
    from accelerate import PartialState

    from lcm.data.packing import Packing, advise_shapes, make_shards, open_source, sizes_of
    from lcm.data.writer import brace_range, read_counts
    from lcm.run.start import set_up_logs

    state = PartialState()
    set_up_logs(state.is_main_process)
    if args.prompts:
        from lcm.drawing import draw_shards

        record = {name: value for name, value in public_options(args).items() if name not in PICTURES}
        paths = draw_shards(args, record, MAY_CHANGE)
        found, advice = f"{args.num_images} pictures", ""
    else:
        packing = Packing(args.shard_size, args.max_shorter_side, args.picture_format)
        paths = make_shards(open_source(args), args.output_dir, packing)
        found, advice = str(read_counts(paths)), advise_shapes(sizes_of(paths))
    if state.is_main_process:
        size = sum(map(os.path.getsize, paths)) / 1e6
        print(f"\n{found}. {size:.1f} MB. Train with:\n"
              f'--train_shards_path_or_url="{brace_range(args.output_dir, len(paths))}"')  # fmt: skip
        if advice:
            print(f"Squares would crop much of them. These shapes crop less:\n{advice}")
    state.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    run(
        make_shards, parse_args(argv), interrupted="Stopped. The same command again makes the shards that are missing."
    )


if __name__ == "__main__":
    main()
