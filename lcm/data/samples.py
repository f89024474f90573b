"""From the bytes of a sample to one row of a batch: picture, caption, JSON, filters.

A sample that cannot be used raises `Unusable`, and is counted.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lcm.cache import EMBEDDING, SUFFIX, unpack_sample, vae_factor
from lcm.data.config import DataConfig
from lcm.data.pictures import Picture, Unusable, open_picture, transform
from lcm.data.shards import Problem, Sample, TooLarge
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS
from lcm.options.shapes import covering_size, nearest_shape

FOR_DEVICE = {"pixels", "moments", "is_empty", *EMBEDDING}  # the tensors of a batch that the device needs


def read_caption(sample: Sample, info: dict[str, Any], caption_key: str, rng: np.random.Generator) -> str:
    """The sample's caption: its text file, else `caption_key` of the JSON (a random one, if that is a list).

    Raises Unusable.
    """
    for suffix in CAPTION_SUFFIXES:
        if sample.get(suffix) is not None:
            try:
                return sample[suffix].decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise Unusable("caption is not UTF-8", str(error)) from None
    caption = info.get(caption_key)
    if isinstance(caption, list) and caption:
        caption = caption[rng.integers(len(caption))]
    if not isinstance(caption, str):
        raise Unusable("no caption", f"no .txt, .text, .caption, and no text under {caption_key!r} in a .json")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, at the end of a caption that was cut
        raise Unusable("caption is not UTF-8", str(error)) from None
    return caption.strip()


def read_json(sample: Sample) -> dict[str, Any]:
    """The sample's JSON object, {} without one. Raises Unusable."""
    if sample.get("json") is None:
        return {}
    try:
        info = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise Unusable("JSON unreadable", str(error)) from None
    if not isinstance(info, dict):
        raise Unusable("JSON unreadable", f"it is a {type(info).__name__}, not an object")
    return info


def json_number(info: dict[str, Any], key: str) -> int | float:
    """The number under `key`. Raises Unusable unless its magnitude is below 2^31."""
    value = info.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31:
        raise Unusable("JSON lacks a number", f"{key!r} is {value!r:.40}")
    return value


def as_problem(sample: Sample, error: Unusable) -> Problem:
    """Why a sample cannot be used, and which one it is."""
    reason, detail = error.args
    return Problem(reason, f"{sample['__url__']}: {sample['__key__']}: {detail}")


def check_watermark(sample: Sample, info: dict[str, Any], config: DataConfig) -> bool:
    """Whether a sample passes the watermark filter only because its JSON has no `pwatermark`. Raises Unusable."""
    is_scored = info.get("pwatermark") is not None
    if is_scored and config.max_watermark_probability is not None:
        probability = json_number(info, "pwatermark")
        if probability > config.max_watermark_probability:
            raise Unusable("watermark too probable", f"{probability:.2f}")
    return sample.get("json") is not None and not is_scored and config.max_watermark_probability is not None


def check_size(width: float, height: float, config: DataConfig) -> None:
    """Raise Unusable for a picture that is too small."""
    if min(width, height) < config.min_image_size:
        raise Unusable("smaller than --min_image_size", f"{width} x {height}")
    if width * height < config.min_image_area * 1e6:
        raise Unusable("smaller than --min_image_area", f"{width} x {height}")


@dataclass(frozen=True)
class Captioned:
    """A picture that has passed the filters."""

    picture: Picture
    caption: str
    original_size: tuple[int, int]  # height, width
    unscored: bool  # passed the watermark filter only because its JSON has no `pwatermark`


def read_sample(sample: Sample, config: DataConfig, rng: np.random.Generator) -> Captioned:
    """The picture and the caption in the bytes of a sample. Raises Unusable."""
    for name, data in sample.items():
        if isinstance(data, TooLarge):
            raise Unusable("member too large", f".{name} has {data.size} bytes")
    suffix = next((s for s in PICTURE_FORMATS if sample.get(s) is not None), None)
    if suffix is None:
        found = ", ".join(f".{name}" for name in sample if not name.startswith("__"))
        reason = "cached, unlike the first shard" if SUFFIX in sample else "no picture"
        raise Unusable(reason, f"there is {found}, but no .{', .'.join(PICTURE_FORMATS)}")
    info = read_json(sample)
    caption = read_caption(sample, info, config.caption_key, rng)
    unscored = check_watermark(sample, info, config)
    shapes = config.shapes
    picture = open_picture(sample[suffix], lambda size: covering_size(nearest_shape(shapes, size), size))
    width = json_number(info, config.width_key) if config.width_key else picture.size[0]
    height = json_number(info, config.height_key) if config.height_key else picture.size[1]
    check_size(width, height, config)
    return Captioned(picture, caption, (int(height), int(width)), unscored)


def decode_sample(sample: Sample, config: DataConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Turn the bytes of a sample into one row of a batch. Raises Unusable.

    Returns a dict: `pixels` (3, H, W) uint8, `caption` str, `original_size` (height, width), `crop` (top, left) and
    `target_size` (H, W) in pixels, and `unscored`: whether it passed the watermark filter only because its JSON has no
    `pwatermark`.
    """
    if config.origin is not None:
        return decode_cached(sample, config, rng)
    read = read_sample(sample, config, rng)
    caption = "" if rng.random() < config.proportion_empty_prompts else read.caption
    pixels, crop = transform(read.picture, config, rng)
    about = {"caption": caption, "original_size": read.original_size, "crop": crop, "unscored": read.unscored}
    return {"pixels": pixels, "target_size": pixels.shape[1:], **about}


def decode_cached(sample: Sample, config: DataConfig, rng: np.random.Generator) -> dict[str, Any]:
    """As `decode_sample`, for a cached sample, of which one crop is picked. Raises Unusable.

    Instead of `pixels` the row has `moments` (2C, h, w), the embedding (`hidden_states` and for SDXL `pooled`), and
    `is_empty`: whether the caption is to be replaced by the empty one.
    """
    data, info = sample.get(SUFFIX), read_json(sample)
    if not isinstance(data, bytes):
        raise Unusable("not cached", f"there is no .{SUFFIX}, unlike in the first shard")
    try:
        assert config.origin is not None
        tensors = unpack_sample(data, config.origin)
    except ValueError as error:
        raise Unusable("cached sample unreadable, or of another origin", str(error)) from None
    caption = read_caption(sample, info, config.caption_key, rng)
    unscored = check_watermark(sample, info, config)
    height, width = tensors["original_size"].tolist()
    check_size(width, height, config)
    is_empty = bool(rng.random() < config.proportion_empty_prompts)
    moments = tensors.pop("moments")
    factor = vae_factor(config.origin)
    number = int(rng.integers(len(moments))) if len(moments) > 1 else 0
    return {
        "moments": moments[number],
        **{name: tensors[name] for name in EMBEDDING if name in tensors},
        "is_empty": torch.tensor(is_empty),
        "caption": "" if is_empty else caption,
        "original_size": (height, width),
        "crop": tuple(tensors["crops"][number].tolist()),
        "target_size": (factor * moments.shape[2], factor * moments.shape[3]),
        "unscored": unscored,
    }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Join B rows of `decode_sample` of one shape into a batch: `pixels` (B, 3, H, W) uint8 or what is cached in
    their place, `captions` a list of B strings, `original_sizes` and `crops` (B, 2) int64, `target_size` (H, W)."""
    batch = {
        "captions": [row["caption"] for row in rows],
        "original_sizes": torch.tensor([row["original_size"] for row in rows]),
        "crops": torch.tensor([row["crop"] for row in rows]),
        "target_size": rows[0]["target_size"],
    }
    if "pixels" in rows[0]:
        return {"pixels": torch.from_numpy(np.stack([row["pixels"] for row in rows])), **batch}
    names = [name for name, value in rows[0].items() if isinstance(value, torch.Tensor)]
    return {**{name: torch.stack([row[name] for row in rows]) for name in names}, **batch}
