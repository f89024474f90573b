"""A sweep: one network at several numbers of steps and guidance scales, from the same noise, as a labelled grid."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from PIL import Image

from lcm.options.checks import steps_in_words
from lcm.pictures.grid import picture_grid
from lcm.playground.drawing import Drawing
from lcm.playground.turns import LATER, Ticket
from lcm.playground.wishes import MOST_GUIDANCE, MOST_STEPS, Wish, a_number, an_integer, values_of

LARGEST_CELL = 256  # pixels a side


def sweep_wishes(wish: Wish, label: str, is_lora: bool, steps: Any, scales: Any) -> list[list[Wish]]:
    """Rows of wishes: a row for each number of steps, a column for each guidance scale. Raises UserError."""
    rows = [an_integer("sweep's steps", value, 1, MOST_STEPS) for value in values_of("sweep's steps", steps)]
    columns = [a_number("sweep's guidance", v, 1, MOST_GUIDANCE) for v in values_of("sweep's guidance", scales)]
    rest = [
        replace(wish, lora_guidance_scale=column) if is_lora else replace(wish, guidance_scale=column)
        for column in columns
    ]
    return [[replace(one, networks=(label,), steps=row) for one in rest] for row in rows]


def draw_sweep(
    drawing: Drawing, label: str, wishes: list[list[Wish]], ticket: Ticket
) -> Iterator[tuple[int, Image.Image | None]]:
    """Yield (the number of pictures so far, None), at the end (all, the grid). Raises Superseded and UserError."""
    rows: list[list[Image.Image]] = []
    for row in wishes:
        rows.append([])
        for wish in row:
            rows[-1].append(drawing.draw(label, wish, ticket, LATER).picture)
            yield sum(map(len, rows)), None
    is_lora, first = drawing.shelf.networks[label].is_lora, wishes[0][0]
    scales = [wish.lora_guidance_scale if is_lora else wish.guidance_scale for wish in wishes[0]]
    from_picture = f", from a picture, change {first.picture_strength:g}" if first.picture else ""
    grid = picture_grid(
        rows,
        [steps_in_words(row[0].steps) for row in wishes],
        [f"guidance {scale:g}" for scale in scales],
        cell_size=min(LARGEST_CELL, max(96, first.size)),
        corner=label,
        footer=f"{first.prompt}\nseed {first.seed}" + from_picture,
    )
    yield sum(map(len, rows)), grid
