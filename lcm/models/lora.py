"""LCM-LoRA: adapters in one U-Net, which is teacher, target and student in turn, and the files they are saved in.

The teacher is the U-Net with its adapter switched off, the target is the U-Net without dropout, so one copy of the
base weights does for all three. The base is frozen, in the precision of the mixed precision; adapters are float32.
"""

import contextlib
import json
import logging
import os
import warnings

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from lcm.options.groups import UserError

logger = logging.getLogger(__name__)

TRAINED, EMA = "lcm", "ema"  # names of adapters in the U-Net
DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip

# diffusers looks for the first name. The second must not end in the first, or diffusers would take it instead.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lcm_lora_kohya.safetensors"
STUDENT_FOLDER = "student"  # beside a moving average: the weights as the optimizer left them


# Adapters in a U-Net.


def find_targets(unet, option):
    """The endings of layer names that get an adapter: those of `--lora_target_modules`, else the usual ones.

    Raises UserError for a name that no linear or convolutional layer has, or that other modules have too.
    """
    if option is None:
        return list(DEFAULT_TARGETS)
    fits = {name: isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) for name, layer in unet.named_modules()}
    targets = [target.strip() for target in option.split(",")]
    for target in targets:
        matches = [fit for name, fit in fits.items() if name == target or name.endswith(f".{target}")]
        if not matches or not all(matches):
            endings = (name.rpartition(".") for name, fit in fits.items() if fit)
            found = {f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last for head, _, last in endings}
            raise UserError(
                f"--lora_target_modules: {target!r} is no linear or convolutional layer of the U-Net; allowed: names, "
                f"or ends of names, as {', '.join(sorted(found))}"
            )
    return targets


def add_adapters(unet, args):
    """Freeze the U-Net and give it a trainable adapter, and with `--ema_decay` its moving average as another one.

    The start is a function of the seed, the same on every process: A at random, B zero, so that the student is the
    teacher. Raises UserError for targets that do not exist.
    """
    targets = find_targets(unet, args.lora_target_modules)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are what we want
        for name in (EMA, TRAINED) if args.ema_decay is not None else (TRAINED,):  # the last one stays active
            torch.manual_seed(args.seed)
            unet.add_adapter(
                LoraConfig(
                    r=args.lora_rank,
                    lora_alpha=args.lora_alpha,
                    lora_dropout=args.lora_dropout,
                    target_modules=targets,
                ),
                name,
            )
            cast_training_params(unet)
    size = f"rank {args.lora_rank}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"
    logger.info("LoRA: %s, in %d layers", size, len(adapter_layers(unet)))
    if args.w_min < args.w_max:
        logger.info(
            "--w_min, --w_max: a LoRA is not told the guidance weight and learns an average over [%g, %g]; a narrow "
            "range, or one value for both, gives sharper pictures",
            args.w_min,
            args.w_max,
        )


def adapter_layers(unet):
    """The layers of a U-Net that hold adapters."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parameters(unet, adapter):
    """The parameters of one adapter, by names that do not contain the adapter's own."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in unet.named_parameters()
        if f".{adapter}." in name
    }


def switch(layers, adapter):
    """Make `adapter`, or none, the active one in `layers`, and leave every requires_grad as it is.

    peft's `set_adapter` and `enable_adapters` also set requires_grad on each weight, which takes most of their time
    and means nothing under no_grad. Attributes are set past `torch.nn.Module.__setattr__`, which takes most of what is
    left. Raises RuntimeError if a future peft keeps its switches elsewhere; without the check the teacher would
    silently be the student.
    """
    state = {"_disable_adapters": adapter is None} | ({} if adapter is None else {"_active_adapter": [adapter]})
    for layer in layers:
        vars(layer).update(state)
    first = next(iter(layers))
    if first.disable_adapters != (adapter is None) or adapter not in (None, *first.active_adapters):
        raise RuntimeError("this version of peft does not switch adapters by _disable_adapters and _active_adapter")


class AdapterView:
    """The U-Net with one of its adapters, or with none, and without dropout; called under no_grad.

    After a call the U-Net is the student again, adapter and dropout switched on: the backward pass needs it so. With
    gradient checkpointing it runs the student's layers anew, and without it a layer in the wrong mode would silently
    give wrong gradients.
    """

    def __init__(self, unet, adapter):
        self.unet, self.adapter = unet, adapter
        # Kept in lists, because walking through all modules of SDXL takes 25 ms each time.
        self.layers = adapter_layers(unet)
        self.dropouts = [module for module in unet.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]

    @contextlib.contextmanager
    def active(self):
        """Yield the U-Net with this adapter alone and no dropout."""
        was_training = [dropout.training for dropout in self.dropouts]
        try:
            for dropout in self.dropouts:
                vars(dropout)["training"] = False
            if self.adapter != TRAINED:
                switch(self.layers, self.adapter)
            yield self.unet
        finally:
            if self.adapter != TRAINED:
                switch(self.layers, TRAINED)
            for dropout, training in zip(self.dropouts, was_training, strict=True):
                vars(dropout)["training"] = training

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        with self.active() as unet:
            return unet(*args, **kwargs)


# Files.


def adapter_weights(unet, adapter):
    """One adapter's tensors under peft's plain keys, `down_blocks.0. ... .to_q.lora_A.weight`, on the CPU."""
    weights = get_peft_model_state_dict(unet, adapter_name=adapter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_for_diffusers(unet, adapter, folder):
    """Write what `pipeline.load_lora_weights(folder)` takes, for Stable Diffusion and SDXL alike.

    Rank and alpha travel as metadata; diffusers refuses them as tensors. peft's plain keys, because
    `convert_state_dict_to_diffusers` mixes two styles where convolutions are among the targets, and the loader then
    drops every attention layer with no more than a warning.
    """
    config = unet.peft_config[adapter]
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=adapter_weights(unet, adapter),
        # Only these: what an older peft does not know of, it would refuse.
        unet_lora_adapter_metadata={
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
            "rank_pattern": {},  # diffusers before 0.40 reads it unasked
        },
        weight_name=DIFFUSERS_FILE,
    )


def save_for_kohya(unet, adapter, path):
    """Write what ComfyUI and A1111 take, in float16: kohya's keys, `lora_unet_ ... .lora_down.weight`, and alphas."""
    config = unet.peft_config[adapter]
    weights = {f"unet.{name}": tensor.half() for name, tensor in adapter_weights(unet, adapter).items()}
    weights = convert_state_dict_to_kohya(weights)
    alpha = torch.tensor(float(config.lora_alpha), dtype=torch.float16)
    weights = {name: alpha.clone() if name.endswith(".alpha") else tensor for name, tensor in weights.items()}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
    }
    save_file(weights, path, metadata)


def load_adapter(unet, adapter, folder):
    """Read what `save_for_diffusers` wrote back into an adapter. Raises ValueError unless every key fits."""
    weights = load_file(os.path.join(folder, DIFFUSERS_FILE))
    weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items()}
    expected = get_peft_model_state_dict(unet, adapter_name=adapter)
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{DIFFUSERS_FILE} and the U-Net's adapter differ in {len(odd)} tensors, such as {odd[0]}")
    set_peft_model_state_dict(unet, weights, adapter_name=adapter)


class LoraModel:
    """A LoRA that was trained, and its moving average if there is one, in the formats that people load.

    `unet` is unwrapped; it holds the adapters. The moving average, if there is one, is what is exported. `scheduler`
    fits it.
    """

    title = "An LCM-LoRA"
    tags = ["lora", "latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "adapter"

    def __init__(self, args, unet, scheduler):
        self.args, self.unet, self.scheduler = args, unet, scheduler
        self.exported = TRAINED if args.ema_decay is None else EMA
        self.outputs = [DIFFUSERS_FILE, KOHYA_FILE, STUDENT_FOLDER, "scheduler"]

    def gathered(self):
        """The same: a LoRA is whole on every process."""
        return self

    def save(self, folder):
        """Write what a checkpoint needs, and the scheduler, so that it can be sampled from, to `folder`."""
        save_for_diffusers(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            save_for_diffusers(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))
        self.scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def load(self, folder):
        """Read what `save` wrote."""
        load_adapter(self.unet, self.exported, folder)
        if self.exported != TRAINED:
            load_adapter(self.unet, TRAINED, os.path.join(folder, STUDENT_FOLDER))

    def export(self, folder):
        """Write the files for diffusers and for kohya's readers to `folder`."""
        self.save(folder)
        save_for_kohya(self.unet, self.exported, os.path.join(folder, KOHYA_FILE))

    def describe(self, output_dir):
        """Lines that say what `export` wrote."""
        lines = [
            f"{os.path.join(output_dir, DIFFUSERS_FILE)}: the LoRA for diffusers, float32",
            f"{os.path.join(output_dir, KOHYA_FILE)}: the same for ComfyUI and A1111, float16",
        ]
        if self.exported != TRAINED:
            lines.append(f"{os.path.join(output_dir, STUDENT_FOLDER)}: as the optimizer left it; the rest is its EMA")
        return lines

    def pushed_files(self, output_dir):
        """What goes to the Hub, as {path in the repository: path here}."""
        return {name: os.path.join(output_dir, name) for name in (DIFFUSERS_FILE, KOHYA_FILE)}

    def usage_code(self, teacher, source, on_hub, machine):
        """Python that samples with what lies at `source`, a repository or this run's output folder, on a Machine."""
        args = self.args
        return f"""\
import torch
from diffusers import DiffusionPipeline, LCMScheduler

{machine.other_kind}
pipeline = DiffusionPipeline.from_pretrained("{teacher}", {machine.dtype}){machine.move}
pipeline.scheduler = LCMScheduler.from_pretrained("{source}", subfolder="scheduler")
pipeline.load_lora_weights("{source}", weight_name="{DIFFUSERS_FILE}")

# Guidance is part of what was learned: 1 adds none; from 1 to 2 a negative prompt has an effect.
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={min(4, args.num_ddim_timesteps)}, guidance_scale=1).images[0]
image.save("lcm.png")
"""

    def card_text(self):
        """A sentence on what it is and how it is used."""
        return (
            "This LoRA lets its base model, and other fine-tunes of it, sample in 1 to 8 steps. "
            f"`{DIFFUSERS_FILE}` is for diffusers, `{KOHYA_FILE}` for ComfyUI and A1111."
        )

    def card_rows(self):
        """Rows for the card's table on the training, as a dict."""
        args = self.args
        rows = {"LoRA": f"rank {args.lora_rank}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"}
        return rows if args.ema_decay is None else {**rows, "EMA decay": args.ema_decay}
