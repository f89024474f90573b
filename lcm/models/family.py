"""What a teacher consists of but its U-Net: noise schedule, VAE, text encoders; one class a family of models.

A family turns a batch of samples into what its U-Net takes, and puts a U-Net into a pipeline. It knows nothing of
training.
"""

import diffusers
import torch

from lcm.models.loading import weight_dtype
from lcm.models.prompts import PromptEncoder, SDXLPromptEncoder
from lcm.models.schedule import load_noise_schedule
from lcm.models.unet import load_unet
from lcm.models.vae import encode_pixels, load_vae


class Family:
    """The teacher that the options name, without its U-Net. Raises UserError for one of another family.

    `noise_schedule` is a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type. `dtype` is the
    precision of frozen weights.
    """

    pipeline_class: type
    prompt_encoder_class: type

    def __init__(self, args, accelerator):
        self.args = args
        self.dtype = weight_dtype(accelerator)
        self.noise_schedule = load_noise_schedule(args)
        self.encode_prompts = self.prompt_encoder_class(args, accelerator)
        self.vae = load_vae(args, accelerator, dtype=self.vae_dtype())

    def vae_dtype(self):
        """The precision of the VAE."""
        return self.dtype

    def load_unet(self, dtype):
        """The teacher's U-Net, on the CPU. Raises UserError, before its weights are read, if it does not fit."""
        return load_unet(self.args, self.encode_prompts, dtype)

    def latents(self, batch, generator):
        """z_0 (B, C, h, w) float32: a scaled sample of the VAE's posterior for the batch's `pixels`."""
        return encode_pixels(self.vae, batch["pixels"], self.args.vae_encode_batch_size, generator)

    def conditions(self, batch):
        """(cond, uncond): the keyword arguments of the U-Net for the batch's captions, and for empty ones."""
        return self.encode_prompts(batch)

    def pipeline(self, unet, scheduler):
        """The family's diffusers pipeline around a U-Net. It may change `scheduler`."""
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

    def vae_dtype(self):
        """float32 for SDXL's own VAE, which overflows in fp16. One that replaces it is taken to be made for fp16."""
        replaced = self.args.pretrained_vae_model_name_or_path is not None
        return self.dtype if replaced else torch.float32
