"""The parts of a teacher other than the U-Net: noise schedule, VAE and text encoders. One class for each family.

A family turns a batch of samples into the U-Net's inputs, and builds a pipeline around a U-Net. It knows nothing about
training.
"""

from typing import Any

import diffusers
import torch
from accelerate import Accelerator

from lcm.models.loading import weight_dtype
from lcm.models.offload import OnDevice
from lcm.models.prompts import Conditioning, PromptEncoder, SDXLPromptEncoder
from lcm.models.schedule import load_noise_schedule
from lcm.models.unet import load_unet
from lcm.models.vae import encode_pixels, load_vae
from lcm.options.types import Options

PIXELS_AT_ONCE = 2**20  # that the VAE encodes, unless --vae_encode_batch_size says otherwise


def pictures_at_once(resolution: int) -> int:
    """How many pictures of this width and height have PIXELS_AT_ONCE, at least 1."""
    return max(1, PIXELS_AT_ONCE // resolution**2)


class Family:
    """The teacher of the options without its U-Net. Raises UserError for a model of another family.

    `noise_schedule` is a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type. `dtype` is the
    precision of frozen weights. A pipeline is called within `vae_on_device` and `encoders_on_device`, which hold its
    networks on the device although `--offload` keeps them elsewhere.
    """

    pipeline_class: type[diffusers.DiffusionPipeline]
    prompt_encoder_class: type[PromptEncoder] | type[SDXLPromptEncoder]

    def __init__(self, args: Options, accelerator: Accelerator):
        self.args = args
        self.dtype = weight_dtype(accelerator)
        self.noise_schedule = load_noise_schedule(args)
        self.encode_prompts = self.prompt_encoder_class(args, accelerator)
        self.vae = load_vae(args, accelerator, dtype=self.vae_dtype())
        encoders = [part for part in self.encode_prompts.components.values() if isinstance(part, torch.nn.Module)]
        self.vae_on_device = OnDevice("VAE", [self.vae], args.offload, accelerator.device)
        self.encoders_on_device = OnDevice("text encoders", encoders, args.offload, accelerator.device)

    def vae_dtype(self) -> torch.dtype:
        """The precision of the VAE."""
        return self.dtype

    def load_unet(self, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
        """The teacher's U-Net, on the CPU. Raises UserError, before its weights are read, if it does not fit."""
        return load_unet(self.args, self.encode_prompts, dtype)

    def latents(self, batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        """z_0 (B, C, h, w) float32: a scaled sample of the VAE's posterior for the batch's `pixels`."""
        size = self.args.vae_encode_batch_size or pictures_at_once(self.args.resolution)
        with self.vae_on_device:
            return encode_pixels(self.vae, batch["pixels"], size, generator)

    def conditions(self, batch: dict[str, Any]) -> tuple[Conditioning, Conditioning | None]:
        """(cond, uncond): the keyword arguments of the U-Net for the batch's captions, and for what guidance leads
        away from, which is None if nothing is guided."""
        with self.encoders_on_device:
            return self.encode_prompts(batch)

    def pipeline(
        self, unet: diffusers.UNet2DConditionModel, scheduler: diffusers.SchedulerMixin
    ) -> diffusers.DiffusionPipeline:
        """The diffusers pipeline of the family with a U-Net. It may change `scheduler`."""
        components = self.encode_prompts.components
        return self.pipeline_class(vae=self.vae, unet=unet, scheduler=scheduler, **components)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    pipeline_class = diffusers.StableDiffusionPipeline
    prompt_encoder_class = PromptEncoder


class SDXL(Family):
    """SDXL base and models of its layout."""

    pipeline_class = diffusers.StableDiffusionXLPipeline
    prompt_encoder_class = SDXLPromptEncoder

    def vae_dtype(self) -> torch.dtype:
        """float32 for SDXL's own VAE, which overflows in fp16. A given VAE is assumed to work in fp16."""
        replaced = self.args.pretrained_vae_model_name_or_path is not None
        return self.dtype if replaced else torch.float32
