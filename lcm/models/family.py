"""The parts of a teacher other than the U-Net: noise schedule, VAE and text encoders. One class for each family.

A family turns a batch of samples into the U-Net's inputs, and builds a pipeline around a U-Net. It knows nothing about
training.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from accelerate import Accelerator

from lcm.cache import BUCKETS, FORMAT, Cache, Origin, content_hash
from lcm.models.loading import weight_dtype, weight_files
from lcm.models.offload import OnDevice
from lcm.models.prompts import Conditioning, PromptEncoder, SDXLPromptEncoder
from lcm.models.schedule import load_noise_schedule
from lcm.models.unet import load_unet
from lcm.models.vae import encode_pixels, load_vae, sample_latents
from lcm.options.shapes import as_text, bucket_shapes
from lcm.options.types import Options

# Options that decide what is in a cached sample.
CACHED_OPTIONS = (
    "resolution",
    "center_crop",
    "random_flip",
    "interpolation_type",
    "caption_key",
    "width_key",
    "height_key",
)
PIXELS_AT_ONCE = 2**20  # that the VAE encodes, unless --vae_encode_batch_size says otherwise


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of this size have PIXELS_AT_ONCE, at least 1."""
    return max(1, PIXELS_AT_ONCE // (height * width))


class Family:
    """The teacher of the options without its U-Net. Raises UserError for a model of another family.

    `noise_schedule` is a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type. `dtype` is the
    precision of frozen weights. A pipeline is called within `loaded`, `vae_on_device` and `encoders_on_device`: else
    VAE and text encoders are absent if samples come from a `cache`, and elsewhere with `--offload`.
    """

    pipeline_class: type[diffusers.DiffusionPipeline]
    prompt_encoder_class: type[PromptEncoder] | type[SDXLPromptEncoder]

    def __init__(self, args: Options, accelerator: Accelerator, cache: Cache | None = None):
        self.args, self.accelerator, self.cache = args, accelerator, cache
        self.dtype = weight_dtype(accelerator)
        self.noise_schedule = load_noise_schedule(args)
        if cache:
            cache.check(self.origin())
        self.encode_prompts = self.prompt_encoder_class(args, accelerator, cache)
        self.vae: Any = None
        if cache:
            self.scaling_factor = float(cache.origin["scaling_factor"])
        else:
            self.vae = load_vae(args, accelerator, dtype=self.vae_dtype())
            self.scaling_factor = self.vae.config.scaling_factor
        vae, encoders = [self.vae] if self.vae else [], self.encode_prompts.encoders()
        self.vae_on_device = OnDevice("VAE", vae, args.offload and bool(vae), accelerator.device)
        self.encoders_on_device = OnDevice(
            "text encoders", encoders, args.offload and bool(encoders), accelerator.device
        )

    def origin(self) -> Origin:
        """What a cache must have been made of to be used with this model and these options."""
        path = self.args.pretrained_vae_model_name_or_path
        encoders = [file for part in self.prompt_encoder_class.parts for file in weight_files(self.args, part)]
        return {
            "format": FORMAT,
            "family": type(self).__name__,
            "vae": content_hash(weight_files(self.args, None if path else "vae", path)),
            "text_encoders": content_hash(encoders),
            **{name: str(getattr(self.args, name)) for name in CACHED_OPTIONS},
            **({BUCKETS: as_text(bucket_shapes(self.args))} if self.args.aspect_ratio_buckets else {}),
        }

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Within it, VAE and text encoders are there. With a cache, they are loaded for it, and freed after it."""
        with self.encode_prompts.loaded():
            if self.vae:
                yield
                return
            self.vae = load_vae(self.args, self.accelerator, dtype=self.vae_dtype())
            try:
                yield
            finally:
                self.vae = None

    def vae_dtype(self) -> torch.dtype:
        """The precision of the VAE."""
        return self.dtype

    def load_unet(self, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
        """The teacher's U-Net, on the CPU. Raises UserError, before its weights are read, if it does not fit."""
        return load_unet(self.args, self.encode_prompts, dtype)

    def latents(self, batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        """z_0 (B, C, h, w) float32: a scaled sample of the VAE's posterior for the batch's `pixels`, or of the cached
        one."""
        moments = batch["moments"].to(self.vae_dtype()) if self.cache else self.moments(batch["pixels"])
        return sample_latents(moments, self.scaling_factor, generator)

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """The moments (B, 2C, h, w) of the VAE's posterior for pixels (B, 3, H, W) in [-1, 1]."""
        size = self.args.vae_encode_batch_size or pictures_at_once(*pixels.shape[-2:])
        with self.vae_on_device:
            return encode_pixels(self.vae, pixels, size)

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
