"""Networks that wait in host memory, on a simulated GPU: where they are, and that nobody waits for them."""

import pytest
from conftest import SCRIPTS, Script
from simulated import found_dtypes, simulated, steps_of, the_one_wait

FROZEN = {"weights of the VAE", "weights of text encoders", "weights of the teacher", "weights of the target"}
OPTIONS = ["--mixed_precision=fp16", "--cast_teacher_unet", "--validation_teacher_steps=1", "--ema_decay=0.5"]


@pytest.fixture(scope="module", params=["sd", "lora_sdxl"])
def runs(request, teacher, sdxl_teacher, shards, tmp_path_factory):
    """[records without, records with networks in host memory]: of a run that draws, and of one that resumes it."""
    name = request.param
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    savers = ["--offload"] if script.is_lora else ["--offload", "--offload_ema"]
    folders = [tmp_path_factory.mktemp(name) for _ in range(2)]
    return [
        simulated(script, folder, *OPTIONS, *more, resumed_to=3, with_pictures=True)
        for folder, more in zip(folders, ([], savers), strict=True)
    ]


def frozen(step):
    """Bytes of frozen networks at the peak of a step."""
    return sum(size for owner, size in step["at_peak"].items() if owner in FROZEN)


def test_they_are_not_in_memory_before_a_step(runs):
    for without, offloaded in zip(*runs, strict=True):
        assert without["loaded"] - offloaded["loaded"] == frozen(without["steps"][0]) > 0
        for a, b in zip(without["steps"], offloaded["steps"], strict=True):
            assert a["start"] - b["start"] == frozen(a)


def test_the_peak_is_lower(runs):
    for without, offloaded in zip(*map(steps_of, runs), strict=True):
        assert offloaded["peak"] < without["peak"]


def test_the_host_waits_as_without(runs):
    for step in steps_of(runs[1]):
        assert step["waits"] == [the_one_wait()]


def test_the_same_is_computed(runs):
    without, offloaded = (records[-1] for records in runs)
    assert found_dtypes(offloaded) == found_dtypes(without)
    assert offloaded["steps"][-1]["flops"] == without["steps"][-1]["flops"]
