"""Whose turn it is: of each visitor the latest request wins, and all drawings take turns at every sampling step."""

import bisect
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOST_VISITORS = 64  # whose pictures are remembered; the one who was away for longest is forgotten first
PATIENCE = 0.05  # seconds between two looks of one who waits, whether the request is still wanted
FIRST, LATER, LAST = 0, 1, 2  # priorities: a picture while typing, one of a sweep, one of the teacher's many steps


class Superseded(Exception):
    """A later request of the same visitor has taken the place of this one, or the visitor has left."""


class Visitor:
    """One open page: its latest request of each kind, and the cards that it shows, by network."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.latest: dict[str, int] = {}
        self.times: dict[str, float] = {}  # of the latest requests, by the browser's clock
        self.cards: dict[str, Any] = {}
        self.num_answers = 0  # requests for cards that have not ended, superseded ones too

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request for cards among those that have not ended."""
        with self.lock:
            self.num_answers += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_answers -= 1

    def begin(self, kind: str, time: float | None = None) -> "Ticket":
        """The ticket of a new request, which supersedes the visitor's earlier one of the same kind.

        `time` is when the browser made it: requests may arrive in another order. Raises Superseded if a later one is
        there already.
        """
        with self.lock:
            if time is not None:
                if time < self.times.get(kind, time):
                    raise Superseded
                self.times[kind] = time
            self.latest[kind] = number = next(self.numbers)
        return Ticket(self, kind, number)


class Ticket:
    """One request of a visitor."""

    def __init__(self, visitor: Visitor, kind: str, number: int):
        self.visitor, self.kind, self.number = visitor, kind, number

    @property
    def is_current(self) -> bool:
        return self.visitor.latest.get(self.kind) == self.number

    def check(self) -> None:
        """Raise Superseded unless this is the visitor's latest request of its kind."""
        if not self.is_current:
            raise Superseded


class Visitors:
    """The open pages, by Gradio's session."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: OrderedDict[str, Visitor] = OrderedDict()

    def of(self, session: str) -> Visitor:
        """The visitor of a session; a new one if it is not known."""
        with self.lock:
            visitor = self.found.setdefault(session, Visitor())
            self.found.move_to_end(session)
            forgotten = [self.found.popitem(last=False)[1] for _ in range(len(self.found) - MOST_VISITORS)]
        for other in forgotten:
            other.latest.clear()
        return visitor

    def leave(self, session: str) -> None:
        """Forget a visitor, whose drawings then stop."""
        with self.lock:
            visitor = self.found.pop(session, None)
        if visitor:
            visitor.latest.clear()


class Turns:
    """One drawing computes at a time. Those that wait are served by priority, then in the order in which they came."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting: list[tuple[int, int]] = []
        self.numbers = itertools.count()
        self.is_taken = False

    @contextmanager
    def turn(self, ticket: Ticket, priority: int) -> Iterator["Turn"]:
        """A turn, for as long as the block runs. Raises Superseded if that comes first."""
        turn = Turn(self, ticket, priority)
        turn.begin()
        try:
            yield turn
        finally:
            turn.end()


class Turn:
    """One drawing's place among the others; `waited` is the time in seconds that it spent waiting for them."""

    def __init__(self, turns: Turns, ticket: Ticket, priority: int):
        self.turns, self.ticket, self.priority = turns, ticket, priority
        self.is_mine, self.waited = False, 0.0

    def begin(self) -> None:
        """Wait until it is this drawing's turn. Raises Superseded, at the latest after PATIENCE."""
        turns, start = self.turns, time.perf_counter()
        with turns.condition:
            me = (self.priority, next(turns.numbers))
            bisect.insort(turns.waiting, me)
            try:
                while turns.is_taken or turns.waiting[0] != me:
                    self.ticket.check()
                    turns.condition.wait(PATIENCE)
                self.ticket.check()
                turns.is_taken = self.is_mine = True
            finally:
                turns.waiting.remove(me)
                turns.condition.notify_all()
        self.waited += time.perf_counter() - start

    def end(self) -> None:
        """Let the next one begin, if this is not done yet."""
        with self.turns.condition:
            if self.is_mine:
                self.turns.is_taken = self.is_mine = False
                self.turns.condition.notify_all()

    def give_way(self) -> bool:
        """Between two steps: let others go first who are not behind this one. Returns whether any did.

        Raises Superseded.
        """
        self.ticket.check()
        with self.turns.condition:
            if not self.turns.waiting or self.turns.waiting[0][0] > self.priority:
                return False
        self.end()
        self.begin()
        return True
