"""One job at a time: visitors wait for their turn, see what their job says, and can stop it.

worker = Worker()
ticket = worker.submit(work)       # work(ticket) runs in the worker's thread
for event in ticket.events(): …    # to its end; what the work raises is raised here
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from steer.errors import InputError
from steer.pipelines.stopping import Stopped, StopRequest

MOST_WAITING = 8
MOST_EVENTS = 64
PATIENCE = 20.0  # seconds that a job waits for a visitor who does not take its events
TICK = 0.2


class Busy(InputError):
    """Too many are waiting already."""


@dataclass(frozen=True)
class Waiting:
    """So many jobs come first."""

    before: int

    def __str__(self) -> str:
        first = "1 run comes" if self.before == 1 else f"{self.before} runs come"
        return f"Waiting: {first} first." if self.before else "Starting …"


class Ticket:
    """A job of one visitor: what it says, and the wish to stop it."""

    def __init__(self) -> None:
        self._request = StopRequest()
        self._events: queue.Queue[Any] = queue.Queue(MOST_EVENTS)
        self._place: Callable[[], int] = lambda: 0
        self.future: Future[None] = Future()

    def say(self, event: Any) -> None:
        """For the job: shows the visitor something. Raises Stopped where they left, or want no more."""
        for _ in range(round(PATIENCE / TICK)):
            self._request.check()
            try:
                return self._events.put(event, timeout=TICK)
            except queue.Full:
                continue
        self.stop()
        self._request.check()

    def check(self) -> None:
        """For the job, at every step: raises Stopped once somebody asked for the end."""
        self._request.check()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked for the end."""
        return self._request.asked

    def stop(self) -> None:
        """Asks for the end: a job that waits never begins, one that runs ends with its present step."""
        self._request.asked = True
        self.future.cancel()

    def events(self) -> Iterator[Any]:
        """What the job says, in order, to its end; while it waits, its place. Left early, it stops the job.

        What the job raises is raised here.
        """
        told = -1
        try:
            while True:
                if not self.future.running() and not self.future.done() and (before := self._place()) != told:
                    told = before
                    yield Waiting(before)
                done = self.future.done()  # before the look into the queue: nothing is said after it
                try:
                    yield self._events.get(timeout=0.0 if done else TICK)
                except queue.Empty:
                    if done:
                        break
            if not self.future.cancelled():
                self.future.result()
        finally:
            if not self.future.done():
                self.stop()


def _run(work: Callable[[Ticket], None], ticket: Ticket) -> None:
    with suppress(Stopped):
        ticket.check()
        work(ticket)


class Worker:
    """Runs jobs one after the other, in a thread of its own."""

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self._pool = ThreadPoolExecutor(1, "steer-worker")
        self._most, self._lock = most_waiting, threading.Lock()
        self._tickets: list[Ticket] = []

    def submit(self, work: Callable[[Ticket], None]) -> Ticket:
        """A job's ticket; it begins when those before it have ended. Raises Busy where too many wait."""
        ticket = Ticket()
        with self._lock:
            self._tickets = [one for one in self._tickets if not one.future.done()]
            if len(self._tickets) > self._most:
                raise Busy(f"{len(self._tickets) - 1} others are waiting for their turn: please try again in a minute")
            self._tickets.append(ticket)
            ticket._place = lambda: self._before(ticket)
            ticket.future = self._pool.submit(_run, work, ticket)
        return ticket

    def _before(self, ticket: Ticket) -> int:
        with self._lock:
            place = self._tickets.index(ticket) if ticket in self._tickets else 0
            return sum(not one.future.done() for one in self._tickets[:place])

    @property
    def pending(self) -> int:
        """Jobs that run or wait."""
        with self._lock:
            return sum(not one.future.done() for one in self._tickets)

    def close(self) -> None:
        """Stops all jobs."""
        with self._lock:
            for ticket in self._tickets:
                ticket.stop()
        self._pool.shutdown(cancel_futures=True)
