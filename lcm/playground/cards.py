"""The pictures of a visitor as HTML. Pictures stand in the page itself, so that no file is written."""

import base64
import io
from dataclasses import dataclass
from html import escape

from PIL import Image

from lcm.options.checks import steps_in_words
from lcm.playground.drawing import Drawn
from lcm.playground.turns import Visitor

SMALL = 256  # pixels: up to this width pictures are sent as they are, and enlarged without smoothing


@dataclass
class Card:
    """What the page shows of one network: its last picture, and whether that is of an earlier request."""

    picture: str = ""  # a `data:` address
    is_small: bool = False
    prompt: str = ""
    figures: str = ""
    words: tuple[str, ...] = ()
    status: str = ""  # what happens now, instead of the figures
    is_stale: bool = False


def data_address(picture: Image.Image, lossless: bool = False) -> str:
    """A picture as a `data:` address: PNG if it is small or asked for, else JPEG."""
    buffer, small = io.BytesIO(), lossless or picture.width <= SMALL
    picture.save(buffer, "PNG" if small else "JPEG", **({"compress_level": 1} if small else {"quality": 92}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def in_seconds(seconds: float) -> str:
    """0.045 s, 1.2 s, 12 s."""
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def ago(seconds: float) -> str:
    """just now, 12 s ago, 12 minutes ago, 12 hours ago, 12 days ago."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{in_seconds(seconds)} ago" if seconds >= 1 else "just now"


def make_card(drawn: Drawn, prompt: str) -> Card:
    """The card of a picture that has just been drawn."""
    figures = f"{in_seconds(drawn.seconds)}, {drawn.steps_per_second:.3g} steps/s, {steps_in_words(drawn.steps)}"
    return Card(data_address(drawn.picture), drawn.picture.width <= SMALL, prompt, figures, drawn.words)


def show(visitor: Visitor, networks: tuple[str, ...], message: str = "") -> str:
    """The cards of a visitor's networks, in their order, below a message."""
    above = f'<p class="message" role="status">{escape(message)}</p>' if message else ""
    cards = "".join(card_html(name, visitor.cards.get(name, Card())) for name in networks)
    return f'{above}<div class="cards">{cards}</div>'


def card_html(name: str, card: Card) -> str:
    """One card."""
    classes = f"card{' stale' * card.is_stale}"
    alt, small = escape(f"{name}: {card.prompt}"), ' class="small"' * card.is_small
    picture = f'<img alt="{alt}" decoding="sync" src="{card.picture}"{small}>' if card.picture else ""
    pieces = (f"<span>{escape(piece)}</span>" for piece in (card.status or card.figures).split(", "))
    words = "".join(f'<p class="word">{escape(word)}</p>' for word in card.words)
    return (
        f'<figure class="{classes}" data-network="{escape(name)}"><div class="frame">{picture}</div>'
        f'<figcaption><b>{escape(name)}</b><p class="figures">{", ".join(pieces)}</p>{words}'
        "</figcaption></figure>"
    )
