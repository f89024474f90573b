"""Folders of shards that are written here: tar files in the layout that img2dataset and WebDataset use."""

import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import webdataset
from PIL import Image

from lcm.errors import UserError, first_line
from lcm.options.choices import PICTURE_FORMATS
from lcm.options.types import Options
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


def write_tar(path: str, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples, {"__key__": key, suffix: bytes, ...}, to a tar file.

    The file has this name only once it is complete. The same samples make the same bytes.
    """
    with open(path + PARTIAL, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as shard:
        for sample in samples:
            shard.write(sample)
    publish(path + PARTIAL, path)


def write_shard(path: str, samples: Iterable[tuple[str, Image.Image, str, dict[str, Any]]], suffix: str) -> None:
    """Write (key, picture, caption, entries of the JSON) as KEY.suffix, KEY.txt and KEY.json with `write_tar`.

    The JSON has the entries, `key`, `caption`, and the picture's `width`, `height`, `original_width` and
    `original_height`, as img2dataset names them.
    """

    def encoded() -> Iterator[dict[str, Any]]:
        for key, picture, caption, entries in samples:
            width, height = picture.size
            sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
            about = json.dumps({"key": key, "caption": caption, **sizes, **entries}, ensure_ascii=False)
            yield {
                "__key__": key,
                suffix: encode_picture(picture, suffix),
                "txt": caption.encode(),
                "json": about.encode(),
            }

    write_tar(path, encoded())


def remove_unfinished(folder: str) -> None:
    """Remove the shards in `folder` that a killed run left unfinished."""
    for name in os.listdir(folder):
        if name.endswith(f".tar{PARTIAL}"):
            os.remove(os.path.join(folder, name))


def check_record(args: Options, name: str, record: dict[str, Any], may_change: set[str]) -> None:
    """Make the output folder with its record, a JSON file of this name. Raises UserError if the shards in it were made
    with other options; those that `may_change` do not count."""
    path = os.path.join(args.output_dir, name)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                before = json.load(file)
            for option, value in record.items():
                if option not in may_change and before.get(option) != value:
                    raise UserError(
                        f"--{option}: {value!r} given, but the shards in {args.output_dir!r} were made with "
                        f"{before.get(option)!r}; allowed: the same, or another --output_dir"
                    )
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, ensure_ascii=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--output_dir: {first_line(error)}") from error


def brace_range(folder: str, count: int) -> str:
    """The `count` shards of a folder, as --train_shards_path_or_url takes them."""
    return os.path.join(folder, f"{{00000..{count - 1:05d}}}.tar" if count > 1 else "00000.tar")
