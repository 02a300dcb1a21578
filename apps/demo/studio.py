"""What all tabs of the demo share: the worker, the models that visitors may choose, and a folder for each visitor."""

import math
import queue
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.models import load_pipeline
from steer.apps.reward_specs import only_named_rewards, resolve_reward
from steer.assets import MODELS
from steer.errors import InputError
from steer.pipelines.training.events import Stopped, StopRequest
from steer.reward import Reward

MAX_WAITING_JOBS = 8
MAX_EVENTS = 64
EVENT_TIMEOUT = 20.0  # seconds that a job waits for a visitor who does not take its events
POLL_INTERVAL = 0.2


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
        self._events: queue.Queue[Any] = queue.Queue(MAX_EVENTS)
        self._place: Callable[[], int] = lambda: 0
        self.future: Future[None] = Future()

    def say(self, event: Any) -> None:
        """For the job: shows the visitor something. Raises Stopped where they left, or want no more."""
        for _ in range(round(EVENT_TIMEOUT / POLL_INTERVAL)):
            self._request.check()
            try:
                return self._events.put(event, timeout=POLL_INTERVAL)
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
        return self._request.requested

    def stop(self) -> None:
        """Asks for the end: a job that waits never begins, one that runs ends with its present step."""
        self._request.requested = True
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
                    yield self._events.get(timeout=0.0 if done else POLL_INTERVAL)
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

    def __init__(self, most_waiting: int = MAX_WAITING_JOBS) -> None:
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


VISITOR = re.compile(r"[A-Za-z0-9-]{1,40}")  # as Gradio names sessions


@dataclass
class Studio:
    """What the owner of the app decided, and what its jobs use.

    models   that visitors may choose, the first by default
    rewards  specifications that the owner vouches for; of others, visitors may use those that have names
    labels   where choices are kept; None: with the rest in `home`, which goes when the app ends
    home     a temporary folder: nothing outside it is written, nothing else is served
    """

    models: tuple[str, ...]
    rewards: tuple[str, ...] = ()
    labels: Path | None = None
    device: str | None = None
    dtype: str | None = None
    worker: Worker = field(default_factory=Worker)
    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="steer-demo-")))
    _pipe: tuple[str, Any] | None = None
    _running: dict[str, Ticket] = field(default_factory=dict)
    _runs: Iterator[int] = field(default_factory=lambda: count(1))

    def begin(self, request: gr.Request, work: Callable[[Ticket], None]) -> Ticket:
        """A visitor's job in the worker, in place of the one that they had before. Raises Busy."""
        self.stop(request)
        visitor, ticket = str(request.session_hash), self.worker.submit(work)
        self._running = {name: one for name, one in self._running.items() if not one.future.done()}
        self._running[visitor] = ticket
        return ticket

    def stop(self, request: gr.Request) -> None:
        """Ends a visitor's job with its present step."""
        if (ticket := self._running.pop(str(request.session_hash), None)) is not None:
            ticket.stop()

    def folder(self, request: gr.Request) -> Path:
        """The visitor's own."""
        visitor = request.session_hash or ""
        if not VISITOR.fullmatch(visitor):
            raise InputError("this request has no session: open the app in a browser, or use its client")
        checked_value = self.home / "visitors" / visitor  # beside nothing else: the name comes from outside
        checked_value.mkdir(mode=0o700, parents=True, exist_ok=True)
        return checked_value

    def run_folder(self, request: gr.Request) -> Path:
        """One of the visitor's own for a single run, with a number that no other run of this app has: run-7."""
        return self.folder(request) / "steer" / f"run-{next(self._runs)}"

    def forget(self, request: gr.Request) -> None:
        """Ends a visitor's job, and removes what they left, once nothing writes there any more."""
        folder, ticket = self.folder(request), self._running.get(str(request.session_hash))
        self.stop(request)
        if ticket is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            ticket.future.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))

    def reward(self, spec: str) -> Reward:
        """A reward that visitors may use. Raises InputError for one that could run code or read files."""
        text = spec.strip()
        if text not in self.rewards and not only_named_rewards(text):
            raise InputError(
                f"reward {text!r:.80}: here rewards have names (`steer rewards` lists them), with + between them"
            )
        return resolve_reward(text)

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """For jobs in the worker: a pipeline.

        Raises InputError for a model that is not among those of this app.
        """
        if name not in self.models:
            raise InputError(f"model {name!r:.80} is not one of this app's: choose {', '.join(self.models)}")
        if self._pipe is None or self._pipe[0] != name:
            self._pipe = None  # frees the memory of the one before
            pipe = load_pipeline(name, self.device, self.dtype)
            pipe.set_progress_bar_config(disable=True)
            self._pipe = (name, pipe)
        yield self._pipe[1]

    def close(self) -> None:
        """Stops the worker and removes all that visitors left."""
        self.worker.close()
        shutil.rmtree(self.home, ignore_errors=True)


def embedded_models() -> tuple[str, ...]:
    """Those that are here: the package lacks some that the repository has."""
    return tuple(name for name, place in MODELS.items() if Path(place).is_dir())


PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of an event
Change = dict[Any, Any]  # by component
MAX_PROMPT_CHARACTERS = 500  # of a prompt
RANDOM, LARGEST_SEED = -1, 2**53  # the seed that stands for a new one; above the other, a browser's numbers have gaps
FAILED = "The run failed. What was wrong is in the message on this page, or else in the app's log."
# An absolute path after a space, a quote, a bracket or a colon: all of it before its last name; no part of an address.
ABSOLUTE_PATH = re.compile(r"""(?<![^\s'"`(\[{=,:])(?:/(?!/)|[A-Za-z]:\\)(?:[^/\\\s'"`:]+[/\\])*(?=[\w.-])""")


def public(text: str) -> str:
    """A message without places on the owner's disk: of a file, its name stays."""
    for place in (tempfile.gettempdir(), str(Path.cwd()), str(Path.home())):  # which may have spaces in them
        text = text.replace(f"{place}/", "/") if len(place) > 1 else text
    return ABSOLUTE_PATH.sub("", text)


def line(text: str, role: str = "status") -> str:
    """One line about how it stands, which screen readers say too."""
    return f'<p class="steer-line" role="{role}">{escape(public(text))}</p>'


def number(name: str, value: float | None) -> float:
    """What a field says. Raises InputError where it is empty."""
    if value is None or not math.isfinite(value):
        raise InputError(f"{name}: the field is empty, give a number")
    return float(value)


def whole(name: str, value: float | None) -> int:
    """What a field of whole numbers says. Raises InputError where it is empty, or says a fraction."""
    checked_value = number(name, value)
    if not checked_value.is_integer():
        raise InputError(f"{name} must be a whole number, got {checked_value:g}")
    return int(checked_value)


def seed_of(value: float | None, fresh: bool = False) -> int:
    """The seed of a field; a new one for −1, or where one is wanted for every run. Raises InputError."""
    if fresh or value == RANDOM:
        return random.randrange(2**32)
    seed = whole("seed", value)
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed must be 0 to {LARGEST_SEED}, or {RANDOM} for a new one, got {seed}")
    return seed


ARCHIVE_NAME = "finetuned"  # what the zip unpacks to, and what its files call the folder of the run


@dataclass(frozen=True)
class Weights:
    """Finetuned weights to steer with: `steer.apps.models.find_finetuned(str(folder))` reads them.

    model            that they were trained from
    label            what they are, for people
    reward           that they were trained on; None: choices
    steps, guidance  that they were trained with: there they do most
    """

    model: str
    folder: Path
    label: str
    reward: str | None
    steps: int
    guidance: float

    @property
    def told(self) -> str:
        """Where they lie for whoever unpacked the zip: what images, commands and programs say of them."""
        return f"{ARCHIVE_NAME}/final"
