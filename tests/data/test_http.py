"""Shards behind http://: a connection that breaks is taken up where it broke, and what cannot be had is counted."""

import contextlib
import http.server
import threading

import pytest
from conftest import write_shards

from lcm.data import http as lcm_http
from lcm.data.http import HttpFile
from lcm.data.shards import Problem, read_shard

CONTENT = bytes(range(256)) * 4000  # 1 MB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; `server.faults` says, in order, how each request goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        fault = server.faults.pop(0) if server.faults else None
        server.requests.append(self.headers.get("Range"))
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = server.content[:-5] if fault == "changed" else server.content
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
        if fault == "no ranges":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault == "stalls":
            self.wfile.write(content[start : start + 1000])
            self.wfile.flush()
            server.released.wait()
        elif fault == "dies":
            self.wfile.write(content[start : start + 300_000])
        else:
            self.wfile.write(content[start:])
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(content, *faults):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.faults, server.requests = content, list(faults), []
        server.released = threading.Event()  # ends the stalls when the test is over
        server.address = f"http://127.0.0.1:{server.server_port}/shard.tar"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(lcm_http, "WAITS", (0, 0, 0))
    monkeypatch.setattr(lcm_http, "TIMEOUT", 30)


def read_all(address):
    with HttpFile(address) as file:
        parts = []
        while part := file.read(70_000):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize(
    "faults",
    [[], [503, 429], ["dies"], ["dies", "dies", 500, "dies"], ["dies", "no ranges"], ["stalls"], ["dies", "stalls"]],
    ids=str,
)
def test_every_byte_arrives_once(faults, monkeypatch):
    if "stalls" in faults:
        monkeypatch.setattr(lcm_http, "TIMEOUT", 1)
        monkeypatch.setattr(lcm_http, "WAITS", (0,) * 20)
    with serve(CONTENT, *faults) as server:
        assert read_all(server.address) == CONTENT
        assert len(server.requests) >= len(faults) + (faults[-1:] != ["no ranges"])


def test_a_break_is_taken_up_at_its_byte():
    with serve(CONTENT, "dies") as server:
        read_all(server.address)
        assert server.requests == [None, "bytes=300000-"]


CHANGED = ["dies", *["changed"] * 9]


@pytest.mark.parametrize(("faults", "tries"), [([404], 1), ([403], 1), ([503] * 9, 4), (CHANGED, 4)])
def test_what_cannot_be_had_is_an_error(faults, tries):
    """At once where it will not change; after all tries where it might have."""
    with serve(CONTENT, *faults) as server:
        with pytest.raises(OSError, match=r"HTTP Error|changed"):
            read_all(server.address)
        assert len(server.requests) == tries


def samples(address):
    read = list(read_shard(address))
    problems = [item.reason for item in read if isinstance(item, Problem)]
    return [item["__key__"] for item in read if not isinstance(item, Problem)], problems


def test_samples_of_a_shard_survive_a_break(tmp_path):
    write_shards(tmp_path, num_shards=1, samples_per_shard=600, size=(20, 24))
    content = (tmp_path / "00000.tar").read_bytes()
    assert len(content) > 600_000
    expected, _ = samples(str(tmp_path / "00000.tar"))
    with serve(content, "dies", 503, "dies") as server:
        assert samples(server.address) == (expected, [])
    with serve(content, "dies", *[503] * 9) as server:
        found, problems = samples(server.address)
    assert problems == ["shard unreadable or cut short"]
    assert 0 < len(found) < 600 and found == expected[: len(found)]
    with serve(content, 404) as server:
        assert samples(server.address) == ([], ["shard unreadable or cut short"])
