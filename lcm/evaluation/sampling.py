"""Pictures from fixed noise.

They are (N, 3, H, W) uint8 tensors on the CPU, and belong to a list of N prompts.
"""

import time

import numpy as np
import torch


def starting_noise(pipeline, count, seed, resolution=None):
    """(count, C, h, w) float32 for pictures of `resolution` pixels a side, the U-Net's own size if that is None.

    The noise of picture i is a function of `seed` and i, whatever `count`, the batch size, the device and the dtype.
    """
    unet = pipeline.unet.config
    side = resolution // pipeline.vae_scale_factor if resolution else unet.sample_size
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(unet.in_channels, side, side, generator=generator) for _ in range(count)])


def picture_generators(count, seed):
    """A generator for each picture, a function of `seed` and its number, for noise between the steps."""
    states = (np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] for i in range(count))
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def synchronize(device):
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(pipeline, prompts, noise, num_inference_steps, guidance_scale, generator, batch_size, progress=None):
    """Draw one picture for each of N prompts, from its row of `noise` (N, C, h, w).

    `generator` is what samplers that add noise between the steps, as LCM's, draw from: one for all, or a list of one
    for each picture, which then does not depend on its batch. `progress`, a tqdm, is told of every batch.

    Returns the pictures, (N, 3, H, W) uint8, and the seconds an image: text encoder, U-Net and VAE in batches of
    `batch_size`, without a first batch of one step that warms up.
    """
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[-2:])
    pipeline.set_progress_bar_config(disable=True)

    def draw(chunk, steps, generator):
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
