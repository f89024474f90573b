"""Labelled grids of pictures."""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

MAX_GRID_WIDTH = 8192  # pixels, of all columns
MAX_PAGE_HEIGHT, MAX_PAGE_ROWS = 8192, 12  # pixels, of all pictures
HAIRLINE = "#d0d0d0"  # around each picture: some are white at the edge
# Letters that fill a square, between which lines may break.
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\U00020000-\U0003fffd"
CLOSING = "\u3001\u3002\u300d\u300f\uff01\uff09\uff0c\uff1f"  # punctuation that must not begin a line
VARIATION_SELECTORS = set(map(chr, range(0xFE00, 0xFE10)))
NAMED_LETTERS: set[str] = set()  # letters without a font that the log has already named


def wrap(text: str, width: int, font: Any) -> list[str]:
    """`text` as lines of at most `width` pixels, broken between words and between wide letters; keeps line breaks."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for piece in re.findall(rf"\s*(?:[{WIDE}][{CLOSING}]*|[^\s{WIDE}]+)", paragraph):
            if lines[-1] and font.getlength(lines[-1] + piece) > width:
                lines.append("")
            piece = piece if lines[-1] else piece.lstrip()
            if font.getlength(lines[-1] + piece) <= width:
                lines[-1] += piece
                continue
            for letter in piece:  # the word is wider than a line
                if lines[-1] and font.getlength(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
    return lines


def missing_letters(path: str, letters: Iterable[str]) -> set[str]:
    """The letters for which a font file has no glyph; all of them if the file cannot be read."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return set(letters)
    return {letter for letter in letters if not font.get_char_index(ord(letter))}


@functools.lru_cache
def fonts_for(letters: frozenset[str]) -> tuple[list[str], set[str]]:
    """(font files, those with most of the letters first; the letters that the first one lacks).

    DejaVu Sans, which comes with matplotlib and has the letters of Europe and more, is first if no font has more.
    """
    dejavu = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    found = {dejavu: missing_letters(dejavu, letters)}
    if found[dejavu]:
        for path in font_manager.findSystemFonts():
            if not re.search("LastResort|Blank", path):  # their glyphs are placeholders
                found[path] = missing_letters(path, letters)
    paths = sorted(found, key=lambda path: (
        len(found[path]), path != dejavu, bool(re.search("Bold|Italic|Oblique|Mono|Serif|Condensed|Light", path)), path
    ))  # fmt: skip
    return paths, found[paths[0]]


def label_font(size: int, texts: Sequence[str]) -> Any:
    """Pillow's default font for ASCII texts, else the installed font that has most of their letters.

    Letters that no font has are logged once.
    """
    if all(text.isascii() for text in texts):
        return ImageFont.load_default(size=size)
    letters = {letter for letter in "".join(texts) if letter.isprintable() and not letter.isspace()}
    paths, missing = fonts_for(frozenset(letters - VARIATION_SELECTORS))
    if missing - NAMED_LETTERS:
        logger.warning(
            "No installed font has %s: the grids show a box for each. Install a font that has them; for Chinese, "
            "Japanese and Korean: fonts-noto-cjk", " ".join(sorted(missing - NAMED_LETTERS)[:20])
        )  # fmt: skip
        NAMED_LETTERS.update(missing)
    for path in paths:
        with contextlib.suppress(OSError):  # bitmap fonts cannot be scaled
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size=size)


def picture_grid(
    rows: list[list[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell_size: int | None = None,
    group_gap: Collection[int] = (),
    corner: str = "",
    footer: str = "",
) -> Image.Image:
    """A labelled grid as one picture. The pictures of a row have the same size.

    `cell_size`, in pixels, is the width to which every picture is resized (nearest, if it is enlarged). `group_gap`
    has the indices of columns with extra space before them. `corner` is written above the row labels, `footer` at the
    bottom.
    """
    side = cell_size or rows[0][0].width
    font = label_font(max(11, min(18, side // 7)), [*row_labels, *column_labels, corner, footer])
    line = int(font.size * 1.3)
    label_width = min(320, max(140, side))
    row_texts = ["\n".join(wrap(text, label_width - font.size // 2, font)) for text in row_labels]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_heights = [int(measure.multiline_textbbox((0, 0), text, font)[3]) + line // 2 for text in row_texts]
    column_texts = ["\n".join(wrap(text, side, font)) for text in column_labels]
    corner = "\n".join(wrap(corner, label_width, font))
    gap, pad = max(4, side // 24), 12
    top = pad + max(int(measure.multiline_textbbox((0, 0), text, font)[3]) for text in [*column_texts, corner]) + 8
    lefts = [pad + label_width + i * (side + gap) + 3 * gap * sum(g <= i for g in group_gap)
             for i in range(len(column_labels))]  # fmt: skip
    cells = [(side, round(side * pictures[0].height / pictures[0].width)) for pictures in rows]
    heights = [max(cell[1], text_height) + gap for cell, text_height in zip(cells, text_heights, strict=True)]
    width, bottom = lefts[-1] + side + pad, top + sum(heights) - gap
    footer = "\n".join(wrap(footer, width - 2 * pad, font))
    footer_height = int(measure.multiline_textbbox((0, 0), footer, font)[3]) + line // 2 if footer else 0
    grid = Image.new("RGB", (width, bottom + footer_height + pad), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((pad, top - 4), corner, "black", font, anchor="ld")
    for left, text in zip(lefts, column_texts, strict=True):
        draw.multiline_text((left + side / 2, top - 4), text, "black", font, anchor="md", align="center")
    y = top
    for pictures, text, cell, height in zip(rows, row_texts, cells, heights, strict=True):
        draw.multiline_text((pad, y + (height - gap) / 2), text, "black", font, anchor="lm")
        for left, picture in zip(lefts, pictures, strict=True):
            resampling = Image.Resampling.NEAREST if side > picture.width else Image.Resampling.LANCZOS
            grid.paste(picture.convert("RGB").resize(cell, resampling), (left, y))
            draw.rectangle((left - 1, y - 1, left + cell[0], y + cell[1]), outline=HAIRLINE)
        y += height
    draw.multiline_text((pad, bottom + line // 2), footer, "black", font)
    return grid


def split_evenly(items: list, most: int) -> list[list]:
    """`items` as lists of at most `most` items: as few lists as possible, of about equal length."""
    size = -(-len(items) // -(-len(items) // most))
    return [items[i : i + size] for i in range(0, len(items), size)]
