"""The demo world: handwritten digits in five colours on two backgrounds, 32x32 pixels, with captions.

Every picture is one of scikit-learn's 1,797 handwritten digits (8x8, grey), rotated, scaled and shifted a little,
drawn large and coloured: "a red three on a white background". 10 digits x 5 colours x 2 backgrounds make 100 captions.
1,500 of the digits are for training, the other 297 are held out. To see examples:

    python demo/digits.py --output world.png
"""

import argparse
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (220, 30, 45),
    "green": (25, 160, 70),
    "blue": (35, 95, 235),
    "orange": (255, 150, 10),
    "purple": (150, 50, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
# Shades from the background to the colour. With 16, a picture is a 4-bit palette PNG that fits one 512-byte tar block.
SHADES = 16


def caption(digit: int, colour: int, background: int) -> str:
    """Return the caption of three indices, for example (3, 0, 0) -> "a red three on a white background"."""
    return f"a {list(COLOURS)[colour]} {DIGITS[digit]} on a {list(BACKGROUNDS)[background]} background"


def parse_caption(text: str) -> tuple[int, int, int]:
    """Return the (digit, colour, background) indices of a caption, the inverse of `caption`."""
    _, colour, digit, _, _, background, _ = text.split()
    return DIGITS.index(digit), list(COLOURS).index(colour), list(BACKGROUNDS).index(background)


def all_captions() -> list[str]:
    """Return the 100 captions: caption i has digit i // 10, colour i % 10 // 2 and background i % 2."""
    return [caption(i // 10, i % 10 // 2, i % 2) for i in range(100)]


def load_glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the handwritten digits of one split ("train": 1,500, "heldout": 297).

    Returns glyphs (N, 8, 8), float32 in [0, 1] where 1 is ink, and labels (N,), int64 in 0..9.
    """
    from sklearn.datasets import load_digits

    glyphs, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    order = order[:1500] if split == "train" else order[1500:]
    return (glyphs[order].reshape(-1, 8, 8) / 16).astype(np.float32), labels[order].astype(np.int64)


def draw(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one 8x8 glyph large and sharp, rotated, scaled and shifted at random.

    Returns shades (32, 32), uint8 in 0..15, where 0 is background and 15 is ink.
    """
    angle, scale = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    shift_x, shift_y = rng.uniform(-1.5, 1.5, size=2)
    # One affine map from the pixels of a canvas, twice the size of the picture, to positions in the glyph. The glyph
    # has a border of one pixel, so that its edge fades to the background. At scale 1 a glyph pixel is 3 pixels wide.
    step = 1 / (3.0 * 2 * scale)
    a, b = step * np.cos(angle), step * np.sin(angle)
    centre_x, centre_y = SIZE + 2 * shift_x, SIZE + 2 * shift_y
    matrix = (a, b, 5 - a * centre_x - b * centre_y, -b, a, 5 + b * centre_x - a * centre_y)
    paper = Image.fromarray(np.pad(glyph, 1))
    canvas = paper.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    # The contrast curve makes the soft strokes sharp; the mean over 2x2 pixels keeps their edges smooth.
    ink = np.clip(3.0 * (np.asarray(canvas) - 0.45) + 0.5, 0, 1).reshape(SIZE, 2, SIZE, 2).mean(axis=(1, 3))
    return np.rint(ink * (SHADES - 1)).astype(np.uint8)


def palette(colour: int, background: int) -> np.ndarray:
    """Return the 16 shades from background to colour, (16, 3), uint8."""
    ink, paper = np.array(list(COLOURS.values())[colour]), np.array(list(BACKGROUNDS.values())[background])
    return np.rint(paper + np.linspace(0, 1, SHADES)[:, None] * (ink - paper)).astype(np.uint8)


def render_split(split: str, copies: int, seed: int) -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
    """Yield every digit of a split `copies` times in random order, each with another drawing, as (shades, indices).

    `shades` is what `draw` returns and `indices` is (digit, colour, background); `palette(...)[shades]` is the RGB
    picture. Every digit gets the ten styles (colour and background) equally often, up to rounding.
    """
    rng = np.random.default_rng(seed)
    glyphs, labels = load_glyphs(split)
    picks = rng.permutation(np.tile(np.arange(len(labels)), copies))
    styles = np.empty(len(picks), dtype=np.int64)
    styles[np.argsort(labels[picks], kind="stable")] = np.arange(len(picks)) % 10
    for pick, style in zip(picks, styles, strict=True):
        yield draw(glyphs[pick], rng), (int(labels[pick]), int(style) // 2, int(style) % 2)


def render_arrays(split: str, copies: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render a split at once: pictures (N, 32, 32, 3), uint8, and indices (N, 3), int64: digit, colour, background."""
    pictures, indices = [], []
    for shades, index in render_split(split, copies, seed):
        pictures.append(palette(*index[1:])[shades])
        indices.append(index)
    return np.stack(pictures), np.array(indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="world.png", help="Where to write a sheet of 10 x 20 held-out pictures.")
    args = parser.parse_args()
    pictures, _ = render_arrays("heldout", copies=1, seed=0)
    sheet = pictures[:200].reshape(10, 20, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(10 * SIZE, 20 * SIZE, 3)
    Image.fromarray(sheet).save(args.output)


if __name__ == "__main__":
    main()
