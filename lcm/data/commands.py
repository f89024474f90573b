"""A shard that a command writes (`pipe:`, `gs://`, `hf://`, ...): what it writes is read, bounded in time."""

import contextlib
import io
import os
import select
import signal
import threading
from subprocess import TimeoutExpired

import psutil
from webdataset.gopen import gopen


@contextlib.contextmanager
def stop_signals_ignored():
    """Commands that are started here ignore what a terminal or SLURM sends to all processes of a run: the step that is
    finished after such a signal needs what they write. (A mask would not do: dash clears it.)"""
    before = {}
    if threading.current_thread() is threading.main_thread():  # nowhere else can it be set
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PipeFile(io.RawIOBase):
    """What the command of a webdataset `Pipe` writes. Reading raises TimeoutError, an OSError, after `timeout` seconds
    without a byte."""

    def __init__(self, pipe, timeout):
        self.descriptor, self.timeout = pipe.stream.fileno(), timeout
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLIN)

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.poll.poll(self.timeout * 1000):
            raise TimeoutError(f"no byte for {self.timeout:g} s (--shard_timeout)")
        return os.readv(self.descriptor, [buffer])


def end_children(process):
    """End all processes that a psutil.Process started, and those that they started."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def end(pipe):
    """End a `Pipe`'s command, if it still runs, with all processes that it started."""
    pipe.ignore_errors = True  # it may well complain
    if pipe.proc.poll() is None:
        end_children(psutil.Process(pipe.proc.pid))
        pipe.proc.kill()
    pipe.close()


@contextlib.contextmanager
def open_url(url, timeout):
    """The bytes of `url` as a stream, opened by webdataset's `gopen`.

    Where that starts a command, OSError is raised if it writes nothing for `timeout` seconds, does not end within as
    many after its last byte, or fails. However the block ends, no process is left.
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
