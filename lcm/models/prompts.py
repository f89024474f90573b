"""Text encoders that turn captions into U-Net keyword arguments.

A conditioning is a dict of U-Net keyword arguments, so that a training loop need not know what is in it:
`encoder_hidden_states` (B, tokens, D), and for SDXL `added_cond_kwargs` = {"text_embeds": (B, P), "time_ids": (B, 6)}.
"""

import contextlib
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator

from lcm.cache import EMBEDDING, Cache
from lcm.errors import UserError
from lcm.models.loading import TEACHER, load_config, load_part, weight_dtype
from lcm.options.types import Options
from lcm_common import apply_guidance

Conditioning = dict[str, Any]  # U-Net keyword arguments
Embedding = tuple[torch.Tensor, ...]

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


class Prompts(ABC):
    """Captions to U-Net keyword arguments; one class for each family of models.

    `components` has the keyword arguments of the family's pipeline for tokenizers and text encoders. With a `cache`,
    samples bring their embeddings along, and the encoders are only there within `loaded`. An embedding is a tuple:
    hidden states (B, tokens, D), and for SDXL the pooled output (B, P).
    """

    layout: str  # the models that it is for
    parts: tuple[str, ...]  # folders of the text encoders

    def __init__(self, args: Options, accelerator: Accelerator, cache: Cache | None = None):
        self.args, self.accelerator, self.cache = args, accelerator, cache
        self.components: dict[str, Any] = {} if cache else self.load()
        self.empty = tuple(part.to(accelerator.device) for part in cache.empty) if cache else ()
        self.unconditional = self.embed_unconditional() if args.w_max > 0 else None

    @abstractmethod
    def load(self) -> dict[str, Any]:
        """The components, on the device."""

    @abstractmethod
    def encode(self, captions: list[str]) -> Embedding:
        """The embedding of B strings, as in the family's pipeline. Only within `loaded`."""

    @abstractmethod
    def unet_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The entries that a U-Net's `config` must have to take this conditioning."""

    def time_ids(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """What the U-Net is told of sizes and crops; None if it does not ask."""
        return None

    @abstractmethod
    def conditioning(self, embedding: Embedding, time_ids: torch.Tensor | None) -> Conditioning:
        """The U-Net's keyword arguments."""

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Within it, `components` are there. With a cache, they are loaded for it, and freed after it."""
        if self.components:
            yield
            return
        self.components = self.load()
        try:
            yield
        finally:
            self.components = {}

    def encoders(self) -> list[Any]:
        """The text encoders that are loaded."""
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def embed_unconditional(self) -> Embedding:
        """The embedding, for one sample, of what guidance leads away from."""
        prompt = self.args.teacher_negative_prompt
        if self.cache and prompt is None:
            return tuple(part[None].to(self.dtype) for part in self.empty)
        with self.loaded():
            return self.encode([prompt or ""])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of embeddings."""
        return weight_dtype(self.accelerator)

    def embed(self, batch: dict[str, Any]) -> Embedding:
        """The embedding of a batch's captions: encoded now, or as it was cached."""
        if self.cache is None:
            return self.encode(batch["captions"])
        return tuple(
            torch.where(batch["is_empty"].view(-1, *[1] * empty.ndim), empty, batch[name]).to(self.dtype)
            for name, empty in zip(EMBEDDING, self.empty, strict=False)
        )

    def __call__(self, batch: dict[str, Any]) -> tuple[Conditioning, Conditioning | None]:
        """(cond, uncond) for a batch of B samples: two dicts of U-Net keyword arguments.

        `uncond` is for what guidance leads away from; None if `--w_max` is 0, so that nothing is guided. Both have the
        same time_ids, as in `StableDiffusionXLPipeline`.
        """
        embedding, time_ids = self.embed(batch), self.time_ids(batch)
        cond = self.conditioning(embedding, time_ids)
        if self.unconditional is None:
            return cond, None
        expanded = tuple(part.expand_as(whole) for part, whole in zip(self.unconditional, embedding, strict=True))
        return cond, self.conditioning(expanded, time_ids)


class PromptEncoder(Prompts):
    """Prompts with the one CLIP text encoder of SD 1.x and 2.x."""

    layout = "Stable Diffusion 1.x or 2.x"
    parts = ("text_encoder",)

    def load(self) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.args, "tokenizer")
        loader = transformers.CLIPTextModel
        return {
            "tokenizer": tokenizer,
            "text_encoder": load_text_encoder(loader, self.args, self.accelerator, "text_encoder", tokenizer),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

    def unet_config(self, config: dict[str, Any]) -> dict[str, Any]:
        width = self.cache.empty[0].shape[-1] if self.cache else self.components["text_encoder"].config.hidden_size
        return {**NO_OTHER_INPUTS, "addition_embed_type": None, "cross_attention_dim": width}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Embedding:
        """Hidden states (B, tokens, D) of B strings, as in `StableDiffusionPipeline.encode_prompt`."""
        text_encoder, device = self.components["text_encoder"], self.accelerator.device
        inputs = tokenize(self.components["tokenizer"], captions)
        uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
        mask = send(inputs.attention_mask, device) if uses_mask else None
        return (text_encoder(send(inputs.input_ids, device), attention_mask=mask)[0],)

    def conditioning(self, embedding: Embedding, time_ids: torch.Tensor | None) -> Conditioning:
        return {"encoder_hidden_states": embedding[0]}


class SDXLPromptEncoder(Prompts):
    """Prompts, sizes and crops with the two CLIP text encoders of SDXL.

    Raises UserError for SDXL's refiner, which has one encoder and takes an aesthetic score, and for models that are
    not SDXL.
    """

    layout = "SDXL (base)"
    parts = ("text_encoder", "text_encoder_2")

    def __init__(self, args: Options, accelerator: Accelerator, cache: Cache | None = None):
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
        self.force_zeros = index.get("force_zeros_for_empty_prompt", True)
        super().__init__(args, accelerator, cache)

    def load(self) -> dict[str, Any]:
        first, second = load_tokenizer(self.args, "tokenizer"), load_tokenizer(self.args, "tokenizer_2")
        kinds, place = (
            (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection),
            (self.args, self.accelerator),
        )
        return {
            "tokenizer": first,
            "tokenizer_2": second,
            "text_encoder": load_text_encoder(kinds[0], *place, "text_encoder", first),
            "text_encoder_2": load_text_encoder(kinds[1], *place, "text_encoder_2", second),
            "force_zeros_for_empty_prompt": self.force_zeros,
            "add_watermarker": False,
        }

    def unet_config(self, config: dict[str, Any]) -> dict[str, Any]:
        if self.cache:
            width, pooled = (part.shape[-1] for part in self.cache.empty)
        else:
            width = sum(encoder.config.hidden_size for encoder in self.encoders())
            pooled = self.components["text_encoder_2"].config.projection_dim
        return {
            **NO_OTHER_INPUTS,
            "addition_embed_type": "text_time",
            "cross_attention_dim": width,
            "projection_class_embeddings_input_dim": pooled + 6 * (config["addition_time_embed_dim"] or 0),
        }

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Embedding:
        """The second to last hidden states of both encoders, concatenated (B, tokens, D1 + D2), and the pooled output
        of the second (B, P), as in `StableDiffusionXLPipeline.encode_prompt`."""
        outputs = [
            encoder(send(tokenize(tokenizer, captions).input_ids, encoder.device), output_hidden_states=True)
            for tokenizer, encoder in (
                (self.components["tokenizer"], self.components["text_encoder"]),
                (self.components["tokenizer_2"], self.components["text_encoder_2"]),
            )
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def embed_unconditional(self) -> Embedding:
        """The embedding, for one sample, of what guidance leads away from.

        Without a `--teacher_negative_prompt` it is zeros if the teacher has `force_zeros_for_empty_prompt`.
        """
        embedding = super().embed_unconditional()
        if self.force_zeros and self.args.teacher_negative_prompt is None:
            return tuple(torch.zeros_like(part) for part in embedding)
        return embedding

    def time_ids(self, batch: dict[str, Any]) -> torch.Tensor:
        """SDXL's micro-conditioning (B, 6) float32: original height and width, crop top and left, target height and
        width, in pixels. In 16 bits they would be rounded."""
        sizes, crops = batch["original_sizes"], batch["crops"]
        target = torch.tensor(batch["target_size"]).expand_as(sizes)
        if self.args.use_fix_crop_and_size:
            sizes, crops = target, torch.zeros_like(crops)
        return send(torch.cat([sizes, crops, target], dim=1).float(), self.accelerator.device)

    def conditioning(self, embedding: Embedding, time_ids: torch.Tensor | None) -> Conditioning:
        added = {"text_embeds": embedding[1], "time_ids": time_ids}
        return {"encoder_hidden_states": embedding[0], "added_cond_kwargs": added}


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
