"""Folders of shards that are written here: tar files in the layout that img2dataset and WebDataset use."""

import io
import json
import os
from collections.abc import Iterable
from typing import Any

import webdataset
from accelerate import PartialState
from PIL import Image

from lcm.data.tally import Tally
from lcm.errors import UserError, first_line
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


def write_tar(path: str, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples, {"__key__": key, suffix: bytes, ...}, to a tar file.

    The file has this name only once it is complete. The same samples make the same bytes. Raises UserError if the disk
    is full.
    """
    try:
        with open(path + PARTIAL, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as shard:
            for sample in samples:
                shard.write(sample)
        publish(path + PARTIAL, path)
    except OSError as error:
        raise UserError(f"--output_dir: {first_line(error)}") from error


def make_captioned(
    key: str,
    suffix: str,
    data: bytes,
    captions: list[str],
    size: tuple[int, int],
    original_size: tuple[int, int],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """The members of one sample: KEY.suffix with the encoded picture, KEY.json, and KEY.txt if there is one caption.

    The JSON has the entries, `key`, `caption` (a list, if there are several), and `width`, `height`, `original_width`
    and `original_height`, as img2dataset names them. Sizes are (width, height) in pixels.
    """
    about = {
        "key": key,
        "caption": captions[0] if len(captions) == 1 else captions,
        "width": size[0],
        "height": size[1],
        "original_width": original_size[0],
        "original_height": original_size[1],
    }
    about |= {name: value for name, value in entries.items() if name not in about}
    text = {"txt": captions[0].encode()} if len(captions) == 1 else {}
    info = json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")
    return {"__key__": key, suffix: data, **text, "json": info}


def write_shard(path: str, samples: Iterable[tuple[str, Image.Image, str, dict[str, Any]]], suffix: str) -> None:
    """Write (key, picture, caption, entries of the JSON) with `make_captioned`, pictures as KEY.suffix."""
    write_tar(path, (
        make_captioned(key, suffix, encode_picture(picture, suffix), [caption], picture.size, picture.size, entries)
        for key, picture, caption, entries in samples
    ))  # fmt: skip


def shard_path(folder: str, number: int) -> str:
    """The path of a shard in a folder."""
    return os.path.join(folder, f"{number:05d}.tar")


def counts_path(shard: str) -> str:
    """The JSON file beside a shard that says what is in it."""
    return os.path.splitext(shard)[0] + ".json"


def write_counts(shard: str, tally: Tally, more: dict[str, Any]) -> None:
    """Write beside a shard how many samples it has, how many were skipped, and more."""
    about = {"samples": tally.used, "skipped": dict(tally.skipped), **more}
    with open(counts_path(shard), "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)


def read_counts(shards: Iterable[str]) -> Tally:
    """The sum of what `write_counts` wrote beside these shards."""
    total = Tally()
    for shard in shards:
        with open(counts_path(shard), encoding="utf-8") as file:
            about = json.load(file)
        total.used += about["samples"]
        total.skipped.update(about["skipped"])
    return total


def remove_unfinished(folder: str) -> None:
    """Remove the shards in `folder` that a killed run left unfinished."""
    for name in os.listdir(folder):
        if name.endswith(f".tar{PARTIAL}"):
            os.remove(os.path.join(folder, name))


def remove_shards(folder: str, name: str, paths: Iterable[str]) -> None:
    """Remove shards, their counts, and the record of this name in their folder."""
    for path in paths:
        os.remove(path)
        os.remove(counts_path(path))
    os.remove(os.path.join(folder, name))


def check_record(folder: str, name: str, record: dict[str, Any], may_change: Iterable[str] = ()) -> None:
    """Make a folder with its record, a JSON file of this name. Raises UserError if the shards in it were made with
    other options; those that `may_change` do not count."""
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                before = json.load(file)
            for option, value in record.items():
                if option not in may_change and before.get(option) != value:
                    raise UserError(
                        f"--{option}: {value!r} given, but the shards in {folder!r} were made with "
                        f"{before.get(option)!r}; allowed: the same, or another --output_dir"
                    )
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, ensure_ascii=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--output_dir: {first_line(error)}") from error


def missing_shards(
    folder: str, name: str, record: dict[str, Any], may_change: Iterable[str], total: int, shard_size: int
) -> tuple[list[str], dict[str, range]]:
    """(the paths of all shards of `total` pictures, {path: numbers of its pictures} of those that are missing and are
    this process's to write). All processes of a launch call it. Raises UserError as `check_record` does."""
    state = PartialState()
    if state.is_main_process:
        check_record(folder, name, record, may_change)
        remove_unfinished(folder)
    state.wait_for_everyone()
    numbers = [range(first, min(first + shard_size, total)) for first in range(0, total, shard_size)]
    shards = {shard_path(folder, number): part for number, part in enumerate(numbers)}
    missing = [path for path in shards if not os.path.exists(path)]
    state.wait_for_everyone()  # before any is written
    if missing:
        state.print(
            f"{folder}: {len(shards) - len(missing)} of {len(shards)} shards are there. Making {len(missing)}."
        )
    return list(shards), {path: shards[path] for path in missing[state.process_index :: state.num_processes]}


def brace_range(folder: str, count: int) -> str:
    """The `count` shards of a folder, as --train_shards_path_or_url takes them."""
    return os.path.join(folder, f"{{00000..{count - 1:05d}}}.tar" if count > 1 else "00000.tar")
