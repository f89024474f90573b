"""Sample pictures of the demo world with any pipeline and measure them: accuracy, Frechet distance, seconds.

Prints one Markdown row per number of steps: the shares of pictures with the right digit, colour and everything, the
Frechet distance to held-out pictures, and the seconds per picture. The Frechet distance uses the demo's own classifier
as its feature network, so it cannot be compared with published FIDs. It ignores the captions: read it together with
the accuracy.

    python demo/evaluate.py --pipeline demo/teacher --scheduler ddim --steps 50 8 4
    python demo/evaluate.py --pipeline demo/teacher --unet lcm-output/unet --scheduler lcm --steps 4 2 1
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import digits
import numpy as np
import torch
from classifier import accuracy, features

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))

from lcm.evaluation import features as lcm_features  # noqa: E402
from lcm.evaluation import measures, sampling  # noqa: E402
from lcm.options.choices import SAMPLERS  # noqa: E402
from lcm.pictures import samplers  # noqa: E402

HELDOUT = HERE / "shards" / "heldout-00000.tar"


def choose_captions(count: int, seed: int) -> list[str]:
    """Return `count` captions in random order, each of the 100 equally often up to rounding."""
    captions = digits.all_captions()
    order = np.random.default_rng(seed).permutation(count)
    return [captions[i % len(captions)] for i in order]


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
    batches = lcm_features.reference_pictures(str(HELDOUT), resolution=digits.SIZE, limit=None, batch_size=500)
    return torch.cat([features(batch) for batch in batches])


def frechet_distance(images: torch.Tensor) -> float:
    """Return the Frechet distance of uint8 pictures (N, 3, 32, 32) to held-out ones, in the classifier's features."""
    return measures.frechet_distance(features(images), heldout_features())


def load_pipeline(folder: Path, unet: Path | None = None, sampler: str | None = None) -> Any:
    """Load a pipeline folder in float32, if given with another U-Net folder and with one of `SAMPLERS`."""
    import diffusers

    parts = {"unet": diffusers.UNet2DConditionModel.from_pretrained(unet)} if unet else {}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts).to(torch.float32)
    if sampler:
        pipe.scheduler = samplers.make_scheduler(sampler, pipe.scheduler)
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=HERE / "teacher", help="Pipeline folder.")
    parser.add_argument("--unet", type=Path, help="Folder of a U-Net to use in place of the pipeline's own.")
    parser.add_argument("--scheduler", choices=SAMPLERS, help="Sampler; default: the pipeline's own.")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="Numbers of inference steps, one row each.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--num_images", type=int, default=500, help="Pictures per row.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of captions and noise.")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.pipeline, args.unet, args.scheduler)
    captions = choose_captions(args.num_images, args.seed)
    print("| sampler | guidance | steps | digit % | colour % | all % | Frechet distance | seconds per picture |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for steps in args.steps:
        images, seconds = sample(pipe, captions, steps, args.guidance_scale, args.seed)
        digit, colour, right = accuracy(images, captions).values()
        distance = frechet_distance(images)
        measured = f"{100 * digit:.1f} | {100 * colour:.1f} | {100 * right:.1f} | {distance:.1f} | {seconds:.4f}"
        print(f"| {args.scheduler or 'own'} | {args.guidance_scale:g} | {steps} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
