"""The latest request wins, drawings take turns between steps, and nobody waits for what is no longer wanted."""

import threading

import pytest

from lcm.playground import turns
from lcm.playground.turns import FIRST, LAST, Superseded, Turns, Visitor, Visitors

pytestmark = pytest.mark.usefixtures("watchdog")


def started(call):
    """A thread that runs `call`, and a list that gets its result or its error."""
    results = []

    def run():
        try:
            results.append(call())
        except Superseded as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def until(condition):
    """Wait, at most as long as the watchdog does."""
    while not condition():
        threading.Event().wait(0.001)


def test_latest_request_of_each_kind_wins():
    visitor, other = Visitor(), Visitor()
    first, sweep, second = visitor.begin("cards"), visitor.begin("sweep"), visitor.begin("cards")
    theirs = other.begin("cards")
    with pytest.raises(Superseded):
        first.check()
    for ticket in (sweep, second, theirs):
        ticket.check()


def test_requests_that_arrive_in_another_order():
    """The latest by the browser's clock wins."""
    visitor = Visitor()
    latest, other = visitor.begin("cards", 20.5), visitor.begin("sweep", 3.0)
    with pytest.raises(Superseded):
        visitor.begin("cards", 20.4)
    assert latest.is_current and other.is_current
    assert visitor.begin("cards", 20.5).is_current and not latest.is_current


def test_a_visitor_who_leaves_is_forgotten():
    visitors = Visitors()
    ticket = visitors.of("a").begin("cards")
    visitors.leave("a")
    visitors.leave("a")
    assert not ticket.is_current and visitors.of("a") is not ticket.visitor


def test_the_number_of_visitors_is_bounded(monkeypatch):
    monkeypatch.setattr(turns, "MOST_VISITORS", 3)
    visitors = Visitors()
    tickets = {name: visitors.of(name).begin("cards") for name in "abc"}
    visitors.of("a")  # has been here more recently than b
    visitors.of("d")
    assert list(visitors.found) == ["c", "a", "d"]
    assert [name for name, ticket in tickets.items() if ticket.is_current] == ["a", "c"]


def test_turns_go_by_priority_then_by_order():
    table, order, threads = Turns(), [], []
    with table.turn(Visitor().begin("x"), FIRST):
        for name, priority in (("teacher", LAST), ("one", FIRST), ("two", FIRST)):

            def take(name=name, priority=priority):
                with table.turn(Visitor().begin("x"), priority):
                    order.append(name)

            threads.append(started(take)[0])
            until(lambda: len(table.waiting) == len(threads))
    for thread in threads:
        thread.join()
    assert order == ["one", "two", "teacher"]


def test_a_step_gives_way_to_others_but_not_to_those_behind():
    table, order = Turns(), []

    def take(priority):
        with table.turn(Visitor().begin("x"), priority):
            order.append(priority)

    with table.turn(Visitor().begin("x"), FIRST) as turn:
        assert not turn.give_way()  # nobody waits
        slow, _ = started(lambda: take(LAST))
        until(lambda: table.waiting)
        assert not turn.give_way() and not order
        quick, _ = started(lambda: take(FIRST))
        until(lambda: len(table.waiting) == 2)
        assert turn.give_way() and order == [FIRST]
        assert turn.waited > 0
    slow.join()
    quick.join()
    assert order == [FIRST, LAST]


def test_one_who_waits_stops_when_superseded():
    table, visitor = Turns(), Visitor()
    with table.turn(Visitor().begin("x"), FIRST):

        def take():
            with table.turn(visitor.begin("cards"), FIRST):
                return "drew"

        thread, results = started(take)
        until(lambda: table.waiting)
        visitor.begin("cards")
        thread.join()
        assert isinstance(results[0], Superseded) and not table.waiting
    assert not table.is_taken


def test_one_who_stops_while_others_go_first_takes_no_turn_away():
    """It has given its turn to another, and must not end that one's."""
    table, visitor, may_end = Turns(), Visitor(), threading.Event()

    def other():
        with table.turn(Visitor().begin("x"), FIRST):
            visitor.begin("cards")
            may_end.wait()

    with pytest.raises(Superseded), table.turn(visitor.begin("cards"), FIRST) as turn:
        thread, _ = started(other)
        until(lambda: table.waiting)
        turn.give_way()
    assert table.is_taken  # by the other one
    may_end.set()
    thread.join()
    assert not table.is_taken and not table.waiting
