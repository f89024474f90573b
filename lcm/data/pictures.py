"""From the bytes of a picture to pixels: decoding, orientation, resizing, cropping."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lcm.data.config import DataConfig
from lcm.options.choices import INTERPOLATIONS, PICTURE_FORMATS
from lcm.options.shapes import Shape, covering_size, nearest_shape

Size = tuple[int, int]  # width, height
MAX_ASPECT_RATIO = 16  # a thinner picture would take gigabytes when it is resized


class Unusable(Exception):
    """Raised for a sample that cannot be used: Unusable(reason, detail). Samples are counted by reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture as 8-bit RGB. `image` may have been decoded smaller than it is: `size` is (width, height).
    `format` is Pillow's name of its encoding."""

    image: Image.Image
    size: Size
    format: str


def open_picture(data: bytes, resized: Callable[[Size], Size] | None = None) -> Picture:
    """Decode a picture: rotated as EXIF says, 16-bit greys scaled to 8 bits, transparency over white.

    `resized` tells, for a picture's size, which size it will be resized to. A JPEG is then decoded at 1/2, 1/4 or 1/8
    of its size where that is enough, which is faster.
    Raises Unusable for anything but one complete picture, and for a decompression bomb (by Pillow's limit). A
    MemoryError is not the picture's fault, and is passed on.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=sorted({*PICTURE_FORMATS.values()}))
        size, encoding = image.size, str(image.format)
        if max(size) > MAX_ASPECT_RATIO * min(size):
            raise Unusable("picture too thin", f"{image.width} x {image.height}")
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 degrees
        if is_turned:
            size = size[1], size[0]
        if resized:
            width, height = resized(size)
            image.draft(None, (height, width) if is_turned else (width, height))  # type: ignore[arg-type]
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return Picture(image if image.mode == "RGB" else image.convert("RGB"), size, encoding)
    except Image.DecompressionBombError as error:
        raise Unusable("picture too large", str(error)) from None
    except UnidentifiedImageError:
        raise Unusable("picture unreadable", f"not one of {', '.join(PICTURE_FORMATS)}") from None
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise Unusable("picture unreadable", str(error) or type(error).__name__) from None


def resize(picture: Picture, shape: Shape, config: DataConfig) -> Image.Image:
    """The picture, resized to just cover a shape."""
    size = covering_size(shape, picture.size)
    if size == picture.image.size:
        return picture.image
    return picture.image.resize(size, Image.Resampling[INTERPOLATIONS[config.interpolation_type]])


def crop_place(image: Image.Image, shape: Shape, config: DataConfig, rng: np.random.Generator) -> tuple[int, int]:
    """(left, top) of a crop of this shape."""
    right, bottom = image.width - shape[1], image.height - shape[0]
    if config.center_crop:
        return right // 2, bottom // 2
    return int(rng.integers(right + 1)), int(rng.integers(bottom + 1))


def crop(
    image: Image.Image, left: int, top: int, shape: Shape, is_mirrored: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """A part of a picture, mirrored or not: (3, H, W) uint8, and (top, left) in pixels of the mirrored picture."""
    height, width = shape
    part = image.crop((left, top, left + width, top + height))
    if is_mirrored:
        part, left = ImageOps.mirror(part), image.width - width - left
    return np.asarray(part).transpose(2, 0, 1), (top, left)


def transform(picture: Picture, config: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize the picture to cover the shape that is nearest to its own, crop that, mirror it or not.

    Returns ((3, H, W) uint8 array, (crop top, crop left)), the crop in pixels of the resized and mirrored picture.
    """
    shape = nearest_shape(config.shapes, picture.size)
    image = resize(picture, shape, config)
    left, top = crop_place(image, shape, config, rng)
    is_mirrored = config.random_flip and bool(rng.random() < 0.5)
    return crop(image, left, top, shape, is_mirrored)


def all_crops(
    picture: Picture, config: DataConfig, rng: np.random.Generator, count: int
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """`count` crops as `transform` makes them, each also mirrored if pictures are to be mirrored at random."""
    shape = nearest_shape(config.shapes, picture.size)
    image = resize(picture, shape, config)
    places = [crop_place(image, shape, config, rng) for _ in range(count)]
    mirrored = (False, True) if config.random_flip else (False,)
    return [crop(image, *place, shape, mirror) for place in places for mirror in mirrored]
