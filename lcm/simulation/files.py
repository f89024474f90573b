"""Files of a simulated run. A file of tensors holds a key; shapes, dtypes and devices are kept in this process.

So the project's own code saves, renames, lists and loads the files of checkpoints and results. As in real runs a
tensor goes to the host to be saved. JSON and other small files are written as ever.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import diffusers.models.model_loading_utils as loading_utils
import huggingface_hub.serialization._torch as sharding
import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from lcm.models import comfyui, lora_files
from lcm.simulation.device import SimulatedCuda

KEY = "file of a simulated run: "
kept: dict[str, Any] = {}  # {content of a file: what was saved}


@dataclass(frozen=True)
class Saved:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def load(self, device: Any = None) -> torch.Tensor:
        """A tensor like the saved one, on its device or another."""
        return torch.empty(self.shape, dtype=self.dtype, device=device or self.device)


def describe(tensor: torch.Tensor) -> Saved:
    tensor.detach().to("cpu")  # for the ledger
    return Saved(tuple(tensor.shape), tensor.dtype, tensor.device)


def write(content: Any, path: Any) -> None:
    key = KEY + uuid.uuid4().hex
    with open(path, "w", encoding="utf-8") as file:
        file.write(key)
    kept[key] = content


def read(path: Any) -> Any:
    """What `write` was given. Raises ValueError for any other file."""
    with open(path, "rb") as file:
        key = file.read(len(KEY) + 32).decode(errors="replace")
    if key not in kept:
        raise ValueError(f"a simulated run cannot read {path}, which it has not written")
    return kept[key]


def save(value: Any, path: Any, *_: Any, **__: Any) -> None:
    """In place of torch.save. Tensors that are not fake, such as random states, are kept with their values."""
    write(tree_map_only(FakeTensor, describe, value), path)


def load(path: Any, map_location: Any = None, **_: Any) -> Any:
    """In place of torch.load."""
    return tree_map_only(Saved, lambda tensor: tensor.load(map_location), read(path))


def save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
    """In place of safetensors' function, which refuses tensors that are not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    write({name: describe(tensor) for name, tensor in tensors.items()}, filename)


def load_file(filename: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """In place of safetensors' function; all tensors are loaded to `device`."""
    return {name: tensor.load(device) for name, tensor in read(filename).items()}


def set_tensor(module: torch.nn.Module, name: str, device: Any, value: torch.Tensor, **__: Any) -> None:
    """In place of accelerate's `set_module_tensor_to_device`, which cannot make parameters of fake tensors."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, torch.nn.Parameter(value.to(device)))


def patch_files(device: SimulatedCuda) -> None:
    """Until the device is left, files of tensors are those of this module."""
    device.patch(torch, "save", save)
    device.patch(torch, "load", load)
    device.patch(loading_utils, "set_module_tensor_to_device", set_tensor)
    # Weights of more than 10 GB are split. Without an address all tensors of a size would count as one.
    device.patch(sharding, "storage_ptr", lambda tensor: tensor.untyped_storage()._cdata)
    for module in (safetensors.torch, lora_files):
        device.patch(module, "load_file", load_file)
    for module in (safetensors.torch, lora_files, comfyui):
        device.patch(module, "save_file", save_file)
