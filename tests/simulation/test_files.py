"""Files of simulated runs: what comes back of tensors without values, and what is refused."""

import os
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import make_unet
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lcm.simulation import files


def test_what_comes_back(tmp_path):
    """Shapes, dtypes, devices, and what is not a fake tensor; also after the file was moved, in another fake mode."""
    random_state = torch.arange(3)
    with FakeTensorMode():
        weights = torch.empty(2, 3, dtype=torch.float16)
        files.save({"weights": [weights, torch.empty(4, device="meta")], "states": (random_state, 1)}, tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    with FakeTensorMode():
        loaded = files.load(tmp_path / "b")
        moved = files.load(tmp_path / "b", map_location="meta")["weights"][0]
    first, second = loaded["weights"]
    assert isinstance(first, FakeTensor) and first is not weights
    assert (first.shape, first.dtype, first.device.type) == ((2, 3), torch.float16, "cpu")
    assert second.device.type == "meta" and moved.device.type == "meta"
    assert loaded["states"] == (random_state, 1)


def test_files_of_weights(tmp_path):
    """They are loaded to one device, wherever the tensors were."""
    with FakeTensorMode():
        files.save_file({"weight": torch.empty(2, 3, device="meta")}, tmp_path / "a", {"format": "pt"})
        loaded = files.load_file(tmp_path / "a")
        assert loaded["weight"].shape == (2, 3) and loaded["weight"].device.type == "cpu"
        with pytest.raises(ValueError, match="weight is not contiguous"):
            files.save_file({"weight": torch.empty(2, 3).T}, tmp_path / "b")


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"cannot read .*a, which it has not written"):
        files.load(tmp_path / "a")


def test_networks_are_split_as_real_ones(tmp_path, monkeypatch):
    """Into the same files, if they are large; and they are loaded again."""
    make_unet().save_pretrained(tmp_path / "real", max_shard_size="50KB")
    files.patch_files(SimpleNamespace(patch=monkeypatch.setattr))
    with FakeTensorMode():
        unet = make_unet()
        unet.save_pretrained(tmp_path / "simulated", max_shard_size="50KB")
        loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "simulated")
    assert sorted(os.listdir(tmp_path / "simulated")) == sorted(os.listdir(tmp_path / "real"))
    assert len(os.listdir(tmp_path / "real")) > 4
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in unet.state_dict().items()}
