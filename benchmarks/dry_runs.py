"""The tables of docs/memory.md: dry runs of the README's commands with batches and options that save memory.

    python benchmarks/dry_runs.py

Prints the peak of each in GB of 10^9 bytes (fp16, gradient checkpointing), and what fits on some cards. Takes a
quarter of an hour on two cores. Reads no model: the configurations come from benchmarks/configs.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = ("lora_sd", "lora_sdxl", "sd", "sdxl")
BATCHES = (12, 4, 1)
CARDS = (24, 16, 12, 8)
OVERHEAD = 1.0  # GB for the CUDA context and fragmentation; a guess
HEADS = ("alone", "8-bit Adam", "offload", "both")


def savers(kind: str) -> list[list[str]]:
    """The options of each column."""
    offload = ["--offload"] if "lora" in kind else ["--offload", "--offload_ema"]
    return [[], ["--use_8bit_adam"], offload, ["--use_8bit_adam", *offload]]


def peak(folder: Path, kind: str, batch: int, more: list[str]) -> float:
    """The peak of one command in GB."""
    teacher = [f"--pretrained_teacher_model={folder}/{'sdxl' if 'sdxl' in kind else 'sd15'}"]
    if "sdxl" in kind:
        teacher.append(f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix")
    if "lora" not in kind:
        teacher.append("--cast_teacher_unet")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "dry_run.py", f"--json={file.name}", f"train_lcm_distill_{kind}_wds.py", *teacher, *more,
            "--train_shards_path_or_url=00000.tar", "--mixed_precision=fp16", "--gradient_checkpointing",
            f"--train_batch_size={batch}",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return json.load(file)["peak"] / 1e9


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    from benchmarks import configs

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        configs.main(Path(name))
        jobs = {
            (kind, batch, column): pool.submit(peak, Path(name), kind, batch, more)
            for kind in KINDS
            for batch in BATCHES
            for column, more in zip(HEADS, savers(kind), strict=True)
        }
        peaks = {key: job.result() for key, job in jobs.items()}
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
