"""The ledger against torch's allocator: the same training steps with real tensors on the CPU."""

import pytest
import torch
from conftest import SCRIPTS, Script
from simulated import simulated

from lcm.run.progress import Progress
from lcm.simulation.ledger import Ledger

# So large that activations are most of the memory. No dropout, which keeps other tensors on a CPU than on a GPU.
LARGE = ["--resolution=64", "--train_batch_size=8", "--max_train_steps=2"]
CASES = {"sd": ["--gradient_checkpointing"], "lora_sd": ["--lora_dropout=0"]}


class Enough(Exception):
    """Two steps are done."""


def measured(script, folder, options, monkeypatch):
    """By how many bytes the memory rises in the second of two real steps: (of the allocator, of a Ledger)."""
    ledger, rises, real = Ledger("cpu"), [], Progress.step

    def step(progress, *args):
        rises.append(ledger.peak - ledger.at_start)
        with torch.profiler.record_function("end of a step"):
            real(progress, *args)
        ledger.start_step()
        if len(rises) == 2:
            raise Enough

    monkeypatch.setattr(Progress, "step", step)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, ledger, pytest.raises(Enough):
        script.main(folder, *options)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return rise_of_allocations(events), rises[1]


def rise_of_allocations(events):
    """The highest sum of what was allocated and freed between the ends of the first and the second step."""
    alive = rise = 0
    ended = 0  # steps
    for event in events:
        if event.name() == "end of a step":
            ended += 1
            start = alive
        elif event.name() == "[memory]":
            alive += event.nbytes()
            if ended == 1:
                rise = max(rise, alive - start)
    return rise


@pytest.mark.parametrize("name", CASES)
def test_memory_as_the_allocator_counts_it(name, teacher, shards, tmp_path, monkeypatch):
    """Within 2 %, for a ledger of the real tensors, and for a simulation of the same command."""
    script = Script(name, teacher, shards, SCRIPTS[name])
    options = [*LARGE, *CASES[name]]
    folder = tmp_path / "simulated"
    folder.mkdir()
    step = simulated(script, folder, *options)["steps"][1]
    allocated, counted = measured(script, tmp_path / "real", options, monkeypatch)
    assert allocated > 10e6
    assert counted == pytest.approx(allocated, rel=0.02)
    assert step["peak"] - step["start"] == pytest.approx(allocated, rel=0.02)


def test_kernels_are_operations_that_touch_memory():
    """Not views; one for each operation that writes, in its phase."""
    ledger = Ledger("cpu")
    with ledger:
        ones = torch.ones(4)
        with ledger.within("sum"):
            (ones + ones).view(2, 2).T.add_(1)
    assert ledger.kernels == {"start": 1, "sum": 2} and ledger.bytes_moved == {"start": 16, "sum": 48 + 16}
