"""Shards that are written here: tar files in the layout that img2dataset and WebDataset use."""

import io
import json
import os
from collections.abc import Iterable
from typing import Any

import webdataset
from PIL import Image

from lcm.options.choices import PICTURE_FORMATS
from lcm.storage import PARTIAL, publish

# Options of Pillow for each format. Colours are kept at full resolution.
ENCODING: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {"optimize": True},
    "WEBP": {"quality": 95},
}


def encode_picture(picture: Image.Image, suffix: str) -> bytes:
    """A picture in the format of a suffix in PICTURE_FORMATS."""
    buffer, kind = io.BytesIO(), PICTURE_FORMATS[suffix]
    picture.save(buffer, format=kind, **ENCODING[kind])
    return buffer.getvalue()


def write_shard(path: str, samples: Iterable[tuple[str, Image.Image, str, dict[str, Any]]], suffix: str) -> None:
    """Write (key, picture, caption, entries of the JSON) as KEY.suffix, KEY.txt and KEY.json to a tar file.

    The JSON has the entries, `key`, `caption`, and the picture's `width`, `height`, `original_width` and
    `original_height`, as img2dataset names them. The file has this name only once it is complete. The same samples
    make the same bytes.
    """
    with open(path + PARTIAL, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as shard:
        for key, picture, caption, entries in samples:
            width, height = picture.size
            sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
            about = {"key": key, "caption": caption, **sizes, **entries}
            shard.write(
                {
                    "__key__": key,
                    suffix: encode_picture(picture, suffix),
                    "txt": caption.encode(),
                    "json": json.dumps(about, ensure_ascii=False).encode(),
                }
            )
    publish(path + PARTIAL, path)


def remove_unfinished(folder: str) -> None:
    """Remove the shards in `folder` that a killed run left unfinished."""
    for name in os.listdir(folder):
        if name.endswith(f".tar{PARTIAL}"):
            os.remove(os.path.join(folder, name))
