"""What a step costs at the sizes of SD 1.5 and SDXL, on a simulated GPU: python benchmarks/step_costs.py

    python benchmarks/step_costs.py --public path/to/diffusers/examples/consistency_distillation

Simulates the README's commands (fp16, batch 12, --gradient_checkpointing) on pictures, on cached shards, and on cached
shards with an unguided teacher; with --public, diffusers' scripts with the same options before them. Prints a table:

TFLOPs     of matrix products, convolutions and attention in a step
GB moved   what the operations of a step read and write, in 10^9 bytes
kernels    operations that read or write memory of the device
waits      how often the host waits for the device
peak GB    of memory in a step, in 10^9 bytes

and writes the figures of each phase to step_costs.json. Ours are of a step that is not logged, as most are. Needs no
weights and no GPU. The scripts of diffusers run as they are, but for their version check: networks come from
configuration files, batches hold zeros, and a stand-in is there for torchvision, which only their data loader uses.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from benchmarks import configs
from lcm.simulation.many import Command, answer_of, be_silent, make_pool

KINDS = ("sd", "sdxl", "lora_sd", "lora_sdxl")
RESOLUTIONS = {"sd15": 512, "sdxl": 1024}
CONDITIONS: dict[str, dict[str, list[int]]] = {
    "sd15": {"moments": [8, 64, 64], "hidden_states": [77, 768]},
    "sdxl": {"moments": [8, 128, 128], "hidden_states": [77, 2048], "pooled": [1280]},
}
UNGUIDED = ("--w_min=0", "--w_max=0")
Figures = dict[str, Any]


def teacher_of(kind: str) -> str:
    """The folder of a script's teacher."""
    return "sdxl" if "sdxl" in kind else "sd15"


def write_cached_shard(folder: Path, teacher: str) -> str:
    """A shard with one cached sample of zeros."""
    import torch

    from lcm import cache
    from lcm.data.writer import write_tar

    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in CONDITIONS[teacher].items()}
    tensors["moments"] = tensors["moments"][None]
    tensors["original_size"] = torch.tensor([512, 512], dtype=torch.int32)
    origin = {
        "format": cache.FORMAT, "dtype": "float16", "scaling_factor": "0.18", "shapes": cache.shapes_of(tensors),
        "resolution": str(RESOLUTIONS[teacher]),
    }  # fmt: skip
    tensors["crops"] = torch.zeros(1, 2, dtype=torch.int32)
    data, path = cache.pack(tensors, origin), str(folder / f"{teacher}.tar")
    write_tar(path, [{"__key__": "0", cache.SUFFIX: data, cache.EMPTY_SUFFIX: data, "txt": b""}])
    return path


def options(folder: Path, kind: str, batch: int) -> list[str]:
    """The README's command, which diffusers' scripts take, too."""
    teacher = teacher_of(kind)
    given = [
        f"--pretrained_teacher_model={folder / teacher}", "--mixed_precision=fp16", "--gradient_checkpointing",
        f"--resolution={RESOLUTIONS[teacher]}", f"--train_batch_size={batch}",
    ]  # fmt: skip
    if teacher == "sdxl":
        given.append(f"--pretrained_vae_model_name_or_path={folder}/sdxl-vae-fp16-fix")
    return given + ["--cast_teacher_unet"] * ("lora" not in kind)


def figures(step: Any) -> Figures:
    """The figures of a `Step`, or of a Ledger."""
    flops = {phase: sum(by_dtype.values()) for phase, by_dtype in step.flops.items()}
    waits = step.waits.values() if isinstance(step.waits, dict) else [count for *_, count in step.waits]
    return {
        "TFLOPs": {phase: count / 1e12 for phase, count in flops.items()},
        "GB moved": {phase: count / 1e9 for phase, count in step.bytes_moved.items()},
        "kernels": dict(step.kernels),
        "waits": sum(waits),
        "peak GB": step.peak / 1e9,
    }


def simulate_own(command: Command, send: Callable[[Figures], None]) -> None:
    """Send the figures of one of our scripts, in a step that is not logged: most are not."""
    step = command.run().steps[-1]
    del step.bytes_moved["check"], step.kernels["check"]
    send(figures(step))


def simulate_public(path: Path, given: list[str], send: Callable[[Figures], None]) -> None:
    """Send the figures of one of diffusers' scripts, from its file, and end this process after the second step."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    from lcm.simulation.device import SimulatedCuda
    from lcm.simulation.training import build

    vision = {f"torchvision{name}": mock.MagicMock() for name in ("", ".transforms", ".transforms.functional")}
    script, device = ModuleType("script"), SimulatedCuda()
    with mock.patch.dict(sys.modules, vision):
        code = path.read_text(encoding="utf-8").replace("check_min_version(", "# check_min_version(")
        exec(compile(code, str(path), "exec"), script.__dict__)

    def outside(load: Any) -> Any:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return load(*args, **kwargs)

        return loaded

    def batches(batch: int, resolution: int) -> Iterator[Any]:
        while True:
            size = [[resolution] * batch] * 2
            yield torch.zeros(batch, 3, resolution, resolution), ["a caption"] * batch, size, [[0] * batch] * 2

    def two_steps(per_gpu_batch_size: int, resolution: int, **_: Any) -> Any:
        class Loader:
            num_batches = num_samples = 1000

            def __iter__(self) -> Iterator[Any]:
                for number, batch in enumerate(batches(per_gpu_batch_size, resolution)):
                    if number == 2:
                        send(figures(device.ledger))
                        os._exit(0)  # torch may crash when the tensors of an unfinished script are freed
                    device.ledger.start_step()
                    yield batch if "SDXL" in dataset else batch[:2]

        return SimpleNamespace(train_dataloader=Loader())

    dataset = next(name for name in vars(script) if name.endswith("Text2ImageDataset"))
    device.patch(script, dataset, two_steps)
    for kind in (AutoTokenizer, DDPMScheduler):
        device.patch(kind, "from_pretrained", outside(kind.from_pretrained))
    for kind in (AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection):
        make = lambda source, kind=kind, **more: build(kind, "", source, **more)  # noqa: E731
        device.patch(kind, "from_pretrained", make)
    for network, phase in ((UNet2DConditionModel, "U-Nets"), (AutoencoderKL, "VAE"), (CLIPTextModel, "text encoders")):
        device.wrap(network, "encode" if phase == "VAE" else "forward", phase)
    device.patch(sys, "argv", [str(path), *given])
    with device:
        script.main(script.parse_args())


def work(job: tuple[Any, ...], sending: Connection) -> None:
    """Send the figures of one simulation, which is silent, or the traceback of its error."""
    be_silent()
    kind, *args = job
    try:
        {"own": simulate_own, "public": simulate_public}[kind](*args, sending.send)
    except BaseException:
        sending.send(traceback.format_exc())


def measured(job: tuple[Any, ...]) -> Figures:
    """The figures of a job, from a process of its own. Raises SystemExit if it fails."""
    answer = answer_of(work, job)
    if isinstance(answer, str):
        raise SystemExit(f"{job}\n{answer}")
    return answer


def jobs(args: argparse.Namespace, folder: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    """{(script, variant): job}"""
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for kind in args.scripts:
        given, script = options(folder, kind, args.batch_size), f"train_lcm_distill_{kind}_wds"
        cached = (*given, f"--train_shards_path_or_url={write_cached_shard(folder, teacher_of(kind))}")
        pictures = (*given, "--train_shards_path_or_url=pictures.tar")
        if args.public:
            more = ["--max_train_samples=100000", "--max_train_steps=1000", "--dataloader_num_workers=1"]
            more += ["--train_shards_path_or_url=pictures.tar", f"--output_dir={folder / kind}"]
            found[kind, "diffusers"] = ("public", Path(args.public, f"{script}.py"), [*given, *more])
        found[kind, "pictures"] = ("own", Command(script, pictures))
        found[kind, "cached"] = ("own", Command(script, cached))
        found[kind, "cached, unguided"] = ("own", Command(script, (*cached, *UNGUIDED)))
    return found


def total(value: Any) -> float:
    """The sum over phases."""
    return sum(value.values()) if isinstance(value, dict) else value


def as_markdown(rows: dict[tuple[str, str], Figures]) -> str:
    """A line for each variant; in parentheses the share of the first variant of its script."""
    forms = {"TFLOPs": ".1f", "GB moved": ".0f", "kernels": ".0f", "waits": ".0f", "peak GB": ".1f"}
    lines = ["| " + " | ".join(["script", "variant", *forms]) + " |", "| --- " * (len(forms) + 2) + "|"]
    for (kind, variant), row in rows.items():
        first = next(other for (name, _), other in rows.items() if name == kind)
        cells = []
        for name, form in forms.items():
            value = total(row[name])
            share = f" ({value / total(first[name]):.2f})" if row is not first and name != "waits" else ""
            cells.append(f"{value:{form}}{share}")
        lines.append(f"| {' | '.join([f'`{kind}`', variant, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--batch_size", type=int, default=12, help="(default: 12)")
    add("--public", metavar="FOLDER", help="folder of diffusers' scripts")
    add("--json", default="step_costs.json", metavar="FILE", help="where the figures are written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, make_pool() as pool:
        folder = Path(name)
        configs.main(folder)
        todo = jobs(args, folder)
        rows = dict(zip(todo, pool.map(measured, todo.values()), strict=True))
    Path(args.json).write_text(
        json.dumps([{"script": k, "variant": v, **row} for (k, v), row in rows.items()], indent=1)
    )
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
