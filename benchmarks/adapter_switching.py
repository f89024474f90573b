"""Host time of the adapter switches of one training step of the LoRA scripts, on the U-Net of SDXL.

    python benchmarks/adapter_switching.py

In each step the U-Net is switched from student to teacher and back, and from student to target and back. Only the
switches are timed, not the networks. The U-Net is on torch's meta device: all modules of SDXL without weights, so that
it takes no memory. Prints the median over `--steps` steps in ms, and the same for diffusers' own methods.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from benchmarks.configs import SDXL


def median_ms(step: Callable[[], None], steps: int) -> float:
    """The median time of `step()` in ms, after one call that is not counted."""
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(ema_decay: float | None, dropout: float, steps: int) -> tuple[int, float, float]:
    """(layers with an adapter, ms a step, ms a step with diffusers' methods)."""
    from diffusers import UNet2DConditionModel

    from lcm.models import lora

    args = SimpleNamespace(
        lora_rank=1, lora_alpha=1, lora_dropout=dropout, lora_target_modules=None, ema_decay=ema_decay,
        seed=0, w_min=0, w_max=0,
    )  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL).train()
        lora.add_adapters(unet, args, seed=0)
    teacher = lora.AdapterView(unet, None)
    target = lora.AdapterView(unet, lora.TRAINED if ema_decay is None else lora.EMA)

    def with_views() -> None:
        with teacher.active():
            pass
        with target.active():
            pass

    def with_diffusers() -> None:
        unet.eval()
        unet.disable_adapters()
        unet.enable_adapters()
        if ema_decay is not None:
            unet.set_adapter(lora.EMA)
            unet.set_adapter(lora.TRAINED)
        unet.train()

    return len(lora.adapter_layers(unet)), median_ms(with_views, steps), median_ms(with_diffusers, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="Number of steps for the median.")
    steps = parser.parse_args().steps
    print("| LoRA of SDXL | layers | ms a step | with diffusers' methods |")
    print("| --- | --- | --- | --- |")
    for label, ema_decay, dropout in (
        ("plain", None, 0.0),
        ("--ema_decay", 0.95, 0.0),
        ("--ema_decay, --lora_dropout", 0.95, 0.1),
    ):
        layers, ours, theirs = measure(ema_decay, dropout, steps)
        print(f"| {label} | {layers} | {ours:.1f} | {theirs:.1f} |")


if __name__ == "__main__":
    main()
