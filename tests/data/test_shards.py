"""Which shards are read, and what of each: damaged ones, foreign ones, none at all."""

import functools
import http.server
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import write_tar
from data_tools import CUT_SHORT, FEW_EXAMPLES, PNG, captions, config, members, shard_of, take
from hypothesis import given
from hypothesis import strategies as st

from lcm.data import shards as lcm_shards
from lcm.data.loader import TrainingData
from lcm.data.shards import expand_shards
from lcm.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


def test_expand_shards(tmp_path):
    for name in ("000", "001", "002", "extra", "brackets[1]"):
        shard_of(tmp_path / f"{name}.tar", "x")
    at = str(tmp_path)
    numbered = tuple(f"{at}/{i:03d}.tar" for i in range(3))
    assert expand_shards([f"{at}/{{000..002}}.tar"]) == numbered
    assert expand_shards([f"{at}/00{{0,2}}.tar"]) == (numbered[0], numbered[2])
    assert expand_shards([f"{at}/000.tar::{at}/extra.tar"]) == (numbered[0], f"{at}/extra.tar")
    assert expand_shards([f"{at}/{{000..001}}.tar::{at}/extra.tar", numbered[2]]) == (
        *numbered[:2], f"{at}/extra.tar", numbered[2],
    )  # fmt: skip
    assert expand_shards([f"{at}/0*.tar"]) == numbered
    assert expand_shards([f"{at}/00[12].tar"]) == numbered[1:]
    assert expand_shards([f"{at}/brackets[1].tar"]) == (f"{at}/brackets[1].tar",)


def test_expand_shards_takes_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = shard_of(tmp_path / "a.tar", "x")
    assert expand_shards(["~/a.tar"]) == (path,)


def test_addresses_and_commands_are_not_looked_for():
    assert expand_shards(["https://host/{00..01}.tar::pipe:cat no/such/file?*.tar", "s3://b/x.tar"]) == (
        "https://host/00.tar", "https://host/01.tar", "pipe:cat no/such/file?*.tar", "s3://b/x.tar",
    )  # fmt: skip


@pytest.mark.parametrize("absent", ["{007..009}.tar", "nothing*.tar"])
def test_missing_shards_are_logged_and_left_out(tmp_path, caplog, absent):
    path = shard_of(tmp_path / "000.tar", "x")
    assert expand_shards([path, f"{tmp_path}/{absent}"]) == (path,)
    assert "do not exist" in caplog.text and str(tmp_path) in caplog.text


@pytest.mark.parametrize("pattern", ["{0..9}.tar", "*.tar", "a.tar", "", "a.tar::b.tar"])
def test_no_shard_at_all_is_an_error(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--train_shards_path_or_url: .*matches no shard") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["{0..9.tar", "a{b,c.tar", "a}.tar", "http://host/{000..002.tar"])
def test_unbalanced_braces_are_an_error(pattern):
    with pytest.raises(UserError, match=r"^--train_shards_path_or_url: ") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_ever_unpickled(tmp_path):
    trace = tmp_path / "it_ran"
    pickled = pickle.dumps(Payload(trace))
    numpy_file = tmp_path / "payload.npy"
    np.save(numpy_file, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    torch.save(Payload(trace), tmp_path / "payload.pth")
    hostile = {
        "pyd": pickled, "pickle": pickled, "pkl": pickled, "npy": numpy_file.read_bytes(),
        "pth": (tmp_path / "payload.pth").read_bytes(), "PYD": pickled, "txt.pyd": pickled, "json.pickle": pickled,
    }  # fmt: skip
    trace.unlink(missing_ok=True)
    path = write_tar(tmp_path / "a.tar", members("a", "used", **hostile) + members("b", "used too"))
    assert captions(take(TrainingData(config(path)), 2)) == ["used", "used too"]
    assert not trace.exists()
    pickle.loads(pickled).close()
    assert trace.exists()  # the payload is a real one


def cut_tar(tmp_path, size):
    whole = shard_of(tmp_path / "whole.tar", *(f"picture {i}" for i in range(6)))
    cut = tmp_path / "cut.tar"
    with open(whole, "rb") as file:
        cut.write_bytes(file.read()[:size])
    return cut


# A sample is four blocks of 512 bytes: the picture's header, the picture, the caption's header, the caption.
@pytest.mark.parametrize(
    "size", [3 * 2048 + 600, 3 * 2048 + 512, 3 * 2048 + 100, 3 * 2048, 3 * 2048 + 1024, 3 * 2048 + 1600]
)
def test_a_shard_that_is_cut_short(tmp_path, size):
    assert len(PNG) < 512
    data = TrainingData(config(cut_tar(tmp_path, size), shard_of(tmp_path / "good.tar", "good")))
    seen = captions(take(data, 12))
    assert {"picture 0", "picture 1", "good"} <= set(seen) <= {"picture 0", "picture 1", "picture 2", "good"}
    # A sample at the cut may have lost its caption, or a JSON that would have followed: it need not be used.
    assert data.tally.skipped[CUT_SHORT] in (2, 3, 4, 5) and set(data.tally.skipped) <= {CUT_SHORT, "no caption"}


def test_a_broken_header_in_the_middle_is_no_end(tmp_path):
    path = tmp_path / "a.tar"
    shard_of(path, *(f"picture {i}" for i in range(6)))
    content = bytearray(path.read_bytes())
    content[3 * 2048 : 3 * 2048 + 50] = b"\xff" * 50
    path.write_bytes(content)
    data = TrainingData(config(path))
    assert set(captions(take(data, 8))) <= {"picture 0", "picture 1", "picture 2"}
    assert data.tally.skipped[CUT_SHORT] >= 2


@pytest.mark.parametrize("content", [b"", b"this is no tar", bytes(511), b"\x1f\x8b\x08broken gzip", b"\xff" * 5000])
def test_a_shard_that_is_no_tar(tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    data = TrainingData(config(tmp_path / "bad.tar", shard_of(tmp_path / "good.tar", "good"), seed=1))
    assert set(captions(take(data, 4))) == {"good"}
    assert set(data.tally.skipped) == {CUT_SHORT} and data.tally.skipped[CUT_SHORT] in (3, 4)


def test_a_shard_that_vanished_and_one_that_is_a_folder(tmp_path):
    good = shard_of(tmp_path / "good.tar", "good")
    data = TrainingData(config(tmp_path / "gone.tar", tmp_path, good, "unknown://x/y.tar"))
    assert set(captions(take(data, 4))) == {"good"}
    assert set(data.tally.skipped) == {CUT_SHORT} and 9 <= data.tally.skipped[CUT_SHORT] <= 12


def test_an_error_in_our_own_code_is_no_unreadable_shard(tmp_path, monkeypatch):
    def max_size(name):
        raise KeyError("a mistake")

    monkeypatch.setattr(lcm_shards, "max_size", max_size)
    with pytest.raises(KeyError, match="a mistake"):
        list(lcm_shards.read_shard(shard_of(tmp_path / "a.tar", "a")))


def test_shards_from_a_web_server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    shard_of(tmp_path / "a.tar", "a", "b")
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (shard,) = expand_shards([f"{address}/a.tar"])
        data = TrainingData(config(shard))
        assert captions(take(data, 4)) == ["a", "b", "a", "b"] and not data.tally.skipped
        data = TrainingData(config(shard, f"{address}/missing.tar"))
        assert set(captions(take(data, 5))) == {"a", "b"}
        assert set(data.tally.skipped) == {CUT_SHORT} and data.tally.skipped[CUT_SHORT] in (2, 3)
        server.shutdown()


@FEW_EXAMPLES
@given(
    changes=st.lists(st.tuples(st.integers(0, 6 * 2048 + 1023), st.integers(0, 255)), max_size=4),
    size=st.one_of(st.none(), st.integers(0, 6 * 2048 + 1024)),
)
def test_any_tar_is_used_or_counted(tmp_path, changes, size):
    path = tmp_path / "a.tar"
    shard_of(path, *(f"picture {i}" for i in range(6)))
    content = bytearray(path.read_bytes())
    intact = [content[at] == value for at, value in changes]
    first = min([at for (at, _), same in zip(changes, intact, strict=True) if not same], default=len(content))
    for at, value in changes:
        content[at] = value
    path.write_bytes(content[:size])
    first = min(first, len(content[:size]))
    # The second shard follows in the same pass, or comes before; after 8 good ones a pass of both was complete.
    data = TrainingData(config(path, shard_of(tmp_path / "good.tar", "good")))
    seen = captions(take(data, 14))
    assert "good" in seen
    # The last sample before the damage is whole for certain only if a header of the next one follows.
    sure = [f"picture {i}" for i in range(6) if (i + 1) * 2048 + 512 <= first]
    assert set(sure) <= set(seen)
    if len(set(seen)) < 7:
        assert data.tally.skipped
