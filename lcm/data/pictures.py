"""From the bytes of a picture to pixels: decoding, orientation, resizing, cropping."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lcm.data.config import DataConfig
from lcm.options.choices import INTERPOLATIONS, PICTURE_FORMATS

MAX_ASPECT_RATIO = 16  # a thinner picture would take gigabytes when it is resized


class Unusable(Exception):
    """Raised for a sample that cannot be used: Unusable(reason, detail). Samples are counted by reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture as 8-bit RGB. `image` may have been decoded smaller than it is: `size` is (width, height).
    `format` is Pillow's name of its encoding."""

    image: Image.Image
    size: tuple[int, int]
    format: str


def open_picture(data: bytes, shorter_side: int | None = None) -> Picture:
    """Decode a picture: rotated as EXIF says, 16-bit greys scaled to 8 bits, transparency over white.

    If no more than `shorter_side` pixels are needed, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is
    enough, which is faster.
    Raises Unusable for anything but one complete picture, and for a decompression bomb (by Pillow's limit). A
    MemoryError is not the picture's fault, and is passed on.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=sorted({*PICTURE_FORMATS.values()}))
        size, encoding = image.size, str(image.format)
        if max(size) > MAX_ASPECT_RATIO * min(size):
            raise Unusable("picture too thin", f"{image.width} x {image.height}")
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # turned by 90 degrees
            size = size[1], size[0]
        if shorter_side:
            image.draft(None, (shorter_side, shorter_side))  # type: ignore[arg-type]
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


def resize(picture: Picture, config: DataConfig) -> Image.Image:
    """The picture with its shorter side resized to the resolution."""
    shorter = min(picture.size)
    width, height = (int(config.resolution * side / shorter) for side in picture.size)  # as in torchvision's `resize`
    if (width, height) == picture.image.size:
        return picture.image
    return picture.image.resize((width, height), Image.Resampling[INTERPOLATIONS[config.interpolation_type]])


def crop_place(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> tuple[int, int]:
    """(left, top) of a square crop."""
    right, bottom = image.width - config.resolution, image.height - config.resolution
    if config.center_crop:
        return right // 2, bottom // 2
    return int(rng.integers(right + 1)), int(rng.integers(bottom + 1))


def crop(
    image: Image.Image, left: int, top: int, resolution: int, is_mirrored: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """A square of a picture, mirrored or not: (3, H, W) uint8, and (top, left) in pixels of the mirrored picture."""
    square = image.crop((left, top, left + resolution, top + resolution))
    if is_mirrored:
        square, left = ImageOps.mirror(square), image.width - resolution - left
    return np.asarray(square).transpose(2, 0, 1), (top, left)


def transform(picture: Picture, config: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize the shorter side to the resolution, crop a square, mirror it or not.

    Returns ((3, H, W) uint8 array, (crop top, crop left)), the crop in pixels of the resized and mirrored picture.
    """
    image = resize(picture, config)
    left, top = crop_place(image, config, rng)
    is_mirrored = config.random_flip and bool(rng.random() < 0.5)
    return crop(image, left, top, config.resolution, is_mirrored)


def all_crops(
    picture: Picture, config: DataConfig, rng: np.random.Generator, count: int
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """`count` crops as `transform` makes them, each also mirrored if pictures are to be mirrored at random."""
    image = resize(picture, config)
    places = [crop_place(image, config, rng) for _ in range(count)]
    mirrored = (False, True) if config.random_flip else (False,)
    return [crop(image, *place, config.resolution, mirror) for place in places for mirror in mirrored]
