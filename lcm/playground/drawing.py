"""One picture of one network, step by step, which stops as soon as its visitor asks for something else."""

import copy
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import torch
from PIL import Image

from lcm.errors import UserError, first_line
from lcm.evaluation.sampling import picture_generator, starting_noise
from lcm.options.checks import span
from lcm.playground.shelf import TEACHER, Shelf
from lcm.playground.turns import LAST, Ticket, Turns
from lcm.playground.wishes import Wish

MOST_PROMPTS = 64  # whose embeddings are kept
# What `encode_prompt` returns, as the pipeline's arguments; Stable Diffusion has the first two.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Drawn:
    """A picture, and what it took. `seconds` has everything: text encoder, steps, VAE. `steps_per_second` has only the
    steps. Neither has the time in which others went first."""

    picture: Image.Image
    steps: int
    seconds: float
    steps_per_second: float
    words: tuple[str, ...] = ()  # about what was asked for and does not fit this network


class Drawing:
    """Draws with the networks of a shelf, one step at a time among all visitors."""

    def __init__(self, shelf: Shelf, turns: Turns, teacher_steps: int):
        self.shelf, self.turns, self.teacher_steps = shelf, turns, teacher_steps
        self.embeddings: OrderedDict[tuple[str, str], dict[str, torch.Tensor]] = OrderedDict()

    @cached_property
    def from_picture(self) -> Any:
        """The teacher's parts as a pipeline that starts from a picture."""
        pipeline = diffusers.AutoPipelineForImage2Image.from_pipe(self.shelf.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prompt_arguments(self, wish: Wish) -> dict[str, torch.Tensor]:
        """The embeddings of the prompts, as the pipeline's arguments. A prompt is encoded once for all networks."""
        key = wish.prompt, wish.negative_prompt
        if key not in self.embeddings:
            pipeline = self.shelf.pipeline
            found = pipeline.encode_prompt(
                prompt=wish.prompt,
                negative_prompt=wish.negative_prompt or None,
                device=pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            self.embeddings[key] = dict(zip(EMBEDDINGS, found, strict=False))
            if len(self.embeddings) > MOST_PROMPTS:
                self.embeddings.popitem(last=False)
        self.embeddings.move_to_end(key)
        return self.embeddings[key]

    def grid(self, label: str) -> int:
        """The number of points of the grid on which a loaded network was trained: the most steps that it can do."""
        return self.shelf.networks[label].scheduler.config.original_inference_steps

    def plan(self, label: str, wish: Wish) -> tuple[int, float, list[str]]:
        """(steps, guidance scale, words about what does not fit) of one network."""
        network, words = self.shelf.networks[label], []
        scale = wish.lora_guidance_scale if network.is_lora else wish.guidance_scale
        steps = self.teacher_steps
        if label != TEACHER:
            steps = min(wish.steps, self.grid(label))
            if steps < wish.steps:
                words.append(f"{steps} steps, since its grid has {steps} points")
        if network.guidance and not network.guidance[0] <= scale <= network.guidance[1]:
            low, high = network.guidance
            words.append(f"guidance {scale:g} is outside the range that fits its training, {span(low, high)}")
        if wish.negative_prompt and (self.shelf.takes_guidance(label) or scale == 1):
            words.append("the negative prompt has no effect here")
        return steps, scale, words

    def steps_from_picture(self, label: str, steps: int, strength: float) -> tuple[int, float]:
        """(steps, strength) with which a pipeline, which does that share of the steps, does at least one."""
        most = self.teacher_steps if label == TEACHER else self.grid(label)
        steps = max(steps, min(most, math.ceil(1 / strength)))
        return steps, min(1.0, max(strength, (1 + 1e-9) / steps))

    @torch.no_grad()
    def draw(self, label: str, wish: Wish, ticket: Ticket, priority: int) -> Drawn:
        """One picture of a loaded network. Raises Superseded at the next step, and UserError if memory is short."""
        steps, scale, words = self.plan(label, wish)
        with self.turns.turn(ticket, LAST if label == TEACHER else priority) as turn:
            start, waited_before = time.perf_counter(), turn.waited
            self.shelf.use(label, wish.lora_strength)
            done, last, embedded = 0, 0.0, 0.0

            def now() -> float:
                return time.perf_counter() - start - (turn.waited - waited_before)

            def between(pipeline: Any, i: int, t: Any, arguments: dict[str, Any]) -> dict[str, Any]:
                nonlocal done, last
                done, last = done + 1, now()
                if turn.give_way():
                    self.shelf.use(label, wish.lora_strength)
                return arguments

            try:
                arguments = self.prompt_arguments(wish)
                embedded = now()
                pipeline = copy.copy(self.shelf.pipeline if wish.picture is None else self.from_picture)
                pipeline.unet = self.shelf.networks[label].unet
                pipeline.scheduler = self.shelf.make_scheduler(label, wish)
                if wish.picture is None:
                    noise = starting_noise(pipeline, 1, wish.seed, wish.size)
                    latents = noise.to(pipeline.device, pipeline.unet.dtype)
                    place = {"height": wish.size, "width": wish.size, "latents": latents}
                else:
                    steps, strength = self.steps_from_picture(label, steps, wish.picture_strength)
                    place = {"image": wish.picture, "strength": strength}
                picture = pipeline(
                    **arguments,
                    **place,
                    num_inference_steps=steps,
                    guidance_scale=scale,
                    generator=picture_generator(wish.seed, 0),
                    callback_on_step_end=between,
                ).images[0]
            except torch.OutOfMemoryError as error:
                raise UserError(f"size: {wish.size} given, but {first_line(error)}") from error
            return Drawn(picture, done, now(), done / max(last - embedded, 1e-9), tuple(words))
