"""The LoRA in its U-Net: teacher, target and student in one, gradients, files."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.configs import SD, SDXL
from lcm.errors import UserError
from lcm.models import lora, lora_files
from lcm.models.lora import EMA, TRAINED, AdapterView
from lcm_common import update_ema


def options(**more):
    given = {
        "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": None, "ema_decay": None,
        "seed": 0, "w_min": 2, "w_max": 2, "lora_rank_pattern": None, "use_rslora": False, "lora_weights": None,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **more})


def randomise(unet, adapter=TRAINED, seed=1):
    """Give an adapter's B, which starts at zero, values that show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.adapter_parameters(unet, adapter).items():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)


def student_unet(**more):
    """(U-Net with a random adapter in train mode, the same U-Net without any)."""
    torch.manual_seed(0)
    base = make_unet()
    unet = copy.deepcopy(base).train()
    lora.add_adapters(unet, options(**more), seed=0)
    randomise(unet)
    return unet, base.eval().requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    z, hidden = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 16, 16)))
    return z, torch.tensor([19, 999]), hidden


def gradients(unet):
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


# Teacher, student and target.


def test_a_new_adapter_is_the_teacher(inputs):
    """B is zero at the start; the start depends on the seed alone."""
    base = make_unet()
    first, second, other = (copy.deepcopy(base) for _ in range(3))
    for unet, global_seed, seed in ((first, 1, 0), (second, 2, 0), (other, 1, 5)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        lora.add_adapters(unet, options(), seed)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(*inputs).sample, base(*inputs).sample)
    weights, same, different = (lora_files.adapter_weights(unet, TRAINED) for unet in (first, second, other))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], different[name]) for name in weights)


def test_teacher_is_the_network_without_its_adapter(inputs):
    unet, base = student_unet(lora_dropout=0.5)
    output = AdapterView(unet, None)(*inputs).sample
    assert torch.equal(output, base(*inputs).sample)
    assert not output.requires_grad
    assert not torch.equal(output, unet.eval()(*inputs).sample)


def test_target_has_the_adapter_and_no_dropout(inputs):
    unet, _ = student_unet(lora_dropout=0.5)
    target = AdapterView(unet, TRAINED)
    assert torch.equal(target(*inputs).sample, target(*inputs).sample)
    assert not torch.equal(unet(*inputs).sample, unet(*inputs).sample)
    expected = copy.deepcopy(unet).eval()(*inputs).sample
    assert torch.equal(target(*inputs).sample, expected)


@pytest.mark.parametrize("adapter", [None, TRAINED, EMA])
@pytest.mark.parametrize("fails", [False, True])
def test_a_view_leaves_the_student_as_it_was(inputs, adapter, fails):
    """Modes, switches, what is trained, and what it computes; also where the call raises."""
    unet, _ = student_unet(lora_dropout=0.5, ema_decay=0.9)
    view = AdapterView(unet, adapter)

    def state():
        layers = lora.adapter_layers(unet)
        torch.manual_seed(0)
        return (
            [module.training for module in unet.modules()],
            [(layer.active_adapters, layer.disable_adapters) for layer in layers],
            {name for name, p in unet.named_parameters() if p.requires_grad},
            unet(*inputs).sample.tolist(),
        )

    before = state()
    if fails:
        with pytest.raises(RuntimeError):
            view(torch.randn(2, 5, 8, 8), *inputs[1:])
    else:
        view(*inputs)
    assert state() == before
    trained = {name for name, _ in unet.named_parameters() if f".{TRAINED}." in name}
    assert before[2] == trained


@pytest.mark.parametrize("adapter", [None, TRAINED, EMA])
def test_a_view_computes_what_pefts_own_switches_give(inputs, adapter):
    unet, _ = student_unet(lora_dropout=0.5, ema_decay=0.9)
    randomise(unet, EMA, seed=2)
    expected = copy.deepcopy(unet).eval()
    if adapter is None:
        expected.disable_adapters()
    else:
        expected.set_adapter(adapter)
    assert torch.equal(AdapterView(unet, adapter)(*inputs).sample, expected(*inputs).sample)


@pytest.mark.parametrize("adapter", [None, TRAINED, EMA])
def test_a_view_does_not_touch_what_is_trained(adapter):
    """peft's own switches set requires_grad on every weight, which took most of their time."""
    unet, _ = student_unet(ema_decay=0.9)
    before = [parameter.requires_grad for parameter in unet.parameters()]
    with AdapterView(unet, adapter).active():
        assert [parameter.requires_grad for parameter in unet.parameters()] == before


def test_a_peft_that_switches_otherwise_is_noticed(monkeypatch):
    unet, _ = student_unet()
    monkeypatch.setattr(BaseTunerLayer, "disable_adapters", property(lambda layer: False))
    with pytest.raises(RuntimeError, match="peft"), AdapterView(unet, None).active():
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_students(inputs, checkpointing):
    """Teacher and target are called before the student, as in the loop; its gradients are those of the student alone,
    with dropout, and with gradient checkpointing, which runs the layers again in the backward pass."""
    z, t, hidden = inputs
    alone, _ = student_unet(lora_dropout=0.3)
    torch.manual_seed(7)
    alone(z, t, hidden).sample.square().mean().backward()
    expected = gradients(alone)

    unet, base = student_unet(lora_dropout=0.3, ema_decay=0.9)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    AdapterView(unet, None)(z, t, hidden)
    AdapterView(unet, EMA)(z, t, hidden)
    AdapterView(unet, TRAINED)(z, t, hidden)
    torch.manual_seed(7)
    unet(z, t, hidden).sample.square().mean().backward()
    found = gradients(unet)
    assert found.keys() == expected.keys() and all(f".{TRAINED}." in name for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3
    for name, parameter in base.named_parameters():
        layer, _, kind = name.rpartition(".")
        wrapped = dict(unet.named_parameters()).get(f"{layer}.base_layer.{kind}")
        assert torch.equal(parameter, wrapped if wrapped is not None else dict(unet.named_parameters())[name])


def test_dropout_left_off_at_the_backward_pass_would_show(inputs):
    """The trap that `AdapterView` avoids: checkpointing recomputes in the mode of the moment."""
    unet, _ = student_unet(lora_dropout=0.3)
    unet.enable_gradient_checkpointing()
    output = unet(*inputs).sample
    unet.eval()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        output.mean().backward()


def test_moving_average_is_a_second_adapter(inputs):
    unet, base = student_unet(ema_decay=0.9)
    student, average = (lora.adapter_parameters(unet, name) for name in (TRAINED, EMA))
    assert student.keys() == average.keys() and len(student) > 50
    assert torch.equal(AdapterView(unet, EMA)(*inputs).sample, base(*inputs).sample)  # it starts as the student did
    update_ema(average, student, 0.0)
    assert torch.equal(AdapterView(unet, EMA)(*inputs).sample, AdapterView(unet, TRAINED)(*inputs).sample)
    assert not any(parameter.requires_grad for parameter in average.values())


def test_base_in_half_precision_adapters_in_float32():
    unet = make_unet().to(torch.bfloat16)
    lora.add_adapters(unet, options(ema_decay=0.9), seed=0)
    for name, parameter in unet.named_parameters():
        is_adapter = ".lora_" in name
        assert parameter.dtype == (torch.float32 if is_adapter else torch.bfloat16), name
        assert parameter.requires_grad == (f".{TRAINED}." in name)


# Files.


def test_round_trip(tmp_path):
    unet, base = student_unet()
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    again = copy.deepcopy(base)
    lora.add_adapters(again, options(), seed=9)
    lora_files.load_adapter(again, TRAINED, tmp_path)
    saved, loaded = (lora_files.adapter_weights(network, TRAINED) for network in (unet, again))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, change):
    unet, _ = student_unet()
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    path = tmp_path / lora_files.DIFFUSERS_FILE
    weights = load_file(path)
    name = next(iter(weights))
    if change == "missing":
        del weights[name]
    elif change == "foreign":
        weights["unet.nowhere.lora_A.weight"] = weights[name].clone()
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, path)
    with pytest.raises((ValueError, RuntimeError)):
        lora_files.load_adapter(unet, TRAINED, tmp_path)


def test_metadata_of_both_files(tmp_path):
    """Rank and alpha are in the metadata of one and in tensors of the other; the options need not be known."""
    unet, _ = student_unet(lora_dropout=0.1)
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    lora_files.save_for_kohya(unet, TRAINED, tmp_path / "kohya.safetensors")
    assert not [name for name in load_file(tmp_path / lora_files.DIFFUSERS_FILE) if "alpha" in name]
    with safe_open(tmp_path / lora_files.DIFFUSERS_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 8)
    assert metadata["unet.target_modules"] == sorted(lora.DEFAULT_TARGETS)
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("4", "8")
    kohya = load_file(tmp_path / "kohya.safetensors")
    assert {tensor.item() for name, tensor in kohya.items() if name.endswith(".alpha")} == {8.0}
    assert {tensor.dtype for tensor in kohya.values()} == {torch.float16}


def test_diffusers_takes_the_first_file_of_the_two(tmp_path):
    """In a folder with both, whichever way they sort; a name that ends alike would be taken by mistake."""
    from diffusers.loaders.lora_base import _best_guess_weight_name

    unet, _ = student_unet()
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    lora_files.save_for_kohya(unet, TRAINED, tmp_path / lora_files.KOHYA_FILE)
    assert _best_guess_weight_name(str(tmp_path)) == lora_files.DIFFUSERS_FILE


# Layers that ComfyUI's `unet_to_diffusers` (comfy/utils.py, read 2026-11-21) has names for, those of the blocks.
COMFYUI = re.compile(
    r"lora_unet_((down|up)_blocks_\d_|mid_block_)"
    r"(resnets_\d_(conv1|conv2|conv_shortcut|time_emb_proj)|downsamplers_0_conv|upsamplers_0_conv"
    r"|attentions_\d_(proj_in|proj_out|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))))"
    r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)


@pytest.mark.parametrize("config", [SD, SDXL])
def test_kohya_names_are_those_of_comfyui(config):
    """On U-Nets of the real shapes: every layer of the blocks, under a name that ComfyUI knows.

    A layer's name in diffusers, its dots as underscores, after "lora_unet_": `model_lora_keys_unet` in comfy/lora.py.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        blocks = {
            f"lora_unet_{name.replace('.', '_')}"
            for name, layer in unet.named_modules()
            if "block" in name and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        }
        lora.add_adapters(unet, options(lora_rank=1), seed=0)
    names = get_peft_model_state_dict(unet, adapter_name=TRAINED)
    kohya = convert_state_dict_to_kohya({f"unet.{name}": torch.zeros(1) for name in names})
    assert [name for name in kohya if not COMFYUI.fullmatch(name)] == []
    assert {name.split(".")[0] for name in kohya} == blocks and len(kohya) == 3 * len(blocks)


@pytest.mark.parametrize(("pattern", "more"), [
    ({"conv1": 2, "to_out.0": 6}, {"lora_rank_pattern": "conv1=2, to_out.0=6"}),
    ({}, {"use_rslora": True}),
    ({"conv1": 2, "to_q": 9}, {"use_rslora": True, "lora_rank_pattern": "conv1=2,to_q=9", "lora_rank": 5}),
])  # fmt: skip
def test_ranks_and_scales_are_in_both_files(tmp_path, inputs, pattern, more):
    """diffusers draws with the first one as the student does; the second has the same products."""
    unet, base = student_unet(**more)
    given = options(**more)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        rank = next((rank for end, rank in pattern.items() if name.endswith(f".{end}")), given.lora_rank)
        assert layer.r[TRAINED] == rank, name
        assert layer.scaling[TRAINED] == pytest.approx(given.lora_alpha / (rank**0.5 if given.use_rslora else rank))
    assert {layer.r[TRAINED] for layer in layers.values()} == {given.lora_rank, *pattern.values()}
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    lora_files.save_for_kohya(unet, TRAINED, tmp_path / "kohya.safetensors")
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(str(tmp_path), weight_name=lora_files.DIFFUSERS_FILE, prefix="unet")
    z, t, hidden = inputs
    with torch.no_grad():
        expected, found = (network.eval()(z, t, hidden).sample for network in (unet, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, base(z, t, hidden).sample, atol=1e-3)
    kohya = load_file(tmp_path / "kohya.safetensors")
    for name, layer in layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = (kohya[f"{key}.lora_{part}.weight"].float().flatten(1) for part in ("down", "up"))
        product = kohya[f"{key}.alpha"].item() / len(down) * up @ down
        a, b = (getattr(layer, part)[TRAINED].weight.flatten(1) for part in ("lora_A", "lora_B"))
        torch.testing.assert_close(product, layer.scaling[TRAINED] * b @ a, rtol=5e-3, atol=5e-3)


def test_ranks_of_layers_that_are_not_adapted():
    for pattern in ("to_z=3", "conv1=3,norm=2"):
        with pytest.raises(UserError, match=r"^--lora_rank_pattern: '(to_z|norm)' fits none of the adapted layers"):
            student_unet(lora_rank_pattern=pattern)


def test_a_lora_to_start_from(tmp_path):
    """By folder or file, into both adapters; one of other ranks or layers is refused."""
    unet, _ = student_unet()
    lora_files.save_for_diffusers(unet, TRAINED, tmp_path)
    expected = lora.adapter_parameters(unet, TRAINED)
    for path in (tmp_path, tmp_path / lora_files.DIFFUSERS_FILE):
        started = make_unet()
        lora.add_adapters(started, options(lora_weights=str(path), ema_decay=0.9), seed=5)
        for adapter in (TRAINED, EMA):
            found = lora.adapter_parameters(started, adapter)
            assert all(torch.equal(found[name], value) for name, value in expected.items()), adapter
    for other in ({"lora_rank": 3}, {"lora_target_modules": "to_q"}, {"lora_weights": str(tmp_path / "nosuch")}):
        with pytest.raises(UserError, match=r"^--lora_weights: cannot load"):
            lora.add_adapters(make_unet(), options(**{"lora_weights": str(tmp_path), **other}), seed=0)
