"""Pictures while training: the networks in memory, sampled as a user will sample them, beside the teacher.

The training run is not disturbed: the noise comes from a generator of its own, the same every time and for all columns
so that pictures can be compared, and train or eval mode is put back.
"""

import contextlib
import logging
import os
import textwrap
from dataclasses import dataclass

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

import lcm_schedulers
from lcm_options import default_guidance_scale, first_line

logger = logging.getLogger(__name__)

MAX_GRID_WIDTH = 8192  # pixels, of all columns


# The grid.


def wrap(text, width):
    """`text` as lines of at most `width` characters; its own line breaks are kept."""
    return [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width)]


def label_font(size, texts):
    """Pillow's own font, or where that lacks a letter DejaVu Sans, which has those of Europe and more."""
    if all(text.isascii() for text in texts):
        return ImageFont.load_default(size=size)
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def picture_grid(rows, row_labels, column_labels, cell_size=None, group_gap=(), corner=""):
    """A labelled grid as one picture: `rows` is a list of lists of PIL pictures, those of one row of one size.

    `cell_size` enlarges or shrinks every picture to that many pixels in width (nearest, if it enlarges). Before each
    column whose index is in `group_gap` some space is left. `corner` is written above the row labels.
    """
    side = cell_size or rows[0][0].width
    font = label_font(max(11, min(18, side // 7)), [*row_labels, *column_labels, corner])
    line = int(font.size * 1.3)
    label_width = min(320, max(140, side))
    label_letters = max(8, int(label_width / (font.size * 0.55)))
    row_texts = ["\n".join(wrap(text, label_letters)) for text in row_labels]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_heights = [measure.multiline_textbbox((0, 0), text, font)[3] + line // 2 for text in row_texts]
    column_texts = [wrap(text, max(5, int(side / (font.size * 0.52)))) for text in column_labels]
    gap, pad = max(4, side // 24), 12
    top = pad + line * max(len(text) for text in column_texts) + 4
    lefts = [pad + label_width + i * (side + gap) + 3 * gap * sum(g <= i for g in group_gap)
             for i in range(len(column_labels))]  # fmt: skip
    cells = [(side, round(side * pictures[0].height / pictures[0].width)) for pictures in rows]
    heights = [max(cell[1], text_height) + gap for cell, text_height in zip(cells, text_heights, strict=True)]
    grid = Image.new("RGB", (lefts[-1] + side + pad, top + sum(heights) + pad - gap), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((pad, top - 4), "\n".join(wrap(corner, label_letters)), "black", font, anchor="ld")
    for left, text in zip(lefts, column_texts, strict=True):
        draw.multiline_text((left + side / 2, top - 4), "\n".join(text), "black", font, anchor="md", align="center")
    y = top
    for pictures, text, cell, height in zip(rows, row_texts, cells, heights, strict=True):
        draw.multiline_text((pad, y + (height - gap) / 2), text, "black", font, anchor="lm")
        for left, picture in zip(lefts, pictures, strict=True):
            resampling = Image.Resampling.NEAREST if side > picture.width else Image.Resampling.LANCZOS
            grid.paste(picture.convert("RGB").resize(cell, resampling), (left, y))
        y += height
    return grid


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
        """Write `validation/step-NNNNNN.png` and tell every tracker.

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
        grid = picture_grid(
            list(zip(*columns.values(), strict=True)),
            [self.label(row) for row in self.rows],
            [column.label("\n", with_guidance=len(guidances) > 1) for column in columns],
            cell_size=max(96, min(max(row.size[0] for row in self.rows), MAX_GRID_WIDTH // len(columns))),
            group_gap=[i for i in range(1, len(names)) if names[i] != names[i - 1]],
            corner="\n".join([f"step {step}", *guidances] if len(guidances) == 1 else [f"step {step}"]),
        )
        folder = os.path.join(self.args.output_dir, "validation")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"step-{step:06d}.png")
        grid.save(path)
        logger.info("Drew %s", path)
        self.trackers.log_pictures({"validation": [(grid, None)]} | self.captioned(drawn), step)

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
        labels = [self.label(row).replace("\n", ", ") for row in self.rows]
        return {
            "validation/" + column.label(", "): list(zip(pictures, labels, strict=True))
            for column, pictures in columns.items()
        }
