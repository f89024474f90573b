"""Pictures that the teacher draws: what `make_shards.py --prompts` runs on one device."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from lcm.data.packing import RECORD
from lcm.data.writer import missing_shards, write_shard
from lcm.errors import UserError, first_line
from lcm.evaluation.candidates import load_teacher
from lcm.evaluation.sampling import picture_generator
from lcm.options.types import Options
from lcm.pictures.samplers import make_scheduler


def draw_shards(args: Options, record: dict[str, Any], may_change: set[str]) -> list[str]:
    """Draw the shards that the output folder lacks; the processes of a launch share them. Returns their paths.

    `record` says how they are drawn. Raises UserError if it has shards with other options.
    """
    digest = hashlib.sha256("\n".join(args.prompts).encode()).hexdigest()
    record = {**record, "prompts": f"{len(args.prompts)}, SHA-256 {digest}"}
    paths, mine = missing_shards(args.output_dir, RECORD, record, may_change, args.num_images, args.shard_size)
    state = PartialState()
    if mine:
        pipeline = load_teacher(args, state.device)
        pipeline.scheduler = make_scheduler(args.scheduler, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        total = sum(map(len, mine.values()))
        with tqdm(total=total, unit="picture", dynamic_ncols=True, disable=not state.is_main_process) as progress:
            for path, numbers in mine.items():
                write_shard(path, samples(pipeline, args, numbers, progress), args.picture_format)
    state.wait_for_everyone()
    return paths


def samples(
    pipeline: DiffusionPipeline, args: Options, numbers: range, progress: Any
) -> Iterator[tuple[str, Image.Image, str, dict[str, Any]]]:
    """Draw the pictures with these numbers; yield (key, picture, caption, entries of the JSON). Raises UserError."""
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
