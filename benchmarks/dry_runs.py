"""The tables of docs/memory.md: dry runs of the README's commands with batches and options that save memory.

    python benchmarks/dry_runs.py

Prints the peak of each in GB of 10^9 bytes (fp16, gradient checkpointing), and what fits on some cards. Takes a
quarter of an hour on two cores. Reads no model: the configurations come from benchmarks/configs.py.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from benchmarks import configs
from benchmarks.step_costs import options
from lcm.simulation.many import Command, make_pool, peaks_of

KINDS = ("lora_sd", "lora_sdxl", "sd", "sdxl")
BATCHES = (12, 4, 1)
CARDS = (24, 16, 12, 8)
OVERHEAD = 1.0  # GB for the CUDA context and fragmentation; a guess
HEADS = ("alone", "8-bit Adam", "offload", "both")


def savers(kind: str) -> list[list[str]]:
    """The options of each column."""
    offload = ["--offload"] if "lora" in kind else ["--offload", "--offload_ema"]
    return [[], ["--use_8bit_adam"], offload, ["--use_8bit_adam", *offload]]


def command(folder: Path, kind: str, batch: int, more: list[str]) -> Command:
    """A command of the README on the configurations in `folder`, with more options, without pictures."""
    given = [*options(folder, kind, batch), "--train_shards_path_or_url=00000.tar", *more]
    return Command(f"train_lcm_distill_{kind}_wds", tuple(given))


def peak(one: Command) -> float:
    """The peak of a command in GB."""
    return max(peaks_of(one).values()) / 1e9


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    with tempfile.TemporaryDirectory() as name, make_pool() as pool:
        configs.main(Path(name))
        commands = {
            (kind, batch, column): replace(command(Path(name), kind, batch, more), with_pictures=True)
            for kind in KINDS
            for batch in BATCHES
            for column, more in zip(HEADS, savers(kind), strict=True)
        }
        peaks = dict(zip(commands, pool.map(peak, commands.values()), strict=True))
    rows = [[f"`{k}`, batch {b}", *(f"{peaks[k, b, c]:.1f}" for c in HEADS)] for k in KINDS for b in BATCHES]
    print(table(["script", *HEADS], rows), end="\n\n")
    rows = []
    for kind in KINDS:
        cells = []
        for card in CARDS:
            fitting = [(b, c) for b in BATCHES for c in HEADS if peaks[kind, b, c] + OVERHEAD <= card]
            cells.append("batch {}, {}".format(*fitting[0]) if fitting else "does not fit")
        rows.append([f"`{kind}`", *cells])
    print(table(["script", *(f"{card} GB" for card in CARDS)], rows))


if __name__ == "__main__":
    main()
