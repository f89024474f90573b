"""Pictures while training: the student and the EMA, sampled as users will sample them, beside the teacher.

Training is not disturbed: the noise has a generator of its own, and the networks' mode is restored. The noise is the
same each time and in all columns, so that pictures can be compared.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from lcm.errors import first_line
from lcm.models.family import Family
from lcm.models.networks import Networks, View
from lcm.options.checks import default_guidance_scale, steps_in_words
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.pictures.grid import MAX_GRID_WIDTH, MAX_PAGE_HEIGHT, MAX_PAGE_ROWS, picture_grid, split_evenly
from lcm.pictures.samplers import student_scheduler, teacher_scheduler

logger = logging.getLogger(__name__)

Pictures = dict[str, list[tuple[Image.Image, str | None]]]  # {name: [(picture, caption), ...]}


def pages_of(output_dir: str, step: int) -> list[str]:
    """The files that `Validation.run` wrote at a step: step-000200.png, or step-000200-1.png, -2, ..., in order."""
    folder = os.path.join(output_dir, "validation")
    found: dict[int, str] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.fullmatch(rf"step-{step:06d}(?:-(\d+))?\.png", name)
        if match:
            found[int(match[1] or 0)] = os.path.join(folder, name)
    return [path for _, path in sorted(found.items())]


@dataclass(frozen=True)
class Row:
    """A row of the grid of pictures."""

    prompt: str
    size: tuple[int, int]  # width, height in pixels
    seed: int


@dataclass(frozen=True)
class Column:
    """A column of the grid of pictures."""

    network: str
    steps: int
    guidance_scale: float

    @property
    def guidance(self) -> str:
        """The words for its guidance scale."""
        return f"guidance {self.guidance_scale:g}"

    def label(self, separator: str, with_guidance: bool = True) -> str:
        """The words for all that it is."""
        return separator.join([self.network, steps_in_words(self.steps), *[self.guidance] * with_guidance])


class Validation:
    """Draws the validation prompts and gives the pictures to the trackers and to `output_dir/validation`.

    `family` makes the pipelines, `networks` has the U-Nets to sample from, and `log_pictures(pictures, step)` gives
    pictures to the trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: Options,
        plan: Plan,
        family: Family,
        networks: Networks,
        log_pictures: Callable[[Pictures, int], None],
    ):
        self.accelerator, self.args, self.log_pictures = accelerator, args, log_pictures
        self.family, self.networks, self.seed = family, networks, plan.seed
        self.guidance_scales = args.validation_guidance_scale or [default_guidance_scale(args)]
        # A LoRA has learned the guidance of the default scale, and is itself sampled without guidance.
        same_scale = networks.takes_guidance or args.w_max == 0
        self.teacher_guidance_scales = self.guidance_scales if same_scale else [default_guidance_scale(args)]
        sizes = args.validation_resolution or [(args.resolution, args.resolution)]
        self.rows = [
            Row(prompt, size, (plan.seed + i) % 2**32)
            for prompt in args.validation_prompts
            for size in sizes
            for i in range(args.num_validation_images)
        ]
        self.teacher_columns: dict[Column, list[Image.Image]] = {}

    @torch.no_grad()
    def sample(self, pipeline: DiffusionPipeline, row: Row, column: Column) -> torch.Tensor:
        """The latents of one picture."""
        with self.accelerator.autocast():
            return pipeline(
                row.prompt,
                negative_prompt=self.args.validation_negative_prompt,
                width=row.size[0],
                height=row.size[1],
                num_inference_steps=column.steps,
                guidance_scale=column.guidance_scale,
                generator=torch.Generator(self.accelerator.device).manual_seed(row.seed),
                output_type="latent",
            ).images

    @torch.no_grad()
    def decode(self, pipeline: DiffusionPipeline, latents: torch.Tensor) -> Image.Image:
        """One picture. Not within autocast, but in the VAE's own precision: SDXL's VAE overflows in fp16."""
        vae = pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels.float())[0]

    def draw(self, view: View, columns: list[Column], scheduler: SchedulerMixin) -> dict[Column, list[Image.Image]]:
        """{column: its pictures from top to bottom} of one U-Net; may change `scheduler`."""
        with view() as unet, self.family.vae_on_device, self.family.encoders_on_device:
            pipeline = self.family.pipeline(unet, scheduler)
            pipeline.set_progress_bar_config(disable=True)
            latents = {column: [self.sample(pipeline, row, column) for row in self.rows] for column in columns}
        # Decoding takes the most memory. Other networks that are offloaded have left the device.
        with self.family.vae_on_device:
            return {column: [self.decode(pipeline, z) for z in zs] for column, zs in latents.items()}

    def draw_teacher(self, step: int) -> None:
        """Draw the teacher's columns once, before training, since they do not change."""
        if self.accelerator.is_main_process and self.args.validation_teacher_steps:
            logger.info("Drawing the teacher's validation pictures")
            columns = [
                Column("teacher", steps, scale)
                for scale in self.teacher_guidance_scales
                for steps in self.args.validation_teacher_steps
            ]
            scheduler = teacher_scheduler(self.family.noise_schedule)
            try:
                with self.family.loaded():
                    self.teacher_columns = self.draw(self.networks.teacher_view, columns, scheduler)
            except Exception as error:  # out of memory, more steps than the schedule has
                logger.warning("No pictures of the teacher: %s", first_line(error))
            self.log_pictures(self.captioned(self.teacher_columns), step)
        self.accelerator.wait_for_everyone()

    def run(self, step: int) -> None:
        """Write `validation/step-NNNNNN.png`, or several pages, and give the pictures to the trackers.

        The main process draws, the others wait for it. A failure is logged and does not end the run.
        """
        if self.accelerator.is_main_process or self.networks.is_sharded:
            counts = self.args.validation_num_inference_steps
            drawn: dict[Column, list[Image.Image]] = {}
            try:
                with self.family.loaded():
                    for name, view in self.networks.views.items():
                        columns = [Column(name, n, s) for s in self.guidance_scales for n in counts]
                        drawn |= self.draw(view, columns, student_scheduler(self.family.noise_schedule, self.args))
                if self.accelerator.is_main_process:
                    self.show(step, drawn)
            except Exception as error:  # out of memory, a full disk
                logger.warning("No pictures at step %d: %s", step, first_line(error))
        self.accelerator.wait_for_everyone()

    def show(self, step: int, drawn: dict[Column, list[Image.Image]]) -> None:
        """Write the grid of the teacher's columns and of those `drawn` now, and give both to the trackers."""
        columns = self.teacher_columns | drawn
        names = [column.network for column in columns]
        guidances = {column.guidance for column in columns}
        side = max(96, min(max(row.size[0] for row in self.rows), MAX_GRID_WIDTH // len(columns)))
        highest = max(side * row.size[1] / row.size[0] for row in self.rows)
        labelled = list(zip(map(self.label, self.rows), *columns.values(), strict=True))
        pages = split_evenly(labelled, max(1, min(MAX_PAGE_ROWS, int(MAX_PAGE_HEIGHT / highest))))
        folder = os.path.join(self.args.output_dir, "validation")
        os.makedirs(folder, exist_ok=True)
        grids: list[tuple[Image.Image, str | None]] = []
        paths: list[str] = []
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
        for path in set(pages_of(self.args.output_dir, step)) - set(paths):  # of an earlier run with other prompts
            os.remove(path)
        logger.info("Drew %s", paths[0] if len(paths) == 1 else f"{paths[0]} to {os.path.basename(paths[-1])}")
        self.log_pictures({"validation": grids} | self.captioned(drawn), step)

    def negative_prompt(self) -> str:
        """Its text on the grid and in captions, empty without one."""
        negative_prompt = self.args.validation_negative_prompt
        return f"negative prompt: {negative_prompt}" if negative_prompt else ""

    def label(self, row: Row) -> str:
        """The label of a row: the prompt, and if there are several, the size and the number of the noise."""
        lines = [row.prompt or "(no prompt)"]
        if len({other.size for other in self.rows}) > 1:
            lines.append(f"{row.size[0]} x {row.size[1]}")
        if self.args.num_validation_images > 1:
            lines.append(f"noise {(row.seed - self.seed) % 2**32 + 1}")
        return "\n".join(lines)

    def captioned(self, columns: dict[Column, list[Image.Image]]) -> Pictures:
        """The pictures for the trackers, {name of the column: [(picture, prompt), ...]}."""
        negative_prompt = [self.negative_prompt()] if self.negative_prompt() else []
        labels = [", ".join([*self.label(row).split("\n"), *negative_prompt]) for row in self.rows]
        return {
            "validation/" + column.label(", "): list(zip(pictures, labels, strict=True))
            for column, pictures in columns.items()
        }
