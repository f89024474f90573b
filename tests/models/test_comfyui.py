"""The guidance scales of a whole U-Net as files for ComfyUI: added to a bias, they act as the network's input does."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet
from safetensors import safe_open
from safetensors.torch import load_file

from lcm.models import comfyui
from lcm_common import guidance_embedding

SCALES = [1.0, 3.0, 7.5, 16.0]


@pytest.mark.parametrize(("w_min", "w_max", "scales"), [
    (5.0, 15.0, [6, 7, 7.5, *range(8, 17)]), (7.5, 7.5, [8.5]), (2.0, 2.0, [3]), (0.0, 1.5, [1, 2, 2.5]),
])  # fmt: skip
def test_scales_that_were_trained(w_min, w_max, scales):
    assert comfyui.guidance_scales(SimpleNamespace(w_min=w_min, w_max=w_max)) == scales


def test_a_file_acts_as_the_input_does(tmp_path):
    torch.manual_seed(0)
    unet = make_unet(time_cond_proj_dim=16).eval()
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)  # the effect is not a matter of rounding
    comfyui.save_guidance(unet, SCALES, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {comfyui.guidance_file(scale) for scale in SCALES}
    z, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([499]), torch.randn(1, 3, 16)
    bias, drawn = unet.time_embedding.linear_1.bias.detach().clone(), []
    for scale in SCALES:
        path = tmp_path / comfyui.guidance_file(scale)
        with torch.no_grad():
            w = guidance_embedding(torch.tensor([scale - 1]), 16)
            expected = unet(z, t, prompt, timestep_cond=w).sample
            unet.time_embedding.linear_1.bias.copy_(bias + load_file(path)[comfyui.BIAS_KEY])
            found = unet(z, t, prompt).sample
            unet.time_embedding.linear_1.bias.copy_(bias)
        assert torch.allclose(found, expected, atol=1e-5)
        drawn.append(found)
        with safe_open(path, "pt") as file:
            assert float(file.metadata()["guidance_scale"]) == scale and list(file.keys()) == [comfyui.BIAS_KEY]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(drawn))
