"""Mistakes that only a GPU shows: each is planted in a simulated run, and noticed."""

import pytest
from conftest import SCRIPTS, Script
from simulated import (
    Failed,
    copies_on_device,
    expected_dtypes,
    found_dtypes,
    simulated,
    states_and_trained,
    the_one_wait,
)


@pytest.fixture(scope="module")
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


def one_step(script, folder, plant, *more, **options):
    """The record of one step in bf16."""
    return simulated(script, folder, "--mixed_precision=bf16", *more, num_steps=1, plant=plant, **options)


def make_generators_of_the_host():
    import torch

    from lcm import session

    session.step_generator = lambda *_: torch.Generator()


def test_a_generator_of_the_host(sd, tmp_path):
    with pytest.raises(Failed, match="expected a generator on cuda, but found cpu"):
        one_step(sd, tmp_path, make_generators_of_the_host)


def keep_tokens_on_the_host():
    from lcm.models import prompts

    prompts.send = lambda tensor, device: tensor


def test_a_tensor_that_stays_on_the_host(sd, tmp_path):
    with pytest.raises(Failed, match="found at least two devices, cuda:0 and cpu"):
        one_step(sd, tmp_path, keep_tokens_on_the_host)


def draw_on_the_host():
    import diffusers

    decode = diffusers.AutoencoderKL.decode
    diffusers.AutoencoderKL.decode = lambda vae, latents: decode(vae, latents.cpu())


def test_a_picture_on_the_wrong_device(sd, tmp_path):
    with pytest.raises(Failed, match=r"(?s)in draw_teacher.* found at least two devices, c"):
        one_step(sd, tmp_path, draw_on_the_host, "--validation_teacher_steps=1", with_pictures=True)


def load_text_encoders_in_float32():
    import torch

    from lcm.models import prompts

    prompts.weight_dtype = lambda accelerator: torch.float32


def test_text_encoders_in_float32(sd, tmp_path):
    record = one_step(sd, tmp_path, load_text_encoders_in_float32)
    assert record["steps"][-1]["flops"]["text encoders"].keys() == {"float32"}
    assert record["dtypes"]["student"]["encoder_hidden_states"] == "float32"


def read_the_loss():
    import lcm_common

    loss = lcm_common.consistency_loss
    lcm_common.consistency_loss = lambda *args: (found := loss(*args), found.mean().item())[0]


def make_conditions_in_float32():
    from lcm.models.family import Family

    conditions = Family.conditions
    Family.conditions = lambda family, batch: tuple(
        {name: tensor.float() for name, tensor in part.items()} for part in conditions(family, batch)
    )


def keep_the_teacher_in_float32():
    import torch

    from lcm.models.networks import WholeUNet

    real = WholeUNet.__init__
    WholeUNet.__init__ = lambda self, args, teacher, *more: real(self, args, teacher.to(torch.float32), *more)


def call_the_target_without_autocast():
    import torch

    from lcm.models.networks import WholeUNet

    real = WholeUNet.__init__

    def init(self, args, teacher, student, target):
        forward = target.forward

        def without_autocast(*args, encoder_hidden_states, **kwargs):
            with torch.autocast("cuda", enabled=False):
                return forward(*args, encoder_hidden_states=encoder_hidden_states.float(), **kwargs)

        target.forward = without_autocast
        real(self, args, teacher, student, target)

    WholeUNet.__init__ = init


def make_four_mistakes():
    read_the_loss()
    make_conditions_in_float32()
    keep_the_teacher_in_float32()
    call_the_target_without_autocast()


@pytest.fixture(scope="module")
def four_mistakes(sd, tmp_path_factory):
    """The record of a run with four planted mistakes, which show in different places."""
    return one_step(sd, tmp_path_factory.mktemp("four_mistakes"), make_four_mistakes, "--cast_teacher_unet")


def test_a_number_that_is_read_in_the_loop(four_mistakes):
    first, second = four_mistakes["steps"][0]["waits"]
    assert first == the_one_wait() and second[1] == "item" and second[-1] == 1


def test_a_conditioning_in_float32(sd, four_mistakes):
    given, _ = found_dtypes(four_mistakes)
    expected = expected_dtypes(sd, "bfloat16")
    for network, dtypes in given.items():
        assert dtypes == expected[network] | {"encoder_hidden_states": "float32"}


def test_a_teacher_that_is_not_cast(four_mistakes):
    at_peak = four_mistakes["steps"][0]["at_peak"]
    assert at_peak["weights of the teacher"] > 0.9 * at_peak["weights of the target"]


def test_a_target_that_computes_in_float32(four_mistakes):
    flops = four_mistakes["steps"][0]["flops"]
    assert flops["target"].keys() == {"float32"} and flops["student"].keys() == {"bfloat16"}


def keep_what_was_loaded():
    from lcm.models import networks

    load_weights, kept = networks.load_weights, []

    def load_and_keep(network, weights):
        kept.extend(tensor.to("cuda") for tensor in weights.values())
        load_weights(network, weights)

    networks.load_weights = load_and_keep


def test_a_checkpoint_that_stays_on_the_device(sd, tmp_path):
    whole, resumed = simulated(sd, tmp_path, "--mixed_precision=bf16", resumed_to=3, plant=keep_what_was_loaded)
    states, trained = states_and_trained(whole)
    assert resumed["loaded"] > whole["loaded"] + states + trained


def cast_results_on_the_device():
    from lcm.models.networks import WholeUNet

    export = WholeUNet.export

    def copying(networks, folder):
        half = {name: tensor.half() for name, tensor in networks.unet.state_dict().items()}
        export(networks, folder)
        del half

    WholeUNet.export = copying


def test_results_that_are_cast_on_the_device(sd, tmp_path):
    record = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=cast_results_on_the_device)
    assert copies_on_device(record, "export") > 0.5
