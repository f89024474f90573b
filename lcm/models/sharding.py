"""Networks whose weights are split over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Only what has to be whole, in files, passes through here; the loop does not know. Where nothing is sharded every
function does the plain thing. All processes call them together.
"""

import os

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

STATE_FILE = "sharded_optimizer.bin"
WHOLE = StateDictOptions(full_state_dict=True)
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(network):
    """Whether a network's weights are split over processes."""
    return isinstance(network, FSDPModule)


def shard_like_student(accelerator, network):
    """Shard a frozen network by the same rules by which accelerate, which takes one network, sharded the student."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    network = fsdp2_prepare_model(accelerator, network)
    reshard_after_forward(network)
    return network


def reshard_after_forward(network):
    """Give up the whole weights after each call. FSDP2 keeps those outside of its blocks, and the next call would then
    not see what the moving average did to the shards."""
    network.register_forward_hook(lambda module, inputs, output: module.reshard())


def gathered(network):
    """The network itself, or where it is sharded a whole copy on the CPU; of use on the first process alone."""
    if not is_sharded(network):
        return network
    weights = get_model_state_dict(network, options=WHOLE_ON_CPU)
    if not weights:  # only the first process is given them
        return None
    with torch.device("meta"):
        copy = type(network).from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def load_weights(network, weights):
    """`load_state_dict` of whole weights into a network that may be sharded."""
    if is_sharded(network):
        set_model_state_dict(network, weights, options=WHOLE)
    else:
        network.load_state_dict(weights)


def save_state(accelerator, student, optimizer, folder):
    """Write the whole optimizer and the gradient scaler of a sharded student to `folder`.

    With one file for all processes, as everything else in a checkpoint. There is no random state to keep: noise comes
    from generators that are a function of the step, and a whole U-Net is trained without dropout.
    """
    state = {"optimizer": get_optimizer_state_dict(student, optimizer.optimizer, options=WHOLE_ON_CPU)}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if accelerator.is_main_process:
        torch.save(state, os.path.join(folder, STATE_FILE))


def load_state(accelerator, student, optimizer, folder):
    """Read what `save_state` wrote."""
    state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu", weights_only=True)
    set_optimizer_state_dict(student, optimizer.optimizer, state["optimizer"], options=WHOLE)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
