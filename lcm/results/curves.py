"""The curves of a run as a picture."""

import numpy as np

CURVES_FILE = "training.png"


def smooth(values):
    """A running mean over a twentieth of the values, as many as there are."""
    width = max(1, len(values) // 20)
    padded = np.pad(np.asarray(values, dtype=float), (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def draw_curve(axes, rows, name, **style):
    """One metric over the optimizer steps; where it is noisy its running mean, over the values themselves in pale."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) == 1 else ""
    (line,) = axes.plot(steps, smooth(values), marker=marker, linewidth=1.5, **style)
    if len(points) >= 40:
        axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)


def timesteps(name):
    """`loss_by_timestep/000-249` as a reader wants it."""
    first, last = name.rpartition("/")[2].split("-")
    return f"t from {int(first)} to {int(last)}"


def draw_curves(rows, path):
    """Draw `metrics.jsonl`, as a list of dicts, to a picture: the loss, the loss by timestep, the gradients' norm."""
    from matplotlib.figure import Figure  # its memory is not needed before the end

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
