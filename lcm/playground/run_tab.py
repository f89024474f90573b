"""What the folder of a training run shows, finished or not: curves, validation pictures, samples used and skipped."""

import base64
import io
import os
import re
import time
from html import escape
from itertools import accumulate

from PIL import Image

from lcm.data.loader import stored_tally
from lcm.data.tally import Tally
from lcm.errors import UserError
from lcm.pictures.validation import pages_of
from lcm.playground.cards import ago, data_address
from lcm.results.curves import draw_curves
from lcm.results.metrics import MetricsFile
from lcm.run.resume import list_checkpoints, read_state

COPYING = 60  # seconds in which a folder is copied, by which pictures get ages in any order
WIDEST = 1600  # pixels, of a grid of validation pictures on the page


def modified(path: str) -> float:
    """The time at which a file or folder changed, 0 if it does not exist."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


class RunFolder:
    """The `--output_dir` of a run, read again whenever it has changed."""

    def __init__(self, path: str):
        self.path = path
        self.metrics = MetricsFile(path)
        self.curves_of: tuple[float, str] = (0.0, "")  # when the metrics had changed, and their picture
        self.pictures: dict[tuple[str, float], str] = {}

    def signature(self) -> str:
        """A text that changes when there is something new to show."""
        steps = self.steps()
        pages = [modified(path) for path in pages_of(self.path, steps[-1])] if steps else []
        checkpoints = list_checkpoints(self.path)
        return repr((modified(self.metrics.path), self.is_finished(), steps, pages, checkpoints[-1:]))

    def steps(self) -> list[int]:
        """The optimizer steps at which there are validation pictures, in order.

        Pictures that are older than those of an earlier step do not count: a longer run in the same folder left them.
        """
        folder = os.path.join(self.path, "validation")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found = (re.fullmatch(r"step-(\d+)(?:-\d+)?\.png", name) for name in names)
        drawn = {int(match[1]): modified(os.path.join(folder, match[0])) for match in found if match}
        steps = sorted(drawn)
        newest_so_far = accumulate((drawn[step] for step in steps), max)
        return [step for step, newest in zip(steps, newest_so_far, strict=True) if drawn[step] + COPYING > newest]

    def curves(self) -> str:
        """The curves as a `data:` address, empty without metrics."""
        changed = modified(self.metrics.path)
        if changed != self.curves_of[0]:
            rows, buffer = self.metrics.read(), io.BytesIO()
            if rows:
                draw_curves(rows, buffer)
            encoded = base64.b64encode(buffer.getvalue()).decode()
            self.curves_of = changed, f"data:image/png;base64,{encoded}" if rows else ""
        return self.curves_of[1]

    def validation(self, step: int) -> list[str]:
        """The pages of validation pictures at a step, as `data:` addresses."""
        pages = []
        for path in pages_of(self.path, step):
            key = path, modified(path)
            if key not in self.pictures:
                try:
                    picture = Image.open(path).convert("RGB")
                except OSError:  # it is being written; the next look finds it
                    continue
                picture.thumbnail((WIDEST, WIDEST * 8))
                self.pictures = dict(list(self.pictures.items())[-20:]) | {key: data_address(picture)}
            pages.append(self.pictures[key])
        return pages

    def is_finished(self) -> bool:
        """Whether the model card, which is written at the end, is newer than the metrics."""
        return 0 < modified(self.metrics.path) <= modified(os.path.join(self.path, "README.md"))

    def facts(self) -> dict[str, str]:
        """What is known of the run, in words, by heading."""
        rows, checkpoints = self.metrics.read(), list_checkpoints(self.path)
        if not rows and not checkpoints:
            return {}
        facts = {"run": os.path.basename(os.path.abspath(self.path))}
        if rows:
            when = ago(time.time() - modified(self.metrics.path))
            facts["finished" if self.is_finished() else "last metrics"] = f"step {rows[-1]['step']}, {when}"
            facts["loss"] = f"{rows[-1]['loss']:.4g}"
            facts["speed"] = f"{rows[-1]['images_per_second']:.3g} pictures/s"
        if checkpoints:
            try:
                state = read_state(checkpoints[-1])
                tally = sum(map(stored_tally, state["data"]), Tally())
            except (UserError, KeyError, TypeError):
                return facts | {"checkpoint": f"{os.path.basename(checkpoints[-1])} cannot be read"}
            facts["checkpoint"] = f"step {state['step']} of {state['options'].get('max_train_steps')}"
            facts["samples used"] = f"{tally.used:,}"
            facts["samples skipped"] = f"{sum(tally.skipped.values()):,}"
            facts |= {f"skipped: {reason}": f"{count:,}" for reason, count in tally.skipped.most_common()}
        return facts

    def facts_html(self) -> str:
        """`facts` as a list, or what is missing."""
        facts = self.facts()
        if not facts:
            return '<p class="message">There are no metrics yet. They are written every --logging_steps.</p>'
        if "samples used" not in facts and "checkpoint" not in facts:
            facts["samples"] = "not counted without a checkpoint"
        items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
        return f'<dl class="facts">{items}</dl>'

    def curves_html(self) -> str:
        """The curves as HTML, empty without metrics."""
        address = self.curves()
        alt = "Loss, loss by timestep and gradient norm"
        return f'<img class="curves" alt="{alt}" src="{address}">' if address else ""

    def validation_html(self, step: int) -> str:
        """The pictures at a step as HTML."""
        pages = self.validation(step)
        images = "".join(f'<img class="grid" alt="Validation pictures" src="{address}">' for address in pages)
        return f'<p class="caption">Validation pictures at step {step}</p>{images}'
