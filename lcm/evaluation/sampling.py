"""Pictures from fixed noise.

They are (N, 3, H, W) uint8 tensors on the CPU, one for each of N prompts.
"""

import time
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline


def starting_noise(pipeline: DiffusionPipeline, count: int, seed: int, resolution: int | None = None) -> torch.Tensor:
    """(count, C, h, w) float32 for pictures of `resolution` pixels a side; None means the U-Net's own size.

    The noise of picture i depends on `seed` and i only, not on `count`, the batch size, the device or the dtype.
    """
    unet = pipeline.unet.config
    side = resolution // pipeline.vae_scale_factor if resolution else unet.sample_size
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(unet.in_channels, side, side, generator=generator) for _ in range(count)])


def picture_generator(seed: int, number: int) -> torch.Generator:
    """A generator for one picture. It depends on `seed` and the picture's number only."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def picture_generators(count: int, seed: int) -> list[torch.Generator]:
    """The generators of the noise between the steps, one for each of `count` pictures."""
    return [picture_generator(seed, i) for i in range(count)]


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    noise: torch.Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator | list[torch.Generator],
    batch_size: int,
    progress: Any = None,
) -> tuple[torch.Tensor, float]:
    """Draw one picture for each of N prompts, from its row of `noise` (N, C, h, w).

    `generator` is for samplers that add noise between the steps, like LCM's: one for all pictures, or a list with one
    for each, so that a picture does not depend on its batch. `progress` is a tqdm that counts the pictures.

    Returns the pictures, (N, 3, H, W) uint8, and the seconds per picture: text encoder, U-Net and VAE in batches of
    `batch_size`, without the warm-up, which is one batch of one step.
    """
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[-2:])
    pipeline.set_progress_bar_config(disable=True)

    def draw(chunk: slice, steps: int, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
        return pipeline(
            prompt=prompts[chunk],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=noise[chunk].to(pipeline.device, pipeline.unet.dtype),
            generator=generator,
            output_type="pt",
        ).images

    draw(slice(batch_size), 1, torch.Generator())
    synchronize(pipeline.device)
    images, start = [], time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        pixels = draw(chunk, num_inference_steps, generator[chunk] if isinstance(generator, list) else generator)
        images.append((pixels.float() * 255).round().to(torch.uint8).cpu())
        if progress is not None:
            progress.update(len(pixels))
    synchronize(pipeline.device)
    return torch.cat(images), (time.perf_counter() - start) / len(prompts)
