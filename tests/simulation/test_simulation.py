"""All four scripts on a simulated GPU: devices, dtypes, waits of the host, memory. Each run has its own process."""

import dataclasses
import json
import re

import pytest
from conftest import SCRIPTS, Script, forked

HALF = {"fp16": "float16", "bf16": "bfloat16"}
HARD = ["--gradient_checkpointing", "--gradient_accumulation_steps=2", "--cast_teacher_unet", "--ema_decay=0.5"]


def simulated(script, folder, *more, plant=None):
    """The Record of a simulated run as a dict. `plant` is called before, in the process of the run."""

    def run():
        from lcm.simulation.training import Simulation

        if plant:
            plant()
        record = Simulation(script.path.stem, script.options(folder, *more)).run()
        (folder / "record.json").write_text(json.dumps(dataclasses.asdict(record)))

    folder.mkdir(exist_ok=True)
    done = forked(run)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "record.json").read_text())


def waits(record):
    """(phase, kind, file) of each wait in the last step, without line numbers."""
    return [(phase, kind, place.split(":")[0]) for phase, kind, place, _ in record["steps"][-1]["waits"]]


@pytest.fixture(scope="module", params=[(name, precision) for name in SCRIPTS for precision in HALF], ids="-".join)
def record(request, teacher, sdxl_teacher, shards, tmp_path_factory):
    """(script, precision, what it did) of a run with the options that most often hide a mistake."""
    name, precision = request.param
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    more = [f"--mixed_precision={precision}", *HARD]
    return script, precision, simulated(script, tmp_path_factory.mktemp(name), *more)


def test_the_host_waits_once_in_a_step(record):
    """For the numbers of the metrics; with fp16 the gradient scaler reads whether gradients overflowed."""
    script, precision, done = record
    expected = [("check", "tolist", "lcm/run/progress.py")]
    assert waits(done) == expected + [("optimizer", "item", script.path.name)] * (precision == "fp16")
    assert all(count == 1 for *_, count in done["steps"][-1]["waits"])


def test_dtypes_of_the_networks(record):
    """Latents and micro-conditioning are float32, embeddings and outputs are in the mixed precision."""
    script, precision, done = record
    half = HALF[precision]
    given = {"sample": "float32", "timestep": "int64", "encoder_hidden_states": half}
    if script.is_sdxl:
        given |= {"text_embeds": half, "time_ids": "float32"}
    embedded = given if script.is_lora else given | {"timestep_cond": "float32"}
    for network, expected in (("teacher", given), ("target", embedded), ("student", embedded)):
        found = dict(done["dtypes"][network])
        assert found.pop("output") in (half, "float32")
        assert found == expected, network


def test_matrix_products_are_in_16_bits(record):
    """Those of the adapters too. Nothing is in float64, but the one number that torch's gradient scaler inverts so."""
    _, precision, done = record
    for step in done["steps"]:
        for phase in ("teacher", "target", "student", "backward", "text encoders"):
            assert step["flops"][phase].keys() == {HALF[precision]}, phase
        assert {phase for phase, *_ in step["float64_places"]} <= ({"clipping"} if precision == "fp16" else set())


def test_memory_is_given_back(record):
    """The second step takes what the first one took, and the optimizer's states."""
    _, _, done = record
    first, second = done["steps"]
    assert 0 < done["loaded"] < first["peak"] <= second["peak"]
    assert sum(second["at_peak"].values()) == second["peak"]


# Mistakes that only a GPU shows: each is planted, and noticed.


def failure(script, folder, plant):
    """The last line of a simulated run that fails."""
    with pytest.raises(AssertionError) as error:
        simulated(script, folder, "--mixed_precision=bf16", plant=plant)
    return re.sub(r"\s+", " ", str(error.value))


@pytest.fixture
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


def test_a_generator_of_the_host(sd, tmp_path):
    def plant():
        import torch

        from lcm import session

        session.step_generator = lambda *_: torch.Generator()

    assert "expected a generator on cuda" in failure(sd, tmp_path, plant)


def test_a_tensor_that_stays_on_the_host(sd, tmp_path):
    def plant():
        from lcm.models import prompts

        prompts.send = lambda tensor, device: tensor

    assert "cpu" in failure(sd, tmp_path, plant)


def test_a_number_that_is_read_in_the_loop(sd, tmp_path):
    def plant():
        import lcm_common

        loss = lcm_common.consistency_loss
        lcm_common.consistency_loss = lambda *args: (found := loss(*args), found.mean().item())[0]

    assert len(waits(simulated(sd, tmp_path, "--mixed_precision=bf16", plant=plant))) == 2


def test_a_network_that_stays_in_float32(sd, tmp_path):
    def plant():
        import torch

        from lcm.models import prompts

        prompts.weight_dtype = lambda accelerator: torch.float32

    done = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=plant)
    assert done["steps"][-1]["flops"]["text encoders"].keys() == {"float32"}
    assert done["dtypes"]["student"]["encoder_hidden_states"] == "float32"
