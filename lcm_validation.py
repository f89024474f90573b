"""Pictures while training: the networks in memory, sampled as a user will sample them.

The training run is not disturbed: the noise comes from a generator of its own, the same every time so that pictures
can be compared over a run, and train or eval mode is put back.
"""

import contextlib
import logging
import os
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lcm_options import default_guidance_scale, first_line

logger = logging.getLogger(__name__)


def wrap(text, width):
    """`text` as lines of at most `width` characters; its own line breaks are kept."""
    return [line for paragraph in text.split("\n") for line in textwrap.wrap(paragraph, width)]


def picture_grid(rows, row_labels, column_labels, cell_size=None, group_gap=()):
    """A labelled grid as one picture: `rows` is a list of lists of PIL pictures of one size.

    `cell_size` enlarges or shrinks every picture to that many pixels a side (nearest, if it enlarges). Before each
    column whose index is in `group_gap` some space is left.
    """
    side = cell_size or rows[0][0].width
    font = ImageFont.load_default(size=max(11, min(18, side // 7)))
    line = int(font.size * 1.3)
    label_width = min(320, max(140, side))
    row_texts = [wrap(text, max(8, int(label_width / (font.size * 0.55)))) for text in row_labels]
    column_texts = [wrap(text, max(5, int(side / (font.size * 0.52)))) for text in column_labels]
    gap, pad = max(4, side // 24), 12
    top = pad + line * max(len(text) for text in column_texts) + 4
    lefts = [pad + label_width + i * (side + gap) + 3 * gap * sum(g <= i for g in group_gap)
             for i in range(len(column_labels))]  # fmt: skip
    row_height = max(side, line * max(len(text) for text in row_texts)) + gap
    grid = Image.new("RGB", (lefts[-1] + side + pad, top + row_height * len(rows) + pad - gap), "white")
    draw = ImageDraw.Draw(grid)
    for left, text in zip(lefts, column_texts, strict=True):
        draw.multiline_text((left + side / 2, top - 4), "\n".join(text), "black", font, anchor="md", align="center")
    for i, (pictures, text) in enumerate(zip(rows, row_texts, strict=True)):
        y = top + i * row_height
        draw.multiline_text((pad, y + side / 2), "\n".join(text), "black", font, anchor="lm")
        for left, picture in zip(lefts, pictures, strict=True):
            resampling = Image.Resampling.NEAREST if side > picture.width else Image.Resampling.LANCZOS
            grid.paste(picture.convert("RGB").resize((side, side), resampling), (left, y))
    return grid


@contextlib.contextmanager
def eval_mode(network):
    """Yield a network in eval mode; its mode is put back afterwards."""
    was_training = network.training
    try:
        yield network.eval()
    finally:
        network.train(was_training)


class Validation:
    """Draws the validation prompts and gives the pictures to the trackers and to `output_dir/validation`.

    `make_pipeline(unet=unet)` returns a pipeline around that network with everything else in place. `networks` maps
    labels to callables that return a context manager, as `eval_mode` with a network filled in: it yields an unwrapped
    U-Net that is ready to sample, and puts everything back. `together`: all processes have to call them, since each
    holds a part of their weights.
    """

    def __init__(self, accelerator, args, make_pipeline, networks, together=False):
        self.accelerator, self.args, self.make_pipeline, self.networks = accelerator, args, make_pipeline, networks
        self.together = together
        scale = args.validation_guidance_scale
        self.guidance_scale = default_guidance_scale(args) if scale is None else scale

    def sample(self, pipeline, prompt, steps):
        """One PIL picture. The VAE decodes outside of autocast, in its own precision: SDXL's overflows in fp16."""
        args = self.args
        with self.accelerator.autocast():
            latents = pipeline(
                prompt,
                height=args.resolution,
                width=args.resolution,
                num_inference_steps=steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator(self.accelerator.device).manual_seed(args.seed),
                output_type="latent",
            ).images
        vae = pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels.float())[0]

    @torch.no_grad()
    def draw(self):
        """One picture of every prompt for every network and step count: (rows of PIL pictures, column labels)."""
        args = self.args
        columns = [(name, steps) for name in self.networks for steps in args.validation_num_inference_steps]
        rows = [[] for _ in args.validation_prompts]
        for name, steps in columns:
            with self.networks[name]() as unet:
                pipeline = self.make_pipeline(unet=unet)
                pipeline.set_progress_bar_config(disable=True)
                for row, prompt in zip(rows, args.validation_prompts, strict=True):
                    row.append(self.sample(pipeline, prompt, steps))
        return rows, [f"{name}\n{steps} step{'s' * (steps > 1)}" for name, steps in columns]

    def run(self, step):
        """Write `validation/step-NNNNNN.png` and tell every tracker.

        The main process draws and the others wait for it. A failure is logged: pictures are not worth a run.
        """
        if self.accelerator.is_main_process or self.together:
            try:
                pictures = self.draw()
                if self.accelerator.is_main_process:
                    self.show(step, *pictures)
            except Exception as error:  # out of memory, a full disk, a tracker without network
                logger.warning("No pictures at step %d: %s", step, first_line(error))
        self.accelerator.wait_for_everyone()

    def show(self, step, rows, columns):
        args = self.args
        grid = picture_grid(rows, args.validation_prompts, columns, cell_size=max(96, args.resolution))
        folder = os.path.join(args.output_dir, "validation")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"step-{step:06d}.png")
        grid.save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"validation": [grid]}, step=step)
            elif tracker.name == "comet_ml":
                tracker.tracker.log_image(grid, name="validation", step=step)
            else:
                logger.warning("The tracker %s is given no pictures; they are in %s", tracker.name, folder)
        logger.info("Drew %s (guidance scale %g)", path, self.guidance_scale)
