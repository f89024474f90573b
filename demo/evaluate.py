"""Sample pictures of the demo world with any pipeline and measure them: accuracy, Frechet distance, seconds.

Prints one Markdown row per sampler, guidance scale and number of steps: the shares of pictures with the right things,
the right background and both, the Frechet distance to held-out pictures, and the seconds per picture. The Frechet
distance uses the demo's own classifier as its feature network, so it cannot be compared with published FIDs. It
ignores the captions: read it together with the accuracy.

    python demo/evaluate.py --pipeline demo/teacher --scheduler ddim --steps 50 8 4
    python demo/evaluate.py --pipeline demo/teacher --unet lcm-output/unet --scheduler lcm --steps 4 2 1
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from classifier import accuracy, features

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))

from lcm.evaluation import features as lcm_features  # noqa: E402
from lcm.evaluation import measures, sampling  # noqa: E402
from lcm.evaluation.candidates import find_sampler  # noqa: E402
from lcm.models.lora_files import DIFFUSERS_FILE  # noqa: E402
from lcm.options.choices import SAMPLERS  # noqa: E402
from lcm.pictures import samplers  # noqa: E402

HELDOUT = HERE / "shards" / "heldout-00000.tar"


def choose_captions(count: int, seed: int) -> list[str]:
    """Return `count` captions in random order, each of the 468 equally often up to rounding."""
    captions = world.all_captions()
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(1 + count // len(captions))])[:count]
    return [captions[i] for i in order]


def sample(
    pipe: Any, captions: list[str], num_inference_steps: int, guidance_scale: float, seed: int, batch_size: int = 100
) -> tuple[torch.Tensor, float]:
    """Sample one picture for each caption, from noise that depends on `seed` and its index in the list.

    Returns the pictures (N, 3, H, W), uint8, and the seconds per picture.
    """
    noise = sampling.starting_noise(pipe, len(captions), seed)
    between_steps = torch.Generator().manual_seed(seed + 1)
    return sampling.sample(pipe, captions, noise, num_inference_steps, guidance_scale, between_steps, batch_size)


@cache
def heldout_features() -> torch.Tensor:
    """Return the classifier's features (M, 64) of the held-out pictures."""
    batches = lcm_features.reference_pictures(str(HELDOUT), resolution=world.SIZE, limit=None, batch_size=500)
    return torch.cat([features(batch) for batch in batches])


def frechet_distance(images: torch.Tensor) -> float:
    """Return the Frechet distance of uint8 pictures (N, 3, 64, 64) to held-out ones, in the classifier's features."""
    return measures.frechet_distance(features(images), heldout_features())


def load_pipeline(folder: Path, unet: Path | None = None, sampler: str | None = None) -> Any:
    """Load a pipeline folder in float32, if given with another U-Net folder and with one of `SAMPLERS`."""
    import diffusers

    parts = {"unet": diffusers.UNet2DConditionModel.from_pretrained(unet)} if unet else {}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts).to(torch.float32)
    if sampler:
        pipe.scheduler = samplers.make_scheduler(sampler, pipe.scheduler)
    return pipe


def load_student(folder: Path) -> tuple[Any, str]:
    """Load what a training script wrote, as users do: the teacher with the new U-Net, or with the LoRA.

    Returns the pipeline and the name of its scheduler in `SAMPLERS`.
    """
    import diffusers

    if (folder / DIFFUSERS_FILE).exists():
        pipe = load_pipeline(HERE / "teacher")
        pipe.load_lora_weights(folder, weight_name=DIFFUSERS_FILE)
    else:
        pipe = load_pipeline(HERE / "teacher", unet=folder / "unet_target")
    sampler = find_sampler(str(folder), subfolder="scheduler", cache_dir=None)
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler][0]).from_pretrained(folder, subfolder="scheduler")
    return pipe, sampler


def measure(pipe: Any, captions: list[str], steps: int, guidance_scale: float, seed: int) -> dict[str, Any]:
    """Sample a picture for each caption and measure them.

    Returns a dict with steps, guidance, things, background, all right (shares in [0, 1]), distance, seconds (per
    picture) and pictures (N, 3, 64, 64), uint8.
    """
    pictures, seconds = sample(pipe, captions, steps, guidance_scale, seed)
    measured = {"steps": steps, "guidance": guidance_scale, **accuracy(pictures, captions)}
    return measured | {"distance": frechet_distance(pictures), "seconds": seconds, "pictures": pictures}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=HERE / "teacher", help="Pipeline folder.")
    parser.add_argument("--unet", type=Path, help="Folder of a U-Net to use in place of the pipeline's own.")
    parser.add_argument(
        "--scheduler", choices=SAMPLERS, nargs="+", default=[None], help="Default: the pipeline's own."
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="Numbers of inference steps, one row each.")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[3.0], help="Scales of guidance.")
    parser.add_argument("--num_images", type=int, default=500, help="Pictures per row.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of captions and noise.")
    args = parser.parse_args(argv)
    captions = choose_captions(args.num_images, args.seed)
    print("| sampler | guidance | steps | things % | background % | all right % | distance | seconds per picture |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for sampler, scale, steps in itertools.product(args.scheduler, args.guidance_scale, args.steps):
        row = measure(load_pipeline(args.pipeline, args.unet, sampler), captions, steps, scale, args.seed)
        shares = " | ".join(f"{100 * row[name]:.1f}" for name in ("things", "background", "all right"))
        about = f"{sampler or 'own'} | {scale:g} | {steps}"
        print(f"| {about} | {shares} | {row['distance']:.2f} | {row['seconds']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
