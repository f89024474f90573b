"""Let the teacher draw the pictures to distil it with, from a file of prompts.

accelerate launch make_shards.py \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --prompts=prompts.txt --num_images=50000 --output_dir=shards --dtype=float16

Writes output_dir/00000.tar, 00001.tar, ... with pictures, captions and JSON, for --train_shards_path_or_url of the
training scripts, and output_dir/make_shards.json, which says how they were drawn. The same command again draws what is
missing. Several processes, as `accelerate config` has them, share the shards.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lcm.errors import UserError, first_line, run
from lcm.options.choices import PICTURE_FORMATS, SAMPLERS, STUDENT_SAMPLERS
from lcm.options.files import existing_parent, read_prompts
from lcm.options.groups import add_model_options
from lcm.options.types import Options, integer, make_parser, number, text
from lcm.secrets import public_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

RECORD = "make_shards.json"
# Options that may differ when a folder is completed: they do not change the pictures.
MAY_CHANGE = {"output_dir", "batch_size", "cache_dir"}


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """The checked options. Heavy imports come later, so that a wrong option is reported at once."""
    parser = make_parser(__doc__, __file__)
    add_model_options(parser)
    add = parser.add_argument_group("what is drawn").add_argument
    add("--variant", type=text, metavar="NAME", help="Variant of the teacher's weight files, such as fp16.")
    add(
        "--prompts",
        nargs="+",
        required=True,
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
    add = parser.add_argument_group("shards").add_argument
    add("--output_dir", type=text, required=True, metavar="FOLDER", help="Where the shards are written.")
    add(
        "--shard_size",
        type=integer(1, 100_000),
        default=1000,
        metavar="PICTURES",
        help="Pictures a shard. If the run is stopped, those of unfinished shards are lost.",
    )
    add(
        "--picture_format",
        choices=PICTURE_FORMATS,
        default="jpg",
        help="Format of the pictures: jpg and webp at quality 95, or png without loss.",
    )

    args = parser.parse_args(argv, Options())
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
    """Draw the shards that are missing. Raises UserError."""
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from lcm.data.writer import brace_range, check_record, remove_unfinished, write_shard
    from lcm.evaluation.candidates import load_teacher
    from lcm.pictures.samplers import make_scheduler

    state = PartialState()
    if state.is_main_process:
        check_record(args, RECORD, record(args), MAY_CHANGE)
        remove_unfinished(args.output_dir)
    state.wait_for_everyone()
    shards = [range(first, min(first + args.shard_size, args.num_images))
              for first in range(0, args.num_images, args.shard_size)]  # fmt: skip
    paths = [os.path.join(args.output_dir, f"{number:05d}.tar") for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not os.path.exists(path)]
    mine = missing[state.process_index :: state.num_processes]
    state.print(f"{len(shards) - len(missing)} of {len(shards)} shards are there. Drawing {len(missing)}.")
    if mine:
        pipeline = load_teacher(args, state.device)
        pipeline.scheduler = make_scheduler(args.scheduler, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        total = sum(len(shards[number]) for number in mine)
        with tqdm(total=total, unit="picture", dynamic_ncols=True, disable=not state.is_main_process) as progress:
            for number in mine:
                write_shard(paths[number], samples(pipeline, args, shards[number], progress), args.picture_format)
    state.wait_for_everyone()
    if state.is_main_process:
        size = sum(map(os.path.getsize, paths)) / 1e6
        print(f"\n{args.num_images} pictures, {size:.1f} MB. Train with:\n"
              f'--train_shards_path_or_url="{brace_range(args.output_dir, len(shards))}"')  # fmt: skip
    state.destroy_process_group()


def record(args: Options) -> dict[str, Any]:
    """What the folder says of its shards."""
    digest = hashlib.sha256("\n".join(args.prompts).encode()).hexdigest()
    return {**public_options(args), "prompts": f"{len(args.prompts)}, SHA-256 {digest}"}


def samples(
    pipeline: "DiffusionPipeline", args: Options, numbers: range, progress: Any
) -> "Iterator[tuple[str, Image.Image, str, dict[str, Any]]]":
    """Draw the pictures with these numbers; yield (key, picture, caption, entries of the JSON). Raises UserError."""
    import torch

    from lcm.evaluation.sampling import picture_generator

    for first in range(numbers.start, numbers.stop, args.batch_size):
        batch = range(first, min(first + args.batch_size, numbers.stop))
        prompts = [args.prompts[i % len(args.prompts)] for i in batch]
        negative = args.negative_prompt and [args.negative_prompt] * len(prompts)
        try:
            pictures = pipeline(
                prompts,
                negative_prompt=negative,
                width=args.resolution,
                height=args.resolution,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[picture_generator(args.seed, i) for i in batch],
            ).images
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch_size: {args.batch_size} given, but {first_line(error)}") from error
        for i, picture, prompt in zip(batch, pictures, prompts, strict=True):
            yield f"{i:09d}", picture, prompt, {"seed": args.seed, "number": i}
            progress.update()


def main(argv: Sequence[str] | None = None) -> None:
    run(
        make_shards, parse_args(argv), interrupted="Stopped. The same command again draws the shards that are missing."
    )


if __name__ == "__main__":
    main()
