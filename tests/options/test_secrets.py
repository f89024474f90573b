"""Secrets in addresses, commands and options reach no log, file, tracker or card."""

import http.server
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, sd_options
from hypothesis import given
from hypothesis import strategies as st

import evaluate_lcm
from lcm import secrets
from lcm.data.http import HttpFile, split_login
from lcm.data.shards import expand_shards, read_shard
from lcm.errors import UserError, run
from lcm.secrets import redact, without_credentials

S = "S3cr3t-Value_0123"  # in every row of the table

SECRET = [
    f"https://user:{S}@host/a.tar",
    f"https://{S}@host/a.tar",
    f"s3://name:{S}@host/{{000..123}}.tar",
    f"https://host/a.tar?X-Amz-Signature={S}&X-Amz-Expires=3600",
    f"https://host/a.tar?X-Amz-Expires=3600&X-Amz-Credential={S}/eu/s3",
    f"https://host/a.tar?X-Amz-Security-Token={S}",
    f"https://host/a.tar?X-Goog-Signature={S}",
    f"https://host/a.tar?x-goog-credential={S}",
    f"https://host/a.tar?sv=2024&sig={S}",
    f"https://host/a.tar?Expires=1&Signature={S}&Key-Pair-Id={S}&Policy={S}",
    f"https://host/a.tar?AWSAccessKeyId={S}",
    f"https://host/{{0..9}}.tar?token={S}::https://host/b.tar?access_token={S}",
    f"https://host/a.tar?api_key={S}",
    f"https://host/a.tar?apikey={S}",
    f"https://host/a.tar?key={S}",
    f"pipe:curl -s -u name:{S} https://host/a.tar",
    f"pipe:curl -u 'some name:{S} with spaces' https://host/a.tar",
    f"pipe:curl --user=name:{S} https://host/a.tar",
    f"pipe:curl --user name:{S} https://host/a.tar",
    f'pipe:curl -H "Authorization: Bearer {S}" https://host/a.tar',
    f"pipe:curl -H 'Authorization: Basic {S}==' https://host/a.tar",
    f"pipe:curl -H Authorization:Bearer\\ {S} https://host/a.tar",
    f"pipe:curl -H 'X-Api-Key: {S}' https://host/a.tar",
    f"pipe:curl -H 'PRIVATE-TOKEN: {S}' https://host/a.tar",
    f"pipe:curl -H 'Cookie: session={S}' https://host/a.tar",
    f"pipe:AWS_ACCESS_KEY_ID={S} AWS_SECRET_ACCESS_KEY={S} aws s3 cp s3://b/a.tar -",
    f"pipe:HF_TOKEN='{S}' hf download x",
    f'pipe:PASSWORD="{S} {S}" get',
    f"pipe:get --password {S} https://host/a.tar",
    f"pipe:get --api-key={S} https://host/a.tar",
    f"python train.py --hub_token {S} --seed 1",
    f"https://user:with/{S}@host/a.tar",
    f"https://user:with#{S}@host/a.tar",
    f"pipe:curl user:{S}@host.org/a.tar",
    f"https://host/a.tar?pass={S}&rlkey={S}&auth_key={S}&session={S}",
    f"https://host/a.tar?next=/b.tar?token%3D{S}",
    f"pipe:curl -sSu name:{S} https://host/a.tar",
    f"pipe:curl -u :{S} https://host/a.tar",
    f"pipe:curl -u name:'{S}' https://host/a.tar",
    f'pipe:curl --user "name":{S} https://host/a.tar',
    f"pipe:curl --oauth2-bearer {S} https://host/a.tar",
    f"pipe:curl -b session={S} https://host/a.tar",
    f"pipe:curl --cookie 'session={S}' https://host/a.tar",
    f"pipe:curl -H 'apikey: {S}' https://host/a.tar",
    f'pipe:curl --header "Job-Token: {S} {S}" https://host/a.tar',
    f"""pipe:curl -d '{{"user": "me", "password": "{S} {S}"}}' https://host/a.tar""",
    f"pipe:SECRET_KEY={S} get",
    f"pipe:AZURE_STORAGE_KEY={S} az storage blob download",
    f"pipe:RCLONE_CONFIG_REMOTE_PASS={S} rclone cat remote:a.tar",
    f"pipe:sshpass -p {S} ssh host cat a.tar",
    f"pipe:gpg --passphrase {S} -d a.tar.gpg",
    f"pipe:PASSWORD=with#{S} get",
    f"pipe:PASSWORD=with\\ {S} get",
    f"pipe:PASSWORD='with'\"{S}\" get",
]
SHAPES = [
    "hf_abcdefghijkl",
    "hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
    "ghp_0123456789abcdefghij",
    "github_pat_0123456789abcdefghij",
    "glpat-0123456789abcdefghij",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "Bearer abcdefgh1",
]
HARMLESS = [
    "path/to/shards/{00000..01099}.tar",
    "https://host:8080/a/{000..123}.tar::/data/b.tar",
    "pipe:curl -L -s https://host/{00000..01099}.tar",
    "pipe:sort -u list | xargs cat",
    "/data/user@example.org/key=1/a.tar",
    "sftp://user@host/a.tar",
    "hf://datasets/someone/hf_images/a.tar",
    "https://host/a.tar?versionId=17&max_tokens=5",
    "a token of love: a secret garden, password on a post-it, basic shapes",
    "gs://bucket/tokenizer=clip/a.tar",
    "python evaluate_lcm.py --prompts 'bearer of gifts' --seed=0",
    "the ring bearer standing in a field, a cookie: crumbly, key=value",
    "/data/hf_transformers/a.tar",
    "https://host:8080/user@example.org/a.tar",
    "--hub_token: given; allowed: no value",
]


@pytest.mark.parametrize("text", SECRET)
def test_secrets_are_redacted(text):
    assert S not in redact(text) and "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("text", SHAPES)
def test_what_looks_like_a_token_is_redacted_anywhere(text):
    assert text not in redact(f"echo {text} to nobody") and "to nobody" in redact(f"echo {text} to nobody")


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text):
    assert redact(text) == text


@given(st.lists(st.sampled_from([*SECRET, *HARMLESS, *SHAPES, " ", "&", "'", '"', "@", ":", "=", "?"]), max_size=4))
def test_twice_is_the_same_as_once(parts):
    assert redact(redact("".join(parts))) == redact("".join(parts))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://host/{0..9}.tar?X-Amz-Signature=abc&X-Amz-Date=1", "https://host/{0..9}.tar?X-Amz-Signature=def"),
        ("https://host/a.tar?sig=1::https://host/b.tar?sig=2", "https://host/a.tar::https://host/b.tar"),
        ("https://me:old@host/a.tar", "https://you:new@host/a.tar"),
        ("pipe:curl -u me:old 'https://host/a.tar?sig=1'", "pipe:curl -u me:new 'https://host/a.tar?sig=2'"),
        ("pipe:HF_TOKEN=a get a.tar", "pipe:HF_TOKEN=b get a.tar"),
    ],
)
def test_the_same_shards_under_other_credentials(one, other):
    assert without_credentials(one) == without_credentials(other)
    assert without_credentials(redact(one)) == without_credentials(one)  # as a checkpoint stores it


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://host/a.tar?sig=1", "https://host/b.tar?sig=1"),
        ("https://host/a.tar?sig=1::https://host/b.tar", "https://host/a.tar?sig=1::https://host/c.tar"),
        ("a.tar", "b.tar"),
        ("pipe:get a.tar", "pipe:get b.tar"),
        ("pipe:get -H Authorization:x https://host/a.tar", "pipe:get -H Authorization:x https://host/b.tar"),
        ("/data/hf_transformers/a.tar", "/data/hf_tokenizersfast/a.tar"),
    ],
)
def test_other_shards_stay_others(one, other):
    assert without_credentials(one) != without_credentials(other)


def test_the_command_line_as_trackers_record_it(monkeypatch):
    given = ["train.py", "--hub_token", S, f"--train_shards_path_or_url=https://host/a.tar?sig={S}", "--seed=1"]
    monkeypatch.setattr(sys, "argv", given)
    with secrets.redacted_command_line():
        assert S not in " ".join(sys.argv) and sys.argv[-1] == "--seed=1" and len(sys.argv) == 5
    assert sys.argv is given


@pytest.mark.parametrize("text", [*SECRET, *HARMLESS])
def test_the_command_line_as_an_evaluation_records_it(text):
    """Its arguments are quoted once more than a shell's user quotes them."""
    given = ["--pretrained_teacher_model=a", "--trained=b", "--reference_images", text, "--seed=1"]
    command = evaluate_lcm.parse_args(given).command
    assert S not in command
    assert shlex.split(command) == ["python", "evaluate_lcm.py", *given[:3], redact(text), given[4]]


def test_errors_without_secrets(capsys):
    pattern = f"https://user:{S}@host/{{0..1.tar?sig={S}"
    with pytest.raises(UserError, match="Unbalanced") as caught:
        expand_shards([pattern])
    assert S not in str(caught.value)
    with pytest.raises(SystemExit):  # a second value, where the option would have to be repeated
        evaluate_lcm.parse_args(["--pretrained_teacher_model=a", "--trained=b", f"--seed=1 https://user:{S}@host/a"])
    assert S not in capsys.readouterr().err

    def fail(args):
        raise UserError(f"--pretrained_teacher_model: cannot load 'https://user:{S}@host/a'")

    with pytest.raises(SystemExit):
        run(fail, None)
    error = capsys.readouterr().err
    assert S not in error and "https://***@host/a" in error


@pytest.mark.parametrize("password", [f"{S}[", f"{S}\N{ACCOUNT OF}"])
def test_what_is_no_address_is_an_unreadable_shard(password):
    (problem,) = read_shard(f"http://user:{password}@127.0.0.1/a.tar")
    assert problem.detail.endswith("the address is malformed") and S not in redact(problem.detail)


# Shards behind a login.


@pytest.fixture
def guarded(shards):
    """(address, password) of a server that gives the first shard to whoever knows the password."""
    content = Path(shards.replace("{00000..00002}", "00000")).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("Authorization") == split_login(f"http://user:{S}@host/")[1]
            self.send_response(200 if known and f"sig={S}" in self.path else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if known:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}/a.tar", content
        server.shutdown()


def test_user_and_password_in_an_address(guarded):
    address, content = guarded
    assert HttpFile(f"http://user:{S}@{address}?sig={S}").read() == content
    with pytest.raises(OSError, match="401") as caught:
        HttpFile(f"http://user:wrong@{address}?sig={S}").read()
    assert S not in str(caught.value) and "wrong" not in str(caught.value)
    assert split_login("http://a%40b:c%3Ad@host/x?y=1") == ("http://host/x?y=1", "Basic YUBiOmM6ZA==")
    assert split_login("http://host/x@y") == ("http://host/x@y", None)


def test_no_secret_is_stored_or_shown(teacher, shards, guarded, tmp_path):
    """A whole run through the command line, with trackers that record it, and with shards that fail."""
    address, _ = guarded
    output, second = tmp_path / "output", shards.replace("{00000..00002}", "00001")
    more = [
        f"--train_shards_path_or_url=pipe:AWS_SECRET_ACCESS_KEY={S} sh -c 'cat {second}'",
        f"--train_shards_path_or_url=pipe:curl -u me:{S} nowhere; exit 3",
        f"--train_shards_path_or_url=http://user:{S}@{address}?token={S}",  # refused, and not tried again
        f"--train_shards_path_or_url=http://user:{S}[@127.0.0.1/a.tar",
        "--report_to=all",
        "--train_batch_size=16",
        "--checkpointing_steps=4",
        "--logging_steps=1",
        "--shard_timeout=1",
    ]  # fmt: skip
    options = sd_options(teacher, f"http://user:{S}@{address}?sig={S}", output, *more)
    done = subprocess.run(
        [sys.executable, ROOT / "train_lcm_distill_sd_wds.py", *options],
        cwd=tmp_path, env={**os.environ, "COMET_MODE": "offline"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "shard unreadable" in done.stdout
    text = done.stdout + done.stderr
    assert S not in text, re.findall(rf".*{S}.*", text)
    searched = 0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert S.encode() not in path.read_bytes(), path
            searched += 1
    assert searched > 10
    for part in secrets.redact(" ".join(options)).split():
        assert S not in part
