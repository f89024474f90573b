"""Pictures while training: the networks in memory, sampled as a user will sample them, beside the teacher.

The training run is not disturbed: the noise comes from a generator of its own, the same every time and for all columns
so that pictures can be compared, and train or eval mode is put back.
"""

import contextlib
import functools
import logging
import os
import re
from dataclasses import dataclass

import matplotlib
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from lcm.options.groups import default_guidance_scale, first_line
from lcm.pictures import samplers as lcm_schedulers

logger = logging.getLogger(__name__)

MAX_GRID_WIDTH = 8192  # pixels, of all columns
MAX_PAGE_HEIGHT, MAX_PAGE_ROWS = 8192, 12  # pixels, of all pictures
HAIRLINE = "#d0d0d0"  # around each picture, some of which are white at the edge
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\U00020000-\U0003fffd"  # letters
CLOSING = "\u3001\u3002\u300d\u300f\uff01\uff09\uff0c\uff1f"  # punctuation that begins no line
VARIATION_SELECTORS = set(map(chr, range(0xFE00, 0xFE10)))
NAMED_LETTERS = set()  # that no font has, as the log has said


# The grid.


def wrap(text, width, font):
    """`text` as lines of at most `width` pixels, cut between words and between wide letters; its line breaks stay."""
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for piece in re.findall(rf"\s*(?:[{WIDE}][{CLOSING}]*|[^\s{WIDE}]+)", paragraph):
            if lines[-1] and font.getlength(lines[-1] + piece) > width:
                lines.append("")
            piece = piece if lines[-1] else piece.lstrip()
            if font.getlength(lines[-1] + piece) <= width:
                lines[-1] += piece
                continue
            for letter in piece:  # of a word that is wider than a line
                if lines[-1] and font.getlength(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
    return lines


def lacks(path, letters):
    """Those of `letters` that a font file has no glyph for; all of them if the file cannot be read."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return set(letters)
    return {letter for letter in letters if not font.get_char_index(ord(letter))}


@functools.lru_cache
def fonts_for(letters):
    """Font files that have most of a frozenset of letters, the best first, and what the best of them lacks.

    DejaVu Sans, which comes with matplotlib and has the letters of Europe and more, is the best if nothing has more.
    """
    dejavu = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    found = {dejavu: lacks(dejavu, letters)}
    if found[dejavu]:
        for path in font_manager.findSystemFonts():
            if not re.search("LastResort|Blank", path):  # whose glyphs say only that one is missing
                found[path] = lacks(path, letters)
    paths = sorted(found, key=lambda path: (
        len(found[path]), path != dejavu, bool(re.search("Bold|Italic|Oblique|Mono|Serif|Condensed|Light", path)), path
    ))  # fmt: skip
    return paths, found[paths[0]]


def label_font(size, texts):
    """Pillow's own font, or where that lacks a letter an installed one that has it; what none has is logged once."""
    if all(text.isascii() for text in texts):
        return ImageFont.load_default(size=size)
    letters = {letter for letter in "".join(texts) if letter.isprintable() and not letter.isspace()}
    paths, missing = fonts_for(frozenset(letters - VARIATION_SELECTORS))
    if missing - NAMED_LETTERS:
        logger.warning(
            "No installed font has %s: a box stands for each in the grids. Install one that does, for Chinese, "
            "Japanese and Korean fonts-noto-cjk", " ".join(sorted(missing - NAMED_LETTERS)[:20])
        )  # fmt: skip
        NAMED_LETTERS.update(missing)
    for path in paths:
        with contextlib.suppress(OSError):  # fonts of bitmaps cannot be scaled
            return ImageFont.truetype(path, size)


def picture_grid(rows, row_labels, column_labels, cell_size=None, group_gap=(), corner="", footer=""):
    """A labelled grid as one picture: `rows` is a list of lists of PIL pictures, those of one row of one size.

    `cell_size` enlarges or shrinks every picture to that many pixels in width (nearest, if it enlarges). Before each
    column whose index is in `group_gap` some space is left. `corner` is written above the row labels, `footer` below
    everything.
    """
    side = cell_size or rows[0][0].width
    font = label_font(max(11, min(18, side // 7)), [*row_labels, *column_labels, corner, footer])
    line = int(font.size * 1.3)
    label_width = min(320, max(140, side))
    row_texts = ["\n".join(wrap(text, label_width - font.size // 2, font)) for text in row_labels]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_heights = [measure.multiline_textbbox((0, 0), text, font)[3] + line // 2 for text in row_texts]
    column_texts = ["\n".join(wrap(text, side, font)) for text in column_labels]
    corner = "\n".join(wrap(corner, label_width, font))
    gap, pad = max(4, side // 24), 12
    top = pad + max(measure.multiline_textbbox((0, 0), text, font)[3] for text in [*column_texts, corner]) + 8
    lefts = [pad + label_width + i * (side + gap) + 3 * gap * sum(g <= i for g in group_gap)
             for i in range(len(column_labels))]  # fmt: skip
    cells = [(side, round(side * pictures[0].height / pictures[0].width)) for pictures in rows]
    heights = [max(cell[1], text_height) + gap for cell, text_height in zip(cells, text_heights, strict=True)]
    width, bottom = lefts[-1] + side + pad, top + sum(heights) - gap
    footer = "\n".join(wrap(footer, width - 2 * pad, font))
    footer_height = measure.multiline_textbbox((0, 0), footer, font)[3] + line // 2 if footer else 0
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


# Its pages.


def split_evenly(items, most):
    """A list as lists of at most `most` items, as few and as equal as can be."""
    size = -(-len(items) // -(-len(items) // most))
    return [items[i : i + size] for i in range(0, len(items), size)]


def pages_of(output_dir, step):
    """The files that `Validation.run` wrote at a step: step-000200.png, or step-000200-1.png, -2, ..., in order."""
    folder, found = os.path.join(output_dir, "validation"), {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.fullmatch(rf"step-{step:06d}(?:-(\d+))?\.png", name)
        if match:
            found[int(match[1] or 0)] = os.path.join(folder, name)
    return [path for _, path in sorted(found.items())]


# The pictures.


@contextlib.contextmanager
def eval_mode(network):
    """Yield a network in eval mode; its mode is put back afterwards."""
    was_training = network.training
    try:
        yield network.eval()
    finally:
        network.train(was_training)


@dataclass(frozen=True)
class Row:
    prompt: str
    size: tuple[int, int]  # width, height in pixels
    seed: int


@dataclass(frozen=True)
class Column:
    network: str
    steps: int
    guidance_scale: float

    @property
    def guidance(self):
        return f"guidance {self.guidance_scale:g}"

    def label(self, separator, with_guidance=True):
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return separator.join([self.network, steps, *[self.guidance] * with_guidance])


class Validation:
    """Draws the validation prompts and gives the pictures to the trackers and to `output_dir/validation`.

    `make_pipeline(unet=unet, scheduler=scheduler)` returns a pipeline around both with everything else in place; the
    schedulers are made from `noise_schedule`. `teacher`, and the values of `networks` with their labels as keys, are
    callables that return a context manager, as `eval_mode` with a network filled in: it yields an unwrapped U-Net that
    is ready to sample, and puts everything back. `teacher_guidance_scales` are those of `networks` if unset.
    `together`: all processes have to call those of `networks`, since each holds a part of their weights.
    """

    def __init__(
        self,
        accelerator,
        args,
        trackers,
        make_pipeline,
        noise_schedule,
        teacher,
        networks,
        teacher_guidance_scales=None,
        together=False,
    ):
        self.accelerator, self.args, self.trackers = accelerator, args, trackers
        self.make_pipeline, self.noise_schedule = make_pipeline, noise_schedule
        self.teacher, self.networks, self.together = teacher, networks, together
        self.guidance_scales = args.validation_guidance_scale or [default_guidance_scale(args)]
        self.teacher_guidance_scales = teacher_guidance_scales or self.guidance_scales
        sizes = args.validation_resolution or [(args.resolution, args.resolution)]
        self.rows = [
            Row(prompt, size, (args.seed + i) % 2**32)
            for prompt in args.validation_prompts
            for size in sizes
            for i in range(args.num_validation_images)
        ]
        self.teacher_columns = {}  # Column: pictures

    @torch.no_grad()
    def sample(self, pipeline, row, column):
        """One PIL picture. The VAE decodes outside of autocast, in its own precision: SDXL's overflows in fp16."""
        with self.accelerator.autocast():
            latents = pipeline(
                row.prompt,
                negative_prompt=self.args.validation_negative_prompt,
                width=row.size[0],
                height=row.size[1],
                num_inference_steps=column.steps,
                guidance_scale=column.guidance_scale,
                generator=torch.Generator(self.accelerator.device).manual_seed(row.seed),
                output_type="latent",
            ).images
        vae = pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels.float())[0]

    def draw(self, network, columns, scheduler):
        """{column: its pictures from top to bottom} of one network; the pipeline may change `scheduler`."""
        with network() as unet:
            pipeline = self.make_pipeline(unet=unet, scheduler=scheduler)
            pipeline.set_progress_bar_config(disable=True)
            return {column: [self.sample(pipeline, row, column) for row in self.rows] for column in columns}

    def draw_teacher(self, step):
        """Draw the teacher's columns, which do not change, and tell the trackers; once, before training."""
        if self.accelerator.is_main_process and self.args.validation_teacher_steps:
            logger.info("Drawing the teacher's validation pictures")
            columns = [
                Column("teacher", steps, scale)
                for scale in self.teacher_guidance_scales
                for steps in self.args.validation_teacher_steps
            ]
            scheduler = lcm_schedulers.make_scheduler("ddim-trailing", self.noise_schedule)
            try:
                self.teacher_columns = self.draw(self.teacher, columns, scheduler)
            except Exception as error:  # out of memory, more steps than the schedule has
                logger.warning("No pictures of the teacher: %s", first_line(error))
            self.trackers.log_pictures(self.captioned(self.teacher_columns), step)
        self.accelerator.wait_for_everyone()

    def run(self, step):
        """Write `validation/step-NNNNNN.png`, or several pages, and tell every tracker.

        The main process draws and the others wait for it. A failure is logged: pictures are not worth a run.
        """
        if self.accelerator.is_main_process or self.together:
            counts, drawn = self.args.validation_num_inference_steps, {}
            try:
                for name, network in self.networks.items():
                    columns = [Column(name, n, s) for s in self.guidance_scales for n in counts]
                    drawn |= self.draw(network, columns, lcm_schedulers.lcm_scheduler(self.noise_schedule, self.args))
                if self.accelerator.is_main_process:
                    self.show(step, drawn)
            except Exception as error:  # out of memory, a full disk
                logger.warning("No pictures at step %d: %s", step, first_line(error))
        self.accelerator.wait_for_everyone()

    def show(self, step, drawn):
        """Write the grid of the teacher's columns and those `drawn` now, and tell the trackers."""
        columns = self.teacher_columns | drawn
        names = [column.network for column in columns]
        guidances = {column.guidance for column in columns}
        side = max(96, min(max(row.size[0] for row in self.rows), MAX_GRID_WIDTH // len(columns)))
        highest = max(side * row.size[1] / row.size[0] for row in self.rows)
        labelled = list(zip(map(self.label, self.rows), *columns.values(), strict=True))
        pages = split_evenly(labelled, max(1, min(MAX_PAGE_ROWS, int(MAX_PAGE_HEIGHT / highest))))
        folder = os.path.join(self.args.output_dir, "validation")
        os.makedirs(folder, exist_ok=True)
        grids, paths = [], []
        for number, page in enumerate(pages, 1):
            of = f"page {number} of {len(pages)}"
            corner = [f"step {step}", *(guidances if len(guidances) == 1 else ()), *([of] if len(pages) > 1 else ())]
            grid = picture_grid(
                [pictures for _, *pictures in page],
                [label for label, *_ in page],
                [column.label("\n", with_guidance=len(guidances) > 1) for column in columns],
                cell_size=side,
                group_gap=[i for i in range(1, len(names)) if names[i] != names[i - 1]],
                corner="\n".join(corner),
                footer=self.negative_prompt(),
            )
            paths.append(os.path.join(folder, f"step-{step:06d}{f'-{number}' if len(pages) > 1 else ''}.png"))
            grid.save(paths[-1])
            grids.append((grid, of if len(pages) > 1 else None))
        for path in set(pages_of(self.args.output_dir, step)) - set(paths):  # of a run with other prompts
            os.remove(path)
        logger.info("Drew %s", paths[0] if len(paths) == 1 else f"{paths[0]} to {os.path.basename(paths[-1])}")
        self.trackers.log_pictures({"validation": grids} | self.captioned(drawn), step)

    def negative_prompt(self):
        """What is said of it on the grid and in captions, empty if there is none."""
        negative_prompt = self.args.validation_negative_prompt
        return f"negative prompt: {negative_prompt}" if negative_prompt else ""

    def label(self, row):
        """What stands before a row: the prompt, and where there are several the size and the number of the noise."""
        lines = [row.prompt or "(no prompt)"]
        if len({other.size for other in self.rows}) > 1:
            lines.append(f"{row.size[0]} x {row.size[1]}")
        if self.args.num_validation_images > 1:
            lines.append(f"noise {(row.seed - self.args.seed) % 2**32 + 1}")
        return "\n".join(lines)

    def captioned(self, columns):
        """Pictures as the trackers take them, one by one: {column: [(picture, prompt), ...]}."""
        negative_prompt = [self.negative_prompt()] if self.negative_prompt() else []
        labels = [", ".join([*self.label(row).split("\n"), *negative_prompt]) for row in self.rows]
        return {
            "validation/" + column.label(", "): list(zip(pictures, labels, strict=True))
            for column, pictures in columns.items()
        }
