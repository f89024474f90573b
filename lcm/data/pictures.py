"""From the bytes of a picture to pixels: decoding, orientation, resizing, cropping."""

import io

import numpy as np
from PIL import Image, ImageOps

from lcm.data.config import DataConfig
from lcm.options.choices import INTERPOLATIONS, PICTURE_FORMATS

MAX_ASPECT_RATIO = 16  # a thinner picture would take gigabytes when it is resized


class Unusable(Exception):
    """Raised for a sample that cannot be used: Unusable(reason, detail). Samples are counted by reason."""


def open_image(data: bytes) -> Image.Image:
    """Decode a picture as 8-bit RGB: rotated as EXIF says, 16-bit greys scaled to 8 bits, transparency over white.

    Raises Unusable for anything but one complete picture, and for a decompression bomb (by Pillow's limit). A
    MemoryError is not the picture's fault, and is passed on.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=sorted({*PICTURE_FORMATS.values()}))
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise Unusable("picture too thin", f"{image.width} x {image.height}")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise Unusable("picture too large", str(error)) from None
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input
        raise Unusable("picture unreadable", str(error) or type(error).__name__) from None


def resize(image: Image.Image, config: DataConfig) -> Image.Image:
    """Resize the shorter side to the resolution."""
    shorter = min(image.size)
    width, height = (int(config.resolution * side / shorter) for side in image.size)  # as in torchvision's `resize`
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling[INTERPOLATIONS[config.interpolation_type]])


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


def transform(image: Image.Image, config: DataConfig, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize the shorter side to the resolution, crop a square, mirror it or not.

    Returns ((3, H, W) uint8 array, (crop top, crop left)), the crop in pixels of the resized and mirrored picture.
    """
    image = resize(image, config)
    left, top = crop_place(image, config, rng)
    is_mirrored = config.random_flip and bool(rng.random() < 0.5)
    return crop(image, left, top, config.resolution, is_mirrored)


def all_crops(
    image: Image.Image, config: DataConfig, rng: np.random.Generator, count: int
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """`count` crops as `transform` makes them, each also mirrored if pictures are to be mirrored at random."""
    image = resize(image, config)
    places = [crop_place(image, config, rng) for _ in range(count)]
    mirrored = (False, True) if config.random_flip else (False,)
    return [crop(image, *place, config.resolution, mirror) for place in places for mirror in mirrored]
