"""From the address of a shard to samples as bytes, in the order of its tar members.

Nothing is ever unpickled: only pictures, captions, JSON and safetensors are read. Nothing is skipped silently: each
sample, or rest of a shard, that cannot be used becomes a `Problem`.
"""

import contextlib
import glob
import importlib.util
import io
import itertools
import logging
import os
import tarfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from lcm.cache import EMPTY_SUFFIX, SUFFIX, Cache, as_cache
from lcm.data.commands import open_url
from lcm.data.http import HttpFile
from lcm.errors import UserError
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS
from lcm.secrets import redact

logger = logging.getLogger(__name__)

MAX_PICTURE_BYTES, MAX_TEXT_BYTES = 1 << 28, 1 << 20  # a tokenizer takes a second for a megabyte

Sample = dict[str, Any]  # file suffix -> bytes, TooLarge or None; `__key__` and `__url__` -> str


def is_local(shard: str) -> bool:
    """True for a path, False for an address or a command."""
    return not shard.startswith("pipe:") and "://" not in shard


def expand_shards(patterns: Iterable[str], option: str = "--train_shards_path_or_url") -> tuple[str, ...]:
    """All shards that the values of `option` name, by brace ranges, `::`-joined lists and local wildcards.

    Raises UserError if a pattern is malformed, if no shard is left, or without a package that an address needs.
    Missing local files are logged and left out.
    """
    shards: list[str] = []
    for pattern in itertools.chain.from_iterable(p.split("::") for p in patterns):
        try:
            expanded = list(braceexpand.braceexpand(os.path.expanduser(pattern)))
        except ValueError as error:
            raise UserError(f"{option}: {redact(pattern)!r}: {redact(str(error))}") from None
        for shard in filter(None, expanded):
            is_wildcard = is_local(shard) and glob.has_magic(shard) and not os.path.isfile(shard)
            shards += (is_wildcard and sorted(glob.glob(shard))) or [shard]
    missing = {shard for shard in shards if is_local(shard) and not os.path.isfile(shard)}
    present = tuple(s for s in shards if s not in missing)
    if missing and present:
        logger.warning("%d of %d shards do not exist, for example %s", len(missing), len(shards), min(missing))
    if importlib.util.find_spec("boto3") is None and any(shard.startswith("s3://") for shard in present):
        raise UserError(f"{option}: s3:// needs the package boto3, which is not installed")
    if not present:
        for folder in filter(os.path.isdir, sorted(missing)):
            raise UserError(
                f"{option}: {folder!r} is a folder; allowed: its shards, such as '{folder}/*.tar'; make_shards.py "
                "makes shards of a folder of pictures"
            )
        raise UserError(f"{option}: {redact(' '.join(patterns))!r} matches no shard")
    return present


@dataclass(frozen=True)
class Problem:
    """A sample, or a shard, that cannot be used."""

    reason: str  # a few words, the same for all of a kind
    detail: str


@dataclass(frozen=True)
class TooLarge:
    """In place of the bytes of a tar member that is too large for a picture or a text; it was not read."""

    size: int  # bytes


def max_size(name: str) -> int:
    """The most bytes that are read of a member; 0 for a member that is neither picture, caption, JSON nor cached."""
    suffix = (base_plus_ext(name)[1] or "").lower()
    if suffix in PICTURE_FORMATS or suffix in (SUFFIX, EMPTY_SUFFIX):
        return MAX_PICTURE_BYTES
    return MAX_TEXT_BYTES if suffix in (*CAPTION_SUFFIXES, "json") else 0


class TarHeader(tarfile.TarInfo):
    """A header in a tar. Unlike in tarfile's own class, a broken or missing header is not the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the regular end
                raise
            raise tarfile.ReadError(str(error)) from None


class ShardUnreadable(Exception):
    """Raised with the reason if the rest of a shard cannot be read."""


@contextlib.contextmanager
def broken_shard() -> Iterator[None]:
    """Turn any exception inside the block, but MemoryError, into ShardUnreadable. Only for calls of libraries.

    For a broken shard tarfile raises nearly anything, TypeError and OverflowError included.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ShardUnreadable(str(error) or type(error).__name__) from error


def tar_members(stream: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar in the form that `group_by_keys` takes; `data` is None for unneeded files."""
    with broken_shard():
        tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=TarHeader)  # noqa: SIM115 (the caller closes it)
    while True:
        with broken_shard():
            member = tar.next()
        if member is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them in memory
        if not member.isreg():
            continue
        limit = 0 if member.issparse() else max_size(member.name)  # a sparse file may unpack to any size
        data: Any = TooLarge(member.size) if member.size > limit > 0 else None
        if limit and member.size <= limit:
            with broken_shard():
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
        yield {"fname": member.name, "data": data, "__url__": url}


@contextlib.contextmanager
def open_shard(url: str, timeout: float) -> Iterator[BinaryIO]:
    """The bytes of a shard as a stream: HttpFile for http(s):// and s3://, else webdataset's `gopen`. `timeout` is in
    seconds.

    Raises ShardUnreadable if it cannot be opened, or if the command that writes it fails.
    """
    is_http = url.lower().startswith(("http://", "https://", "s3://"))
    with contextlib.ExitStack() as stack:
        with broken_shard():
            opened: contextlib.AbstractContextManager
            if is_http:
                opened = io.BufferedReader(HttpFile(url, timeout), buffer_size=1 << 20)
            else:
                opened = open_url(url, timeout)
            stream = stack.enter_context(opened)
        yield stream
        with broken_shard():  # the command may have failed
            stack.close()


def read_shard(url: str, timeout: float = 300.0) -> Generator[Sample | Problem, None, None]:
    """Yield the samples of one shard as dicts of bytes, and a Problem for each part of it that cannot be read."""
    problems = []

    def note_duplicate(error: Exception) -> bool:
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


def find_cache(shards: Iterable[str], timeout: float) -> Cache | None:
    """What cached shards have in common, from the first that has a readable sample; None if that one is not cached.

    A shard that is no local file is the last that is tried: each that cannot be reached would take its time.
    """
    for url in shards:
        samples = read_shard(url, timeout)
        first = next((sample for sample in samples if isinstance(sample, dict)), None)
        samples.close()
        if first is not None:
            return as_cache(first)
        if not is_local(url):
            break
    return None
