"""What TensorBoard, W&B and Comet hold after a run, read back with what their makers ship; and losing one of them."""

import json
import struct
import time
import zipfile

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from conftest import SCRIPTS, Script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcm.options.choices import TRACKERS

RUN = [
    "--max_train_steps=4",
    "--validation_steps=2",
    "--logging_steps=2",
    "--checkpointing_steps=4",
    "--tracker_project_name=mine",
    "--validation_teacher_steps",
    "2",
    "--validation_prompts",
    "a red three",
    "two/blue",
]
PICTURES = {
    0: {"validation/teacher, 2 steps, guidance 7.5"},
    2: {"validation/LoRA, 1 step, guidance 1", "validation"},
    4: {"validation/LoRA, 1 step, guidance 1", "validation"},
}
SCALARS = {"loss", "gradient_norm", "lr", "images_per_second", "data_wait", "peak_memory_gb", "ema_distance"}


@pytest.fixture
def script(teacher, shards):
    name = "lora_sd"
    return Script(name, teacher, shards, (*SCRIPTS[name], "--ema_decay=0.5"))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensorboard(folder):
    return EventAccumulator(str(folder / "logs" / "mine"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_tensorboard(script, tmp_path):
    """Every picture under a tag that says what it is, every metric, at the right steps; and the options."""
    script.main(tmp_path, *RUN, "--report_to=tensorboard")
    log = tensorboard(tmp_path)
    found = {}
    for tag in log.Tags()["images"]:
        for event in log.Images(tag):
            found.setdefault(event.step, set()).add(tag)
    expected = {
        step: {f"{name}/{prompt}" for name in names - {"validation"} for prompt in ("a red three", "two/blue")}
        | names & {"validation"}
        for step, names in PICTURES.items()
    }
    assert found == expected
    grid = (tmp_path / "validation" / "step-000004.png").read_bytes()
    (event,) = [event for event in log.Images("validation") if event.step == 4]
    assert (event.width, event.height) == struct.unpack(">II", grid[16:24])
    for row in rows_of(tmp_path):
        for name, value in row.items():
            if name != "step":
                (event,) = [event for event in log.Scalars(name) if event.step == row["step"]]
                assert event.value == pytest.approx(value, rel=1e-6)
    assert SCALARS | {"samples/used"} <= set(log.Tags()["scalars"])
    (options,) = (tmp_path / "logs" / "mine").rglob("hparams.yml")
    assert "lora_rank: 4" in options.read_text() and "hub_token" not in options.read_text()


def test_tensorboard_of_a_resumed_run_shows_no_step_twice(script, tmp_path):
    more = [*RUN, "--report_to=tensorboard", "--logging_steps=1", "--checkpointing_steps=2"]
    script.main(tmp_path, *more)
    for path in ("checkpoint-4", "README.md"):
        (tmp_path / path).rename(tmp_path / f"old-{path}")
    script.main(tmp_path, *more, "--resume_from_checkpoint=latest")
    log = tensorboard(tmp_path)
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def wandb_records(path):
    """The records of a .wandb file: a LevelDB log of W&B's own protobuf messages. Its reader is compiled in W&B."""
    from wandb.proto import wandb_internal_pb2

    data, place, partial = path.read_bytes(), 7, b""  # 7 bytes of header
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a header: padding to the end of the block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the only or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            yield record
            partial = b""


def test_wandb(script, tmp_path, monkeypatch):
    """Offline: pictures with their captions and metrics at the right steps, and the options."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    script.main(tmp_path, *RUN, "--report_to=wandb", "--tracker_run_name=four steps")
    (path,) = (tmp_path / "logs").rglob("*.wandb")
    history, config, records, names = {}, {}, [], set()
    while not any(record.WhichOneof("record_type") == "exit" for record in records):  # W&B's process takes its time
        time.sleep(0.1)
        records = list(wandb_records(path))
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                if inner:
                    row.setdefault(name, {})[inner[0]] = json.loads(item.value_json)
                else:
                    row[name] = json.loads(item.value_json)
            history.setdefault(row["_step"], {}).update(row)
        if record.WhichOneof("record_type") == "run":
            names.add(record.run.display_name)
        if record.WhichOneof("record_type") == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    assert names == {"four steps"}
    for step, names in PICTURES.items():
        assert {name for name in history[step] if name.startswith("validation")} == names
        for name in names - {"validation"}:
            shown = history[step][name]
            assert shown["captions"] == ["a red three", "two/blue"]
            assert all((path.parent / "files" / file).is_file() for file in shown["filenames"])
    for row in rows_of(tmp_path):
        assert {name: history[row["step"]][name] for name in row if name != "step"} == pytest.approx(
            {name: value for name, value in row.items() if name != "step"}
        )
    assert config["lora_rank"] == 4 and "hub_token" not in config


def test_comet(script, tmp_path, monkeypatch):
    """Offline, read from the archive that Comet would upload."""
    comet_ml = pytest.importorskip("comet_ml")
    start = comet_ml.start
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.setattr(comet_ml, "start", lambda **more: start(online=False, **more))
    script.main(tmp_path / "out", *RUN, "--report_to=comet_ml", "--tracker_run_name=four steps")
    (path,) = (tmp_path / "comet").glob("*.zip")
    metrics, pictures, others = {}, {}, set()
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)["payload"]
            others |= {(message["key"], message["value"])} if {"key", "value"} <= message.keys() else set()
            if "metric" in message:
                metric = message["metric"]
                metrics[metric["step"], metric["metricName"]] = metric["metricValue"]
            if message.get("upload_type") == "visualization":
                picture = message["additional_params"]
                pictures.setdefault(picture["step"], set()).add(picture["figName"])
    expected = {
        step: {f"{name}: {prompt}" for name in names - {"validation"} for prompt in ("a red three", "two/blue")}
        | names & {"validation"}
        for step, names in PICTURES.items()
    }
    assert pictures == expected and ("Name", "four steps") in others
    for row in rows_of(tmp_path / "out"):
        for name in row.keys() - {"step"}:
            assert metrics[row["step"], name] == pytest.approx(row[name])


def stored_runs(folder):
    """What the newest checkpoint says the trackers call the run."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((newest / "training_state.json").read_text())["trackers"]


def test_a_resume_goes_on_in_its_own_wandb_run(script, tmp_path, monkeypatch):
    """A new run, and a branch that another folder takes from this one's checkpoint, have runs of their own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(folder, *more):
        before = set((folder / "logs").rglob("*.wandb"))
        script.main(folder, *RUN, "--checkpointing_steps=2", "--report_to=wandb", *more)
        (path,) = set((folder / "logs").rglob("*.wandb")) - before
        return path.stem.removeprefix("run-")

    first = run(tmp_path / "a")
    assert stored_runs(tmp_path / "a") == {"wandb": first}
    assert run(tmp_path / "a", "--resume_from_checkpoint=latest", "--max_train_steps=6") == first
    branch = run(tmp_path / "b", f"--resume_from_checkpoint={tmp_path}/a/checkpoint-2")
    anew = run(tmp_path / "a")
    assert len({first, branch, anew}) == 3
    assert run(tmp_path / "b", "--resume_from_checkpoint=checkpoint-4", "--max_train_steps=5") == branch


def test_a_resume_goes_on_in_its_own_comet_experiment(script, tmp_path, monkeypatch):
    comet_ml = pytest.importorskip("comet_ml")
    start, keys = comet_ml.start, []

    def offline(**more):
        experiment = start(online=False, **more)
        keys.append(experiment.get_key())
        return experiment

    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.setattr(comet_ml, "start", offline)
    script.main(tmp_path / "out", *RUN, "--report_to=comet_ml")
    script.main(tmp_path / "out", *RUN, "--report_to=comet_ml", "--resume_from_checkpoint=latest")
    assert keys == [keys[0]] * 2 and stored_runs(tmp_path / "out") == {"comet_ml": keys[0]}


def test_the_option_knows_every_tracker_of_accelerate():
    assert set(TRACKERS) == {kind.value for kind in LoggerType} - {"all"} == set(LOGGER_TYPE_TO_CLASS)


class Scalars(GeneralTracker):
    """A tracker in the way of accelerate's for mlflow, dvclive and trackio: it takes no pictures."""

    name = "scalars"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, run_name, **more):
        super().__init__()
        self.run_name, self.rows, self.pictures, self.options = run_name, {}, {}, None
        type(self).last = self

    tracker = None

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.options = values

    def log(self, values, step=None, **more):
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        pass


class Pictures(Scalars):
    """One whose `log_images` is as accelerate describes it."""

    name = "pictures"

    def log_images(self, values, step=None, **more):
        for tag, images in values.items():
            assert all(isinstance(image, Image.Image) for image in images)
            self.pictures.setdefault(step, set()).add(tag)


@pytest.mark.parametrize("kind", [Scalars, Pictures])
def test_any_other_tracker(script, tmp_path, monkeypatch, capfd, kind):
    """In the place of one that is installed: metrics and options; pictures if it takes them, else one line."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", kind)
    script.main(tmp_path, *RUN, "--report_to=tensorboard")
    tracker = kind.last
    assert tracker.run_name == "mine" and tracker.options["lora_rank"] == 4
    for row in rows_of(tmp_path):
        assert {name: tracker.rows[row["step"]][name] for name in row if name != "step"} == {
            name: value for name, value in row.items() if name != "step"
        }
    expected = {
        step: {f"{name}/{prompt}" for name in names - {"validation"} for prompt in ("a red three", "two/blue")}
        | names & {"validation"}
        for step, names in PICTURES.items()
    }
    assert tracker.pictures == (expected if kind is Pictures else {})
    assert capfd.readouterr().err.count("pictures do not go to scalars") == (kind is Scalars)


def test_all_takes_every_tracker(script, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    script.main(tmp_path, *RUN, "--report_to=all")
    assert list((tmp_path / "logs").rglob("*.wandb")) and "loss" in tensorboard(tmp_path).Tags()["scalars"]


@pytest.mark.parametrize("when", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_losing_a_tracker_costs_the_tracker_only(script, tmp_path, monkeypatch, capfd, when):
    """One line in the log, the other trackers and the weights as without."""
    from accelerate.tracking import WandBTracker

    def no_network(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(WandBTracker, when, no_network)
    script.main(tmp_path / "lost", *RUN, "--report_to=all")
    lost = "lost wandb: no route to host; training goes on without"
    assert capfd.readouterr().err.count(lost) == (when != "log_images")  # which is not called: captions go another way
    assert "validation" in tensorboard(tmp_path / "lost").Tags()["images"]
    script.main(tmp_path / "none", *RUN)
    lost, none = script.weights(tmp_path / "lost"), script.weights(tmp_path / "none")
    assert all(torch.equal(lost[name], none[name]) for name in none)
