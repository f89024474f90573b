"""All four scripts on a simulated GPU: devices, dtypes, waits of the host, memory.

Each run has its own process, forked from a server that never ran a backward pass: autograd notes which devices there
are when it starts.
"""

import dataclasses
import json
import multiprocessing
import traceback

import pytest
from conftest import SCRIPTS, Script

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lcm.simulation.training"])
HALF = {"fp16": "float16", "bf16": "bfloat16"}
HARD = ["--gradient_checkpointing", "--gradient_accumulation_steps=2", "--cast_teacher_unet", "--ema_decay=0.5"]


def simulate(script, options, plant, path):
    """Run in a process of its own: write the record, or why there is none, to a file."""
    try:
        from lcm.simulation.training import Simulation

        if plant:
            plant()
        found = dataclasses.asdict(Simulation(script, options).run())
    except BaseException:
        found = {"error": traceback.format_exc()}
    path.write_text(json.dumps(found))


def simulated(script, folder, *more, plant=None):
    """The Record of a simulated run as a dict. `plant` is called before, in the process of the run."""
    path = folder / "record.json"
    process = SERVER.Process(target=simulate, args=(script.path.stem, script.options(folder, *more), plant, path))
    process.start()
    process.join()
    return json.loads(path.read_text())


def waits(record):
    """(phase, kind, file) of each wait in the last step, without line numbers."""
    return [(phase, kind, place.split(":")[0]) for phase, kind, place, _ in record["steps"][-1]["waits"]]


@pytest.fixture(scope="module", params=[(name, precision) for name in SCRIPTS for precision in HALF], ids="-".join)
def record(request, teacher, sdxl_teacher, shards, tmp_path_factory):
    """(script, precision, what it did) of a run with the options that most often hide a mistake."""
    name, precision = request.param
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    more = [f"--mixed_precision={precision}", *HARD]
    done = simulated(script, tmp_path_factory.mktemp(name), *more)
    assert "error" not in done, done["error"]
    return script, precision, done


def test_the_host_waits_once_in_a_step(record):
    """For the numbers of the metrics, among them whether gradients overflowed."""
    _, _, done = record
    assert waits(done) == [("check", "tolist", "lcm/run/progress.py")]
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


@pytest.fixture
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


def make_generators_of_the_host():
    import torch

    from lcm import session

    session.step_generator = lambda *_: torch.Generator()


def test_a_generator_of_the_host(sd, tmp_path):
    done = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=make_generators_of_the_host)
    assert "expected a generator on cuda, but found cpu" in done["error"]


def keep_tokens_on_the_host():
    from lcm.models import prompts

    prompts.send = lambda tensor, device: tensor


def test_a_tensor_that_stays_on_the_host(sd, tmp_path):
    done = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=keep_tokens_on_the_host)
    assert "found at least two devices, cuda:0 and cpu" in done["error"]


def read_the_loss():
    import lcm_common

    loss = lcm_common.consistency_loss
    lcm_common.consistency_loss = lambda *args: (found := loss(*args), found.mean().item())[0]


def test_a_number_that_is_read_in_the_loop(sd, tmp_path):
    done = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=read_the_loss)
    assert [kind for _, kind, _ in waits(done)] == ["tolist", "item"]


def load_text_encoders_in_float32():
    import torch

    from lcm.models import prompts

    prompts.weight_dtype = lambda accelerator: torch.float32


def test_a_network_that_stays_in_float32(sd, tmp_path):
    done = simulated(sd, tmp_path, "--mixed_precision=bf16", plant=load_text_encoders_in_float32)
    assert done["steps"][-1]["flops"]["text encoders"].keys() == {"float32"}
    assert done["dtypes"]["student"]["encoder_hidden_states"] == "float32"
