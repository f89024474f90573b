"""What a visitor asks for, checked here: the page's own limits only guide, since anyone can send other values."""

import base64
import binascii
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lcm.errors import UserError
from lcm.options.choices import SAMPLERS, STUDENT_SAMPLERS

MOST_STEPS = 16  # of a trained network
MOST_LETTERS = 1000  # of a prompt
MOST_GUIDANCE, MOST_STRENGTH = 30.0, 2.0
MOST_SEED = 2**32 - 1
MOST_VALUES = 6  # in a row or a column of a sweep
MOST_BYTES = 2**21  # of a picture to start from, as base64
MOST_PIXELS = 2**22  # of the same
AS_TRAINED = "as trained"  # the sampler that was saved with a network
TEACHER_SAMPLERS = [*(name for name in SAMPLERS if name not in STUDENT_SAMPLERS), "own"]
DATA_ADDRESS = re.compile(r"data:image/(?:png|jpeg|webp);base64,")


@dataclass(frozen=True)
class Wish:
    """What to draw. `size` is in pixels a side; `picture` is one to start from, of that size, or None."""

    prompt: str
    negative_prompt: str
    networks: tuple[str, ...]
    steps: int
    guidance_scale: float
    seed: int
    size: int
    sampler: str
    teacher_sampler: str
    lora_guidance_scale: float
    lora_strength: float
    picture: Image.Image | None
    picture_strength: float

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing of what to draw."""
        return not self.prompt and self.picture is None


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """What was given, in a few letters."""
    return "nothing" if value is None else f"{value:.12g}" if is_number(value) else f"{value!r:.40}"


def a_number(field: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high]. Raises UserError."""
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"{field}: {shown(value)} given; allowed: a number from {low:g} to {high:g}")
    return float(value)


def an_integer(field: str, value: Any, low: int, high: int) -> int:
    """`value` as an int in [low, high]. Raises UserError."""
    if not is_number(value) or not low <= value <= high or value != int(value):
        raise UserError(f"{field}: {shown(value)} given; allowed: a whole number from {low} to {high}")
    return int(value)


def a_text(field: str, value: Any) -> str:
    """`value` as one line; None is an empty one. Raises UserError for anything but a short string."""
    value = "" if value is None else value
    if not isinstance(value, str) or len(value) > MOST_LETTERS:
        raise UserError(f"{field}: allowed: text of at most {MOST_LETTERS} letters")
    return " ".join(value.split())


def one_of(field: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is allowed. Raises UserError."""
    if value not in allowed:
        raise UserError(f"{field}: {value!r:.40} given; allowed: {', '.join(allowed)}")
    return value


def a_picture(value: Any, size: int) -> Image.Image | None:
    """The picture in a `data:` address, cut to a square of `size` pixels a side; None for "". Raises UserError.

    No file is written or read: the page sends pictures in the request itself.
    """
    if value in (None, ""):
        return None
    head = DATA_ADDRESS.match(value) if isinstance(value, str) else None
    if not head or len(value) > MOST_BYTES:
        raise UserError(f"picture: allowed: a PNG, JPEG or WebP picture of at most {MOST_BYTES * 3 // 4 >> 10} kB")
    try:
        file = io.BytesIO(base64.b64decode(value[head.end() :], validate=True))
        picture: Image.Image = Image.open(file, formats=("PNG", "JPEG", "WEBP"))
        if picture.width * picture.height > MOST_PIXELS:
            raise UserError(f"picture: {picture.width} x {picture.height} given; allowed: {MOST_PIXELS} pixels")
        picture = picture.convert("RGB")
    except (OSError, ValueError, binascii.Error, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("picture: it cannot be read; allowed: a PNG, JPEG or WebP picture") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def values_of(field: str, text: Any) -> list[float]:
    """The numbers of a row or a column of a sweep, written with commas or spaces. Raises UserError."""
    words = re.split(r"[\s,;]+", a_text(field, text).strip(" ,;"))
    try:
        values = list(dict.fromkeys(float(word) for word in words))
    except ValueError:
        raise UserError(f"{field}: {text!r:.40} given; allowed: numbers, with commas between them") from None
    if len(values) > MOST_VALUES:
        raise UserError(f"{field}: {len(values)} numbers given; allowed: at most {MOST_VALUES}")
    return values


class Bounds:
    """The limits of a page: its networks, and the largest size in pixels a side."""

    def __init__(self, networks: Sequence[str], max_size: int):
        self.networks, self.max_size = tuple(networks), max_size

    def read(self, values: Sequence[Any]) -> Wish:
        """The wish in the values of the page's fields, in the order of `Wish`. Raises UserError, which begins with the
        field's name."""
        (prompt, negative_prompt, networks, steps, guidance_scale, seed, size, sampler, teacher_sampler,
         lora_guidance_scale, lora_strength, picture, picture_strength) = values  # fmt: skip
        side = an_integer("size", size, 8, self.max_size)
        if side % 8:
            raise UserError(f"size: {side} given; allowed: multiples of 8")
        if not isinstance(networks, list) or not networks:
            raise UserError("networks: none given; allowed: at least one")
        return Wish(
            a_text("prompt", prompt),
            a_text("negative prompt", negative_prompt),
            tuple(name for name in self.networks if name in [one_of("networks", n, self.networks) for n in networks]),
            an_integer("steps", steps, 1, MOST_STEPS),
            a_number("guidance", guidance_scale, 1, MOST_GUIDANCE),
            an_integer("seed", seed, 0, MOST_SEED),
            side,
            one_of("sampler", sampler, [AS_TRAINED, *STUDENT_SAMPLERS]),
            one_of("teacher's sampler", teacher_sampler, TEACHER_SAMPLERS),
            a_number("LoRA guidance", lora_guidance_scale, 1, MOST_GUIDANCE),
            a_number("LoRA strength", lora_strength, 0, MOST_STRENGTH),
            a_picture(picture, side),
            a_number("change", picture_strength, 0.1, 1),
        )
