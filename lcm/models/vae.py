"""The VAE, and pictures to latents."""

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from lcm.errors import UserError
from lcm.models.loading import OPTION, load_part
from lcm.models.unet import unet_config


def load_vae(args, accelerator, dtype):
    """The VAE, frozen: the teacher's, or the one given in its place.

    Raises UserError if its latents do not fit, or if it is not for pictures in RGB.
    """
    path = args.pretrained_vae_model_name_or_path
    vae = load_part(diffusers.AutoencoderKL, args, None if path else "vae", path, dtype=dtype)
    expected, found = unet_config(args)["out_channels"], vae.config.latent_channels
    option = "--pretrained_vae_model_name_or_path" if path else OPTION
    if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
        raise UserError(
            f"{option}: the VAE takes {vae.config.in_channels} channels and gives {vae.config.out_channels}; "
            "allowed: 3 and 3, as pictures have"
        )
    if expected != found:
        raise UserError(f"{option}: the VAE has latents of {found} channels; allowed: {expected}, as the U-Net has")
    return vae.requires_grad_(False).eval().to(accelerator.device)


def encode_pixels(vae, pixels, batch_size, generator):
    """z_0: a scaled sample of the VAE's posterior. `pixels` (B, 3, H, W) in [-1, 1]; returns (B, C, h, w) float32.

    `batch_size` pictures are encoded at once. The noise is drawn for all B together, so that it does not depend on it.
    """
    moments = [vae.encode(part.to(vae.dtype)).latent_dist.parameters for part in pixels.split(batch_size)]
    return DiagonalGaussianDistribution(torch.cat(moments)).sample(generator).float() * vae.config.scaling_factor
