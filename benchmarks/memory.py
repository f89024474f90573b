"""Peak memory of the training scripts, each in its own process, on a random teacher with the architecture of SD 1.5.

    python benchmarks/memory.py
    python benchmarks/memory.py --public path/to/diffusers/examples/consistency_distillation

Makes a teacher with a U-Net of 210 M parameters and small shards in a temporary folder (under TMPDIR; 4 GB), and
trains a few steps with batch size 1 on small pictures, so that the weights take nearly all the memory. Prints a table,
in MB of 10^6 bytes. The full script takes 7 GB of memory. Linux only.

With `--public`, diffusers' scripts run with the same options. `--public_prefix` is the command that runs, in its own
process, the script that follows it: "PYTHON benchmarks/run_public.py", with the Python of another virtual environment.
benchmarks/run_public.py says what that needs.

weights    the expected memory of the weights, from the numbers of parameters. The full script holds 6 float32 copies
           of the U-Net: teacher, student, target, gradients, two moments. A LoRA script holds 4 of the adapter:
           weights, gradients, two moments. The text encoder, the VAE and activations are small here, and left out
peak       `ru_maxrss` of the finished process: the peak of its resident memory, without its data worker
- imports  the same, minus the peak of a process that only imports the libraries
start, steps, end
           the peak before the first step, during the steps, and after them (pictures, files): sampled every 20 ms, and
           separated by the progress bar
files      the part of the peak in pages of mapped files. A model is mapped while it is loaded, and afterwards if its
           weights are neither cast nor written. A file that is loaded twice counts twice, as it would on a GPU, though
           a CPU's memory holds its pages once
s / step   without the first step; only a rough value, since the machine may be busy
CUDA       on a GPU only: `torch.cuda.max_memory_allocated()`. The other columns are then the host's memory
"""

import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# No heavy imports here: the resident memory of this process, when it starts another one, counts in that one's peak.

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"full": "train_lcm_distill_sd_wds.py", "LoRA": "train_lcm_distill_lora_sd_wds.py"}
MB = 1e6

IMPORTS = """
import accelerate, peft, torch._dynamo, torch.utils.tensorboard, transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
"""

# Python runs this as sitecustomize.py on PYTHONPATH, so that no script has to be changed.
CUDA_REPORT = """
import atexit, sys

def report():
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        print(f"CUDA peak: {torch.cuda.max_memory_allocated()} bytes", file=sys.stderr)

atexit.register(report)
"""


def prepare(folder: Path, channels: tuple[int, ...], resolution: int) -> None:
    """Write teacher and shards to `folder`, and the U-Net's number of parameters to the file `parameters`.

    All parts but the U-Net are tiny. Texts have 77 tokens, as the public scripts assume.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import DEMO_TEACHER, make_scheduler, make_vae, text_config, write_shards
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(DEMO_TEACHER / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(text_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=channels, cross_attention_dim=text_encoder.config.hidden_size
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=make_vae(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "teacher")
    write_shards(folder / "shards", num_shards=2, samples_per_shard=100, size=(resolution + 16,) * 2)
    (folder / "parameters").write_text(str(unet.num_parameters()))


def resident(pid: int) -> tuple[int, int] | None:
    """(resident bytes, those in mapped files) of a running process; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"(VmRSS|RssFile):\s+(\d+) kB", status))
    return (int(found["VmRSS"]) * 1024, int(found["RssFile"]) * 1024) if found else None


def measure(command: list[Any], env: dict[str, str], steps: int) -> dict[str, Any]:
    """Run a command that trains `steps` steps, or none; returns its measurements as a dict, memory in bytes."""
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    samples = []  # (time, bytes resident, bytes in files)

    def sample() -> None:
        while now := resident(process.pid):
            samples.append((time.perf_counter(), *now))
            time.sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, seen = "", {}  # seen: number of finished steps -> time when the progress bar first showed it
    while data := os.read(process.stdout.fileno(), 65536):
        output += data.decode(errors="replace")
        for step in re.findall(rf"Steps:.*?(\d+)/{steps} \[", output[-4096:]):
            seen.setdefault(int(step), time.perf_counter())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if process.returncode:
        sys.exit(f"{output}\nExit status {process.returncode}: {shlex.join(map(str, command))}")

    first, last = seen.get(0, float("inf")), seen.get(steps, float("inf"))
    trainable = re.search(r"([\d.]+) M trainable parameters", output)
    cuda = re.search(r"CUDA peak: (\d+) bytes", output)
    return {
        "peak": usage.ru_maxrss * 1024,
        "start": max((size for now, size, _ in samples if now < first), default=0),
        "steps": max((size for now, size, _ in samples if first <= now < last), default=0),
        "end": max((size for now, size, _ in samples if last <= now), default=0),
        "files": max(samples, key=lambda s: s[1])[2],
        "seconds": (last - seen.get(1, last)) / (steps - 1),
        "trainable": float(trainable[1]) * 1e6 if trainable else None,
        "cuda": int(cuda[1]) if cuda else None,
    }


def expected_weights(kind: str, precision: str, is_public: bool, unet: int, adapter: int) -> tuple[str, int]:
    """The expected weights of a script, (in words, in bytes); `unet` and `adapter` are numbers of parameters."""
    if kind == "full":
        return "6 U-Nets", 6 * 4 * unet
    if is_public:
        return "2 U-Nets + 4 adapters", 2 * 4 * unet + 4 * 4 * adapter
    if precision == "no":
        return "1 U-Net + 4 adapters", 4 * unet + 4 * 4 * adapter
    return f"1 U-Net in {precision} + 4 adapters", 2 * unet + 4 * 4 * adapter


def run_all(args: argparse.Namespace, folder: Path, env: dict[str, str]) -> list[dict[str, Any]]:
    """The measurements of all scripts: ours, then the public ones."""
    unet, adapter, runs = int((folder / "parameters").read_text()), 0, []
    kinds = [("full", "no"), ("LoRA", "no"), ("LoRA", "bf16")]
    todo = [(kind, precision, False) for kind, precision in kinds]
    todo += [(kind, precision, True) for kind, precision in kinds if args.public]
    for kind, precision, is_public in todo:
        options = {
            "pretrained_teacher_model": folder / "teacher",
            "train_shards_path_or_url": folder / "shards" / "{00000..00001}.tar",
            "output_dir": folder / "output",
            "resolution": args.resolution,
            "train_batch_size": 1,
            "max_train_steps": args.steps,
            "max_train_samples": 1000,
            "dataloader_num_workers": 1,
            "mixed_precision": precision,
            "validation_steps": 1_000_000,
            "seed": 0,
            **({"lora_rank": args.lora_rank, "lora_alpha": args.lora_rank} if kind == "LoRA" else {}),
        }
        prefix = shlex.split(args.public_prefix) if is_public and args.public_prefix else [sys.executable]
        script = Path(args.public if is_public else ROOT).resolve() / SCRIPTS[kind]
        command = [*prefix, script, *(f"--{name}={value}" for name, value in options.items())]
        if not is_public:
            command.append("--validation_teacher_steps")  # the public scripts have no pictures of the teacher
        run = measure(command, env, args.steps)
        shutil.rmtree(folder / "output")
        if kind == "LoRA":
            adapter = run["trainable"] or adapter  # the public script does not say
        name = f"{'public' if is_public else 'ours'}, {kind}"
        held, weights = expected_weights(kind, precision, is_public, unet, adapter)
        runs.append({**run, "name": name, "precision": precision, "held": held, "weights": weights})
        print(f"{name}, {precision}: {run['peak'] / MB:.0f} MB", file=sys.stderr, flush=True)
    return runs


def table(runs: list[dict[str, Any]], imports: dict[str, Any]) -> str:
    """The measurements as Markdown; `imports` are those of the process that only imports."""
    on_cuda = any(run["cuda"] for run in runs)
    sizes = ["MB", "peak", "- imports", "start", "steps", "end", "files"]
    lines = [["script", "precision", "weights", *sizes, "s / step"], ["---"] * 11]
    lines.append(["imports only", "", "", "", f"{imports['peak'] / MB:.0f}", *[""] * 6])
    for run in runs:
        sizes = [run["weights"], run["peak"], run["peak"] - imports["peak"]]
        sizes += [run[name] for name in ("start", "steps", "end", "files")]
        line = [run["name"], run["precision"], run["held"], *(f"{size / MB:.0f}" for size in sizes)]
        lines.append([*line, f"{run['seconds']:.2f}"])
    if on_cuda:
        cuda = ["CUDA", "---", "", *(f"{(run['cuda'] or 0) / MB:.0f}" for run in runs)]
        lines = [[*line, cell] for line, cell in zip(lines, cuda, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    channels = "of the U-Net's levels, 64, 96, 128 ...; SD 1.5 has 320 640 1280 1280, 3.2 GB in float32"
    add("--channels", type=int, nargs=4, default=(160, 320, 640, 640), metavar="N", help=channels)
    add("--resolution", type=int, default=64, help="of the pictures, a multiple of 64 (default: 64)")
    add("--steps", type=int, default=3, help="optimizer steps of each run, at least 2 (default: 3)")
    add("--lora_rank", type=int, default=64, help="(default: 64)")
    add("--public", metavar="FOLDER", help="diffusers' examples/consistency_distillation, to compare with")
    add("--public_prefix", metavar="COMMAND", help="command that runs a public script (default: this Python)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        process = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, tuple(args.channels), args.resolution)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        unet = int((folder / "parameters").read_text())
        print(f"Teacher: a U-Net of {unet / 1e6:.1f} M parameters, {unet * 4 / MB:.0f} MB in float32\n", flush=True)
        (folder / "sitecustomize.py").write_text(CUDA_REPORT)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}
        imports = measure([sys.executable, "-c", IMPORTS], env, args.steps)
        print(table(run_all(args, folder, env), imports))


if __name__ == "__main__":
    main()
