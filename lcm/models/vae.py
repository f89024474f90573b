"""The VAE, and the encoding of pictures to latents."""

from argparse import Namespace

import diffusers
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from lcm.errors import UserError
from lcm.models.loading import TEACHER, load_part
from lcm.models.unet import unet_config


def load_vae(args: Namespace, accelerator: Accelerator, dtype: torch.dtype) -> diffusers.AutoencoderKL:
    """The frozen VAE: the teacher's, or that of --pretrained_vae_model_name_or_path.

    Raises UserError if its latents do not fit the U-Net, or if it is not for RGB pictures.
    """
    path = args.pretrained_vae_model_name_or_path
    vae = load_part(diffusers.AutoencoderKL, args, None if path else "vae", path, dtype=dtype)
    expected, found = unet_config(args)["out_channels"], vae.config.latent_channels
    option = "--pretrained_vae_model_name_or_path" if path else TEACHER
    if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
        raise UserError(
            f"{option}: the VAE takes {vae.config.in_channels} channels and gives {vae.config.out_channels}; "
            "allowed: 3 and 3, for RGB pictures"
        )
    if expected != found:
        raise UserError(f"{option}: the VAE has latents of {found} channels; allowed: {expected}, as the U-Net has")
    return vae.requires_grad_(False).eval().to(accelerator.device)


def encode_pixels(vae: diffusers.AutoencoderKL, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The moments (B, 2C, h, w) of the VAE's posterior, mean and log-variance, of `pixels` (B, 3, H, W) in [-1, 1].

    Encodes `batch_size` pictures at once.
    """
    return torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.parameters for part in pixels.split(batch_size)])


def sample_latents(moments: torch.Tensor, scaling_factor: float, generator: torch.Generator) -> torch.Tensor:
    """z_0: a scaled sample (B, C, h, w), float32, of the posterior with these moments."""
    return DiagonalGaussianDistribution(moments).sample(generator).float() * scaling_factor
