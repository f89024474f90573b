"""A run that is told to stop saves a checkpoint and ends; told twice, it ends at once."""

import importlib
import os
import signal
from functools import reduce

import pytest
import torch
from conftest import SCRIPTS, Script, forked

from lcm.run import progress
from lcm.run import signals as lcm_signals

OPTIONS = ["--max_train_steps=5", "--gradient_accumulation_steps=2", "--dataloader_num_workers=2", "--random_flip"]


def run(script, folder, name, whom):
    """A run that gets a signal inside step 3: its process, or its whole group, as from a terminal and SLURM."""

    def signalled():
        number, add_losses, calls = getattr(signal, name), progress.Progress.add_losses, []

        def add_losses_and_signal(self, *args):
            add_losses(self, *args)
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), number) if whom == "process" else os.killpg(0, number)
            if len(calls) == 5 and whom == "twice":
                os.kill(os.getpid(), number)

        progress.Progress.add_losses = add_losses_and_signal
        script.main(folder, *OPTIONS)

    return forked(signalled, new_session=True)


@pytest.mark.parametrize(
    ("name", "number", "whom"), [("lora_sd", "SIGTERM", "process"), ("lora_sdxl", "SIGINT", "group"),
                                 ("sd", "SIGTERM", "group")]
)  # fmt: skip
def test_stopped_and_resumed_equals_unbroken(teacher, sdxl_teacher, shards, tmp_path, name, number, whom):
    """The step is finished, saved, and gone on from, bit for bit; exit status 0, one line that says how to go on."""
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    script.main(tmp_path / "unbroken", *OPTIONS)
    stopped = run(script, tmp_path / "stopped", number, whom)
    assert stopped.returncode == 0, stopped.stderr
    assert "finishing the step, then saving a checkpoint; once more ends at once" in stopped.stderr
    assert "Stopped at step 3" in stopped.stdout and "--resume_from_checkpoint=latest" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint-3", "metrics.jsonl"}
    script.main(tmp_path / "stopped", *OPTIONS, "--resume_from_checkpoint=latest")
    unbroken, resumed = script.weights(tmp_path / "unbroken"), script.weights(tmp_path / "stopped")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_a_signal_is_taken_where_nothing_can_be_printed(monkeypatch):
    """As when the terminal is gone."""

    def gone(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lcm_signals.os, "write", gone)
    signals = lcm_signals.StopSignals(prints=True)
    try:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
    finally:
        signals.restore()


def test_a_second_signal_ends_at_once(teacher, shards, tmp_path):
    script = Script("sd", teacher, shards, SCRIPTS["sd"])
    stopped = run(script, tmp_path, "SIGTERM", "twice")
    assert stopped.returncode == -signal.SIGTERM
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("name", "number", "module", "method"),
    [
        ("sd", "SIGTERM", "lcm.pictures.validation", "Validation.show"),
        ("lora_sd", "SIGINT", "lcm.models.networks", "Lora.export"),
        ("sd", "SIGINT", "lcm.run.trackers", "Trackers.finish"),
        ("sd", "SIGTERM", "lcm.session", "leave_process_group"),
    ],
)
def test_a_signal_after_the_last_step_lets_the_results_be_written(
    teacher, shards, tmp_path, name, number, module, method
):
    """And says so: no checkpoint is promised, none is saved."""
    script = Script(name, teacher, shards, SCRIPTS[name])

    def signalled():
        *path, last = method.split(".")
        owner = reduce(getattr, path, importlib.import_module(module))
        original = getattr(owner, last)

        def signal_first(*args, **kwargs):
            os.kill(os.getpid(), getattr(signal, number))
            return original(*args, **kwargs)

        setattr(owner, last, signal_first)
        script.main(tmp_path, "--max_train_steps=1")

    done = forked(signalled)
    assert done.returncode == 0, done.stderr
    assert f"{number}: all steps are done; finishing pictures, results and uploads; once more ends" in done.stderr
    assert "checkpoint" not in done.stderr and "Stopped" not in done.stderr and "Trained to step 1" in done.stdout
    assert not list(tmp_path.glob("checkpoint-*")) and script.weights(tmp_path)
    assert (tmp_path / "README.md").is_file() and (tmp_path / "validation" / "step-000001.png").is_file()


def test_signals_are_as_before_when_a_run_is_over(teacher, shards, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    Script("sd", teacher, shards, SCRIPTS["sd"]).main(tmp_path, "--max_train_steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_ctrl_c_before_the_first_step_is_one_line(teacher, shards, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcm.models.family.load_vae", interrupted)
    with pytest.raises(SystemExit) as stop:
        Script("sd", teacher, shards, SCRIPTS["sd"]).main(tmp_path)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("\nStopped before the first step.\n")


def test_ctrl_c_in_an_evaluation_is_one_line(teacher, tmp_path, monkeypatch, capsys):
    import evaluate_lcm

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lcm.evaluation.candidates.load_teacher", interrupted)
    with pytest.raises(SystemExit) as stop:
        evaluate_lcm.main([f"--pretrained_teacher_model={teacher}", f"--trained={tmp_path}", "--clip_model=none",
                           "--feature_network=none", f"--output_dir={tmp_path / 'out'}"])  # fmt: skip
    assert stop.value.code == 130 and capsys.readouterr().err.endswith("\nStopped before the table was written.\n")
