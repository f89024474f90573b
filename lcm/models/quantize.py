"""Frozen weights in 8 or 4 bits, by bitsandbytes' layers.

diffusers' BitsAndBytesConfig would make the same layers, but refuses machines without a GPU, and reads a model from
its files, while a student is made of the teacher's weights as they are.
"""

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from lcm.options.types import Options

logger = logging.getLogger(__name__)


def quantizable(network: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """(owner, name in it, layer) of the linear layers of a U-Net's transformers, which are most of SDXL's weights."""
    for name, module in network.named_modules():
        if "attentions" in name.split("."):
            for child, layer in module.named_children():
                if type(layer) is torch.nn.Linear:
                    yield module, child, layer


def make_layer(layer: torch.nn.Linear, precision: str, compute_dtype: torch.dtype) -> torch.nn.Linear:
    """A layer with the same weights, which quantizes them when it is moved to a device."""
    bnb = importlib.import_module("bitsandbytes.nn")
    size = layer.in_features, layer.out_features, layer.bias is not None
    made: Any
    if precision == "nf4":
        made = bnb.Linear4bit(*size, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        made.support_avx512bf16_for_cpu = False  # its own kernel for a CPU takes some widths only
        made.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    else:
        made = bnb.Linear8bitLt(*size, has_fp16_weights=False, device="meta")
        made.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    quantized: torch.nn.Linear = made
    return quantized


def quantize(network: torch.nn.Module, args: Options, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a frozen network's transformers by such of `--base_model_precision`.

    To be called on the CPU, before adapters are added.
    """
    if args.base_model_precision == "no_change":
        return
    network.requires_grad_(False)
    layers = list(quantizable(network))
    count = sum(layer.weight.numel() for *_, layer in layers)
    others = sum(parameter.numel() for parameter in network.parameters()) - count
    for owner, name, layer in layers:
        setattr(owner, name, make_layer(layer, args.base_model_precision, compute_dtype))
    logger.info("%s: %.4g M weights in %d linear layers; %.4g M others stay as they are", args.base_model_precision,
                count / 1e6, len(layers), others / 1e6)  # fmt: skip
