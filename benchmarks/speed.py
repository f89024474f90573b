"""Seconds a step of the training scripts: on pictures, on cached shards, and beside diffusers' scripts.

    python benchmarks/speed.py
    python benchmarks/speed.py --public path/to/diffusers/examples/consistency_distillation --public_python PYTHON
    python benchmarks/speed.py --teacher sd15 --scripts lora_sd -- --mixed_precision=fp16

Trains on the demo's teacher (`tiny`), or on one of the size of SD 1.5 or SDXL with random weights, and on shards of
noise, in a temporary folder (under TMPDIR). All variants run in turn, round after round. Each is run for a few steps
and for more; the difference gives the seconds of a step, without start and end. Options after `--` go to all scripts.
Prints a table and writes speed.json:

CPU s / step   of all threads and data workers together
s / step       of the clock
images / s     the batch size divided by that
ratio          to the public script on pictures, in CPU seconds without a GPU and in seconds with one: the median of
               the rounds, and their range

With `--public`, diffusers' scripts run with the same options, by benchmarks/run_public.py, which says what it needs:
`--public_python` is the Python of a virtual environment that has it.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
SIZES = {"tiny": 64, "sd15": 512, "sdxl": 1024}


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """(CPU seconds, seconds) that a command took. Raises SystemExit with its last lines if it fails."""
    start = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{shlex.join(command)}\n{log.read_bytes()[-3000:].decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def variants(args: argparse.Namespace, folder: Path, kind: str) -> dict[str, list[str]]:
    """{name: command without its length} of one script; makes what they need."""
    teacher = ROOT / "demo" / "teacher" if args.teacher == "tiny" else folder / args.teacher
    pictures, cached = folder / "pictures" / "{00000..00001}.tar", folder / "cached" / "{00000..00001}.tar"
    common = [
        f"--pretrained_teacher_model={teacher}", f"--resolution={SIZES[args.teacher]}",
        f"--train_batch_size={args.batch_size}", f"--dataloader_num_workers={args.workers}", "--seed=0",
        f"--output_dir={folder}/output", "--loss_type=huber", "--learning_rate=1e-6", "--max_train_samples=100000",
        "--validation_steps=1000000", "--checkpointing_steps=1000000", *args.more,
    ]  # fmt: skip
    if args.teacher == "sdxl":
        common.append(f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix")
    if "lora" in kind:
        common += [f"--lora_rank={args.lora_rank}", f"--lora_alpha={args.lora_rank}"]
    script = f"train_lcm_distill_{kind}_wds.py"
    own = [sys.executable, str(ROOT / script), *common, "--validation_teacher_steps", "--report_to=none"]
    found = {
        "pictures": [*own, f"--train_shards_path_or_url={pictures}", "--shuffle_buffer_size=100"],
        "cached": [*own, f"--train_shards_path_or_url={cached}", "--shuffle_buffer_size=100"],
    }
    if args.public:
        runner = [args.public_python, str(ROOT / "benchmarks" / "run_public.py"), str(Path(args.public, script))]
        found = {"public": [*runner, *common, f"--train_shards_path_or_url={pictures}"]} | found
    return found


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the teacher, shards of noise, and cached ones."""
    from conftest import write_shards

    side = SIZES[args.teacher] * 9 // 8
    write_shards(folder / "pictures", num_shards=2, samples_per_shard=args.samples, size=(side, side))
    if args.teacher != "tiny":
        from gpu import make_teachers

        make_teachers(folder, {args.teacher})
    teacher = ROOT / "demo" / "teacher" if args.teacher == "tiny" else folder / args.teacher
    command = [
        sys.executable, str(ROOT / "precompute_lcm.py"), f"--pretrained_teacher_model={teacher}",
        f"--train_shards_path_or_url={folder}/pictures/{{00000..00001}}.tar", f"--output_dir={folder}/cached",
        f"--resolution={SIZES[args.teacher]}",
    ]  # fmt: skip
    if args.teacher == "sdxl":
        command.append(f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix")
    timed(command, folder / "precompute.log")


def measure(args: argparse.Namespace, folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one script, {variant, CPU seconds and seconds of a step in each round}."""
    commands = variants(args, folder, kind)
    rows: dict[str, dict[str, Any]] = {
        name: {"script": kind, "variant": name, "cpu": [], "seconds": []} for name in commands
    }
    for number in range(args.rounds):
        for name, command in commands.items():
            spent = [timed([*command, f"--max_train_steps={n}"], folder / "log") for n in (args.short, args.long)]
            for key, short, long in zip(("cpu", "seconds"), *spent, strict=True):
                rows[name][key].append((long - short) / (args.long - args.short))
            print(f"{kind}, {name}, round {number + 1}: {rows[name]['cpu'][-1]:.3f} CPU s / step", file=sys.stderr)
    return list(rows.values())


def spread(values: list[float], form: str = ".3f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def as_markdown(rows: list[dict[str, Any]], batch_size: int, on_gpu: bool) -> str:
    """The table."""
    lines = ["| script | variant | CPU s / step | s / step | images / s | ratio |", "| --- " * 6 + "|"]
    for row in rows:
        public = next((r for r in rows if (r["script"], r["variant"]) == (row["script"], "public")), None)
        key = "seconds" if on_gpu else "cpu"
        ratios = [a / b for a, b in zip(row[key], public[key], strict=True)] if public else []
        cells = [row["script"], row["variant"], spread(row["cpu"]), spread(row["seconds"])]
        cells += [f"{batch_size / statistics.median(row['seconds']):.2f}", spread(ratios, ".2f") if ratios else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", choices=SIZES, default="tiny", help="(default: tiny)")
    add("--scripts", nargs="+", choices=("sd", "lora_sd", "sdxl", "lora_sdxl"), help="default: those of the teacher")
    add("--batch_size", type=int, default=4, help="(default: 4)")
    add("--workers", type=int, default=1, help="--dataloader_num_workers of all scripts (default: 1)")
    add("--lora_rank", type=int, default=64, help="and alpha (default: 64)")
    add("--samples", type=int, default=100, help="pictures in each of two shards (default: 100)")
    add("--short", type=int, default=4, help="steps of the short run (default: 4)")
    add("--long", type=int, default=104, help="steps of the long run (default: 104)")
    add("--rounds", type=int, default=3, help="(default: 3)")
    add("--public", metavar="FOLDER", help="folder of diffusers' scripts")
    add("--public_python", metavar="PATH", default=sys.executable, help="Python that runs them (default: this one)")
    add("--json", default="speed.json", metavar="FILE", help="where the rows are written")
    add("more", nargs="*", metavar="OPTION", help="after --: options of all scripts")
    args = parser.parse_args()
    family = "sdxl" if args.teacher == "sdxl" else "sd"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args, folder)
        rows = [row for kind in args.scripts or (family, f"lora_{family}") for row in measure(args, folder, kind)]
    Path(args.json).write_text(json.dumps(rows, indent=1))
    import torch

    print(as_markdown(rows, args.batch_size, torch.cuda.is_available()))


if __name__ == "__main__":
    main()
