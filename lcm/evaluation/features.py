"""Reference pictures, CLIP, and the feature networks of the Frechet distance."""

import importlib.util
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lcm.data.config import DataConfig
from lcm.data.pictures import Unusable, open_picture, transform
from lcm.data.shards import Problem, expand_shards, read_shard
from lcm.data.tally import describe
from lcm.errors import UserError, first_line
from lcm.models.loading import load_pretrained
from lcm.options.choices import PICTURE_FORMATS
from lcm.secrets import redact

logger = logging.getLogger(__name__)

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:  # transformers 4 has only this one
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


def reference_pictures(source: str, resolution: int, limit: int | None, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield up to `limit` pictures of a folder (and its subfolders, by name), or of shards, as (B, 3, H, W) uint8.

    Each is resized to `resolution` pixels and cropped at its centre, as in training. Pictures that cannot be read are
    skipped and logged. Raises UserError if fewer than two are left.
    """
    config = DataConfig(shards=(), batch_size=batch_size, resolution=resolution, seed=0, center_crop=True)
    skipped: Counter[str] = Counter()
    rng = np.random.default_rng(0)  # not used with `center_crop`

    def usable() -> Iterator[torch.Tensor]:
        for data in encoded_pictures(source):
            try:
                if isinstance(data, Problem):
                    raise Unusable(data.reason)
                yield torch.from_numpy(transform(open_picture(data), config, rng)[0].copy())
            except Unusable as error:
                skipped[error.args[0]] += 1

    pictures, count = itertools.islice(usable(), limit), 0
    while batch := list(itertools.islice(pictures, batch_size)):
        count += len(batch)
        yield torch.stack(batch)
    if skipped:
        logger.warning("--reference_images: skipped: %s", describe(skipped))
    if count < 2:
        raise UserError(
            f"--reference_images: {redact(source)!r} holds {count} usable pictures; allowed: a folder or shards with "
            f"at least 2 (.{', .'.join(PICTURE_FORMATS)})"
        )


def encoded_pictures(source: str) -> Iterator[bytes | Problem]:
    """Yield the bytes of every picture in a folder or in shards, and a Problem for each sample without one."""
    if os.path.isdir(source):
        for path in sorted(Path(source).rglob("*")):
            if path.suffix.lower().removeprefix(".") in PICTURE_FORMATS:
                yield path.read_bytes()
        return
    for sample in itertools.chain.from_iterable(map(read_shard, expand_shards([source], "--reference_images"))):
        if isinstance(sample, Problem):
            yield sample
        else:
            found = (sample[suffix] for suffix in PICTURE_FORMATS if sample.get(suffix) is not None)
            yield next(found, Problem("no picture", sample["__key__"]))


class Clip:
    """A CLIP model of transformers with its tokenizer and picture processor, in float32."""

    def __init__(self, name: str, device: torch.device, cache_dir: str | None = None):
        load: dict[str, Any] = {"option": "--clip_model", "source": name, "cache_dir": cache_dir}
        try:
            model = load_pretrained(transformers.CLIPModel, dtype=torch.float32, **load)
        except UserError as error:
            raise UserError(f"{error}; --clip_model none leaves the CLIP score out") from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = load_pretrained(transformers.CLIPTokenizer, **load)
        self.processor = load_pretrained(CLIPImageProcessorPil, **load)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """The embeddings (B, D) of pictures (B, 3, H, W) uint8, not normalised."""
        pixels = self.processor(list(images.numpy()), input_data_format="channels_first", return_tensors="pt")
        pooled = self.model.vision_model(pixels["pixel_values"].to(self.model.device)).pooler_output
        return self.model.visual_projection(pooled)

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """The embeddings (B, D) of B strings, cut to the model's maximum length; not normalised."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.text_projection(self.model.text_model(**inputs.to(self.model.device)).pooler_output)


def load_function(option: str, text: str) -> Callable[..., Any]:
    """The function `path/to/file.py:name` or `module:name`. Raises UserError if there is none.

    A file may import from its own folder, a module from the current folder.
    """
    source, _, name = text.rpartition(":")
    is_file = source.endswith(".py")
    sys.path.append(os.path.dirname(os.path.abspath(source)) if is_file else os.getcwd())
    try:
        if is_file:
            spec: Any = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # the file may raise anything
        raise UserError(f"{option}: cannot load {text!r}: {first_line(error)}") from error
    if not callable(function):
        raise UserError(f"{option}: {text!r} is not a function")
    return function


def load_feature_network(
    name: str, clip: Clip | None, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function of --feature_network: pictures (B, 3, H, W) uint8 to features (B, F); None for `none`.

    A torch module is moved to `device` and gets pictures there; a function gets them on the CPU. Raises UserError.
    """
    if name == "none":
        return None
    if name == "clip" and clip:
        return clip.image_features
    if name == "inception":
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            network = FrechetInceptionDistance(feature=2048).inception
        except Exception as error:  # its weights are downloaded
            raise UserError(f"--feature_network: cannot load inception: {first_line(error)}") from error
    else:
        network = load_function("--feature_network", name)
    if isinstance(network, torch.nn.Module):
        module = network.eval().to(device)
        return lambda images: module(images.to(device))
    return network


@torch.no_grad()
def features_of(
    images: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor], batch_size: int
) -> torch.Tensor:
    """The features (N, F) float32 of pictures, on the CPU. Raises UserError if `network` returns anything else."""
    parts = []
    for batch in images.split(batch_size):
        features = network(batch)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(batch):
            shape = getattr(features, "shape", None)
            found = f"shape {tuple(shape)}" if shape is not None else type(features).__name__
            raise UserError(f"--feature_network: {len(batch)} pictures gave {found}; allowed: a tensor (B, F)")
        parts.append(features.float().cpu())
    return torch.cat(parts)
