"""Shards that a command writes: `pipe:` and what webdataset starts."""

import contextlib
import gc
import signal
import threading
import warnings

import numpy as np
import psutil
import pytest
from conftest import encode_image
from data_tools import CUT_SHORT, captions, config, shard_of, take
from webdataset.gopen import Pipe, gopen_schemes

from lcm.data import shards as lcm_shards
from lcm.data.loader import TrainingData

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


def test_a_pipe(tmp_path):
    path = shard_of(tmp_path / "a.tar", "a", "b")
    data = TrainingData(config(f"pipe:cat {path}"))
    assert captions(take(data, 4)) == ["a", "b", "a", "b"] and not data.tally.skipped


def test_a_command_that_fails_is_counted_and_loses_nothing_that_it_wrote(tmp_path):
    path = shard_of(tmp_path / "a.tar", *"abcdef")
    for _ in range(5):  # whichever is faster, the command or its reader
        data = TrainingData(config(f"pipe:cat {path}; exit 3"))
        assert captions(take(data, 7)) == list("abcdefa")
        assert dict(data.tally.skipped) == {CUT_SHORT: 1}
    data = TrainingData(config("pipe:exit 3", path))
    assert set(captions(take(data, 12))) == set("abcdef") and set(data.tally.skipped) == {CUT_SHORT}


def test_a_command_that_is_left_early_complains_to_nobody(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *map(str, range(40)), picture=large)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        for shard in (f"pipe:cat {path} || exit 1", f"pipe:dd if={path} bs=1k 2>&1 || exit 1"):
            assert captions(take(TrainingData(config(shard)), 1)) == ["0"]
            reader = lcm_shards.read_shard(shard)
            next(reader)
            reader.close()
            gc.collect()


def children_of(process):
    """The processes below this one, by their commands."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


@pytest.mark.parametrize("command", ["cat {path}; sleep 1234", "head -c 3000 {path}; sleep 1234 | cat", "sleep 1234"])
def test_a_command_that_stalls_is_ended_and_counted(tmp_path, caplog, command):
    path = shard_of(tmp_path / "a.tar", *"abc")
    good = shard_of(tmp_path / "good.tar", "good")
    data = TrainingData(config("pipe:" + command.format(path=path), good, shard_timeout=0.3))
    seen = captions(take(data, 8))
    assert "good" in seen and set(seen) <= {"a", "b", "c", "good"}
    assert data.tally.skipped[CUT_SHORT] >= 1
    assert "0.3 s (--shard_timeout)" in caplog.text
    assert not [line for line in children_of(psutil.Process()) if "sleep 1234" in line]


def test_a_slow_command_is_not_a_stalled_one(tmp_path):
    path = shard_of(tmp_path / "a.tar", *"abc")
    slow = f"pipe:for i in 1 2 3 4 5 6 7; do dd if={path} bs=1536 skip=$((i-1)) count=1 status=none; sleep 0.2; done"
    data = TrainingData(config(slow, shard_timeout=0.9))
    assert captions(take(data, 3)) == ["a", "b", "c"] and not data.tally.skipped


def test_a_run_that_ends_leaves_no_command_behind(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *"abcdef", picture=large)
    data = TrainingData(config(f"pipe:cat {path}; sleep 1235", num_workers=2))
    iterator = iter(data)
    assert next(iterator)["captions"]
    iterator.close()
    del iterator
    gc.collect()
    assert not [line for line in children_of(psutil.Process()) if "sleep 1235" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_does_not_reach_the_commands(tmp_path, number):
    path = shard_of(tmp_path / "a.tar", *"abc")
    data = TrainingData(config(f"pipe:head -c 2048 {path}; sleep 0.5; tail -c +2049 {path}"))
    before = signal.signal(number, lambda *_: None)  # as a training process has one
    others = psutil.Process().children(recursive=True)  # such as the service of W&B, which other tests need

    def send():
        for child in set(psutil.Process().children(recursive=True)) - set(others):
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    timer = threading.Timer(0.2, send)
    timer.start()
    try:
        assert captions(take(data, 3)) == ["a", "b", "c"] and not data.tally.skipped
    finally:
        timer.join()
        signal.signal(number, before)


def test_a_token_in_a_failed_command_is_not_logged(tmp_path, monkeypatch, caplog):
    # As webdataset's own hf:// does, which takes the token from the Hub client's settings, not from our options.
    def opener(url, mode, bufsize):
        return Pipe(["sh", "-c", "exit 22", "Authorization:Bearer hf_secret"], mode=mode)

    monkeypatch.setitem(gopen_schemes, "hf", opener)
    data = TrainingData(config("hf://datasets/x/y.tar", shard_of(tmp_path / "good.tar", "good")))
    take(data, 3)
    assert data.tally.skipped[CUT_SHORT] >= 2 and "hf://datasets/x/y.tar" in caplog.text
    assert "hf_secret" not in caplog.text
