"""Digests of what tiny runs of all four scripts leave behind: python tests/digests.py > digests.txt

A change that should not alter results shows equal digests before and after. Each script runs three times: plainly, in
bf16 with gradient checkpointing, and with accumulation, data workers, flips, dropped captions, dropout and a moving
average, ended after three steps and resumed. On one machine, with one version of the libraries, the digests are the
same each time.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # first: it sets the number of threads
import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

MEASURED = {"images_per_second", "data_wait", "peak_memory_gb"}  # differ from run to run
PLAIN = ["--validation_num_inference_steps", "1", "2", "--validation_teacher_steps=2", "--checkpointing_steps=2"]
HALF = ["--mixed_precision=bf16", "--gradient_checkpointing"]
BOTH = [*conftest.EVERYTHING_AT_RANDOM, "--checkpointing_steps=2"]
OWN_IN_HALF = {"lora_sd": ["--lora_dropout=0"]}  # dropout is rounded in half precision
RANDOM = {"sd": [], "sdxl": ["--use_fix_crop_and_size"], "lora_sd": ["--ema_decay=0.5"], "lora_sdxl": []}


def tensors(value):
    """Everything in nested dicts, lists and tensors, as bytes, in a fixed order."""
    if isinstance(value, torch.Tensor):
        header = f"{value.dtype} {tuple(value.shape)}".encode()
        return header + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(str(key).encode() + tensors(value[key]) for key in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return b"".join(map(tensors, value))
    return repr(value).encode()


def content(path):
    """(kind, what counts of a file as bytes), None for what is not compared."""
    if path.suffix == ".safetensors":
        return "weights", tensors(load_file(path))
    if path.name == "optimizer.bin":
        return "optimizer", tensors(torch.load(path, weights_only=True))
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return "metrics", repr([{k: v for k, v in row.items() if k not in MEASURED} for row in rows]).encode()
    if path.parent.name == "validation":
        return "pictures", np.asarray(Image.open(path)).tobytes()
    if path.name == "scheduler_config.json":
        return "schedulers", path.read_bytes()
    return None


def digests(folder):
    """{kind: digest of all files of that kind below a folder, with their names}."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (found := content(path)):
            kind, data = found
            digest = sums.setdefault(kind, hashlib.sha256())
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + data)
    return {kind: digest.hexdigest()[:16] for kind, digest in sums.items()}


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teachers = {
            "sd": conftest.make_teacher(folder / "teacher"),
            "sdxl": conftest.make_sdxl_teacher(folder / "sdxl_teacher"),
        }
        shards = conftest.write_shards(folder / "shards")
        for kind, own in conftest.SCRIPTS.items():
            teacher = teachers["sdxl" if "sdxl" in kind else "sd"]
            script = conftest.Script(kind, teacher, shards, own)
            runs = {
                "plain": [PLAIN],
                "bf16": [[*HALF, *OWN_IN_HALF.get(kind, [])]],
                "random": [[*BOTH, "--max_train_steps=3"], BOTH],
            }
            for run, options in runs.items():
                output = folder / f"{kind}-{run}"
                for more in options:
                    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        script.main(output, *(RANDOM[kind] if run == "random" else []), *more)
                for what, digest in sorted(digests(output).items()):
                    print(f"{kind:10} {run:7} {what:11} {digest}", flush=True)


if __name__ == "__main__":
    main()
