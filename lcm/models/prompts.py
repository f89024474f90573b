"""Text encoders that turn captions into U-Net keyword arguments.

Conditioning travels as a dict of U-Net keyword arguments, so that a training loop does not know what is in it:
`encoder_hidden_states` (B, tokens, D), and for SDXL `added_cond_kwargs` = {"text_embeds": (B, P), "time_ids": (B, 6)}.
"""

import diffusers
import torch
import transformers

from lcm.errors import UserError
from lcm.models.loading import OPTION, load_config, load_part, weight_dtype
from lcm.models.unet import NO_OTHER_INPUTS


def load_tokenizer(args, subfolder):
    """A CLIP tokenizer. Raises UserError if its vocabulary is not whole."""
    tokenizer = load_part(transformers.CLIPTokenizer, args, subfolder)
    if len(tokenizer) < 512:  # CLIP's has all bytes twice; where files are missing, transformers makes one up
        raise UserError(
            f"{OPTION}: cannot load {args.pretrained_teacher_model!r}, part {subfolder!r}: its vocabulary has "
            f"{len(tokenizer)} entries; are its files complete?"
        )
    return tokenizer


def load_text_encoder(loader, args, accelerator, subfolder, tokenizer):
    """A frozen text encoder. Raises UserError if it cannot take what its tokenizer gives."""
    encoder = load_part(loader, args, subfolder, dtype=weight_dtype(accelerator))
    for what, given, most in (
        ("model_max_length", tokenizer.model_max_length, encoder.config.max_position_embeddings),
        ("vocabulary", len(tokenizer), encoder.config.vocab_size),
    ):
        if not 2 < given <= most:  # a caption is a token at least, between a beginning and an end
            raise UserError(
                f"{OPTION}: part {subfolder!r} of {args.pretrained_teacher_model!r} and its tokenizer do not fit: the "
                f"tokenizer's {what} is {given}; allowed: 3 to {most}"
            )
    return encoder.requires_grad_(False).eval().to(accelerator.device)


def tokenize(tokenizer, captions, device):
    """Token ids (B, tokens), padded or cut to the tokenizer's `model_max_length` as diffusers' pipelines do."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(device)


class PromptEncoder:
    """Captions to U-Net keyword arguments, with the one CLIP text encoder of SD 1.x and 2.x.

    `components` are the keyword arguments that `StableDiffusionPipeline` takes for it.
    """

    layout = "Stable Diffusion 1.x or 2.x"

    def __init__(self, args, accelerator):
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
        self.empty = self.encode([""])

    def unet_config(self, config):
        """What a U-Net's `config` must say to take what this returns."""
        return {
            **NO_OTHER_INPUTS,
            "addition_embed_type": None,
            "cross_attention_dim": self.text_encoder.config.hidden_size,
        }

    @torch.no_grad()
    def encode(self, captions):
        """Hidden states (B, tokens, D) of B strings, as `StableDiffusionPipeline.encode_prompt` has them."""
        inputs = tokenize(self.tokenizer, captions, self.text_encoder.device)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask if uses_mask else None)[0]

    def __call__(self, batch):
        """(cond, uncond) for a batch of samples: each a dict of U-Net keyword arguments for B samples."""
        hidden_states = self.encode(batch["captions"])
        return {"encoder_hidden_states": hidden_states}, {"encoder_hidden_states": self.empty.expand_as(hidden_states)}


class SDXLPromptEncoder:
    """Captions, sizes and crops to U-Net keyword arguments, with the two CLIP text encoders of SDXL.

    `components` are the keyword arguments that `StableDiffusionXLPipeline` takes for them. Raises UserError for SDXL's
    refiner, which has one encoder and takes an aesthetic score, and for models that are not SDXL.
    """

    layout = "SDXL (base)"

    def __init__(self, args, accelerator):
        index = load_config(diffusers.DiffusionPipeline, args)
        has_first_encoder = index.get("text_encoder") not in (None, [None, None])
        if index.get("requires_aesthetics_score") or not has_first_encoder:
            raise UserError(
                f"{OPTION}: {args.pretrained_teacher_model!r} is laid out as SDXL's refiner, which goes on from "
                "another model's latents; allowed here: SDXL base and models of its layout"
            )
        if "text_encoder_2" not in index:
            raise UserError(
                f"{OPTION}: {args.pretrained_teacher_model!r} has one text encoder; allowed here: models in the "
                "layout of SDXL, with two (train_lcm_distill_sd_wds.py and its LoRA sibling take Stable Diffusion)"
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
        self.empty = self.encode([""])
        if self.components["force_zeros_for_empty_prompt"]:
            self.empty = [torch.zeros_like(part) for part in self.empty]

    def unet_config(self, config):
        """What a U-Net's `config` must say to take what this returns."""
        pooled = self.text_encoders[1].config.projection_dim
        return {
            **NO_OTHER_INPUTS,
            "addition_embed_type": "text_time",
            "cross_attention_dim": sum(encoder.config.hidden_size for encoder in self.text_encoders),
            "projection_class_embeddings_input_dim": pooled + 6 * (config["addition_time_embed_dim"] or 0),
        }

    @torch.no_grad()
    def encode(self, captions):
        """Second to last hidden states of both encoders, joined (B, tokens, D1 + D2), and the second's pooled output
        (B, P), as `StableDiffusionXLPipeline.encode_prompt` has them."""
        outputs = [
            encoder(tokenize(tokenizer, captions, encoder.device).input_ids, output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def time_ids(self, batch):
        """SDXL's micro-conditioning (B, 6) float32: original height and width, crop top and left, target height and
        width, in pixels. In 16 bits they would be rounded."""
        sizes, crops = batch["original_sizes"], batch["crops"]
        target = torch.full_like(sizes, self.resolution)
        if self.use_fix_crop_and_size:
            sizes, crops = target, torch.zeros_like(crops)
        return torch.cat([sizes, crops, target], dim=1).to(self.text_encoders[1].device, torch.float32)

    def __call__(self, batch):
        """(cond, uncond) for a batch of samples: each a dict of U-Net keyword arguments for B samples.

        Both have the same `time_ids`, as in `StableDiffusionXLPipeline`. The unconditional embeddings are zeros or
        those of "", as the teacher's `force_zeros_for_empty_prompt` says.
        """
        encoded, time_ids = self.encode(batch["captions"]), self.time_ids(batch)
        empty = [part.expand_as(other) for part, other in zip(self.empty, encoded, strict=True)]
        cond, uncond = (
            {
                "encoder_hidden_states": hidden_states,
                "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids},
            }
            for hidden_states, text_embeds in (encoded, empty)
        )
        return cond, uncond


def join_conditioning(first, second):
    """Two dicts of U-Net keyword arguments for B samples each, as one for 2B."""
    return {
        name: join_conditioning(value, second[name]) if isinstance(value, dict) else torch.cat([value, second[name]])
        for name, value in first.items()
    }
