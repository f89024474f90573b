"""How the cost of a run grows: python benchmarks/growth.py [work] [shards] [length] [processes]

work        TFLOPs and peak memory of a step with batch size, resolution and rank: LoRA of SD 1.5 in fp16 with gradient
            checkpointing, on a simulated GPU
shards      seconds to the first step, and memory of a run and its data worker, with 10 to 100,000 shards
length      steps a second and memory of a run after 100 to 10,000 steps, tiny networks
processes   images a second of 1 and 2 processes that share the cores: the demo's teacher

Prints a table for each; all of them, if none is named. Memory is the resident set in MB of 10^6 bytes.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DEMO = ROOT / "demo"
Rows = list[list[str]]


def table(head: str, rows: Rows) -> str:
    """Rows as Markdown under a head such as "a | b"."""
    lines = [f"| {head} |", "| --- " * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def work(folder: Path) -> str:
    """Simulated steps."""
    from benchmarks import configs
    from benchmarks.step_costs import measured, options, total
    from lcm.simulation.many import Command, make_pool

    configs.main(folder)
    given = [*options(folder, "lora_sd", 12), "--train_shards_path_or_url=pictures.tar"]
    changes = [
        *(("batch size", "train_batch_size", n) for n in (1, 4, 12, 24)),
        *(("resolution", "resolution", n) for n in (512, 768, 1024)),
        *(("rank", "lora_rank", n) for n in (4, 64, 256)),
    ]
    command = Command("train_lcm_distill_lora_sd_wds", tuple(given))
    jobs = [("own", command.with_more([f"--{option}={n}"])) for _, option, n in changes]
    with make_pool() as pool:
        rows = [
            [f"{what} {n}", f"{total(found['TFLOPs']):.1f}", f"{found['peak GB']:.1f}"]
            for (what, _, n), found in zip(changes, pool.map(measured, jobs), strict=True)
        ]
    return table("batch 12, 512 px, rank 64, but | TFLOPs | peak GB", rows)


def trainer(folder: Path, *more: str, demo: bool = False, names: str = "shards/{00000..00001}.tar") -> list[str]:
    """A training command on tiny networks and the shards with these names in `folder`, or on the demo's."""
    from conftest import make_teacher, write_shards

    teacher, shards, resolution = DEMO / "teacher", DEMO / "shards" / "train-{00000..00003}.tar", 64
    if not demo:
        teacher, resolution = folder / "teacher", 16
        shards = folder / names
        if not teacher.exists():
            make_teacher(teacher)
            write_shards(folder / "shards", num_shards=2, samples_per_shard=200)
    return [
        "train_lcm_distill_sd_wds.py", f"--pretrained_teacher_model={teacher}", f"--resolution={resolution}",
        f"--train_shards_path_or_url={shards}", f"--output_dir={folder / 'out'}", "--seed=0", "--report_to=none",
        "--validation_teacher_steps", "--validation_steps=1000000", "--checkpointing_steps=1000000", *more,
    ]  # fmt: skip


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[psutil.Popen]:
    """A running Python with these arguments; it is killed at the end. Its output goes to folder/log."""
    with open(folder / "log", "wb") as file:
        process = psutil.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
        try:
            yield process
        finally:
            for one in (*process.children(recursive=True), process):
                one.kill()
            process.wait()


def wait_for_step(process: psutil.Popen, folder: Path, step: int) -> dict[str, Any]:
    """The row of metrics.jsonl of this step, as soon as it is there. Raises SystemExit if the run ends before."""
    path = folder / "out" / "metrics.jsonl"
    while True:
        has_ended = process.poll() is not None
        lines = path.read_text().splitlines() if path.exists() else []
        for row in (json.loads(line) for line in lines if line.endswith("}")):
            if row["step"] == step:
                return row
        if has_ended:
            raise SystemExit((folder / "log").read_bytes()[-2000:].decode(errors="replace"))
        time.sleep(0.05)


def resident(process: psutil.Popen) -> list[str]:
    """Resident memory in MB of a run and of its data worker."""
    return [f"{one.memory_info().rss / 1e6:.0f}" for one in (process, *process.children())][:2]


def shards(folder: Path) -> str:
    """Many names of two shards."""
    rows = []
    more = ["--train_batch_size=4", "--max_train_steps=100000", "--logging_steps=1", "--dataloader_num_workers=1"]
    for count in (10, 1000, 100_000):
        many = folder / f"many-{count}"
        many.mkdir()
        names = f"{many.name}/{{000000..{count - 1:06d}}}.tar"
        command = trainer(folder, *more, "--shuffle_buffer_size=100", names=names)
        for i in range(count):
            os.symlink(folder / "shards" / f"{i % 2:05d}.tar", many / f"{i:06d}.tar")
        start = time.perf_counter()
        with started(command, folder) as process:
            wait_for_step(process, folder, 1)
            rows.append([f"{count:,}", f"{time.perf_counter() - start:.1f}", *resident(process)])
        shutil.rmtree(folder / "out")
    return table("shards | s to the end of the first step | MB, training process | MB, data worker", rows)


def length(folder: Path) -> str:
    """A long run."""
    rows = []
    more = ["--train_batch_size=1", "--max_train_steps=10001", "--logging_steps=50", "--dataloader_num_workers=1"]
    with started(trainer(folder, *more), folder) as process:
        for step in (100, 1000, 10_000):
            row = wait_for_step(process, folder, step)
            rows.append([f"{step:,}", f"{row['images_per_second']:.1f}", *resident(process)])
    return table("step | steps / s, over 50 steps | MB, training process | MB, data worker", rows)


def processes(folder: Path) -> str:
    """One and two processes."""
    rows = []
    more = ["--train_batch_size=16", "--max_train_steps=40", "--logging_steps=20", "--loss_type=huber"]
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        with started([*launch, *trainer(folder, *more, demo=True)], folder) as process:
            rows.append([str(count), f"{wait_for_step(process, folder, 40)['images_per_second']:.1f}"])
        shutil.rmtree(folder / "out")
    return table("processes, one core each | images / s", rows)


def main() -> None:
    parts = {"work": work, "shards": shards, "length": length, "processes": processes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; default: all")
    chosen = parser.parse_args().parts or list(parts)
    for name in chosen:
        if name not in parts:
            parser.error(f"PART: {name!r}; allowed: {', '.join(parts)}")
        with tempfile.TemporaryDirectory() as folder:
            print(parts[name](Path(folder)), flush=True)


if __name__ == "__main__":
    main()
