"""Frozen weights in 8 and 4 bits: which they are, what they cost, and a LoRA that is trained on them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO_TEACHER, SCRIPTS, Script, write_shards
from diffusers import DiffusionPipeline, UNet2DConditionModel

from lcm.models.quantize import make_layer, quantizable, quantize
from lcm.simulation.quantized import PackedLinear

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = {"int8": bitsandbytes.nn.Linear8bitLt, "nf4": bitsandbytes.nn.Linear4bit}


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(DEMO_TEACHER, subfolder="unet")


def inputs(unet):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=generator)
    hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    return z, torch.tensor([10, 700]), hidden


@pytest.mark.parametrize(("precision", "error"), [("int8", 2e-3), ("nf4", 0.1)])
def test_linear_layers_of_the_transformers(unet, precision, error):
    """They alone are replaced; the output is near that of the whole weights."""
    whole = unet
    small = UNet2DConditionModel.from_pretrained(DEMO_TEACHER, subfolder="unet")
    names = {name for name, layer in whole.named_modules() if type(layer) is torch.nn.Linear and "attn" in name}
    quantize(small, SimpleNamespace(base_model_precision=precision), torch.float32)
    small.to("cpu")
    made = {name for name, layer in small.named_modules() if isinstance(layer, KINDS[precision])}
    assert names < made and all("attentions" in name for name in made)
    assert {type(layer) for name, layer in small.named_modules() if name.startswith("time_embedding.")} == {
        type(layer) for name, layer in whole.named_modules() if name.startswith("time_embedding.")
    }
    assert not any(parameter.requires_grad for parameter in small.parameters())
    z, t, hidden = inputs(whole)
    with torch.no_grad():
        expected, found = (network(z, t, hidden).sample for network in (whole, small))
    distance = ((found - expected).square().mean() / expected.square().mean()).sqrt()
    assert 0 < distance < error


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("size", [(64, 128), (320, 1280), (96, 96)])
def test_the_simulated_layer_takes_as_many_bytes(precision, size):
    layer = torch.nn.Linear(*size)
    real = make_layer(layer, precision, torch.float16).to("cpu")
    real(torch.randn(1, size[0]))
    packed = PackedLinear(layer, precision, torch.float16)
    state = real.weight.quant_state if precision == "nf4" else None
    scales = state.absmax.nbytes + state.state2.absmax.nbytes if state else real.state.SCB.nbytes
    assert packed.weight.nbytes == real.weight.nbytes
    assert packed.scales.nbytes + packed.block_scales.nbytes == scales
    assert packed(torch.randn(3, size[0])).shape == (3, size[1])


def test_nothing_changes_by_default(unet):
    before = {name: type(layer) for name, layer in unet.named_modules()}
    quantize(unet, SimpleNamespace(base_model_precision="no_change"), torch.float32)
    assert {name: type(layer) for name, layer in unet.named_modules()} == before and len(list(quantizable(unet))) > 9


@pytest.mark.parametrize(("name", "precision"), [("lora_sd", "nf4"), ("lora_sdxl", "int8")])
def test_a_lora_on_it(name, precision, teacher, sdxl_teacher, shards, tmp_path):
    """It resumes bit for bit, and what comes out works on the unquantized pipeline."""
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    more = [f"--base_model_precision={precision}", "--checkpointing_steps=2", "--gradient_checkpointing"]
    script.main(tmp_path / "whole", *more)
    script.main(tmp_path / "cut", *more, "--max_train_steps=2")
    script.main(tmp_path / "cut", *more, "--resume_from_checkpoint=latest")
    whole, resumed = script.weights(tmp_path / "whole"), script.weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    script.main(tmp_path / "plain", *more[1:])
    plain = script.weights(tmp_path / "plain")
    assert plain.keys() == whole.keys() and not all(torch.equal(plain[key], whole[key]) for key in whole)
    pipeline = DiffusionPipeline.from_pretrained(script.teacher)
    pipeline.load_lora_weights(str(tmp_path / "whole"), weight_name="pytorch_lora_weights.safetensors")
    image = pipeline("a red three", num_inference_steps=1, guidance_scale=1, height=16, width=16).images[0]
    assert image.size == (16, 16)


@pytest.mark.parametrize("precision", KINDS)
def test_a_quantized_teacher_leaves_the_student_alone(precision, teacher, tmp_path):
    """The whole U-Net starts as the teacher's own weights, whatever the teacher is held in."""
    script = Script("sd", teacher, write_shards(tmp_path / "shards"), SCRIPTS["sd"])
    script.main(tmp_path / "out", f"--base_model_precision={precision}", "--learning_rate=0", "--max_train_steps=1")
    start = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").state_dict()
    weights = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.items())
