"""The report that a run leaves: a card whose pictures exist, and curves of the whole run."""

import re

import matplotlib.figure
import numpy as np
from conftest import SCRIPTS, Script
from matplotlib.figure import Figure
from PIL import Image

import lcm_export
import lcm_report


def pictures_of(folder):
    return re.findall(r"!\[.*?\]\((.*?)\)", (folder / "README.md").read_text())


def test_the_card_shows_pictures_and_curves(script, tmp_path):
    script.main(tmp_path)
    assert pictures_of(tmp_path) == ["validation/step-000004.png", "training.png"]
    for name in pictures_of(tmp_path):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_a_card_without_pictures(teacher, shards, tmp_path, monkeypatch, capfd):
    """What could not be drawn is not shown, and costs nothing else."""
    import lcm_validation

    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(lcm_validation.Validation, "show", broken)
    monkeypatch.setattr(lcm_export, "draw_curves", broken)
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    script.main(tmp_path)
    assert pictures_of(tmp_path) == []
    assert "No curves: no font" in capfd.readouterr().err
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def drawn_lines(rows, tmp_path, monkeypatch):
    """{title of a panel: [(x, y) of each solid line]} as matplotlib was given them."""
    figures = []
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **more: figures.append(Figure(**more)) or figures[-1])
    lcm_report.draw_curves(rows, tmp_path / "training.png")
    return {
        axes.get_title(): [
            (line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
            if not line.get_alpha()
        ]
        for axes in figures[0].axes
    }


def test_curves(tmp_path, monkeypatch):
    """One panel each for loss, loss by timestep and gradients; rows in which no timestep of a quarter was drawn."""
    same = {"gradient_norm": 2.0, "loss_by_timestep/000-249": 0.5}
    rows = [{"step": 10 * i, "loss": 1 / i, **same} for i in range(1, 9)]
    rows[3]["loss_by_timestep/750-999"] = 3.0
    lines = drawn_lines(rows, tmp_path, monkeypatch)
    steps = [10 * i for i in range(1, 9)]
    ((_, x, y),) = lines["loss"]
    assert x == steps and np.allclose(y, [1 / i for i in range(1, 9)])
    assert [(label, x, y) for label, x, y in lines["loss by timestep"]] == [
        ("t from 0 to 249", steps, [0.5] * 8),
        ("t from 750 to 999", [40], [3.0]),
    ]
    assert lines["gradient norm, before clipping"][0][1:] == (steps, [2.0] * 8)
    assert Image.open(tmp_path / "training.png").size == (1200, 340)


def test_curves_of_one_row(tmp_path, monkeypatch):
    """And one without a gradient norm, as when fp16 overflowed at every step."""
    lines = drawn_lines([{"step": 4, "loss": 1.0, "loss_by_timestep/000-249": 1.0}], tmp_path, monkeypatch)
    assert lines["loss"][0][1:] == ([4], [1.0]) and lines["gradient norm, before clipping"] == []


def test_a_running_mean_keeps_length_and_level():
    rng = np.random.default_rng(0)
    for count in (1, 2, 19, 20, 41, 1000):
        assert np.allclose(lcm_report.smooth([3.0] * count), 3.0) and len(lcm_report.smooth([3.0] * count)) == count
    noise = rng.normal(size=1000)
    assert lcm_report.smooth(noise).std() < 0.3 * noise.std()
    assert np.allclose(lcm_report.smooth(np.arange(100.0))[10:-10], np.arange(100.0)[10:-10], atol=0.6)
