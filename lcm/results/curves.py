"""The curves of a run as a picture."""

from collections.abc import Sequence
from typing import IO, Any

import numpy as np

CURVES_FILE = "training.png"


def smooth(values: Sequence[float]) -> np.ndarray:
    """A running mean of N values over a window of N / 20; returns (N,) float64."""
    width = max(1, len(values) // 20)
    padded = np.pad(np.asarray(values, dtype=float), (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def draw_curve(axes: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    """Draw the running mean of one metric over the optimizer steps; from 40 values on, also the values in pale."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) == 1 else ""
    (line,) = axes.plot(steps, smooth(values), marker=marker, linewidth=1.5, **style)
    if len(points) >= 40:
        axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)


def timesteps(name: str) -> str:
    """The label of a curve: `loss_by_timestep/000-249` becomes `t from 0 to 249`."""
    first, last = name.rpartition("/")[2].split("-")
    return f"t from {int(first)} to {int(last)}"


def draw_curves(rows: list[dict[str, Any]], path: str | IO[bytes]) -> None:
    """Draw the loss, the loss by timestep and the gradient norm in rows of `metrics.jsonl`, to a picture file, or
    to an open one as PNG."""
    from matplotlib.figure import Figure  # imported late: it takes memory, and is only needed at the end

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    loss, by_timestep, gradients = figure.subplots(1, 3)
    draw_curve(loss, rows, "loss")
    loss.set_title("loss")
    quarters = sorted({name for row in rows for name in row if name.startswith("loss_by_timestep/")})
    for name in quarters:
        draw_curve(by_timestep, rows, name, label=timesteps(name))
    by_timestep.set_title("loss by timestep")
    by_timestep.legend(fontsize="small")
    if any("gradient_norm" in row for row in rows):
        draw_curve(gradients, rows, "gradient_norm")
    gradients.set_title("gradient norm, before clipping")
    for axes in (loss, by_timestep, gradients):
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.savefig(path)
