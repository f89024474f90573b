"""The demo world: one or two emoji on one of six backgrounds, 64x64 pixels, with captions.

"a fox and a star, night" shows the two at random places, sizes and angles. 12 things, alone or in pairs, and 6
backgrounds make 468 captions. A caption leaves much open, so the mean of all pictures that fit it is a blur. To see
examples:

    python demo/world.py --output world.png

The things are pictures of Noto Emoji (sprites/README.md).
"""

import argparse
import functools
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
THINGS = ("apple", "ball", "banana", "car", "cat", "crown", "fish", "fox", "frog", "house", "star", "tree")
# The colours at the top and at the bottom.
BACKGROUNDS = {
    "meadow": ((170, 215, 240), (95, 165, 70)),
    "sea": ((30, 150, 190), (10, 60, 120)),
    "desert": ((250, 225, 165), (205, 145, 85)),
    "night": ((15, 15, 50), (60, 50, 110)),
    "sunset": ((120, 60, 140), (250, 150, 110)),
    "snow": ((205, 220, 240), (250, 250, 255)),
}
SPRITES = Path(__file__).parent / "sprites"
LARGE, SMALL = (0.45, 0.65), (0.36, 0.46)  # sizes of a thing alone and of one in a pair, as parts of the picture
ANGLE = 25  # degrees to either side


def all_things() -> list[tuple[int, ...]]:
    """Return the 78 sets of one or two different things, as indices in order."""
    indices = range(len(THINGS))
    return [*itertools.combinations(indices, 1), *itertools.combinations(indices, 2)]


def caption(things: tuple[int, ...], background: int) -> str:
    """Return the caption of indices, for example ((7, 10), 3) -> "a fox and a star, night"."""
    names = [f"{'an' if THINGS[i][0] in 'aeiou' else 'a'} {THINGS[i]}" for i in things]
    return f"{' and '.join(names)}, {list(BACKGROUNDS)[background]}"


def parse_caption(text: str) -> tuple[tuple[int, ...], int]:
    """Return the indices (things, background) of a caption, the inverse of `caption`."""
    names, background = text.split(", ")
    things = tuple(THINGS.index(name.split()[1]) for name in names.split(" and "))
    return things, list(BACKGROUNDS).index(background)


def all_captions() -> list[str]:
    """Return the 468 captions: caption i has the things i // 6 of `all_things` and the background i % 6."""
    return [caption(things, background) for things in all_things() for background in range(len(BACKGROUNDS))]


def labels(things: tuple[int, ...], background: int) -> list[int]:
    """Return the 13 labels of a picture: 1 for each of the 12 things that it shows, else 0; then its background."""
    return [int(i in things) for i in range(len(THINGS))] + [background]


@functools.cache
def sprite(thing: int) -> Image.Image:
    """Return the picture of a thing, 72x72, RGB with an opacity that the colours are multiplied with."""
    pixels = np.asarray(Image.open(SPRITES / f"{THINGS[thing]}.png").convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def place(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (centre x, centre y, diameter) in pixels of `count` things that lie inside and do not overlap."""
    while True:
        diameters = SIZE * rng.uniform(*(LARGE if count == 1 else SMALL), size=count)
        centres = [rng.uniform(0.5 * d, SIZE - 0.5 * d, size=2) for d in diameters]
        apart = all(
            np.hypot(*(centres[i] - centres[j])) > 0.5 * (diameters[i] + diameters[j])
            for i, j in itertools.combinations(range(count), 2)
        )
        if apart:
            return [(float(x), float(y), float(d)) for (x, y), d in zip(centres, diameters, strict=True)]


def draw(things: tuple[int, ...], background: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a picture (64, 64, 3), uint8, with the things at random places, sizes and angles."""
    top, bottom = np.array(list(BACKGROUNDS.values())[background], dtype=np.float32)
    picture = np.repeat(np.linspace(top, bottom, SIZE)[:, None], SIZE, axis=1)
    for thing, (x, y, diameter) in zip(things, place(len(things), rng), strict=True):
        angle = np.deg2rad(rng.uniform(-ANGLE, ANGLE))
        image = sprite(thing)
        # An affine map from pixels of the picture to pixels of the sprite, drawn at twice the size, then averaged.
        step = image.width / (2 * diameter)
        a, b, middle = step * np.cos(angle), step * np.sin(angle), image.width / 2
        matrix = (a, b, middle - 2 * (a * x + b * y), -b, a, middle - 2 * (a * y - b * x))
        layer = image.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        pixels = np.asarray(layer, dtype=np.float32).reshape(SIZE, 2, SIZE, 2, 4).mean(axis=(1, 3))
        picture = picture * (1 - pixels[..., 3:] / 255) + pixels[..., :3]
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def render(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` pictures: each caption equally often up to rounding, in random order.

    Returns pictures (count, 64, 64, 3), uint8, and the numbers of their captions in `all_captions`, (count,), int64.
    """
    rng = np.random.default_rng(seed)
    sets, number_of_backgrounds = all_things(), len(BACKGROUNDS)
    captions = len(sets) * number_of_backgrounds
    numbers = np.concatenate([rng.permutation(captions) for _ in range(-(-count // captions))])[:count]
    pictures = [draw(sets[n // number_of_backgrounds], int(n) % number_of_backgrounds, rng) for n in numbers]
    return np.stack(pictures), numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="world.png", help="Where to write a sheet of 8 x 12 pictures.")
    args = parser.parse_args()
    pictures, _ = render(96, seed=0)
    sheet = pictures.reshape(8, 12, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(8 * SIZE, 12 * SIZE, 3)
    Image.fromarray(sheet).save(args.output)


if __name__ == "__main__":
    main()
