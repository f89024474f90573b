"""The teacher as it is loaded: noise schedule, VAE, U-Net, and text encoders that return U-Net keyword arguments.

Conditioning travels as a dict of U-Net keyword arguments, so that a training loop does not know what is in it:
`encoder_hidden_states` (B, tokens, D), and for SDXL `added_cond_kwargs` = {"text_embeds": (B, P), "time_ids": (B, 6)}.
Everything that can be wrong with a model folder becomes a UserError of one line.
"""

import inspect

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from packaging import version

from lcm.options.groups import UserError, first_line

OPTION = "--pretrained_teacher_model"
# What diffusers' `from_pretrained` calls it, which until 0.40 did not know `dtype`.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.40") else "torch_dtype"
NO_OTHER_INPUTS = {"class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None}  # of a U-Net


# Loading.


def weight_dtype(accelerator):
    """The dtype of frozen weights: that of the mixed precision, float32 without one or where a CPU cannot."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def load_pretrained(loader, option, source, **kwargs):
    """`loader.from_pretrained(source, **kwargs)`; the message of a failure begins with `option`.

    Any failure becomes a UserError of one line: a wrong folder, a broken file, no network, no access.
    """
    subfolder = kwargs.get("subfolder")
    where = f"{source!r}" + (f", part {subfolder!r}" if subfolder else "")
    if kwargs.get("revision") is not None:
        where += f" at revision {kwargs['revision']!r}"
    if "dtype" in kwargs and issubclass(loader, diffusers.ModelMixin):
        kwargs[DTYPE] = kwargs.pop("dtype")
    has_weights = issubclass(loader, torch.nn.Module)
    if has_weights:
        kwargs["output_loading_info"] = True
    try:
        part = loader.from_pretrained(source, **kwargs)
    except Exception as error:  # the libraries raise nearly anything for a broken folder
        raise UserError(f"{option}: cannot load {where}: {first_line(error)}") from error
    if has_weights:
        part, info = part
        if info["missing_keys"]:  # the libraries would make them up
            missing = sorted(info["missing_keys"])
            raise UserError(f"{option}: cannot load {where}: {len(missing)} weights are missing, such as {missing[0]}")
    return part


def load_part(loader, args, subfolder, path=None, **kwargs):
    """`load_pretrained` for one part of the teacher, or for the VAE at `path`."""
    if path is None:
        kwargs["revision"] = args.teacher_revision or args.revision
    option = "--pretrained_vae_model_name_or_path" if path else OPTION
    source = path or args.pretrained_teacher_model
    return load_pretrained(loader, option, source, subfolder=subfolder, cache_dir=args.cache_dir, **kwargs)


def load_config(loader, args, subfolder=None):
    """The configuration file of one part of the teacher, or its `model_index.json`, as a dict."""
    where = f"{args.pretrained_teacher_model!r}, part {subfolder or 'model_index.json'!r}"
    try:
        config = loader.load_config(
            args.pretrained_teacher_model,
            subfolder=subfolder,
            cache_dir=args.cache_dir,
            revision=args.teacher_revision or args.revision,
        )
    except Exception as error:
        raise UserError(f"{OPTION}: cannot load {where}: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{OPTION}: cannot load {where}: its JSON is no object, but {type(config).__name__}")
    return config


def load_noise_schedule(args):
    """The teacher's scheduler as a DDPMScheduler, for its `alphas_cumprod` (T,) and its prediction type.

    Raises UserError for a scheduler without betas (flow matching) or with senseless ones, for an unknown prediction
    type, for fewer timesteps than `--num_ddim_timesteps`, and for epsilon prediction with zero terminal SNR, where the
    network's output at the last timestep says nothing about x_0.
    """
    schedule = load_part(diffusers.DDPMScheduler, args, "scheduler")
    raw = load_config(diffusers.DDPMScheduler, args, "scheduler")  # what the file says, before defaults fill it up
    prediction_type = schedule.config.prediction_type
    if "beta_schedule" not in raw:
        raise UserError(f"{OPTION}: its scheduler, {raw.get('_class_name')}, has no beta schedule to distil along")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{OPTION}: its prediction type is {prediction_type!r}; allowed: epsilon, v_prediction, sample"
        )
    alphas = schedule.alphas_cumprod
    if len(alphas) < args.num_ddim_timesteps:
        raise UserError(
            f"--num_ddim_timesteps: {args.num_ddim_timesteps} given; allowed: at most the schedule's "
            f"{len(alphas)} timesteps"
        )
    if not (alphas.diff() < 0).all():  # nor if they are NaN
        raise UserError(f"{OPTION}: its scheduler's betas are none: the signal has to fall at each timestep")
    if prediction_type == "epsilon" and alphas[-1] < 1e-6:
        raise UserError(
            f"{OPTION}: its schedule ends at zero signal (zero terminal SNR), where epsilon prediction determines no "
            "x_0; allowed with it: v_prediction, sample"
        )
    return schedule


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


def unet_config(args):
    """The configuration of the teacher's U-Net: the class's defaults, then what the file says."""
    defaults = {name: p.default for name, p in inspect.signature(diffusers.UNet2DConditionModel).parameters.items()}
    return {**defaults, **load_config(diffusers.UNet2DConditionModel, args, "unet")}


def load_unet(args, encode_prompts, dtype):
    """The teacher's U-Net, on the CPU.

    Raises UserError, before its weights are read, if it is not one that this script can distil with `encode_prompts`:
    it takes another conditioning or a guidance embedding, or more channels than it predicts (inpainting, editing).
    """
    config = unet_config(args)
    if config["time_cond_proj_dim"] is not None:
        raise UserError(
            f"{OPTION}: its U-Net takes a guidance embedding, so it is a distilled model already; allowed: one that "
            "is sampled with classifier-free guidance"
        )
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"{OPTION}: its U-Net takes {config['in_channels']} channels and predicts {config['out_channels']}, as "
            "for inpainting or editing; allowed: a text-to-image model"
        )
    for name, expected in encode_prompts.unet_config(config).items():
        if config[name] != expected:
            raise UserError(
                f"{OPTION}: its U-Net has {name} = {config[name]}; allowed here: {expected}, as in "
                f"{encode_prompts.layout}"
            )
    unet = load_part(diffusers.UNet2DConditionModel, args, "unet", dtype=dtype)
    unet.register_to_config(_name_or_path="")  # a local path would travel into every saved config.json
    return unet


# Pixels and prompts to what the U-Net takes.


def encode_pixels(vae, pixels, batch_size, generator):
    """z_0: a scaled sample of the VAE's posterior. `pixels` (B, 3, H, W) in [-1, 1]; returns (B, C, h, w) float32.

    `batch_size` pictures are encoded at once. The noise is drawn for all B together, so that it does not depend on it.
    """
    moments = [vae.encode(part.to(vae.dtype)).latent_dist.parameters for part in pixels.split(batch_size)]
    return DiagonalGaussianDistribution(torch.cat(moments)).sample(generator).float() * vae.config.scaling_factor


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
