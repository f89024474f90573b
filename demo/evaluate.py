"""Sample pictures of the demo world with any pipeline and measure them: accuracy, Frechet distance, seconds.

One Markdown row per number of steps: do the pictures show the digit, the colour and everything that the caption asked
for, how far are they from held-out pictures, and what does one cost. The Frechet distance uses the demo's own
classifier as its feature network, so it compares with itself only, never with published FIDs. It does not see the
captions: read it beside the accuracy.

    python demo/evaluate.py --pipeline demo/teacher --scheduler ddim --steps 50 8 4
    python demo/evaluate.py --pipeline demo/teacher --unet lcm-output/unet --scheduler lcm --steps 4 2 1
"""

import argparse
import io
import tarfile
import time
from pathlib import Path

import digits
import numpy as np
import torch
from classifier import FEATURES, load_classifier
from PIL import Image

HELDOUT = Path(__file__).parent / "shards" / "heldout-00000.tar"
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "leading"}),
    "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "dpm++-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "unipc-trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "lcm": ("LCMScheduler", {}),
}


def choose_captions(count, seed):
    """Return `count` captions in random order, each of the 100 equally often up to rounding."""
    captions = digits.all_captions()
    order = np.random.default_rng(seed).permutation(count)
    return [captions[i % len(captions)] for i in order]


def load_heldout(path=HELDOUT):
    """Return the held-out pictures (N, 3, 32, 32), uint8, and their captions."""
    images, captions = [], []
    with tarfile.open(path) as shard:
        for member in shard:
            data = shard.extractfile(member).read()
            if member.name.endswith(".png"):
                images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            else:
                captions.append(data.decode())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions


def sample(pipe, captions, num_inference_steps, guidance_scale, seed, batch_size=100):
    """Sample one picture for each caption.

    Every picture starts from noise that depends on `seed` and its place in the list alone, so that two pipelines, or
    two numbers of steps, can be compared picture by picture.

    Returns the pictures (N, 3, H, W), uint8, and the seconds per picture.
    """
    pipe.set_progress_bar_config(disable=True)
    unet = pipe.unet.config
    shape = (len(captions), unet.in_channels, unet.sample_size, unet.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    renoise = torch.Generator().manual_seed(seed + 1)  # drawn from by samplers that add noise between steps, as LCM's
    images, start = [], time.perf_counter()
    for first in range(0, len(captions), batch_size):
        chunk = slice(first, first + batch_size)
        pixels = pipe(
            prompt=captions[chunk],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise[chunk].to(pipe.device, pipe.unet.dtype),
            generator=renoise,
            output_type="pt",
        ).images
        images.append((pixels.float() * 255).round().to(torch.uint8).cpu())
    return torch.cat(images), (time.perf_counter() - start) / len(captions)


def accuracy(images, captions):
    """Return the shares in [0, 1] of uint8 pictures that show the digit, the colour, and all that was asked for.

    The last is stricter than the first two: digit, colour and background are right in the same picture.
    """
    asked = torch.tensor([digits.parse_caption(text) for text in captions])
    right = load_classifier().read(images) == asked
    return right[:, 0].double().mean().item(), right[:, 1].double().mean().item(), right.all(1).double().mean().item()


class FeatureNetwork(torch.nn.Module):
    """The classifier's features of uint8 pictures, in the form that torchmetrics wants them."""

    num_features = FEATURES

    def __init__(self):
        super().__init__()
        self.classifier = load_classifier()

    def forward(self, images):
        return self.classifier.features(images.float() / 127.5 - 1)


def frechet_distance(images, real_images):
    """Return the Frechet distance between two sets of uint8 pictures (N, 3, 32, 32) in the classifier's features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=FeatureNetwork())
    metric.update(real_images, real=True)
    metric.update(images, real=False)
    return metric.compute().item()


def load_pipeline(folder, unet=None, scheduler=None):
    """Load a pipeline folder in float32, with another U-Net folder or one of `SCHEDULERS` if asked for."""
    import diffusers

    parts = {"unet": diffusers.UNet2DConditionModel.from_pretrained(unet)} if unet else {}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts).to(torch.float32)
    if scheduler:
        name, options = SCHEDULERS[scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parent / "teacher", help="Pipeline folder.")
    parser.add_argument("--unet", type=Path, help="Folder of a U-Net to use in place of the pipeline's own.")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="Sampler; default: the pipeline's own.")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="Numbers of inference steps, one row each.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--num_images", type=int, default=500, help="Pictures per row.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of captions and noise.")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.pipeline, args.unet, args.scheduler)
    captions = choose_captions(args.num_images, args.seed)
    real_images, _ = load_heldout()
    print("| sampler | guidance | steps | digit % | colour % | all % | Frechet distance | seconds per picture |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for steps in args.steps:
        images, seconds = sample(pipe, captions, steps, args.guidance_scale, args.seed)
        digit, colour, right = accuracy(images, captions)
        distance = frechet_distance(images, real_images)
        measured = f"{100 * digit:.1f} | {100 * colour:.1f} | {100 * right:.1f} | {distance:.1f} | {seconds:.4f}"
        print(f"| {args.scheduler or 'own'} | {args.guidance_scale:g} | {steps} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
