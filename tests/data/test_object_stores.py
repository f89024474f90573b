"""Shards in an S3-compatible store: a real server on this machine, and the real client."""

import http.server
import importlib.util
import threading
import urllib.request

import pytest
from data_tools import captions, config, shard_of, take

from lcm.data import http as http_file
from lcm.data.loader import TrainingData
from lcm.data.shards import expand_shards, read_shard
from lcm.errors import UserError

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"


class Breaking(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a store, and breaks off the first answers with a body in the middle of it."""

    store = ""
    breaks = 0

    def answer(self):
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        asked = urllib.request.Request(self.store + self.path, headers=headers, method=self.command)
        with urllib.request.urlopen(asked) as reply:
            body = reply.read()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
        if body and type(self).breaks:
            type(self).breaks -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of a store with the bucket `pictures` and in it `a.tar` and `b.tar`."""
    server_of = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        server = server_of.ThreadedMotoServer("127.0.0.1", port=0)
        server.start()
        _, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client, folder = boto3.client("s3"), tmp_path_factory.mktemp("store")
        client.create_bucket(Bucket="pictures")
        for name in "ab":
            shard_of(folder / f"{name}.tar", *(f"{name}{i}" for i in range(5)))
            client.upload_file(str(folder / f"{name}.tar"), "pictures", f"{name}.tar")
        yield f"http://127.0.0.1:{port}"
        server.stop()


def test_shards_of_a_store(store):
    shards = expand_shards(["s3://pictures/{a,b}.tar"])
    assert len(shards) == 2
    data = TrainingData(config(*shards, batch_size=2, shard_timeout=60))
    assert sorted(captions(take(data, 5))) == sorted(f"{name}{i}" for name in "ab" for i in range(5))
    assert data.tally.used == 10 and not data.tally.skipped


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_broken_transfer_is_taken_up(store, monkeypatch, breaks):
    """At the same byte: each sample comes once."""
    handler = type("Breaks", (Breaking,), {"store": store, "breaks": breaks})
    monkeypatch.setattr(http_file, "WAITS", (0.01,) * 5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = http_file.http_address("s3://pictures/a.tar").replace(store, f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setattr(http_file, "http_address", lambda url: address)
        found = list(read_shard("s3://pictures/a.tar", 60))
        proxy.shutdown()
    assert handler.breaks == 0
    assert [sample["txt"] for sample in found] == [f"a{i}".encode() for i in range(5)]


def test_what_is_not_there_is_counted_and_no_secret_shown(store, capfd, caplog):
    paths = [f"s3://{place}.tar" for place in ("pictures/a", "pictures/none", "elsewhere/a")]
    data = TrainingData(config(*paths, shard_timeout=60))
    take(data, 11)
    assert data.tally.used == 11 and data.tally.skipped["shard unreadable or cut short"] >= 2
    shown = "".join(record.getMessage() for record in caplog.records if record.name.startswith("lcm"))
    assert "s3://pictures/none.tar" in shown and "404" in shown
    assert not any(secret in shown + "".join(capfd.readouterr()) for secret in (SECRET, "Signature=", "AKIA"))


def test_a_public_bucket_needs_no_credentials(store, monkeypatch, request):
    request.addfinalizer(http_file.s3_client.cache_clear)
    assert "Signature" in http_file.http_address("s3://pictures/a.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    http_file.s3_client.cache_clear()
    assert http_file.http_address("s3://pictures/a.tar") == f"{store}/pictures/a.tar"


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^--train_shards_path_or_url: s3:// needs the package boto3, which is not in"
    ):
        expand_shards(["s3://pictures/a.tar"])
