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
    steps_of,
    the_one_wait,
)

from lcm.models.lora import DEFAULT_TARGETS

HALF = {"fp16": "float16", "bf16": "bfloat16"}
# In fp16 the options that most often hide a mistake, and another run that resumes; in bf16 the pictures.
HARD = ["--gradient_checkpointing", "--gradient_accumulation_steps=2", "--cast_teacher_unet", "--ema_decay=0.5"]
EASY = ["--use_8bit_adam", "--validation_steps=1", "--validation_teacher_steps=1"]

every_run = pytest.mark.parametrize(("name", "precision"), [(name, half) for name in SCRIPTS for half in HALF])
every_script = pytest.mark.parametrize("name", SCRIPTS)
whole_unets = pytest.mark.parametrize("name", [name for name in SCRIPTS if "lora" not in name])


@pytest.fixture(scope="module")
def runs(teacher, sdxl_teacher, shards, tmp_path_factory):
    """A function of a script's name and the precision: the script and the records of its runs, each run once."""
    made = {}

    def run(name, precision):
        script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
        if (name, precision) not in made:
            folder, mixed = tmp_path_factory.mktemp(name), f"--mixed_precision={precision}"
            made[name, precision] = (
                simulated(script, folder, mixed, *HARD, resumed_to=3)
                if precision == "fp16"
                else [simulated(script, folder, mixed, *EASY, with_pictures=True)]
            )
        return script, made[name, precision]

    return run


def num_trained(script):
    """How many tensors are trained: all of the U-Net and the projection of the guidance, or two a layer."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(script.teacher, subfolder="unet")
    if script.is_lora:
        return 2 * sum(name.endswith(DEFAULT_TARGETS) for name, _ in unet.named_modules())
    return 1 + len(list(unet.parameters()))


@every_script
def test_the_host_waits_once_in_a_step(runs, name):
    """For the numbers of the metrics, among them whether gradients overflowed. So it is after a resume."""
    _, records = runs(name, "fp16")
    assert [step["waits"] for step in steps_of(records)] == [[the_one_wait()]] * 3


@every_script
def test_the_waits_of_8_bit_adam(runs, name):
    """One for each tensor. In the first step also for its two tables, if a tensor is large enough for 8 bits, which
    those of the LoRAs here are not."""
    script, records = runs(name, "bf16")
    place = place_of(script.path.name, "optimizer.step()")
    tables = [] if script.is_lora else [["optimizer", "copy from cpu to cuda", place, 2]]
    every = ["optimizer", "synchronize", place, num_trained(script)]
    first, second = steps_of(records)
    assert first["waits"] == [the_one_wait(), *tables, every]
    assert second["waits"] == [the_one_wait(), every]


@every_run
def test_dtypes_of_the_networks(runs, name, precision):
    """Outputs are in the mixed precision, or float32 where accelerate casts them."""
    script, records = runs(name, precision)
    for record in records:
        given, returned = found_dtypes(record)
        assert given == expected_dtypes(script, HALF[precision])
        assert returned <= {HALF[precision], "float32"}


@every_run
def test_matrix_products_are_in_16_bits(runs, name, precision):
    """Those of the adapters too, but not those of SDXL's VAE, which overflows in fp16. Nothing is in float64, but the
    one number that torch's gradient scaler inverts so."""
    script, records = runs(name, precision)
    scaler = {("clipping", place_of(script.path.name, "accelerator.clip_grad_norm_("))}
    for step in steps_of(records):
        for phase in ("teacher", "target", "student", "backward", "text encoders"):
            assert step["flops"][phase].keys() == {HALF[precision]}, phase
        assert [phase for phase, *_ in step["float32_places"]] == (["VAE"] if script.is_sdxl else [])
        found = {(phase, place) for phase, place, _ in step["float64_places"]}
        assert found == (scaler if precision == "fp16" else set())


@every_run
def test_memory_is_given_back(runs, name, precision):
    """The second step takes what the first one took, and the optimizer's states."""
    record = runs(name, precision)[1][0]
    first, second = record["steps"]
    assert 0 < record["loaded"] < first["peak"] <= second["peak"]
    for step in (first, second):
        assert sum(step["at_peak"].values()) == step["peak"]


@whole_unets
def test_the_teacher_is_cast(runs, name):
    """With `--cast_teacher_unet` its weights take half of the memory; tensors begin at multiples of 512 bytes."""
    for step in steps_of(runs(name, "fp16")[1]):
        assert step["at_peak"]["weights of the teacher"] < 0.7 * step["at_peak"]["weights of the target"]


@whole_unets
def test_8_bit_states(runs, name):
    """They take less than two float32 numbers for each weight, though small tensors keep those."""
    states, trained = states_and_trained(runs(name, "bf16")[1][0])
    assert 0 < states < 2 * trained


def test_weights_in_bfloat16(teacher, shards, tmp_path):
    """So are their three states, while the moving average is in float32; tensors begin at multiples of 512 bytes. The
    average is kept up without a copy of all weights, checkpoints are made on the host, and nothing more waits."""
    script = Script("sd", teacher, shards, SCRIPTS["sd"])
    more = ["--mixed_precision=bf16", "--gradient_checkpointing", "--optimizer=adamw_bf16"]
    record = simulated(script, tmp_path, *more)
    states, trained = states_and_trained(record)
    assert states == pytest.approx(3 * trained, rel=0.01)
    at_peak = record["steps"][-1]["at_peak"]
    assert trained < 0.7 * at_peak["weights of the target"]
    assert [step["waits"] for step in record["steps"]] == [[the_one_wait()]] * 2
    given, _ = found_dtypes(record)
    assert given == expected_dtypes(script, "bfloat16")
    for phase in ("target", "student", "backward"):
        assert record["steps"][-1]["flops"][phase].keys() == {"bfloat16"}, phase
    peaks = record["steps"][-1]["phase_peaks"]
    assert peaks["loop"] - min(peaks.values()) < trained
    assert 0 < copies_on_device(record, "checkpoints") < 0.25


@every_run
def test_checkpoints_and_results_are_made_on_the_host(runs, name, precision):
    """What the device holds beside weights and states is the last batch."""
    record = runs(name, precision)[1][0]
    for what in ("checkpoints", "export"):
        assert 0 < copies_on_device(record, what) < 0.25


@every_script
def test_a_resumed_run_goes_on_as_the_unbroken_one(runs, name):
    """Weights and states come back, to the device, in their dtypes, and once; the next step is like the one before."""
    whole, resumed = runs(name, "fp16")[1]
    states, _ = states_and_trained(whole)
    assert resumed["loaded"] == whole["loaded"] + states
    assert 0 < resumed["checkpoints"] <= resumed["loaded"]
    before, after = whole["steps"][-1], *resumed["steps"]
    for what in ("peak", "peak_phase", "at_peak", "flops", "waits", "float32_places", "float64_places"):
        assert after[what] == before[what], what


@every_script
def test_pictures(runs, name):
    """They are drawn before the first step, between the steps and at the end. A failure would end a simulated run, and
    the tests above see that the step between them is like any other."""
    record = runs(name, "bf16")[1][0]
    assert record["pictures"] > record["loaded"]
    assert runs(name, "fp16")[1][0]["pictures"] == 0
