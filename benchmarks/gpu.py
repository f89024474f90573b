"""Runs the training scripts on this machine's GPU at the sizes of SD 1.5 and SDXL, and dry runs of the same commands.

    python benchmarks/gpu.py                                      # everything: four scripts, fp16 and bf16
    python benchmarks/gpu.py --scripts lora_sd --precisions bf16
    python benchmarks/gpu.py --small                              # demo/teacher, SD scripts: to try it, also on a CPU

Makes teachers with random weights, in fp16, and shards of noise in a temporary folder (under TMPDIR; 12 GB, and 60 GB
for the checkpoints of SDXL). Each script trains 6 steps, with a checkpoint, pictures and results; then its checkpoint
is resumed, and the code of its report is run. Prints a table and writes gpu.json:

peak       of GPU memory in the steps, as torch counted it; GB of 10^9 bytes
dry run    the same from dry_run.py, and the difference between the two
images/s   the median of the last 3 steps
resume     the largest difference of a loss between the resumed and the unbroken run, as a part of the loss. Not 0 on a
           GPU, where some kernels add in no fixed order
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = ("lora_sd", "lora_sdxl", "sd", "sdxl")
STEPS, CHECKPOINT = 6, 3


def make_teachers(folder: Path, families: set[str]) -> None:
    """Write folder/sd15 or folder/sdxl, with a VAE for fp16, with random weights in fp16."""
    import diffusers
    import torch
    import transformers

    from benchmarks import configs
    from lcm.simulation.training import build

    configs.main(folder)
    torch.manual_seed(0)
    parts = [(folder / family, index) for family in families
             for index in json.loads((folder / family / "model_index.json").read_text()).items()]  # fmt: skip
    if "sdxl" in families:
        parts.append((folder, ("sdxl-vae-fp16-fix", ["diffusers", "AutoencoderKL"])))
    for teacher, (name, entry) in parts:
        loader = getattr({"diffusers": diffusers, "transformers": transformers}.get(entry[0]), str(entry[1]), None)
        if isinstance(loader, type) and issubclass(loader, torch.nn.Module):
            network = build(loader, "", str(teacher), subfolder=name, dtype=torch.float16)
            network.save_pretrained(teacher / name)


def options(kind: str, precision: str, folder: Path, small: bool) -> list[str]:
    """The options of a command, without its output folder."""
    sdxl, lora = "sdxl" in kind, "lora" in kind
    teacher = ROOT / "demo" / "teacher" if small else folder / ("sdxl" if sdxl else "sd15")
    given = [
        f"--pretrained_teacher_model={teacher}", f"--train_shards_path_or_url={folder}/shards/{{00000..00001}}.tar",
        f"--mixed_precision={precision}", f"--resolution={64 if small else 1024 if sdxl else 512}",
        f"--train_batch_size={4 if sdxl or small else 12}", "--gradient_checkpointing", "--dataloader_num_workers=2",
        "--shuffle_buffer_size=20", "--loss_type=huber", "--learning_rate=1e-6", "--seed=0", "--report_to=none",
    ]  # fmt: skip
    given += ["--lora_rank=64", "--w_min=7.5", "--w_max=7.5"] if lora else ["--cast_teacher_unet"]
    return given + ([f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix"] if sdxl else [])


def python(*arguments: object) -> str:
    """Run Python in the repository; returns what it printed. Raises SystemExit with its last lines."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stderr[-3000:]}")
    return done.stdout


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure(kind: str, precision: str, folder: Path, small: bool = False, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train, resume, use the result, and simulate a command with `more` options. Returns a row of the table.

    Raises SystemExit if one of the commands fails.
    """
    script, given = f"train_lcm_distill_{kind}_wds.py", [*options(kind, precision, folder, small), *more]
    unbroken, resumed = folder / "unbroken", folder / "resumed"
    length = [f"--max_train_steps={STEPS}", f"--checkpointing_steps={CHECKPOINT}", "--logging_steps=1"]
    pictures = ["--validation_prompts=noise", "--validation_num_inference_steps=2", "--validation_teacher_steps=2"]
    python(script, *given, *length, *pictures, f"--output_dir={unbroken}")
    resume = f"--resume_from_checkpoint={unbroken}/checkpoint-{CHECKPOINT}"
    python(script, *given, *length, *pictures, f"--output_dir={resumed}", resume)
    code = (unbroken / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    (folder / "use.py").write_text(code.replace("lcm.png", f"{folder}/lcm.png"))
    python(folder / "use.py")
    python("dry_run.py", f"--json={folder}/dry_run.json", script, *given)

    rows, again = metrics(unbroken), metrics(resumed)
    assert len(rows) == STEPS and all(math.isfinite(row["loss"]) for row in rows)
    assert (folder / "lcm.png").is_file() and len(list((unbroken / "validation").iterdir())) == 1
    pairs = list(zip(rows[CHECKPOINT:], again, strict=True))
    simulated = max(step["peak"] for step in json.loads((folder / "dry_run.json").read_text())["steps"])
    row = {
        "script": kind,
        "precision": precision,
        "device": device_name(),
        "peak": max(row["peak_memory_gb"] for row in rows) * 1e9,
        "simulated": simulated,
        "images_per_second": statistics.median(row["images_per_second"] for row in rows[-3:]),
        "losses": [row["loss"] for row in rows],
        "resume": max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs),
    }
    for path in (unbroken, resumed):
        shutil.rmtree(path)
    return row


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def show(row: dict[str, Any]) -> str:
    """A row of the table."""
    peak, simulated, on_gpu = row["peak"], row["simulated"], row["device"] != "a CPU"
    memory = f"{peak / 1e9:.2f} | {simulated / 1e9:.2f}, {simulated / peak - 1:+.1%}" if on_gpu else "- | -"
    return f"| {row['script']}, {row['precision']} | {memory} | {row['images_per_second']:.2f} | {row['resume']:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=KINDS, help="which (default: all)")
    parser.add_argument("--precisions", nargs="+", choices=("fp16", "bf16"), default=["fp16", "bf16"])
    parser.add_argument("--small", action="store_true", help="the teacher of the demo, SD scripts only")
    parser.add_argument("--json", default="gpu.json", metavar="FILE", help="where the rows are written")
    args = parser.parse_args()
    from conftest import write_shards

    kinds = args.scripts or (["lora_sd", "sd"] if args.small else KINDS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(
            folder / "shards", num_shards=2, samples_per_shard=24, size=(64, 64) if args.small else (1100, 1100)
        )
        if not args.small:
            make_teachers(folder, {"sdxl" if "sdxl" in kind else "sd15" for kind in kinds})
        print(f"{device_name()}\n\n| script | peak | dry run | images/s | resume |\n| --- | --- | --- | --- | --- |")
        for kind in kinds:
            for precision in args.precisions:
                rows.append(measure(kind, precision, folder, args.small))
                print(show(rows[-1]), flush=True)
                Path(args.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
