"""The real Hub client, in a process of its own, against the stand-in of `hub_server.py`."""

import subprocess
import sys

import pytest
from hub_server import HubServer, card_errors, client_env

UPLOAD_AND_LOAD = """
import sys
import warnings
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import HfApi, create_repo, hf_hub_download, snapshot_download, upload_file, upload_folder

warnings.filterwarnings("error", message="Warnings while validating metadata")
folder = Path(sys.argv[1])
api = HfApi()
assert api.whoami()["name"] == "tester"
repo_id = create_repo("tiny", private=True, exist_ok=True).repo_id
assert repo_id == "tester/tiny" == create_repo("tiny", exist_ok=True).repo_id

torch.manual_seed(0)
model = UNet2DConditionModel(
    sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
    attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
model.save_pretrained(folder)
half = UNet2DConditionModel.from_pretrained(folder).half()
half.save_pretrained(folder, variant="fp16")
(folder / "README.md").write_text("---\\nlicense: mit\\ntags:\\n- lcm\\n---\\n# Tiny\\n")
(folder / "samples").mkdir()
(folder / "samples" / "a b.txt").write_text("first")
(folder / "empty.bin").touch()
first = upload_folder(repo_id=repo_id, folder_path=folder, commit_message="step 1")
(folder / "samples" / "a b.txt").write_text("second")
second = upload_folder(repo_id=repo_id, folder_path=folder, commit_message="step 2")
third = upload_file(repo_id=repo_id, path_or_fileobj=b"third", path_in_repo="notes.txt")
assert len({first.oid, second.oid, third.oid}) == 3
assert first.repo_url.repo_id == repo_id
assert upload_folder(repo_id=repo_id, folder_path=folder).oid == third.oid  # nothing new, no commit

local = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
assert set(api.list_repo_files(repo_id)) == local | {".gitattributes", "notes.txt"}
info = api.model_info(repo_id)
assert (info.id, info.sha, info.private) == (repo_id, third.oid, True)
assert Path(hf_hub_download(repo_id, "samples/a b.txt")).read_text() == "second"
assert Path(hf_hub_download(repo_id, "samples/a b.txt", revision=first.oid)).read_text() == "first"
snapshot = Path(snapshot_download(repo_id))
assert all((snapshot / path).read_bytes() == (folder / path).read_bytes() for path in local)
api.delete_folder("samples", repo_id=repo_id)
api.delete_file("notes.txt", repo_id=repo_id)

for expected, options in ((model, {}), (half, {"variant": "fp16", "torch_dtype": torch.float16})):
    loaded = UNet2DConditionModel.from_pretrained(repo_id, **options)
    assert loaded.dtype == expected.dtype
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
"""

ERRORS_AND_RETRIES = """
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
)

api, other, nobody = HfApi(), HfApi(token="hf_wrong"), HfApi(token=False)
api.create_repo("open")
api.create_repo("closed", private=True)
api.upload_file(repo_id="tester/open", path_or_fileobj=b"weights", path_in_repo="a.safetensors")
api.upload_file(repo_id="tester/closed", path_or_fileobj=b"notes", path_in_repo="a.txt")

assert open(nobody.hf_hub_download("tester/open", "a.safetensors"), "rb").read() == b"weights"
assert api.repo_exists("tester/closed") and nobody.repo_exists("tester/open")
assert not nobody.repo_exists("tester/closed") and not api.repo_exists("tester/missing")
for refused in (
    lambda: other.whoami(),
    lambda: other.create_repo("new"),
    lambda: nobody.create_repo("new"),
    lambda: other.list_repo_files("tester/closed"),
    lambda: other.upload_file(repo_id="tester/open", path_or_fileobj=b"", path_in_repo="b.txt"),
    lambda: nobody.upload_file(repo_id="tester/open", path_or_fileobj=b"", path_in_repo="b.txt"),
    lambda: nobody.hf_hub_download("tester/closed", "a.txt"),
):
    with pytest.raises(HfHubHTTPError) as error:
        refused()
    assert error.value.response.status_code == 401
with pytest.raises(HfHubHTTPError) as error:
    api.create_repo("open")
assert error.value.response.status_code == 409

with pytest.raises(RepositoryNotFoundError):
    api.hf_hub_download("tester/missing", "a.txt")
with pytest.raises(EntryNotFoundError):
    api.hf_hub_download("tester/open", "missing.txt")
with pytest.raises(RevisionNotFoundError):
    api.hf_hub_download("tester/open", "a.safetensors", revision="missing")
with pytest.raises(RevisionNotFoundError):
    api.model_info("tester/open", revision="0" * 40)
with pytest.raises(ValueError, match="license"):
    api.upload_file(repo_id="tester/open", path_or_fileobj=b"---\\nlicense\\n---\\n", path_in_repo="README.md")
"""

UPLOAD_TWICE_REFUSED = """
from huggingface_hub import HfApi

HfApi().upload_file(repo_id="tester/open", path_or_fileobj=b"more", path_in_repo="b.safetensors")
"""


def run(script, server, home, *args):
    """Run `script` as a client of `server`; whatever it printed must not hold the token."""
    command = [sys.executable, "-c", script, *map(str, args)]
    env = client_env(server, home)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    output = done.stdout + done.stderr
    assert server.token not in output
    assert done.returncode == 0, output
    return output


def test_upload_and_load(tmp_path):
    """A model goes up in several commits and comes back equal, in float32 and as the fp16 variant."""
    folder = tmp_path / "model"
    folder.mkdir()
    with HubServer() as server:
        run(UPLOAD_AND_LOAD, server, tmp_path / "home", folder)
        assert server.private("tester/tiny")
        files = server.files("tester/tiny")
        weights = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
        assert set(files) == weights | {".gitattributes", "README.md", "config.json", "empty.bin"}
        assert all(files[name] == (folder / name).read_bytes() for name in weights)
        assert len([path for method, path in server.requests if method == "PUT"]) == len(weights)
        assert len([path for method, path in server.requests if "/commit/" in path]) == 5


def test_errors_and_retries(tmp_path):
    """Missing things and wrong tokens raise the client's own exceptions; a passing 503 is retried."""
    with HubServer() as server:
        run(ERRORS_AND_RETRIES, server, tmp_path)
        before = len(server.requests)
        server.fail_next(1, path_contains="/preupload/")
        server.fail_next(1, path_contains="/upload/")
        output = run(UPLOAD_TWICE_REFUSED, server, tmp_path)
        assert output.count("HTTP Error 503") == 2
        steps = [path.split("/")[-2] for method, path in server.requests[before:]]
        assert steps == ["preupload", "preupload", "objects", "upload", "upload", "commit"]
        assert server.files("tester/open")["b.safetensors"] == b"more"


@pytest.mark.parametrize(("metadata", "error"), [
    ("license: Apache 2", "license"),
    ("license_name: mine", "license_name"),
    ("base_model: a folder/of/mine", "base_model"),
    ("base_model_relation: lora", "base_model_relation"),
    ("tags:\n- 1", "tags"),
    ("pipeline_tag: pictures", "pipeline_tag"),
    ("widget:\n- output:\n    url: a.png", "widget"),
    ("widget:\n- text: a\n  output: a.png", "widget"),
    ("inference:\n  num_inference_steps: 4", "inference"),
    ("model-index:\n- name: a\n  results:\n  - task:\n      type: text-to-image", "model-index"),
    ("tags: [", "while parsing"),
])  # fmt: skip
def test_metadata_that_the_hub_refuses(metadata, error):
    assert any(message.startswith(error) for message in card_errors(metadata))
    assert card_errors("license: mit\nbase_model: some/teacher\ntags:\n- lora\nwidget:\n- text: a") == []
