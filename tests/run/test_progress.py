"""The metrics of a run: what they are means of, where they go, and what measuring them costs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SCRIPTS, Script

import lcm_common
from lcm.data import loader
from lcm.pictures import validation
from lcm.results import metrics
from lcm.run import checkpoints, progress


@pytest.fixture
def sd(teacher, shards):
    return Script("sd", teacher, shards, SCRIPTS["sd"])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_means_over_the_window(script, tmp_path, monkeypatch):
    """Of all forward passes since the last row: of the losses, together and by timestep, and the gradients' norms."""
    passes, norms = [], []
    add_losses, clip = progress.Progress.add_losses, Accelerator.clip_grad_norm_

    def recording(self, losses, t):
        passes.append((losses.tolist(), t.tolist()))
        add_losses(self, losses, t)

    def clipping(self, *args):
        norms.append(clip(self, *args))
        return norms[-1]

    monkeypatch.setattr(progress.Progress, "add_losses", recording)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipping)
    more = ["--logging_steps=2", "--max_train_steps=5", "--gradient_accumulation_steps=3", "--lr_scheduler=linear"]
    script.main(tmp_path, *more, "--lr_warmup_steps=0", "--train_batch_size=4")
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert len(passes) == 15
    for row, first, last in zip(rows, (0, 2, 4), (2, 4, 5), strict=True):
        seen = [pair for losses, t in passes[3 * first : 3 * last] for pair in zip(losses, t, strict=True)]
        assert row["loss"] == pytest.approx(sum(loss for loss, _ in seen) / len(seen), rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(torch.stack(norms[first:last]).mean().item(), rel=1e-5)
        for low in range(0, 1000, 250):
            name = f"loss_by_timestep/{low:03d}-{low + 249:03d}"
            quarter = [loss for loss, t in seen if low <= t < low + 250]
            assert (name in row) == bool(quarter)
            assert not quarter or row[name] == pytest.approx(sum(quarter) / len(quarter), rel=1e-5)
    rate = script.module.parse_args(script.options(tmp_path)).learning_rate
    assert [row["lr"] for row in rows] == pytest.approx([rate * (6 - row["step"]) / 5 for row in rows])
    assert all(row["images_per_second"] > 0 and row["peak_memory_gb"] > 0.1 for row in rows)


def test_distance_of_the_moving_average(sd, tmp_path):
    """|EMA - student| / |EMA| before the step, as in the files of the checkpoint before."""
    sd.main(tmp_path, "--checkpointing_steps=1", "--max_train_steps=3", "--ema_decay=0.9")
    for row in rows_of(tmp_path)[1:]:
        folder = tmp_path / f"checkpoint-{row['step'] - 1}"
        weights = sd.weights(folder)
        pairs = [(weights[f"unet_target/{name}"], weights[f"unet/{name}"]) for name in
                 (key.partition("/")[2] for key in weights if key.startswith("unet/"))]  # fmt: skip
        difference = sum((a - b).double().square().sum() for a, b in pairs)
        expected = (difference / sum(a.double().square().sum() for a, _ in pairs)).sqrt().item()
        assert row["ema_distance"] == pytest.approx(expected, rel=1e-4) and expected > 1e-5
    assert rows_of(tmp_path)[0]["ema_distance"] == 0


def test_relative_distance():
    target = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    source = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert lcm_common.relative_distance(target, source).item() == pytest.approx((9 + 9) ** 0.5 / 5)


def test_a_lora_without_moving_average_has_no_distance(teacher, shards, tmp_path):
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    script.main(tmp_path)
    assert all("ema_distance" not in row for row in rows_of(tmp_path))


def test_a_resumed_run_has_the_metrics_of_an_unbroken_one(sd, tmp_path):
    """Rows after the checkpoint are trained again, and written once; a line that a kill has cut is passed over."""
    more = ["--max_train_steps=8", "--checkpointing_steps=4", "--logging_steps=2"]
    sd.main(tmp_path / "unbroken", *more)
    sd.main(tmp_path / "killed", *more, "--max_train_steps=6")
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    sd.main(tmp_path / "killed", *more, "--resume_from_checkpoint=latest")
    unbroken, resumed = rows_of(tmp_path / "unbroken"), rows_of(tmp_path / "killed")
    measured = {"images_per_second", "data_wait", "peak_memory_gb"}
    assert [row["step"] for row in resumed] == [2, 4, 6, 8]
    for a, b in zip(unbroken, resumed, strict=True):
        assert {name: a[name] for name in a.keys() - measured} == {name: b[name] for name in b.keys() - measured}


def test_a_new_run_in_an_old_folder_starts_a_new_file(sd, tmp_path):
    sd.main(tmp_path, "--max_train_steps=4")
    sd.main(tmp_path, "--max_train_steps=2")
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_a_foreign_file_of_metrics_is_set_aside(sd, tmp_path, capfd):
    """Its rows have no `step`, or other columns, or are no objects: one line in the log, and nothing of it is lost."""
    sd.main(tmp_path, "--max_train_steps=2", "--checkpointing_steps=2")
    own = (tmp_path / "metrics.jsonl").read_text()
    foreign = '{"epoch": 1, "loss": 2.0}\n{"step": 1, "acc": 0.5}\n[1, 2]\n"step"\nnot json\n{"step": "1"}\n'
    for content, others in ((own + foreign, 6), (own + "{}", 1)):
        (tmp_path / "metrics.jsonl").write_text(content)
        capfd.readouterr()
        sd.main(tmp_path, "--max_train_steps=3", "--resume_from_checkpoint=latest")
        assert f"{others} line(s) of {tmp_path}/metrics.jsonl are not metrics of a run" in capfd.readouterr().err
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.1").read_text() == own + foreign
    assert (tmp_path / "metrics.jsonl.2").read_text() == own + "{}"


def test_pictures_and_checkpoints_are_not_in_the_memory_of_steps(sd, tmp_path, monkeypatch):
    """On an allocator whose peak is 10 bytes in a step, more in step 3, and 1000 in pictures and checkpoints."""
    peak = [0]
    monkeypatch.setattr(progress, "peak_memory", lambda device: peak[0])
    monkeypatch.setattr(progress, "reset_peak_memory", lambda device: peak.__setitem__(0, 0))

    def raising(original, amount):
        def call(self, *args):
            peak[0] = max(peak[0], amount())
            return original(self, *args)

        return call

    steps = []
    for owner, name, amount in (
        (validation.Validation, "draw_teacher", lambda: 1000),
        (validation.Validation, "run", lambda: 1000),
        (checkpoints.Checkpoints, "save", lambda: 1000),
        (progress.Progress, "add_losses", lambda: 20 if steps.append(1) or len(steps) == 3 else 10),
    ):
        monkeypatch.setattr(owner, name, raising(getattr(owner, name), amount))
    more = ["--max_train_steps=6", "--logging_steps=2", "--validation_steps=1", "--checkpointing_steps=3"]
    sd.main(tmp_path, *more)
    assert [row["peak_memory_gb"] for row in rows_of(tmp_path)] == [10e-9, 20e-9, 10e-9]


@pytest.mark.cuda
def test_the_peak_of_a_gpu_can_be_measured_again():
    device = torch.device("cuda")
    torch.zeros(2**24, device=device)
    progress.reset_peak_memory(device)
    assert progress.peak_memory(device) < 2**26 <= torch.zeros(2**24, device=device).nbytes
    assert progress.peak_memory(device) >= 2**26


def test_waiting_for_data_is_measured(sd, tmp_path, monkeypatch):
    """By a clock that only data and forward passes move: 3 seconds for a batch, 1 for what is done with it."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    batches, add_losses = loader.TrainingData.__iter__, progress.Progress.add_losses

    def slow_batches(self):
        for batch in batches(self):
            clock[0] += 3
            yield batch

    def slow_losses(self, *args):
        clock[0] += 1
        add_losses(self, *args)

    monkeypatch.setattr(loader.TrainingData, "__iter__", slow_batches)
    monkeypatch.setattr(progress.Progress, "add_losses", slow_losses)
    sd.main(tmp_path, "--gradient_accumulation_steps=2", "--logging_steps=2")
    assert [row["data_wait"] for row in rows_of(tmp_path)] == [0.75, 0.75]
    assert [row["images_per_second"] for row in rows_of(tmp_path)] == [0.5, 0.5]  # 4 samples in 8 s


def test_one_line_waits_for_the_device_once_per_optimizer_step(script, tmp_path, monkeypatch):
    """No other line of ours in the loop reads a tensor's numbers, which on a GPU would wait for them."""
    readers = []

    def watch(name):
        read = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            caller = sys._getframe(1).f_code
            if Path(caller.co_filename).parent == ROOT or ROOT / "lcm" in Path(caller.co_filename).parents:
                readers.append((Path(caller.co_filename).name, caller.co_name))
            return read(self, *args, **kwargs)

        return watched

    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    watchers = {name: watch(name) for name in names}
    start, close = progress.Progress.__init__, progress.Progress.close

    def started(self, *args):
        start(self, *args)
        for name, watcher in watchers.items():
            monkeypatch.setattr(torch.Tensor, name, watcher)

    def closed(self):
        for name in watchers:
            monkeypatch.setattr(torch.Tensor, name, originals[name])
        return close(self)

    originals = {name: getattr(torch.Tensor, name) for name in watchers}
    monkeypatch.setattr(progress.Progress, "__init__", started)
    monkeypatch.setattr(progress.Progress, "close", closed)
    monkeypatch.setattr("lcm.pictures.validation.Validation.run", lambda self, step: None)
    script.main(tmp_path, "--gradient_accumulation_steps=2", "--max_train_steps=3")
    assert readers == [("progress.py", "check")] * 3


def test_processes_speak_once_per_optimizer_step(sd, tmp_path, monkeypatch):
    calls, reduce = [], Accelerator.reduce

    def counted(self, *args, **kwargs):
        calls.append(1)
        return reduce(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "reduce", counted)
    sd.main(tmp_path, "--gradient_accumulation_steps=2", "--max_train_steps=3")
    assert len(calls) == 3


def test_a_full_disk_costs_metrics_only(sd, tmp_path, monkeypatch, capfd):
    """One warning, however many rows."""

    def full(path, mode="r", **more):
        if mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, **more)

    monkeypatch.setattr(metrics, "open", full, raising=False)
    sd.main(tmp_path)
    assert capfd.readouterr().err.count("Metrics are not written") == 1
    assert (tmp_path / "unet_target").is_dir() and rows_of(tmp_path) == []
