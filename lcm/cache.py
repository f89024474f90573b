"""Cached samples: what `precompute_lcm.py` stores, and the training scripts read, in place of a picture.

KEY.safetensors holds the tensors of one sample, and in its metadata what made them:

    moments        (V, 2C, h, w), mean and log-variance of the VAE's posterior for V crops of the picture
    crops          (V, 2) int32, top and left of each, in pixels of the resized picture
    original_size  (2,) int32, height and width in pixels
    hidden_states  (tokens, D), and for SDXL also pooled (P,): the caption's embedding

The first sample of each shard also has KEY.empty.safetensors, the embedding of the empty caption. Only safetensors
reads these bytes, so nothing in them can run code.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from lcm.errors import UserError, first_line

SUFFIX, EMPTY_SUFFIX = "safetensors", "empty.safetensors"
FORMAT = "lcm-cache-1"
BUCKETS = "aspect_ratio_buckets"  # an entry of an origin, but for squares
EMBEDDING = ("hidden_states", "pooled")

Origin = dict[str, str]  # what made a sample; the same for all samples of a run
Tensors = dict[str, torch.Tensor]


def pack(tensors: Tensors, origin: Origin) -> bytes:
    """Tensors and what made them as the bytes of a safetensors file, always in the same order."""
    about = {"origin": json.dumps(origin, sort_keys=True)}  # safetensors would write several entries in any order
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, about)


def unpack(data: bytes) -> tuple[Tensors, Origin]:
    """The reverse of `pack`. Raises ValueError for anything that is not a whole safetensors file with metadata."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        origin = json.loads(header["__metadata__"]["origin"])
    except Exception as error:  # safetensors raises its own kinds, and KeyError for unknown dtypes
        raise ValueError(first_line(error)) from None
    if not isinstance(origin, dict):
        raise ValueError(f"its origin is a {type(origin).__name__}, not an object")
    return tensors, origin


def unpack_sample(data: bytes, origin: Origin) -> Tensors:
    """The tensors of one sample that was made as `origin` says. Raises ValueError for others and for broken ones."""
    tensors, found = unpack(data)
    different = [name for name in sorted({*origin, *found}) if origin.get(name) != found.get(name)]
    if different:
        name = different[0]
        raise ValueError(f"{name} is {found.get(name)}, not {origin.get(name)}")
    expected = json.loads(origin["shapes"])
    moments = tensors.get("moments", torch.empty(0))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shapes["moments"] = shapes.get("moments", [0])[1:]
    crops = shapes.pop("crops", None)
    if origin.get(BUCKETS):
        allowed = [[side // vae_factor(origin) for side in shape] for shape in json_shapes(origin)]
        if shapes["moments"][1:] in allowed:
            expected["moments"] = [*expected["moments"][:1], *shapes["moments"][1:]]
    if shapes != expected or crops != [len(moments), 2] or not len(moments):
        raise ValueError(f"shapes are {shapes} and {crops} of the crops, not {expected}")
    floats = [moments, *(tensors[name] for name in EMBEDDING if name in tensors)]
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in floats):
        raise ValueError("a number is not finite")
    return tensors


def json_shapes(origin: Origin) -> list[list[int]]:
    """The shapes of the pictures, [height, width] in pixels, that were cut to --aspect_ratio_buckets."""
    return [[int(side) for side in shape.split(",")] for shape in origin[BUCKETS].split(";")]


def vae_factor(origin: Origin) -> int:
    """How many times a picture is as wide as its latents."""
    return int(origin["resolution"]) // json.loads(origin["shapes"])["moments"][-1]


def shapes_of(tensors: Tensors) -> str:
    """The entry `shapes` of an origin, for the tensors of one sample: without the number of its crops."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if name != "crops"}
    return json.dumps({**shapes, "moments": shapes["moments"][1:]}, sort_keys=True)


def sample_bytes(origin: Origin, crops: int = 1) -> int:
    """The bytes of a sample's moments, for so many crops, and of its embedding."""
    sizes = {name: math.prod(shape) for name, shape in json.loads(origin["shapes"]).items()}
    return getattr(torch, origin["dtype"]).itemsize * (sum(sizes.values()) + (crops - 1) * sizes["moments"])


def check_entries(origin: Origin) -> None:
    """Raise ValueError for what cannot be the origin of cached samples: another format, or an unreadable entry."""
    if origin.get("format") != FORMAT:
        raise ValueError(f"its format is {origin.get('format')}, not {FORMAT}")
    readers: dict[str, Callable[[Any], float]] = {
        "shapes": lambda _: sample_bytes(origin),
        "scaling_factor": float,
        "resolution": lambda _: vae_factor(origin),
    }
    if BUCKETS in origin:
        readers[BUCKETS] = lambda _: min(map(min, json_shapes(origin)))
    for name, read in readers.items():
        try:
            is_usable = 0 < read(origin[name]) < math.inf
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError, ZeroDivisionError):
            is_usable = False
        if not is_usable:
            raise ValueError(f"its metadata has {origin.get(name)!r:.40} as {name}")


@dataclass(frozen=True)
class Cache:
    """What the shards of a run have in common if they are cached."""

    origin: Origin
    empty: tuple[torch.Tensor, ...]  # the embedding of the empty caption: (tokens, D), and for SDXL (P,)

    def check(self, expected: Origin) -> None:
        """Raise UserError if these shards were made with another model, or other options, than `expected` has."""
        for name, value in {BUCKETS: "None", **expected}.items():
            found = self.origin.get(name, "None" if name == BUCKETS else "unknown")
            if found != value:
                what = {"vae": "VAE", "text_encoders": "text encoder", "family": "kind of model"}.get(name)
                given = f"with another {what} than this run's" if what else f"with --{name} {found}, not {value}"
                raise UserError(
                    f"--train_shards_path_or_url: these shards were cached {given}; allowed: the same, or the "
                    "original shards"
                )


def as_cache(first_sample: dict[str, Any]) -> Cache | None:
    """The Cache of a shard that begins with this sample; None if it is not cached. Raises UserError if broken."""
    data = first_sample.get(EMPTY_SUFFIX)
    if not isinstance(data, bytes):
        return None
    try:
        tensors, origin = unpack(data)
        check_entries(origin)
        if EMBEDDING[0] not in tensors:
            raise ValueError("it has no embedding of the empty caption")
        return Cache(origin, tuple(tensors[name] for name in EMBEDDING if name in tensors))
    except ValueError as error:
        raise UserError(f"--train_shards_path_or_url: {first_sample['__url__']}: {error}") from None


def content_hash(paths: list[str]) -> str:
    """SHA-256 over the contents of files, 16 hexadecimal digits of it."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.basename(path)} {os.path.getsize(path)} ".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
