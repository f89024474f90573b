"""Aspect-ratio buckets: the shapes, (height, width) in pixels, that pictures are cropped to."""

import argparse
import math
import re
from collections.abc import Sequence

Shape = tuple[int, int]  # height, width
AUTO = "auto"
MOST = 2  # times as long as wide, or as wide as long, at most, for the shapes that are made here


def buckets(value: str) -> str:
    """An argparse type: shapes as HEIGHT,WIDTH;HEIGHT,WIDTH;..., or `auto`; returned without spaces."""
    value = re.sub(r"\s", "", value).strip(";")
    if value != AUTO and not all(is_shape(part) for part in value.split(";")):
        raise argparse.ArgumentTypeError(
            f"{value!r} given; allowed: auto, or HEIGHT,WIDTH in multiples of 8, joined by semicolons"
        )
    return value


def is_shape(text: str) -> bool:
    found = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    return found is not None and all(int(side) % 8 == 0 for side in found.groups())


def make_buckets(resolution: int, rounding: int, kind: str) -> list[Shape]:
    """Shapes whose sides are multiples of `rounding`, from MOST times as high as wide to the opposite.

    For `area` they have up to resolution^2 pixels; for `pixel` their shorter side is `resolution`.
    """
    if kind == "pixel":
        longer = range(resolution, MOST * resolution + 1, rounding)
        return sorted({*((side, resolution) for side in longer), *((resolution, side) for side in longer)})
    heights = range(rounding, MOST * resolution + 1, rounding)
    shapes = {(height, resolution**2 // height // rounding * rounding) for height in heights}
    shapes |= {(width, height) for height, width in shapes}
    shapes = {shape for shape in shapes if min(shape) and max(shape) <= MOST * min(shape)}
    return sorted(shape for shape in shapes if is_largest(shape, shapes))


def is_largest(shape: Shape, shapes: set[Shape]) -> bool:
    """Whether no other of these shapes contains it."""
    return not any(other != shape and other[0] >= shape[0] and other[1] >= shape[1] for other in shapes)


def bucket_shapes(args: argparse.Namespace) -> tuple[Shape, ...]:
    """The shapes of `--aspect_ratio_buckets`; none if it is not given."""
    given = args.aspect_ratio_buckets
    if given is None:
        return ()
    if given == AUTO:
        return tuple(make_buckets(args.resolution, args.aspect_bucket_rounding, args.resolution_type))
    return tuple(
        dict.fromkeys((int(height), int(width)) for height, width in (p.split(",") for p in given.split(";")))
    )


def training_shapes(args: argparse.Namespace) -> tuple[Shape, ...]:
    """The shapes of a training: those of `--aspect_ratio_buckets`, or the square of `--resolution`."""
    return bucket_shapes(args) or ((args.resolution, args.resolution),)


def as_text(shapes: Sequence[Shape]) -> str:
    """Shapes as `--aspect_ratio_buckets` takes them."""
    return ";".join(f"{height},{width}" for height, width in shapes)


def nearest_shape(shapes: Sequence[Shape], size: tuple[int, int]) -> Shape:
    """The shape whose aspect ratio is nearest to that of a picture of (width, height): the least is cropped.

    Of shapes with the same ratio it is the largest that the picture fills, or else the smallest.
    """
    width, height = size

    def order(shape: Shape) -> tuple[float, bool, int]:
        difference = abs(math.log(width / height) - math.log(shape[1] / shape[0]))
        is_filled = shape[0] <= height and shape[1] <= width
        return round(difference, 9), not is_filled, -shape[0] * shape[1] if is_filled else shape[0] * shape[1]

    return shapes[0] if len(shapes) == 1 else min(shapes, key=order)


def covering_size(shape: Shape, size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of a picture of this (width, height), resized to just cover a shape."""
    (height, width), (old_width, old_height) = shape, size
    if old_width * height >= old_height * width:  # one division, as torchvision's `resize` has it
        return int(height * old_width / old_height), height
    return width, int(width * old_height / old_width)
