"""Other targets on the simulated device: they cost no wait, and what is not guided costs no second pass."""

import pytest
from conftest import SCRIPTS, Script
from simulated import simulated, steps_of, the_one_wait


def test_waits_and_passes(teacher, shards, tmp_path):
    """Pictures are drawn too, with the scheduler that fits."""
    script = Script("sd", teacher, shards, SCRIPTS["sd"])
    phased = ["--target=phased", "--num_phases", "8", "2", "--num_solver_steps=2"]
    flops = []
    for name, more in (("phased", phased), ("trajectory", ["--target=trajectory", "--w_min=0", "--w_max=0"])):
        (tmp_path / name).mkdir()
        record = simulated(script, tmp_path / name, *more, with_pictures=True)
        assert [step["waits"] for step in steps_of([record])] == [[the_one_wait()]] * 2, name
        flops.append(sum(record["steps"][-1]["flops"]["teacher"].values()))
    assert flops[0] == pytest.approx(4 * flops[1], rel=1e-6)  # two guided steps against one without guidance
