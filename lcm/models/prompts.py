"""Text encoders that turn captions into U-Net keyword arguments.

A conditioning is a dict of U-Net keyword arguments, so that a training loop need not know what is in it:
`encoder_hidden_states` (B, tokens, D), and for SDXL `added_cond_kwargs` = {"text_embeds": (B, P), "time_ids": (B, 6)}.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator

from lcm.errors import UserError
from lcm.models.loading import TEACHER, load_config, load_part, weight_dtype
from lcm_common import apply_guidance

Conditioning = dict[str, Any]  # U-Net keyword arguments

# Entries of the config of a U-Net without class labels and without projected hidden states.
NO_OTHER_INPUTS = {"class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None}


def load_tokenizer(args: Namespace, subfolder: str) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer. Raises UserError if its vocabulary is incomplete."""
    tokenizer = load_part(transformers.CLIPTokenizer, args, subfolder)
    if len(tokenizer) < 512:  # CLIP's has each byte twice; if files are missing, transformers makes a tiny one
        raise UserError(
            f"{TEACHER}: cannot load {args.pretrained_teacher_model!r}, part {subfolder!r}: its vocabulary has "
            f"{len(tokenizer)} entries; are its files complete?"
        )
    return tokenizer


def load_text_encoder(
    loader: Any, args: Namespace, accelerator: Accelerator, subfolder: str, tokenizer: transformers.CLIPTokenizer
) -> Any:
    """A frozen text encoder. Raises UserError if it does not fit its tokenizer."""
    encoder = load_part(loader, args, subfolder, dtype=weight_dtype(accelerator))
    for what, given, most in (
        ("model_max_length", tokenizer.model_max_length, encoder.config.max_position_embeddings),
        ("vocabulary", len(tokenizer), encoder.config.vocab_size),
    ):
        if not 2 < given <= most:  # a start token, at least one of the caption, an end token
            raise UserError(
                f"{TEACHER}: part {subfolder!r} of {args.pretrained_teacher_model!r} does not fit its tokenizer: the "
                f"tokenizer's {what} is {given}; allowed: 3 to {most}"
            )
    return encoder.requires_grad_(False).eval().to(accelerator.device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on `device`, without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def tokenize(tokenizer: transformers.CLIPTokenizer, captions: list[str]) -> transformers.BatchEncoding:
    """`input_ids` and `attention_mask`, (B, tokens), padded or cut to `model_max_length` as in diffusers."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


class PromptEncoder:
    """Captions to U-Net keyword arguments, with the one CLIP text encoder of SD 1.x and 2.x.

    `components` has the keyword arguments of `StableDiffusionPipeline` for the encoder.
    """

    layout = "Stable Diffusion 1.x or 2.x"

    def __init__(self, args: Namespace, accelerator: Accelerator):
        self.tokenizer = load_tokenizer(args, "tokenizer")
        loader = transformers.CLIPTextModel
        self.text_encoder = load_text_encoder(loader, args, accelerator, "text_encoder", self.tokenizer)
        self.components = {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        self.unconditional = self.encode([args.teacher_negative_prompt or ""]) if args.w_max > 0 else None

    def unet_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The entries that a U-Net's `config` must have to take this conditioning."""
        return {
            **NO_OTHER_INPUTS,
            "addition_embed_type": None,
            "cross_attention_dim": self.text_encoder.config.hidden_size,
        }

    @torch.no_grad()
    def encode(self, captions: list[str]) -> torch.Tensor:
        """Hidden states (B, tokens, D) of B strings, as in `StableDiffusionPipeline.encode_prompt`."""
        inputs, device = tokenize(self.tokenizer, captions), self.text_encoder.device
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = send(inputs.attention_mask, device) if uses_mask else None
        return self.text_encoder(send(inputs.input_ids, device), attention_mask=mask)[0]

    def __call__(self, batch: dict[str, Any]) -> tuple[Conditioning, Conditioning | None]:
        """(cond, uncond) for a batch of B samples: two dicts of U-Net keyword arguments.

        `uncond` is for what guidance leads away from; None if `--w_max` is 0, so that nothing is guided.
        """
        cond = {"encoder_hidden_states": self.encode(batch["captions"])}
        if self.unconditional is None:
            return cond, None
        return cond, {"encoder_hidden_states": self.unconditional.expand_as(cond["encoder_hidden_states"])}


class SDXLPromptEncoder:
    """Captions, sizes and crops to U-Net keyword arguments, with the two CLIP text encoders of SDXL.

    `components` has the keyword arguments of `StableDiffusionXLPipeline` for the encoders. Raises UserError for SDXL's
    refiner, which has one encoder and takes an aesthetic score, and for models that are not SDXL.
    """

    layout = "SDXL (base)"

    def __init__(self, args: Namespace, accelerator: Accelerator):
        index = load_config(diffusers.DiffusionPipeline, args)
        has_first_encoder = index.get("text_encoder") not in (None, [None, None])
        if index.get("requires_aesthetics_score") or not has_first_encoder:
            raise UserError(
                f"{TEACHER}: {args.pretrained_teacher_model!r} has the layout of SDXL's refiner, which starts "
                "from another model's latents; allowed here: models in the layout of SDXL base"
            )
        if "text_encoder_2" not in index:
            raise UserError(
                f"{TEACHER}: {args.pretrained_teacher_model!r} has one text encoder; allowed here: models in the "
                "layout of SDXL, with two (for Stable Diffusion, use train_lcm_distill_sd_wds.py or its LoRA version)"
            )
        self.resolution, self.use_fix_crop_and_size = args.resolution, args.use_fix_crop_and_size
        self.tokenizers = [load_tokenizer(args, "tokenizer"), load_tokenizer(args, "tokenizer_2")]
        self.text_encoders = [
            load_text_encoder(loader, args, accelerator, subfolder, tokenizer)
            for loader, subfolder, tokenizer in (
                (transformers.CLIPTextModel, "text_encoder", self.tokenizers[0]),
                (transformers.CLIPTextModelWithProjection, "text_encoder_2", self.tokenizers[1]),
            )
        ]
        self.components = {
            "tokenizer": self.tokenizers[0],
            "tokenizer_2": self.tokenizers[1],
            "text_encoder": self.text_encoders[0],
            "text_encoder_2": self.text_encoders[1],
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
            "add_watermarker": False,
        }
        self.unconditional = self.encode([args.teacher_negative_prompt or ""]) if args.w_max > 0 else None
        force_zeros = self.components["force_zeros_for_empty_prompt"] and args.teacher_negative_prompt is None
        if self.unconditional is not None and force_zeros:
            states, pooled = self.unconditional
            self.unconditional = torch.zeros_like(states), torch.zeros_like(pooled)

    def unet_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The entries that a U-Net's `config` must have to take this conditioning."""
        pooled = self.text_encoders[1].config.projection_dim
        return {
            **NO_OTHER_INPUTS,
            "addition_embed_type": "text_time",
            "cross_attention_dim": sum(encoder.config.hidden_size for encoder in self.text_encoders),
            "projection_class_embeddings_input_dim": pooled + 6 * (config["addition_time_embed_dim"] or 0),
        }

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The second to last hidden states of both encoders, concatenated (B, tokens, D1 + D2), and the pooled output
        of the second (B, P), as in `StableDiffusionXLPipeline.encode_prompt`."""
        outputs = [
            encoder(send(tokenize(tokenizer, captions).input_ids, encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def time_ids(self, batch: dict[str, Any]) -> torch.Tensor:
        """SDXL's micro-conditioning (B, 6) float32: original height and width, crop top and left, target height and
        width, in pixels. In 16 bits they would be rounded."""
        sizes, crops = batch["original_sizes"], batch["crops"]
        target = torch.full_like(sizes, self.resolution)
        if self.use_fix_crop_and_size:
            sizes, crops = target, torch.zeros_like(crops)
        return send(torch.cat([sizes, crops, target], dim=1).float(), self.text_encoders[1].device)

    def __call__(self, batch: dict[str, Any]) -> tuple[Conditioning, Conditioning | None]:
        """(cond, uncond) for a batch of B samples: two dicts of U-Net keyword arguments.

        Both have the same `time_ids`, as in `StableDiffusionXLPipeline`. Without a `--teacher_negative_prompt`, the
        embeddings of `uncond` are zeros if the teacher has `force_zeros_for_empty_prompt`, else those of "". `uncond`
        is None if `--w_max` is 0, so that nothing is guided.
        """
        (hidden_states, text_embeds), time_ids = self.encode(batch["captions"]), self.time_ids(batch)
        cond = sdxl_conditioning(hidden_states, text_embeds, time_ids)
        if self.unconditional is None:
            return cond, None
        states, pooled = self.unconditional
        return cond, sdxl_conditioning(states.expand_as(hidden_states), pooled.expand_as(text_embeds), time_ids)


def sdxl_conditioning(hidden_states: torch.Tensor, text_embeds: torch.Tensor, time_ids: torch.Tensor) -> Conditioning:
    """The keyword arguments of SDXL's U-Net for (B, tokens, D), (B, P) and (B, 6)."""
    return {
        "encoder_hidden_states": hidden_states,
        "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids},
    }


def join_conditioning(first: Conditioning, second: Conditioning) -> Conditioning:
    """Join two dicts of U-Net keyword arguments for B samples each into one for 2B samples."""
    return {
        name: join_conditioning(value, second[name]) if isinstance(value, dict) else torch.cat([value, second[name]])
        for name, value in first.items()
    }


def guided_output(
    unet: Callable[..., Any],
    z_t: torch.Tensor,
    t: torch.Tensor,
    cond: Conditioning,
    uncond: Conditioning | None,
    w: torch.Tensor,
) -> torch.Tensor:
    """A U-Net's output at (z_t, t) with guidance of weight `w` (B,), float32 (B, C, h, w').

    The conditional and the unconditional pass are one batch of 2B. If `uncond` is None there is only the first.
    """
    if uncond is None:
        return unet(z_t, t, **cond).sample.float()
    both = join_conditioning(cond, uncond)
    output = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), **both).sample
    cond_output, uncond_output = output.chunk(2)
    return apply_guidance(cond_output, uncond_output, w)
