"""The worker of the demo: turns, stopping, and visitors who are gone."""

import threading
import time
from collections.abc import Iterator

import pytest

from steer.apps.demo import studio as worker_module
from steer.apps.demo.studio import MAX_EVENTS, Busy, Ticket, Waiting, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(most_waiting=2)
    yield made
    made.close()


def until(true: object, seconds: float = 10.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def count(ticket: Ticket) -> None:
    for number in range(3):
        ticket.say(number)


def forever(ticket: Ticket) -> None:
    while True:
        ticket.check()
        time.sleep(0.01)


def test_events_come_in_order_and_end(worker: Worker) -> None:
    assert [event for event in worker.submit(count).events() if event != Waiting(0)] == [0, 1, 2]
    until(lambda: worker.pending == 0)


def test_one_job_at_a_time_in_the_order_they_came(worker: Worker) -> None:
    running, most, order = [0], [0], []

    def work(ticket: Ticket, name: str) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        order.append(name)
        running[0] -= 1

    tickets = [worker.submit(lambda ticket, name=name: work(ticket, name)) for name in "abc"]
    for ticket in tickets:
        list(ticket.events())
    assert most == [1] and order == ["a", "b", "c"]


def test_who_waits_sees_how_many_come_first_and_too_many_are_refused(worker: Worker) -> None:
    first = worker.submit(forever)
    second, third = worker.submit(count), worker.submit(count)
    waiting = third.events()
    assert next(waiting) == Waiting(2)
    with pytest.raises(Busy, match="2 others are waiting for their turn: please try again"):
        worker.submit(count)
    first.stop()
    assert [event for event in waiting if not isinstance(event, Waiting)] == [0, 1, 2]
    assert list(second.events()) == [0, 1, 2]
    list(worker.submit(count).events())  # there is room again


def test_stop_ends_a_job_at_its_next_step_and_one_that_waits_never_begins(worker: Worker) -> None:
    begun: list[int] = []
    first, second = worker.submit(forever), worker.submit(lambda ticket: begun.append(1))
    second.stop()
    first.stop()
    assert [*first.events()] == [] and [*second.events()] == []
    until(lambda: worker.pending == 0)
    assert not begun and first.stopped


def test_an_exception_of_a_job_reaches_its_visitor_and_the_worker_survives(worker: Worker) -> None:
    def fails(ticket: Ticket) -> None:
        ticket.say("so far")
        raise ValueError("broken")

    events = worker.submit(fails).events()
    received = []
    with pytest.raises(ValueError, match="broken"):
        for event in events:
            received.append(event)
    assert "so far" in received
    assert 2 in worker.submit(count).events()


def test_a_visitor_who_leaves_frees_the_worker(worker: Worker) -> None:
    ticket = worker.submit(forever)
    events = ticket.events()
    until(ticket.future.running)
    closed = threading.Thread(target=lambda: (time.sleep(0.05), ticket.stop()))
    closed.start()
    assert list(events) in ([], [Waiting(0)])
    until(lambda: worker.pending == 0)


def test_a_generator_that_is_closed_stops_its_job(worker: Worker) -> None:
    def chatter(ticket: Ticket) -> None:
        while True:
            ticket.say("more")
            time.sleep(0.01)

    events = worker.submit(chatter).events()
    while next(events) != "more":
        pass
    events.close()  # type: ignore[attr-defined]
    until(lambda: worker.pending == 0)


def test_a_thousand_events_that_nobody_takes_are_held_back_and_then_given_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "EVENT_TIMEOUT", 0.4)
    received: list[int] = []

    def floods(ticket: Ticket) -> None:
        for number in range(1000):
            ticket.say(number)
            received.append(number)

    ticket = worker.submit(floods)
    until(lambda: worker.pending == 0)
    assert received == list(range(MAX_EVENTS)) and ticket.stopped
