"""From the address of a shard to samples as bytes: tar members in order, and what cannot be read.

Nothing is ever unpickled: of a sample, only its picture, caption and JSON are read. Nothing is skipped silently: what
cannot be used becomes a `Problem`.
"""

import contextlib
import glob
import io
import itertools
import logging
import os
import tarfile
from dataclasses import dataclass

import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from lcm.data.commands import open_url
from lcm.data.http import HttpFile
from lcm.errors import UserError
from lcm.options.choices import CAPTION_SUFFIXES, PICTURE_FORMATS
from lcm.secrets import redact

logger = logging.getLogger(__name__)



def is_local(shard):
    """True for a path, False for an address or a command."""
    return not shard.startswith("pipe:") and "://" not in shard


def expand_shards(patterns, option="--train_shards_path_or_url"):
    """List every shard that the values of `option` name: brace ranges, `::`-joined lists, local wildcards.

    Raises UserError if a pattern is malformed or if no shard is left; missing local files are logged and left out.
    """
    shards = []
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
    if not present:
        raise UserError(f"{option}: {redact(' '.join(patterns))!r} matches no shard")
    return present
MAX_PICTURE_BYTES, MAX_TEXT_BYTES = 1 << 28, 1 << 20  # a tokenizer takes a second for a megabyte


@dataclass(frozen=True)
class Problem:
    """A sample, or a shard, that cannot be used."""

    reason: str  # a few words, the same for all of a kind
    detail: str


@dataclass(frozen=True)
class TooLarge:
    """Stands for a member of a size that no picture or text has; it was not read."""

    size: int  # bytes


def max_size(name):
    """The most bytes that are read of a member; 0 for all that no sample is made of."""
    suffix = (base_plus_ext(name)[1] or "").lower()
    if suffix in PICTURE_FORMATS:
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
