"""Parts of a pretrained model, from a folder or the Hub; any failure to load them becomes a UserError."""

import difflib
import json
import os
from argparse import Namespace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from packaging import version
from transformers.utils import cached_file

from lcm.errors import UserError, first_line

TEACHER = "--pretrained_teacher_model"
# The name of this argument in diffusers' `from_pretrained`, which has `dtype` since 0.40.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.40") else "torch_dtype"


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen weights: that of the mixed precision; float32 without one, and for fp16 on a CPU."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def close_folder(source: str) -> str:
    """A question, for the end of an error, if `source` is no folder and one beside it has nearly this name."""
    parent = os.path.dirname(source) or "."
    if os.path.isdir(source) or not os.path.isdir(parent):
        return ""
    folders = [name for name in os.listdir(parent) if os.path.isdir(os.path.join(parent, name))]
    close = difflib.get_close_matches(os.path.basename(source), folders, n=1)
    return f" Did you mean the folder {os.path.join(os.path.dirname(source), close[0])!r}?" if close else ""


def load_pretrained(loader: Any, option: str, source: str, **kwargs: Any) -> Any:
    """`loader.from_pretrained(source, **kwargs)`.

    Raises UserError, whose message begins with `option`, for any failure: a wrong folder, a broken file, no network,
    no access, missing weights.
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
        raise UserError(f"{option}: cannot load {where}: {first_line(error)}{close_folder(source)}") from error
    if has_weights:
        part, info = part
        if info["missing_keys"]:  # the libraries would initialise them at random
            missing = sorted(info["missing_keys"])
            raise UserError(f"{option}: cannot load {where}: {len(missing)} weights are missing, such as {missing[0]}")
    return part


def load_part(loader: Any, args: Namespace, subfolder: str | None, path: str | None = None, **kwargs: Any) -> Any:
    """`load_pretrained` for one part of the teacher, or for the VAE at `path`. Raises UserError."""
    if path is None:
        kwargs["revision"] = args.teacher_revision or args.revision
    option = "--pretrained_vae_model_name_or_path" if path else TEACHER
    source = path or args.pretrained_teacher_model
    return load_pretrained(loader, option, source, subfolder=subfolder, cache_dir=args.cache_dir, **kwargs)


def load_config(loader: Any, args: Namespace, subfolder: str | None = None) -> dict[str, Any]:
    """The configuration file of one part of the teacher, or its `model_index.json`, as a dict. Raises UserError."""
    where = f"{args.pretrained_teacher_model!r}, part {subfolder or 'model_index.json'!r}"
    try:
        config = loader.load_config(
            args.pretrained_teacher_model,
            subfolder=subfolder,
            cache_dir=args.cache_dir,
            revision=args.teacher_revision or args.revision,
        )
    except Exception as error:
        close = close_folder(args.pretrained_teacher_model)
        raise UserError(f"{TEACHER}: cannot load {where}: {first_line(error)}{close}") from error
    if not isinstance(config, dict):
        raise UserError(f"{TEACHER}: cannot load {where}: its JSON is a {type(config).__name__}, not an object")
    return config


def weight_files(args: Namespace, subfolder: str | None, path: str | None = None) -> list[str]:
    """The local files with the weights of one part of the teacher, or of the VAE at `path`; those of a model on the
    Hub are downloaded. Raises UserError if there are none."""
    source, revision = path or args.pretrained_teacher_model, None if path else args.teacher_revision or args.revision
    place = {"subfolder": subfolder or "", "cache_dir": args.cache_dir, "revision": revision}

    def find(name: str) -> str | None:
        return cached_file(source, name, **place, _raise_exceptions_for_missing_entries=False)

    option = "--pretrained_vae_model_name_or_path" if path else TEACHER
    try:
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for suffix in (".safetensors", ".bin"):
                whole = find(stem + suffix)
                if whole is not None:
                    return [whole]
                index = find(f"{stem}{suffix}.index.json")
                if index is not None:
                    with open(index, encoding="utf-8") as file:
                        names = sorted(set(json.load(file)["weight_map"].values()))
                    return [found for found in map(find, names) if found is not None]
    except Exception as error:
        raise UserError(f"{option}: cannot read the weights in {source!r}: {first_line(error)}") from error
    raise UserError(f"{option}: {source!r}, part {subfolder!r}, has no weights")
