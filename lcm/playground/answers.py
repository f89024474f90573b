"""What the page answers when one of its fields changes."""

import asyncio
import contextlib
import functools
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from html import escape
from time import sleep
from typing import Any

import gradio as gr

from lcm.errors import UserError, first_line
from lcm.playground.cards import Card, data_address, make_card, show
from lcm.playground.drawing import Drawing
from lcm.playground.run_tab import RunFolder
from lcm.playground.shelf import TEACHER, Shelf
from lcm.playground.sweep import draw_sweep, sweep_wishes
from lcm.playground.turns import FIRST, PATIENCE, Superseded, Ticket, Turns, Visitor, Visitors
from lcm.playground.wishes import Bounds, Wish, a_number
from lcm.secrets import redact

logger = logging.getLogger(__name__)


def ends_with_nothing(answer: Callable[..., Iterator[str]]) -> Callable[..., Iterator[Any]]:
    """A generator for Gradio which stops when it is superseded, and whose last value changes nothing.

    Gradio sends the last value once more at the end, which is then possibly after the first values of a later request.
    """

    @functools.wraps(answer)
    def answers(*args: Any) -> Iterator[Any]:
        with contextlib.suppress(Superseded):
            yield from answer(*args)
        yield gr.skip()

    return answers


MOST_TIME = 1e12  # milliseconds since the page was opened


class Answers:
    """The answers of one server to all its visitors."""

    def __init__(self, args: Namespace, shelf: Shelf):
        self.args, self.shelf = args, shelf
        self.turns, self.visitors = Turns(), Visitors()
        self.drawing = Drawing(shelf, self.turns, args.teacher_num_inference_steps)
        self.bounds = Bounds(list(shelf.networks), args.max_size)
        self.run = RunFolder(args.output_dir) if args.output_dir else None

    def load(self, label: str, ticket: Ticket) -> Iterator[str]:
        """Load what a network needs, and say before each part what is loaded."""
        for part in self.shelf.missing(label):
            yield f"Loading {'the teacher' if part == TEACHER else part} ..."
            with self.turns.turn(ticket, FIRST):
                if part in self.shelf.missing(label):  # another visitor may have been first
                    self.shelf.load(part)
            ticket.check()

    @ends_with_nothing
    def draw(self, request: gr.Request, time: Any, *values: Any) -> Iterator[str]:
        """The cards, again after each picture. The teacher, which is slow, comes last. `time` is the browser's."""
        visitor = self.visitors.of(request.session_hash or "")
        try:
            ticket = visitor.begin("cards", a_number("time", time, 0, MOST_TIME))
        except UserError as error:
            yield show(visitor, tuple(visitor.cards), str(error))
            return
        with visitor.answering():
            page, is_alone = "", True
            for page in self.draw_cards(visitor, ticket, values):
                is_alone = visitor.num_answers == 1
                yield page
            if not is_alone:  # Gradio may have sent what an earlier request answered after this
                while visitor.num_answers > 1:
                    ticket.check()
                    sleep(PATIENCE)
                ticket.check()
                yield page

    def draw_cards(self, visitor: Visitor, ticket: Ticket, values: Sequence[Any]) -> Iterator[str]:
        """The cards for the values of the page's fields. Raises Superseded."""
        try:
            wish = self.bounds.read(values)
        except UserError as error:
            for card in visitor.cards.values():  # an earlier request, which this one has ended, may have drawn on
                card.status = "stopped" if card.status else ""
            yield show(visitor, tuple(visitor.cards), str(error))
            return
        if wish.is_empty:
            visitor.cards.clear()
            yield show(visitor, wish.networks, "Type what to draw.")
            return
        for card in visitor.cards.values():
            card.is_stale = True
        for label in wish.networks:
            yield from self.draw_card(visitor, ticket, wish, label)

    def draw_card(self, visitor: Visitor, ticket: Ticket, wish: Wish, label: str) -> Iterator[str]:
        """Draw one network's picture. What goes wrong is shown on its card. Raises Superseded."""
        card = visitor.cards.setdefault(label, Card())
        try:
            for status in self.load(label, ticket):
                card.status = status
                yield show(visitor, wish.networks)
            if label == TEACHER:
                card.status = f"drawing {self.args.teacher_num_inference_steps} steps ..."
                yield show(visitor, wish.networks)
            drawn = self.drawing.draw(label, wish, ticket, FIRST)
            ticket.check()
            visitor.cards[label] = make_card(drawn, wish.prompt)
        except Superseded:
            raise
        except UserError as error:
            visitor.cards[label] = Card(status=self.for_visitors(error))
        except Exception as error:  # the libraries raise nearly anything; the page goes on
            logger.exception("No picture of %s", label)
            visitor.cards[label] = Card(status=f"no picture: {type(error).__name__}; the terminal says more")
        yield show(visitor, wish.networks)

    def for_visitors(self, error: UserError) -> str:
        """An error's message. Those about the server's own options and folders stay in the terminal."""
        message = redact(first_line(error))
        if not message.startswith("--"):
            return message
        logger.error("%s", message)
        return "cannot be loaded; the terminal says why"

    @ends_with_nothing
    def sweep(self, request: gr.Request, label: Any, steps: Any, scales: Any, *values: Any) -> Iterator[str]:
        """How far the sweep is, then the grid and its download."""
        ticket = self.visitors.of(request.session_hash or "").begin("sweep")
        try:
            if label not in self.shelf.networks or label == TEACHER:
                raise UserError("sweep's network: allowed: one of the trained ones")
            is_lora = self.shelf.networks[label].is_lora
            wish = self.bounds.read(values)
            if wish.is_empty:
                raise UserError("prompt: nothing given; allowed: what to draw in the grid")
            wishes = sweep_wishes(wish, label, is_lora, steps, scales)
            for status in self.load(label, ticket):
                yield f'<p class="message" role="status">{escape(status)}</p>'
            for count, grid in draw_sweep(self.drawing, label, wishes, ticket):
                if grid is None:
                    total = sum(map(len, wishes))
                    yield f'<p class="message" role="status">Picture {count} of {total}</p>'
                else:
                    address = data_address(grid, lossless=True)
                    yield (
                        f'<div class="sweep"><a download="sweep.png" href="{address}">Download the grid</a><br>'
                        f'<img alt="Grid of steps and guidance of {escape(label)}" src="{address}"></div>'
                    )
        except UserError as error:
            yield f'<p class="message" role="alert">{escape(self.for_visitors(error))}</p>'

    def refresh(self, seen: tuple[str, int], position: float | None) -> list[Any]:
        """What is new in the run's folder: what was seen of it, facts, curves, slider, pictures.

        `seen` is (signature, number of validation pictures). The slider stays where it is, or at the newest.
        """
        assert self.run is not None
        signature, steps = self.run.signature(), self.run.steps()
        if signature == seen[0]:
            return [gr.skip()] * 5
        was_newest = position is None or position >= seen[1]
        index = len(steps) if was_newest else min(int(position or 1), len(steps))
        slider = gr.Slider(maximum=max(2, len(steps)), value=index or 1, visible=len(steps) > 1)
        pictures = self.run.validation_html(steps[index - 1]) if steps else ""
        return [(signature, len(steps)), self.run.facts_html(), self.run.curves_html(), slider, pictures]

    def turn_to(self, position: Any) -> str:
        """The validation pictures at a position of the slider, from 1 on."""
        assert self.run is not None
        steps = self.run.steps()
        if not steps or not isinstance(position, (int, float)):
            return ""
        return self.run.validation_html(steps[min(max(int(position), 1), len(steps)) - 1])

    async def stay(self, request: gr.Request) -> None:
        """A request that has no answer for as long as the page is open.

        Gradio closes a page's connection after the last answer. If the page asks for more at this very moment, it
        waits at the closed one for ever. With this request there is no last answer.
        """
        session = request.session_hash or ""
        visitor = self.visitors.of(session)
        while self.visitors.found.get(session) is visitor:
            await asyncio.sleep(1)

    def leave(self, request: gr.Request) -> None:
        """Stop drawing for a visitor who has closed the page."""
        self.visitors.leave(request.session_hash or "")
