"""Adapters in one U-Net, which is teacher, target and student in turn.

The teacher is the U-Net with its adapter switched off, the target is the U-Net without dropout, so one copy of the
base weights does for all three. The base is frozen, in the precision of the mixed precision; adapters are float32.
"""

import contextlib
import logging
import warnings

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from lcm.errors import UserError

logger = logging.getLogger(__name__)

TRAINED, EMA = "lcm", "ema"  # names of adapters in the U-Net
DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


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


def add_adapters(unet, args, seed):
    """Freeze the U-Net and give it a trainable adapter, and with `--ema_decay` its moving average as another one.

    The start is a function of the seed, the same on every process: A at random, B zero, so that the student is the
    teacher. Raises UserError for targets that do not exist.
    """
    targets = find_targets(unet, args.lora_target_modules)
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are what we want
        for name in (EMA, TRAINED) if args.ema_decay is not None else (TRAINED,):  # the last one stays active
            torch.manual_seed(seed)
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
