"""Frozen networks that wait in host memory while the GPU does not need them."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class OnDevice(contextlib.AbstractContextManager["OnDevice"]):
    """Holds the weights of frozen networks on `device` while it is entered. May be entered again meanwhile.

    `name` is what the log calls them. If `is_offloaded`, they lie in host memory otherwise, pinned for a GPU, else
    nothing happens. The host does not wait for the copies. diffusers' group offloading needs less memory during a
    forward pass, where the peak is not, but it waits for each layer.
    """

    def __init__(self, name: str, networks: Iterable[torch.nn.Module], is_offloaded: bool, device: torch.device):
        self.device, self.depth = device, 0
        self.weights: list[tuple[dict[str, Any], str, torch.Tensor]] = []  # of a module: its table, a key, the weight
        if is_offloaded:
            for module in (module for network in networks for module in network.cpu().modules()):
                tables: list[dict[str, Any]] = [module._parameters, module._buffers]
                for table in tables:
                    for key, tensor in table.items():
                        if tensor is not None:
                            host = tensor.detach().pin_memory() if device.type == "cuda" else tensor.detach()
                            table[key] = like(tensor, host)
                            self.weights.append((table, key, table[key]))
            size = sum(weight.numel() * weight.element_size() for *_, weight in self.weights)
            logger.info("In host memory while not used: %s, %.3g GB", name, size / 1e9)

    def __enter__(self) -> "OnDevice":
        self.depth += 1
        if self.depth == 1:
            for table, key, tensor in self.weights:
                table[key] = like(tensor, tensor.detach().to(self.device, non_blocking=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            for table, key, tensor in self.weights:
                table[key] = tensor

    def wait_for_copies(self) -> None:
        """Wait until the host can read what was last written to its weights."""
        if self.weights and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def like(original: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` as a parameter, if the original is one."""
    is_parameter = isinstance(original, torch.nn.Parameter)
    return torch.nn.Parameter(values, requires_grad=False) if is_parameter else values


def while_called(name: str, network: torch.nn.Module, is_offloaded: bool, device: torch.device) -> OnDevice:
    """An OnDevice for a network that is entered for each of its forward passes."""
    on_device = OnDevice(name, [network], is_offloaded, device)

    def enter(*_: object) -> None:  # what it returned would replace the inputs
        on_device.__enter__()

    if on_device.weights:
        network.register_forward_pre_hook(enter)
        network.register_forward_hook(on_device.__exit__, always_call=True)
    return on_device
