"""Pictures with captions that are not in shards yet: a folder, or a data set for the library `datasets`."""

import csv
import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from lcm.data.pictures import Unusable
from lcm.errors import UserError, first_line
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS

METADATA = ("metadata.jsonl", "metadata.csv")  # as the library `datasets` calls them


@dataclass(frozen=True)
class Raw:
    """A picture as it lies in its source."""

    name: str  # where it comes from
    data: bytes
    captions: list[str]
    about: dict[str, Any] = field(default_factory=dict)  # what else is known, for the JSON


class Source(ABC):
    """Numbered pictures with captions.

    `options` are those that name the source, with something that changes if its contents do.
    """

    options: dict[str, str]

    @abstractmethod
    def __len__(self) -> int:
        """How many pictures there are."""

    @abstractmethod
    def read(self, number: int) -> Raw:
        """One picture. Raises Unusable."""

    def readers(self, numbers: range) -> Iterator[Callable[[], Raw]]:
        """For each of these pictures a function that reads it, or raises Unusable. Any thread may call it."""
        return (partial(self.read, number) for number in numbers)


def caption_list(value: Any, column: str) -> list[str]:
    """The captions in a cell: a string, or a list of them. Raises Unusable."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise Unusable("no caption", f"{column!r} is {value!r:.40}")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise Unusable("caption is not UTF-8", str(error)) from None
    return [caption.strip() for caption in captions]


def is_plain(value: Any) -> bool:
    """Whether a value can be an entry of a sample's JSON."""
    return value is None or isinstance(value, (str, int, float, bool))


class PictureFolder(Source):
    """All pictures in a folder and its subfolders, in the order of their names.

    A picture's captions are those in the `caption_column` of a metadata.jsonl or metadata.csv that names it, in its
    folder or above; else the lines of the .txt, .text or .caption file beside it. Names that begin with a dot are left
    out. Raises UserError for a folder without pictures, and for metadata that cannot be read.
    """

    def __init__(self, folder: str, caption_column: str):
        if not os.path.isdir(folder):
            raise UserError(f"--train_data_dir: {folder!r} is not a folder; allowed: a folder with pictures")
        self.folder, self.caption_column = folder, caption_column
        self.files: list[str] = []
        self.metadata: dict[str, dict[str, Any]] = {}  # by path
        for path in walk(folder):
            if os.path.basename(path) in METADATA:
                self.metadata |= self.read_metadata(path)
            elif path.rpartition(".")[2].lower() in PICTURE_FORMATS:
                self.files.append(path)
        there = set(self.files)
        self.files += sorted(path for path in self.metadata if path not in there)  # to be reported as missing
        if not there:
            allowed = ", ".join(PICTURE_FORMATS)
            raise UserError(f"--train_data_dir: {folder!r} has no pictures; allowed: a folder with {allowed} files")
        self.options = {"train_data_dir": f"{len(self)} pictures, SHA-256 {self.digest()}"}

    def __len__(self) -> int:
        return len(self.files)

    def read_metadata(self, path: str) -> dict[str, dict[str, Any]]:
        """The rows of a metadata file, by the path of their picture."""
        column, rows = self.caption_column, {}
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file) if path.endswith(".csv") else map(json.loads, filter(str.strip, file))
                for number, row in enumerate(table, 1):
                    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                        raise UserError(f"--train_data_dir: {path!r}: row {number} has no file_name")
                    if column not in row:
                        found = ", ".join(name for name in map(str, row) if name != "file_name") or "none"
                        raise UserError(
                            f"--caption_column: {column!r} given, but row {number} of {path!r} has no such column; "
                            f"allowed: one of its others ({found})"
                        )
                    rows[os.path.normpath(os.path.join(os.path.dirname(path), row.pop("file_name")))] = row
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise UserError(f"--train_data_dir: cannot read {path!r}: {first_line(error)}") from error
        return rows

    def digest(self) -> str:
        """A hash of all names and captions, and of the sizes of the files."""
        digest = hashlib.sha256()
        for path in self.files:
            try:
                about: Any = [os.path.getsize(path), self.captions(path)]
            except (OSError, Unusable) as error:
                about = type(error).__name__
            digest.update(json.dumps([self.name(path), about]).encode())
        return digest.hexdigest()

    def name(self, path: str) -> str:
        return os.path.relpath(path, self.folder)

    def captions(self, path: str) -> list[str]:
        """Raises Unusable."""
        if path in self.metadata:
            return caption_list(self.metadata[path][self.caption_column], self.caption_column)
        for suffix in CAPTION_SUFFIXES:
            try:
                with open(f"{os.path.splitext(path)[0]}.{suffix}", encoding="utf-8-sig") as file:
                    return [line.strip() for line in file if line.strip()] or [""]
            except FileNotFoundError:
                continue
            except UnicodeDecodeError as error:
                raise Unusable("caption is not UTF-8", f"{self.name(path)}: {error}") from None
        raise Unusable("no caption", f"{self.name(path)}: no .txt, .text or .caption beside it, no row of a metadata "
                       "file")  # fmt: skip

    def read(self, number: int) -> Raw:
        path = self.files[number]
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise Unusable("picture is missing or unreadable", f"{self.name(path)}: {first_line(error)}") from None
        row = self.metadata.get(path, {})
        about = {name: value for name, value in row.items() if name != self.caption_column and is_plain(value)}
        return Raw(self.name(path), data, self.captions(path), about)


def walk(folder: str) -> Iterator[str]:
    """All files below a folder, links followed, each folder once, in the order of their names."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name for name in folders
            if name[0] != "." and name != "__MACOSX" and os.path.realpath(os.path.join(parent, name)) not in seen
        )  # fmt: skip
        yield from (os.path.normpath(os.path.join(parent, name)) for name in sorted(files) if name[0] != ".")


class DataSet(Source):
    """A data set of the library `datasets`: on the Hub, a folder with parquet or arrow files, or a saved one.

    Those in a folder are copied to a temporary one, in which the library looks for them. Pictures stay as they are
    encoded. Raises UserError for all that goes wrong when it is loaded.
    """

    def __init__(
        self, name: str, config_name: str | None, image_column: str, caption_column: str, cache_dir: str | None = None
    ):
        try:
            import datasets
        except ImportError:
            raise UserError("--dataset_name: the package datasets is not installed") from None
        self.caption_column, self.image_column = caption_column, image_column
        datasets.disable_progress_bars()
        try:
            table = self.load(datasets, name, config_name, cache_dir)
            if isinstance(table, dict):
                table = table["train"] if "train" in table else table[next(iter(table))]
            columns = table.column_names or list(next(iter(table)))  # a stream may not know them
        except Exception as error:  # it raises nearly anything
            raise UserError(f"--dataset_name: cannot load {name!r}: {first_line(error)}") from error
        for option, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in columns:
                raise UserError(
                    f"--{option}: {column!r} given, but the data set has none; allowed: {', '.join(columns)}"
                )
        try:
            self.table = table.cast_column(image_column, datasets.Image(decode=False))
            next(iter(self.table), None)  # a stream is cast while it is read
        except Exception as error:
            raise UserError(f"--image_column: {image_column!r} has no pictures: {first_line(error)}") from error
        self.size = self.count()
        self.options = {"dataset_name": f"{name}, {config_name or 'default'}, {len(self)} rows"}

    def load(self, datasets: Any, name: str, config_name: str | None, cache_dir: str | None) -> Any:
        """The data set as the library gives it."""
        if any(map(os.path.isfile, saved_files(name))):
            return datasets.load_from_disk(name)
        # The library's cache may take one folder for another of the same name: a local one gets its own.
        self.own_cache = tempfile.TemporaryDirectory() if os.path.isdir(name) else None
        cache_dir = self.own_cache.name if self.own_cache else cache_dir
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir)

    def count(self) -> int:
        """How many rows there are."""
        return len(self.table)

    def __len__(self) -> int:
        return self.size

    def read(self, number: int) -> Raw:
        return self.raw(self.table[number], number)

    def raw(self, row: dict[str, Any], number: int) -> Raw:
        """The picture of a row. Raises Unusable."""
        picture, captions = row.pop(self.image_column), row.pop(self.caption_column)
        name = str(number)
        if picture is None:
            raise Unusable("picture is missing or unreadable", f"row {name} has none")
        data = picture["bytes"]
        try:
            if data is None:
                with open(picture["path"], "rb") as file:
                    data = file.read()
        except OSError as error:
            raise Unusable("picture is missing or unreadable", f"row {name}: {first_line(error)}") from None
        captions = caption_list(captions, self.caption_column)
        return Raw(name, data, captions, {key: value for key, value in row.items() if is_plain(value)})


class Stream(DataSet):
    """A data set that is read while its shards are written, and never stored as a whole.

    Its rows are counted first, in a pass without pictures, if it does not say how many it has. A process that begins
    in the middle passes over what is before. Raises UserError if the stream breaks.
    """

    def load(self, datasets: Any, name: str, config_name: str | None, cache_dir: str | None) -> Any:
        if any(map(os.path.isfile, saved_files(name))):
            raise ValueError("what save_to_disk wrote is on the disk already; allowed: without --streaming")
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir, streaming=True)

    def count(self) -> int:
        splits = self.table.info.splits or {}
        if self.table.split in splits and splits[self.table.split].num_examples:
            return int(splits[self.table.split].num_examples)
        return sum(1 for _ in self.unbroken(self.table.select_columns([self.caption_column])))

    def unbroken(self, table: Any) -> Iterator[dict[str, Any]]:
        """The rows. Raises UserError for whatever the library raises."""
        try:
            yield from table
        except Exception as error:
            raise UserError(f"--dataset_name: the stream broke: {first_line(error)}") from error

    def readers(self, numbers: range) -> Iterator[Callable[[], Raw]]:
        rows = self.unbroken(self.table.skip(numbers.start))
        return (
            partial(self.raw, row, number) for number, row in zip(numbers, islice(rows, len(numbers)), strict=False)
        )


def saved_files(folder: str) -> list[str]:
    """The files by which one knows what `save_to_disk` has written."""
    return [os.path.join(folder, name) for name in ("state.json", "dataset_dict.json")]
