"""Runs one of diffusers' training scripts from a checkout: python benchmarks/run_public.py SCRIPT OPTIONS

It needs a virtual environment with torch, diffusers, transformers, accelerate, peft, braceexpand, and webdataset
0.2.86 (with 0.2.111 and 1.x they stop at the end of a shard). The script runs as it is, but for

- torchvision: if it is not installed, by functions of Pillow that do the same to a picture;
- the check for a development version of diffusers, which is left out;
- `max_length=77` of the empty prompt: the tokenizer's own length. For Stable Diffusion it is 77;
- without a GPU, the teacher's autocast: in the precision that was asked for. The default on a CPU is bf16.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.training_utils as training_utils
import numpy as np
import torch
from PIL import Image

REPLACED = {
    "check_min_version(": "# check_min_version(",
    "max_length=77": "max_length=tokenizer.model_max_length",
}
ON_A_CPU = {
    "torch.autocast(accelerator.device.type)": "torch.autocast(accelerator.device.type, dtype=weight_dtype)",
}
# Both libraries look for torchvision when these are first used, so that comes before the stand-in.
LOADED_FIRST = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL", "LCMScheduler"
)  # fmt: skip


def resize(image: Image.Image, size: int, interpolation: Any = None) -> Image.Image:
    """The shorter side becomes `size` pixels; bilinear."""
    width, height = (int(size * side / min(image.size)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def normalize(tensor: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return tensor.clone().sub_(shift).div_(scale)


class RandomCrop:
    @staticmethod
    def get_params(image: Image.Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random crop."""
        height, width = output_size
        top, left = (int(torch.randint(most + 1, ())) for most in (image.height - height, image.width - width))
        return top, left, height, width


def stand_in_for_torchvision() -> None:
    """Make `torchvision.transforms` importable, and known to diffusers."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    package, transforms, functional = (ModuleType(name) for name in names)
    modes: Any = Image.Resampling
    vars(functional).update(resize=resize, crop=crop, to_tensor=to_tensor, normalize=normalize)
    vars(transforms).update(functional=functional, RandomCrop=RandomCrop, InterpolationMode=modes)
    vars(package).update(transforms=transforms)
    sys.modules |= dict(zip(names, (package, transforms, functional), strict=True))
    vars(training_utils).update(transforms=transforms, is_torchvision_available=lambda: True)


def main() -> None:
    path = Path(sys.argv[1])
    for name in LOADED_FIRST:
        getattr(diffusers, name)
    if importlib.util.find_spec("torchvision") is None:
        stand_in_for_torchvision()
    code = path.read_text(encoding="utf-8")
    for old, new in (REPLACED if torch.cuda.is_available() else REPLACED | ON_A_CPU).items():
        code = code.replace(old, new)
    sys.argv = sys.argv[1:]
    exec(compile(code, str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})


if __name__ == "__main__":
    main()
