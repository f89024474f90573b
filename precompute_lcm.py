"""Run the VAE and the text encoders over a data set once, so that trainings need neither.

accelerate launch precompute_lcm.py \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --output_dir=cached --mixed_precision=fp16

Writes a cached shard for each shard, output_dir/00000.tar, 00001.tar, ..., with latents and embeddings in place of
pictures. The training scripts take them as --train_shards_path_or_url, and know them by themselves. The same command
again writes what is missing. Several processes, as `accelerate config` has them, share the shards.
"""

import os
from collections.abc import Sequence

from lcm.errors import run
from lcm.options import groups
from lcm.options.checks import check_buckets
from lcm.options.choices import CACHE_DTYPES, PRECISIONS
from lcm.options.files import existing_parent
from lcm.options.shapes import bucket_shapes
from lcm.options.types import Options, integer, make_parser, text
from lcm.secrets import public_options

RECORD = "precompute_lcm.json"
# Options that may differ when a folder is completed: they do not change what is stored.
MAY_CHANGE = {
    "config", "output_dir", "batch_size", "vae_encode_batch_size", "decoding_threads", "cache_dir", "shard_timeout",
}  # fmt: skip
# Options of training that a Family asks for, and that have no part in this.
UNUSED = {
    "offload": False,
    "w_max": 0.0,
    "teacher_negative_prompt": None,
    "use_fix_crop_and_size": False,
    "num_ddim_timesteps": 1,
    "num_solver_steps": 1,
}


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """The checked options. Heavy imports come later, so that a wrong option is reported at once."""
    parser = make_parser(__doc__, __file__)
    groups.add_model_options(parser)
    group = parser.add_argument_group("data")
    groups.add_shards_option(group, required=True)
    groups.add_crop_options(group, resolution=None)
    groups.add_sample_options(group, max_watermark_probability=None)
    groups.add_timeout_option(group)
    add = parser.add_argument_group("what is stored").add_argument
    add("--output_dir", type=text, required=True, metavar="FOLDER", help="Where the cached shards are written.")
    add(
        "--crops_per_picture",
        type=integer(1, 1000),
        default=1,
        metavar="N",
        help="Crops of each picture; a training picks one at random. With --random_flip each is stored twice.",
    )
    add("--dtype", choices=CACHE_DTYPES, default="float16", help="Dtype of what is stored.")
    add("--keep_pictures", action="store_true", help="Store the original pictures too.")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="Seed of the places of the crops.")
    add = parser.add_argument_group("speed").add_argument
    add("--mixed_precision", choices=PRECISIONS, help="Precision of VAE and text encoders. If unset: accelerate's.")
    add("--batch_size", type=integer(1), default=16, metavar="PICTURES", help="Pictures and captions at once.")
    add(
        "--vae_encode_batch_size",
        type=integer(1),
        metavar="CROPS",
        help="Crops that the VAE encodes at once. If unset: as many as have 2^20 pixels.",
    )
    add("--decoding_threads", type=integer(1), default=4, metavar="N", help="Threads of a process for pictures.")

    args = parser.parse_args(argv, Options())
    if args.resolution is not None and args.resolution % 8:
        parser.error(f"--resolution: {args.resolution} given; allowed: multiples of 8")
    check_buckets(parser, args)
    for name, other in (("width_key", "height_key"), ("height_key", "width_key")):
        if getattr(args, name) is not None and getattr(args, other) is None:
            parser.error(f"--{name}: given without --{other}; allowed: both or neither")
    if args.crops_per_picture > 1 and args.center_crop:
        parser.error(f"--crops_per_picture: {args.crops_per_picture} given, but --center_crop leaves one place")
    existing = existing_parent(args.output_dir)
    if not os.path.isdir(existing):
        parser.error(f"--output_dir: {args.output_dir!r} given, but {existing!r} is a file; allowed: a folder")
    return args


def precompute(args: Options) -> None:
    """Write the cached shards that are missing. Raises UserError."""
    import diffusers
    from accelerate import Accelerator

    from lcm.data.config import DataConfig
    from lcm.data.shards import expand_shards
    from lcm.data.writer import brace_range, check_record, remove_unfinished, shard_path
    from lcm.models.family import SDXL, StableDiffusion
    from lcm.models.loading import load_config
    from lcm.precompute import Maker, summary
    from lcm.run.start import set_up_logs

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_up_logs(accelerator.is_main_process)
    kind = SDXL if "text_encoder_2" in load_config(diffusers.DiffusionPipeline, args) else StableDiffusion
    args.resolution = args.resolution or (1024 if kind is SDXL else 512)
    args.freeze()
    shards = expand_shards(args.train_shards_path_or_url)
    paths = [shard_path(args.output_dir, number) for number in range(len(shards))]
    if accelerator.is_main_process:
        record = {**public_options(args), "mixed_precision": accelerator.mixed_precision}
        check_record(args.output_dir, RECORD, record, MAY_CHANGE)
        remove_unfinished(args.output_dir)
    accelerator.wait_for_everyone()
    missing = [number for number, path in enumerate(paths) if not os.path.exists(path)]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    accelerator.print(f"{len(shards) - len(missing)} of {len(shards)} shards are there. Making {len(missing)}.")
    if mine:
        settings = {name: getattr(args, name) for name in DataConfig.__dataclass_fields__.keys() & vars(args).keys()}
        config = DataConfig(shards, buckets=bucket_shapes(args), **settings)
        maker = Maker(args, accelerator, kind(Options(**vars(args), **UNUSED), accelerator), config)
        if accelerator.is_main_process:
            maker.check_disk([shards[number] for number in missing])
        maker.make({number: paths[number] for number in mine})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"\n{summary(paths)} Train with:\n"
              f'--train_shards_path_or_url="{brace_range(args.output_dir, len(paths))}"')  # fmt: skip
    accelerator.end_training()


def main(argv: Sequence[str] | None = None) -> None:
    run(precompute, parse_args(argv), interrupted="Stopped. The same command again makes the shards that are missing.")


if __name__ == "__main__":
    main()
