"""Shards that a command writes (`pipe:`, `gs://`, `hf://`, ...), read with a time limit."""

import contextlib
import io
import os
import select
import signal
import threading
from collections.abc import Iterator
from subprocess import TimeoutExpired
from typing import Any, BinaryIO

import psutil
from webdataset.gopen import Pipe, gopen


@contextlib.contextmanager
def stop_signals_ignored() -> Iterator[None]:
    """Commands started inside the block ignore SIGINT and SIGTERM, which a terminal or SLURM sends to all processes: a
    run still finishes its step after such a signal, and needs their data. (dash would clear a signal mask.)"""
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PipeFile(io.RawIOBase):
    """The output of a webdataset `Pipe`'s command. Reading raises TimeoutError, an OSError, after `timeout` seconds
    without a byte."""

    def __init__(self, pipe: Pipe, timeout: float):
        self.descriptor, self.timeout = pipe.stream.fileno(), timeout
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.poll.poll(self.timeout * 1000):
            raise TimeoutError(f"no byte for {self.timeout:g} s (--shard_timeout)")
        return os.readv(self.descriptor, [buffer])


def end_children(process: psutil.Process) -> None:
    """Kill all descendants of a process."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def end(pipe: Pipe) -> None:
    """Kill a `Pipe`'s command, if it still runs, and all its descendants."""
    pipe.ignore_errors = True  # a killed command has an error status
    if pipe.proc.poll() is None:
        end_children(psutil.Process(pipe.proc.pid))
        pipe.proc.kill()
    pipe.close()


@contextlib.contextmanager
def open_url(url: str, timeout: float) -> Iterator[BinaryIO]:
    """The bytes of `url` as a stream, opened by webdataset's `gopen`.

    If that starts a command, raises OSError if the command fails, writes nothing for `timeout` seconds, or does not
    end within `timeout` seconds after its last byte. No process is left at the end of the block.
    """
    with stop_signals_ignored():
        opened = gopen(url)
    if not hasattr(opened, "proc"):
        with opened:
            yield opened
        return
    try:
        yield io.BufferedReader(PipeFile(opened, timeout), buffer_size=1 << 20)
        opened.stream.close()
        status = opened.proc.wait(timeout)
        if status not in opened.ignore_status:
            raise OSError(f"the command failed with status {status}")
    except TimeoutExpired:
        raise TimeoutError(f"the command did not end within {timeout:g} s (--shard_timeout)") from None
    finally:
        end(opened)
