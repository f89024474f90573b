"""What saves memory and changes no result: checkpointed gradients, inputs of LoRA layers, networks in host memory."""

import copy

import pytest
import torch
from conftest import make_unet
from test_lora import options

import lcm_common
from lcm.models import lora
from lcm.models.offload import OnDevice, while_called
from lcm.models.speed import CHECKPOINTED, checkpoint_gradients
from lcm.simulation.ledger import Ledger


def inputs(batch_size=2):
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timestep": torch.full((batch_size,), 500),
        "encoder_hidden_states": torch.randn(batch_size, 7, 16, generator=generator),
    }


def gradients(unet):
    """The gradients of a U-Net in bf16, and the bytes that its forward pass keeps for them."""
    unet.zero_grad()
    with Ledger("cpu") as ledger, torch.autocast("cpu", torch.bfloat16):
        loss = unet(**inputs()).sample.float().square().mean()
    kept = ledger.current
    loss.backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}, kept


def assert_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_checkpointed_gradients_are_the_same_to_the_last_bit():
    """And less is kept than with diffusers' checkpointing."""
    unet = make_unet()
    plain, theirs, ours = unet, copy.deepcopy(unet), copy.deepcopy(unet)
    theirs.enable_gradient_checkpointing()
    checkpoint_gradients(ours)
    (expected, everything), (_, more), (found, least) = map(gradients, (plain, theirs, ours))
    assert_equal(found, expected)
    assert least < 0.9 * more < more < everything


@pytest.mark.parametrize(("kind", "method"), [(kind, name) for kind, names in CHECKPOINTED.items() for name in names])
def test_diffusers_has_the_methods_that_are_checkpointed(kind, method):
    """Some are not public: if one is renamed, memory would grow without a word."""
    assert callable(getattr(kind, method))
    assert any(type(module) is kind for module in make_unet().modules())


def test_lora_layers_take_their_input_as_it_is():
    """peft would cast it to float32. Outputs and gradients are the same."""
    torch.manual_seed(0)
    unet = make_unet().to(torch.bfloat16)
    lora.add_adapters(unet, options(), seed=0)
    layers = lora.adapter_layers(unet)
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B[lora.TRAINED].weight, std=0.1)
    seen = []
    for layer in layers:
        layer.lora_A[lora.TRAINED].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    found, less = gradients(unet)
    assert len(seen) == len(layers) and seen.count(torch.bfloat16) > 0.8 * len(layers)  # some are given float32
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    seen.clear()
    expected, more = gradients(unet)
    assert set(seen) == {torch.float32} and less < more
    assert_equal(found, expected)


def test_weights_are_on_the_device_while_it_is_entered():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).requires_grad_(False).eval()
    before = network.state_dict(keep_vars=True)
    on_device = OnDevice("network", [network], True, torch.device("meta"))
    waiting = network.state_dict(keep_vars=True)
    assert waiting.keys() == before.keys() and {tensor.device.type for tensor in waiting.values()} == {"cpu"}
    with pytest.raises(ZeroDivisionError), on_device:
        with on_device:
            pass
        found = network.state_dict(keep_vars=True)
        assert {tensor.device.type for tensor in found.values()} == {"meta"}
        assert {name for name, _ in network.named_parameters()} == {name for name in found if "running" not in name
                                                                    and "num" not in name}  # fmt: skip
        raise ZeroDivisionError
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is waiting[name] for name in waiting)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_network_is_on_the_device_while_it_is_called():
    network = torch.nn.Linear(2, 3)
    on_device = while_called("network", network, True, torch.device("meta"))
    assert network(torch.zeros(1, 2, device="meta")).device.type == "meta"
    assert network.weight.device.type == "cpu"
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 9, device="meta"))
    assert network.weight.device.type == "cpu"  # after an error, too
    with on_device:
        network(torch.zeros(1, 2, device="meta"))
        assert network.weight.device.type == "meta"


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    device = torch.device("cuda", 7)


def test_a_moving_average_in_host_memory():
    """The update and the distance are those of tensors on one device."""
    torch.manual_seed(0)
    source = {name: torch.randn(3) for name in "ab"}
    here = {name: torch.randn(3) for name in "ab"}
    away = {"a": here["a"].clone().as_subclass(Elsewhere), "b": here["b"].clone()}
    assert lcm_common.relative_distance(away, source) == lcm_common.relative_distance(here, source)
    lcm_common.update_ema(here, source, 0.9)
    lcm_common.update_ema(away, source, 0.9)
    assert all(torch.equal(away[name].as_subclass(torch.Tensor), here[name]) for name in here)
