"""From a shard's bytes to one training sample: tar members, picture, caption, JSON, filters, resize and crop.

Nothing is ever unpickled: of a sample, only its picture, caption and JSON are read, each by its own parser. Nothing is
skipped silently: what cannot be used becomes a `Problem`, or raises `Unusable`, and is counted in `lcm_data`.
"""

import contextlib
import io
import json
import tarfile
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from webdataset.tariterators import base_plus_ext, group_by_keys

from lcm.data.commands import open_url
from lcm.data.http import HttpFile

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "text", "caption")
MAX_ASPECT_RATIO = 16  # resizing a thinner picture to the resolution would take gigabytes
MAX_PICTURE_BYTES, MAX_TEXT_BYTES = 1 << 28, 1 << 20  # a tokenizer takes a second for a megabyte

INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest is already the exact one
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Problem:
    """A sample, or a shard, that cannot be used."""

    reason: str  # a few words, the same for all of a kind
    detail: str


class Unusable(Exception):
    """Raised while a sample is decoded; carries the reason under which it is counted."""


# Shards to samples.


@dataclass(frozen=True)
class TooLarge:
    """Stands for a member of a size that no picture or text has; it was not read."""

    size: int  # bytes


def max_size(name):
    """The most bytes that are read of a member; 0 for all that no sample is made of."""
    suffix = (base_plus_ext(name)[1] or "").lower()
    if suffix in IMAGE_SUFFIXES:
        return MAX_PICTURE_BYTES
    return MAX_TEXT_BYTES if suffix in (*CAPTION_SUFFIXES, "json") else 0


class TarHeader(tarfile.TarInfo):
    """A header that, unlike tarfile's own, never takes a broken or a missing one for the end of the tar."""

    @classmethod
    def frombuf(cls, buffer, *args):
        try:
            return super().frombuf(buffer, *args)
        except tarfile.HeaderError as error:
            if buffer == bytes(tarfile.BLOCKSIZE):  # the end, as it should be
                raise
            raise tarfile.ReadError(str(error)) from None


class ShardUnreadable(Exception):
    """Raised where the rest of a shard cannot be read; carries why."""


@contextlib.contextmanager
def broken_shard():
    """For calls of libraries alone: what a broken shard makes them raise becomes ShardUnreadable.

    tarfile raises nearly anything, TypeError and OverflowError among it. Running out of memory is no fault of a shard.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ShardUnreadable(str(error) or type(error).__name__) from error


def tar_members(stream, url):
    """Yield the files of a tar as `group_by_keys` takes them; those that no sample is made of have None for data."""
    with broken_shard():
        tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=TarHeader)  # noqa: SIM115 (the caller's)
    while True:
        with broken_shard():
            member = tar.next()
        if member is None:
            return
        tar.members.clear()
        if not member.isreg():
            continue
        limit = 0 if member.issparse() else max_size(member.name)  # a sparse file may unpack to any size
        data = TooLarge(member.size) if member.size > limit > 0 else None
        if limit and member.size <= limit:
            with broken_shard():
                data = tar.extractfile(member).read()
        yield {"fname": member.name, "data": data, "__url__": url}


@contextlib.contextmanager
def open_shard(url, timeout):
    """A shard's bytes as a stream: HttpFile for http(s)://, else what webdataset opens. `timeout` is in seconds."""
    is_http = url.lower().startswith(("http://", "https://"))
    with contextlib.ExitStack() as stack:
        with broken_shard():
            if is_http:
                opened = io.BufferedReader(HttpFile(url, timeout), buffer_size=1 << 20)
            else:
                opened = open_url(url, timeout)
            stream = stack.enter_context(opened)
        yield stream
        with broken_shard():  # the command may have failed
            stack.close()


def read_shard(url, timeout=300.0):
    """Yield the samples of one shard as dicts of bytes, and a Problem for each thing in it that cannot be read."""
    problems = []

    def note_duplicate(error):
        problems.append(Problem("duplicate member", f"{url}: {error.args[0]}"))
        return True

    try:
        with open_shard(url, timeout) as stream:
            for sample in group_by_keys(tar_members(stream, url), handler=note_duplicate):
                yield from problems
                problems.clear()
                yield sample
    except ShardUnreadable as error:
        problems.append(Problem("shard unreadable or cut short", f"{url}: {error}"))
    yield from problems


# Samples to pictures and captions.


def open_image(data):
    """Decode a picture as 8-bit RGB: upright after EXIF, 16-bit greys scaled, transparency over white.

    Raises Unusable for anything that is not one whole picture, and for what Pillow holds for a decompression bomb;
    MemoryError is no fault of the picture's, and is raised.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise Unusable("picture too thin", f"{image.width} x {image.height}")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise Unusable("picture too large", str(error)) from None
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise Unusable("picture unreadable", str(error) or type(error).__name__) from None


def read_caption(sample, info, caption_key, rng):
    """The sample's caption: its text file, else `caption_key` of the JSON (one of them, if that is a list)."""
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
    except UnicodeEncodeError as error:  # half a surrogate pair, of a caption that was cut: no tokenizer takes it
        raise Unusable("caption is not UTF-8", str(error)) from None
    return caption.strip()


def read_json(sample):
    """The sample's JSON object, {} if it has none."""
    if sample.get("json") is None:
        return {}
    try:
        info = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise Unusable("JSON unreadable", str(error)) from None
    if not isinstance(info, dict):
        raise Unusable("JSON unreadable", f"it holds a {type(info).__name__}, not an object")
    return info


def json_number(info, key):
    """A number below 2^31 in size under `key`, else Unusable."""
    value = info.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31:
        raise Unusable("JSON lacks a number", f"{key!r} is {value!r:.40}")
    return value


def transform(image, config, rng):
    """Resize the shorter side to the resolution, crop a square, perhaps mirror it.

    Returns ((3, H, W) uint8 array, (crop top, crop left)), the crop in pixels of the picture as resized and mirrored.
    """
    resolution, shorter = config.resolution, min(image.size)
    width, height = (int(resolution * side / shorter) for side in image.size)  # rounded as torchvision's `resize`
    if (width, height) != image.size:
        image = image.resize((width, height), INTERPOLATION[config.interpolation_type])
    if config.center_crop:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        left, top = rng.integers(width - resolution + 1), rng.integers(height - resolution + 1)
    image = image.crop((left, top, left + resolution, top + resolution))
    if config.random_flip and rng.random() < 0.5:
        image, left = ImageOps.mirror(image), width - resolution - left
    return np.asarray(image).transpose(2, 0, 1), (int(top), int(left))


def decode_sample(sample, config, rng):
    """Turn a sample's bytes into what one row of a batch needs. Raises Unusable.

    Returns a dict: `pixels` (3, H, W) uint8, `caption` str, `original_size` (height, width) and `crop` (top, left) in
    pixels, and `unscored`: whether the filter on watermarks let it through because its JSON has no `pwatermark`.
    """
    for name, data in sample.items():
        if isinstance(data, TooLarge):
            raise Unusable("member too large", f".{name} has {data.size} bytes")
    suffix = next((s for s in IMAGE_SUFFIXES if sample.get(s) is not None), None)
    if suffix is None:
        found = ", ".join(f".{name}" for name in sample if not name.startswith("__"))
        raise Unusable("no picture", f"there is {found}, but no .{', .'.join(IMAGE_SUFFIXES)}")
    info = read_json(sample)
    caption = read_caption(sample, info, config.caption_key, rng)
    is_scored = info.get("pwatermark") is not None
    if is_scored and config.max_watermark_probability is not None:
        probability = json_number(info, "pwatermark")
        if probability > config.max_watermark_probability:
            raise Unusable("watermark too probable", f"{probability:.2f}")
    image = open_image(sample[suffix])
    width = json_number(info, config.width_key) if config.width_key else image.width
    height = json_number(info, config.height_key) if config.height_key else image.height
    if min(width, height) < config.min_image_size:
        raise Unusable("smaller than --min_image_size", f"{width} x {height}")
    if rng.random() < config.proportion_empty_prompts:
        caption = ""
    pixels, crop = transform(image, config, rng)
    unscored = sample.get("json") is not None and not is_scored and config.max_watermark_probability is not None
    return {
        "pixels": pixels,
        "caption": caption,
        "original_size": (int(height), int(width)),
        "crop": crop,
        "unscored": unscored,
    }


def collate(rows):
    """Join decoded samples into a batch of tensors and lists; sizes and crops are (B, 2) int64."""
    return {
        "pixels": torch.from_numpy(np.stack([row["pixels"] for row in rows])),
        "captions": [row["caption"] for row in rows],
        "original_sizes": torch.tensor([row["original_size"] for row in rows]),
        "crops": torch.tensor([row["crop"] for row in rows]),
    }
