"""What a simulated run tells the user, as text."""

from lcm.simulation.processes import BUCKETS, GATHERED
from lcm.simulation.training import Record

LEAST_MORE, MOST_MORE = 1, 4  # GB that are not included; a guess
NOT_INCLUDED = (
    "Not included: the CUDA context, workspaces of cuBLAS and cuDNN, buffers of NCCL, and what the allocator loses to "
    f"fragmentation. Together they take {LEAST_MORE} to {MOST_MORE} GB; that is a guess, not measured."
)
ACTIVATIONS = {"student", "backward"}  # phases whose tensors are kept for the backward pass, or made by it
NAMED = (
    {"gradients", "states of the optimizer", "weights cast by autocast", "weights that are trained"}
    | {BUCKETS, GATHERED}
    | {f"weights of {network}" for network in ("the teacher", "the student", "the target", "the VAE", "text encoders")}
)


def owners(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes by owner, largest first; tensors that live for a moment have one name."""
    found: dict[str, int] = {}
    for owner, size in sizes.items():
        name = "activations" if owner in ACTIVATIONS else owner if owner in NAMED else "temporary tensors"
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def table(rows: list[list[str]]) -> list[str]:
    """Rows as lines, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return lines


def describe(record: Record) -> str:
    """The figures of the last simulated step, which are those of every step after it."""
    step = record.steps[-1]
    alive = [[name, f"{size / 1e9:.2f}"] for name, size in owners(step.at_peak).items() if size > 5e6]
    phases = []
    for phase, peak in step.phase_peaks.items():
        flops, moved = sum(step.flops.get(phase, {}).values()), step.bytes_moved.get(phase, 0)
        phases.append([phase, f"{peak / 1e9:.2f}", f"{flops / 1e12:.1f}", f"{moved / 1e9:.0f}"])
    share = f" of {record.num_processes}, each of which takes as much" if record.num_processes > 1 else ""
    lines = [
        f"{record.script}: one step on a simulated GPU{share}, in {record.seconds:.0f} s",
        f"Peak memory: {step.peak / 1e9:.2f} GB (10^9 bytes), in the phase {step.peak_phase!r}",
        *([f"Peak memory while pictures are drawn: {record.pictures / 1e9:.2f} GB"] if record.pictures else []),
        f"Peak memory while a checkpoint is saved or loaded: {record.checkpoints / 1e9:.2f} GB",
        f"Peak memory while results are written: {record.export / 1e9:.2f} GB",
        "",
        *table([["at the peak", "GB"], *alive]),
        "",
        *table([["phase", "peak GB", "TFLOPs", "GB moved"], *phases]),
        "",
        f"Waits of the host for the device, in a step: {sum(count for *_, count in step.waits)}",
        *(f"  {count} x {kind}, in {phase}, {place}" for phase, kind, place, count in step.waits),
        "",
        "Networks:",
    ]
    for network, dtypes in record.dtypes.items():
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items() if name != "output")
        lines.append(f"  {network}: {given} -> {dtypes['output']}")
    return "\n".join([*lines, "", NOT_INCLUDED])
