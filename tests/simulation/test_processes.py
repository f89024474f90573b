"""One process of several on a simulated GPU: what DistributedDataParallel adds, and what FSDP2 splits."""

import pytest
from conftest import SCRIPTS, Script
from simulated import Failed, expected_dtypes, found_dtypes, simulated, the_one_wait

from lcm.run import start
from lcm.simulation import ledger

OPTIONS = ["--mixed_precision=fp16", "--gradient_checkpointing", "--cast_teacher_unet"]
BUCKETS = "buckets of DistributedDataParallel"
FSDP = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
num_machines: 1
num_processes: 2
mixed_precision: fp16
"""


@pytest.fixture(scope="module")
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


@pytest.fixture(scope="module")
def alone(sd, tmp_path_factory):
    """The record of a single process."""
    return simulated(sd, tmp_path_factory.mktemp("alone"), *OPTIONS, plant=count_exactly)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "fsdp.yaml"
    path.write_text(FSDP)
    return {"config_file": str(path), "num_processes": 4}


@pytest.fixture(scope="module")
def sharded(sd, fsdp, tmp_path_factory):
    """The record of one process of four, with FSDP."""
    return simulated(sd, tmp_path_factory.mktemp("sharded"), *OPTIONS, plant=count_exactly, **fsdp)


def count_exactly():
    """The test's networks are so small that rounded sizes hide the others."""
    ledger.GRANULE = 1


def of(record, owner):
    """Bytes of an owner at the peak of the last step."""
    return record["steps"][-1]["at_peak"].get(owner, 0)


def test_ddp_adds_its_buckets(sd, alone, tmp_path):
    """Their size is that of the trained weights, before the first step and after the last one."""
    record = simulated(sd, tmp_path, *OPTIONS, num_processes=2, plant=count_exactly)
    assert of(record, BUCKETS) == of(record, "weights that are trained") > 0
    assert record["loaded"] == alone["loaded"] + of(record, BUCKETS)
    assert record["steps"][-1]["waits"] == [the_one_wait()]


def hold_gradients_twice():
    count_exactly()
    kwargs = start.DistributedDataParallelKwargs
    start.DistributedDataParallelKwargs = lambda gradient_as_bucket_view: kwargs()


def test_gradients_are_in_the_buckets(sd, tmp_path):
    """In the clipping and the optimizer there are no others."""
    folders = [tmp_path / "once", tmp_path / "twice"]
    for folder in folders:
        folder.mkdir()
    once = simulated(sd, folders[0], *OPTIONS, num_processes=2, plant=count_exactly)
    twice = simulated(sd, folders[1], *OPTIONS, num_processes=2, plant=hold_gradients_twice)
    saved = twice["steps"][-1]["phase_peaks"]["optimizer"] - once["steps"][-1]["phase_peaks"]["optimizer"]
    assert saved == of(once, BUCKETS) > 0


def test_fsdp_splits_weights_and_states(alone, sharded):
    """Of four processes each has a quarter of the student, of its average and of the states, rounded up."""
    record = sharded
    assert record["is_sharded"] and not alone["is_sharded"]
    for owner in ("weights that are trained", "weights of the target", "states of the optimizer"):
        assert of(alone, owner) / 4 <= of(record, owner) < of(alone, owner) / 3.5
    assert of(record, "gathered by FSDP") < of(alone, "weights that are trained") / 2
    assert of(record, "weights of the teacher") == of(alone, "weights of the teacher")
    assert record["loaded"] < alone["loaded"]
    assert record["steps"][-1]["flops"]["student"] == alone["steps"][-1]["flops"]["student"]


def test_fsdp_gives_the_networks_their_inputs_as_they_are(sd, sharded):
    """FSDP would cast them to fp16, and round SDXL's sizes in bf16."""
    assert found_dtypes(sharded)[0] == expected_dtypes(sd, "float16")


def test_fsdp_is_refused_for_a_lora(teacher, shards, fsdp, tmp_path):
    lora = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    with pytest.raises(Failed, match="accelerate config: FSDP is not supported"):
        simulated(lora, tmp_path, "--mixed_precision=fp16", **fsdp)


def test_an_offloaded_moving_average_is_refused_with_fsdp(sd, fsdp, tmp_path):
    with pytest.raises(Failed, match="UserError: --offload_ema: FSDP splits the moving average already"):
        simulated(sd, tmp_path, *OPTIONS, "--offload_ema", **fsdp)


def test_a_config_file_that_accelerate_refuses(sd, tmp_path):
    with pytest.raises(Failed, match=r"UserError: --config_file: accelerate refuses '/no/such\.yaml'"):
        simulated(sd, tmp_path, *OPTIONS, num_processes=2, config_file="/no/such.yaml")
