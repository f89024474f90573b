"""All four scripts on a simulated GPU: devices, dtypes, waits of the host, memory, checkpoints, results, pictures."""

import diffusers
import pytest
from conftest import SCRIPTS, Script
from simulated import (
    copies_on_device,
    expected_dtypes,
    found_dtypes,
    place_of,
    simulated,
    states_and_trained,
    the_one_wait,
)

from lcm.models.lora import DEFAULT_TARGETS

HALF = {"fp16": "float16", "bf16": "bfloat16"}
# Options that most often hide a mistake, and what a run without them may do.
HARD = ["--gradient_checkpointing", "--gradient_accumulation_steps=2", "--cast_teacher_unet", "--ema_decay=0.5"]
EASY = ["--use_8bit_adam", "--validation_steps=1", "--validation_teacher_steps=1"]


@pytest.fixture(scope="module", params=[(name, precision) for name in SCRIPTS for precision in HALF], ids="-".join)
def runs(request, teacher, sdxl_teacher, shards, tmp_path_factory):
    """(script, precision, records): in fp16 a HARD run and one that resumes it, in bf16 an EASY one with pictures."""
    name, precision = request.param
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    folder, mixed = tmp_path_factory.mktemp(name), f"--mixed_precision={precision}"
    if precision == "fp16":
        return script, precision, simulated(script, folder, mixed, *HARD, resumed_to=3)
    return script, precision, [simulated(script, folder, mixed, *EASY, with_pictures=True)]


@pytest.fixture
def steps(runs):
    """All steps of the runs."""
    return [step for record in runs[2] for step in record["steps"]]


@pytest.fixture
def whole_and_resumed(runs):
    """The records of a HARD run and of the one that resumes it."""
    if len(runs[2]) == 1:
        pytest.skip("is not resumed")
    return runs[2]


def num_trained(script):
    """How many tensors are trained: all of the U-Net and the projection of the guidance, or two a layer."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(script.teacher, subfolder="unet")
    if script.is_lora:
        return 2 * sum(name.endswith(DEFAULT_TARGETS) for name, _ in unet.named_modules())
    return 1 + len(list(unet.parameters()))


def test_the_host_waits_once_in_a_step(runs, steps):
    """For the numbers of the metrics, among them whether gradients overflowed.

    bitsandbytes waits for each tensor, and in the first step for its two tables of numbers in 8 bits, if a tensor has
    4096 numbers or more; those of the LoRAs here have fewer.
    """
    script, precision, _ = runs
    for number, step in enumerate(steps, 1):
        expected = [the_one_wait()]
        if precision == "bf16":
            optimizer_step = place_of(script.path.name, "optimizer.step()")
            if number == 1 and not script.is_lora:
                expected.append(["optimizer", "copy from cpu to cuda", optimizer_step, 2])
            expected.append(["optimizer", "synchronize", optimizer_step, num_trained(script)])
        assert step["waits"] == expected


def test_dtypes_of_the_networks(runs):
    """Outputs are in the mixed precision, or float32 where accelerate casts them."""
    script, precision, records = runs
    for record in records:
        given, returned = found_dtypes(record)
        assert given == expected_dtypes(script, HALF[precision])
        assert returned <= {HALF[precision], "float32"}


def test_matrix_products_are_in_16_bits(runs, steps):
    """Those of the adapters too, but not those of SDXL's VAE, which overflows in fp16. Nothing is in float64, but the
    one number that torch's gradient scaler inverts so."""
    script, precision, _ = runs
    scaler = {("clipping", place_of(script.path.name, "accelerator.clip_grad_norm_("))}
    for step in steps:
        for phase in ("teacher", "target", "student", "backward", "text encoders"):
            assert step["flops"][phase].keys() == {HALF[precision]}, phase
        assert [phase for phase, *_ in step["float32_places"]] == (["VAE"] if script.is_sdxl else [])
        assert {(phase, place) for phase, place, _ in step["float64_places"]} == (
            scaler if precision == "fp16" else set()
        )


def test_memory_is_given_back(runs):
    """The second step takes what the first one took, and the optimizer's states."""
    first, second = runs[2][0]["steps"]
    assert 0 < runs[2][0]["loaded"] < first["peak"] <= second["peak"]
    for step in (first, second):
        assert sum(step["at_peak"].values()) == step["peak"]


def test_the_teacher_is_cast(whole_and_resumed, runs):
    """With `--cast_teacher_unet` its weights take half of the memory; tensors begin at multiples of 512 bytes."""
    if not runs[0].is_lora:
        at_peak = whole_and_resumed[0]["steps"][-1]["at_peak"]
        assert at_peak["weights of the teacher"] < 0.7 * at_peak["weights of the target"]


def test_8_bit_states_take_less(runs, steps):
    """Than two float32 numbers for each weight; small tensors keep those."""
    if runs[1] == "bf16" and not runs[0].is_lora:
        states, trained = states_and_trained(runs[2][0])
        assert 0 < states < 1.95 * trained


def test_checkpoints_and_results_are_made_on_the_host(runs):
    """What the device holds beside weights and states is the last batch."""
    for what in ("checkpoints", "export"):
        assert 0 < copies_on_device(runs[2][0], what) < 0.25


def test_a_resumed_run_goes_on_as_the_unbroken_one(whole_and_resumed):
    """Weights and states come back, to the device, in their dtypes, and once; the next step is like the one before."""
    whole, resumed = whole_and_resumed
    states, _ = states_and_trained(whole)
    assert resumed["loaded"] == whole["loaded"] + states
    assert resumed["checkpoints"] <= resumed["loaded"]
    before, after = whole["steps"][-1], *resumed["steps"]
    for what in ("peak", "peak_phase", "at_peak", "flops", "waits", "float32_places", "float64_places"):
        assert after[what] == before[what], what


def test_pictures(runs):
    """They are drawn before the first step, between the steps and at the end; a failure would end the run."""
    record = runs[2][0]
    assert (record["pictures"] > record["loaded"]) == (runs[1] == "bf16")
