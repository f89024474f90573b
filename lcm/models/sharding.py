"""Networks whose weights are split over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

These functions gather the weights for files; the training loop does not need them. They also accept networks that are
not sharded. All processes call them together.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import ModelMixin
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

STATE_FILE = "sharded_optimizer.bin"
UNSHARDED = StateDictOptions(full_state_dict=True)
UNSHARDED_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's weights are split over processes."""
    return isinstance(network, FSDPModule)


def shard_like_student(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Shard a frozen network as accelerate shards the student; accelerate itself takes only one network."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    network = fsdp2_prepare_model(accelerator, network)
    reshard_after_forward(network)
    return network


def reshard_after_forward(network: nn.Module) -> None:
    """Reshard after each forward. FSDP2 keeps the root's parameters gathered, so the next forward would miss the EMA
    update of the shards."""
    network.register_forward_hook(lambda module, inputs, output: module.reshard())


def gathered(network: ModelMixin) -> ModelMixin | None:
    """The network itself; if it is sharded, an unsharded copy on the CPU, but None on all processes but the first."""
    if not is_sharded(network):
        return network
    weights = get_model_state_dict(network, options=UNSHARDED_ON_CPU)
    if not weights:  # only the first process gets them
        return None
    with torch.device("meta"):
        copy = type(network).from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def load_weights(network: nn.Module, weights: dict[str, Any]) -> None:
    """`load_state_dict` of unsharded weights into a network that may be sharded."""
    if is_sharded(network):
        set_model_state_dict(network, weights, options=UNSHARDED)
    else:
        network.load_state_dict(weights)


def save_state(accelerator: Accelerator, student: nn.Module, optimizer: AcceleratedOptimizer, folder: str) -> None:
    """Write the optimizer and the gradient scaler of a sharded student to `folder`, in one file for all processes.

    No random state is saved: noise comes from generators that are a function of the step, and a full U-Net is trained
    without dropout.
    """
    state = {"optimizer": get_optimizer_state_dict(student, optimizer.optimizer, options=UNSHARDED_ON_CPU)}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        torch.save(state, os.path.join(folder, STATE_FILE))


def load_state(accelerator: Accelerator, student: nn.Module, optimizer: AcceleratedOptimizer, folder: str) -> None:
    """Load the file of `save_state`."""
    state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu", weights_only=True)
    set_optimizer_state_dict(student, optimizer.optimizer, state["optimizer"], options=UNSHARDED)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
