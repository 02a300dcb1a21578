"""The parts that all tabs share: the worker, the models, a folder for each visitor, and fields."""

import math
import queue
import random
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from steer.apps.demo.history import FILE, History
from steer.apps.models import load_pipeline
from steer.apps.reward_specs import only_named_rewards, resolve_reward
from steer.assets import MODELS, TEXT_MODELS
from steer.errors import InputError
from steer.pipelines.training.events import Stopped, StopRequest
from steer.reward import Reward

MAX_WAITING_JOBS = 8
MAX_EVENTS = 64
EVENT_TIMEOUT = 20.0  # seconds that a job waits for a visitor who does not receive its events
POLL_INTERVAL = 0.2


class Busy(InputError):
    """Too many jobs are waiting."""


@dataclass(frozen=True)
class Waiting:
    """An event: the number of jobs that run first."""

    before: int

    def __str__(self) -> str:
        first = "1 run comes" if self.before == 1 else f"{self.before} runs come"
        return f"Waiting: {first} first." if self.before else "Starting …"


class Ticket(StopRequest):
    """A visitor's job: its events, and a stop request; `check`, called at every step, raises it."""

    def __init__(self) -> None:
        super().__init__()
        self._events: queue.Queue[Any] = queue.Queue(MAX_EVENTS)
        self._answers: queue.Queue[bool] = queue.Queue(1)
        self._place: Callable[[], int] = lambda: 0
        self.future: Future[None] = Future()

    def say(self, event: Any) -> None:
        """Send an event of the job. Raises Stopped, after the event, if the visitor left or stopped the job."""
        for _ in range(round(EVENT_TIMEOUT / POLL_INTERVAL)):
            try:
                self._events.put(event, timeout=POLL_INTERVAL)
                return self.check()
            except queue.Full:
                self.check()
        self.stop()
        self.check()

    def ask(self, event: Any, timeout: float) -> bool | None:
        """Send an event that asks the visitor, and wait for `answer`: True, False, or None after `timeout` seconds.

        Raises Stopped at once if the visitor left or stopped the job.
        """
        with suppress(queue.Empty):  # a second click on an earlier question
            self._answers.get_nowait()
        self.say(event)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.check()
            with suppress(queue.Empty):
                return self._answers.get(timeout=POLL_INTERVAL)
        return None

    def answer(self, agreed: bool) -> None:
        """Answer the question of the job; of several answers the first counts."""
        with suppress(queue.Full):
            self._answers.put_nowait(agreed)

    @property
    def stopped(self) -> bool:
        return self.requested

    def stop(self) -> None:
        """Request a stop: a waiting job never begins, a running job ends with its current step."""
        self.requested = True
        self.future.cancel()

    def events(self) -> Iterator[Any]:
        """Yield the job's events in order, and its place in the queue while it waits.

        Closing the iterator early stops the job. Exceptions of the job are raised here.
        """
        last_place = -1
        try:
            while True:
                if not self.future.running() and not self.future.done() and (before := self._place()) != last_place:
                    last_place = before
                    yield Waiting(before)
                done = self.future.done()  # set before the queue is read: no event follows
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
    """A thread that runs jobs one after the other."""

    def __init__(self, most_waiting: int = MAX_WAITING_JOBS) -> None:
        self._pool = ThreadPoolExecutor(1, "steer-worker")
        self._most, self._lock = most_waiting, threading.Lock()
        self._tickets: list[Ticket] = []

    def submit(self, work: Callable[[Ticket], None]) -> Ticket:
        """Queue a job and return its ticket. Raises Busy if too many jobs wait."""
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
        """Number of jobs that run or wait."""
        with self._lock:
            return sum(not one.future.done() for one in self._tickets)

    def close(self) -> None:
        """Stop all jobs."""
        with self._lock:
            for ticket in self._tickets:
                ticket.stop()
        self._pool.shutdown(cancel_futures=True)


VISITOR = re.compile(r"[A-Za-z0-9-]{1,40}")  # as Gradio names sessions


@dataclass
class Studio:
    """The owner's configuration of the app, and the resources of its jobs.

    models   models that visitors may choose, the first by default
    rewards  specifications that the owner allows; visitors may also use rewards that have names
    labels   folder of preferences; None: one in `home`, which is removed when the app ends
    text_models  models of the Text tab
    label_images  folder of images with prompts that annotators choose between; None: images are sampled
    home     a temporary folder: nothing but labels and history is written outside it, nothing else is served
    max_upload  largest file that visitors may upload, in MB: LoRA files are large
    variant  variant of the weights of models that are not embedded, such as fp16
    history_file  history of one user, kept after the app ends; None: a history in `home`, separate for each visitor. If
        the file cannot be written, a history in `home` replaces it, and history_notice reports this
    """

    models: tuple[str, ...]
    rewards: tuple[str, ...] = ()
    labels: Path | None = None
    device: str | None = None
    dtype: str | None = None
    label_images: Path | None = None
    worker: Worker = field(default_factory=Worker)
    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="steer-demo-")))
    text_models: tuple[str, ...] = field(default_factory=lambda: embedded_models(TEXT_MODELS))
    history_file: Path | None = None
    max_upload: int = 512
    variant: str | None = None
    history: History = field(init=False)
    history_notice: str = ""
    _pipe: tuple[str, Any] | None = None
    _running: dict[str, Ticket] = field(default_factory=dict)
    _runs: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        try:
            self.history = History(self.history_file or self.home / FILE, shared=self.history_file is None)
        except InputError as error:
            if self.history_file is None:
                raise
            self.history = History(self.home / FILE, shared=False)
            self.history_notice = f"{error}: runs are kept until the app ends"

    def begin(self, request: gr.Request, work: Callable[[Ticket], None]) -> Ticket:
        """Start a visitor's job, and stop their previous one. Raises Busy."""
        self.stop(request)
        visitor, ticket = str(request.session_hash), self.worker.submit(work)
        self._running = {name: one for name, one in self._running.items() if not one.future.done()}
        self._running[visitor] = ticket
        return ticket

    def stop(self, request: gr.Request) -> None:
        """Stop a visitor's job after its current step."""
        if (ticket := self._running.pop(str(request.session_hash), None)) is not None:
            ticket.stop()

    def answer(self, request: gr.Request, agreed: bool) -> None:
        """Answer the question of a visitor's job."""
        if (ticket := self._running.get(str(request.session_hash))) is not None:
            ticket.answer(agreed)

    def folder(self, request: gr.Request) -> Path:
        """Make the visitor's folder. Raises InputError without a session, and after the app has ended."""
        folder = self._place(request)
        try:
            for one in (folder.parent, folder):  # not `home` itself, which `close` removes for good
                one.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError as error:
            raise InputError("the app has ended: start it again") from error
        return folder

    def _place(self, request: gr.Request) -> Path:
        """Return the path of the visitor's folder, which may not exist. Raises InputError without a session."""
        visitor = request.session_hash or ""
        if not VISITOR.fullmatch(visitor):
            raise InputError("this request has no session: open the app in a browser, or use its client")
        return self.home / "visitors" / visitor  # in a separate folder, because the name comes from outside

    def run_folder(self, request: gr.Request) -> Path:
        """Return a folder for one run of the visitor, with a number unique in this app: run-7."""
        return self.folder(request) / "steer" / f"run-{next(self._runs)}"

    def forget(self, request: gr.Request) -> None:
        """Stop a visitor's job, and remove their folder once nothing writes there."""
        folder, ticket = self._place(request), self._running.get(str(request.session_hash))
        self.stop(request)
        self.history.leave(str(request.session_hash))
        if ticket is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            ticket.future.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))

    def reward(self, spec: str) -> Reward:
        """Load a reward that visitors may use. Raises InputError for a reward that could run code or read files."""
        self.check_reward(spec)
        return resolve_reward(spec.strip())

    def check_reward(self, spec: str) -> None:
        """Raise InputError for a reward that could run code or read files; nothing is loaded."""
        text = spec.strip()
        if text not in self.rewards and not only_named_rewards(text):
            raise InputError(
                f"reward {text!r:.80}: here rewards have names (`steer rewards` lists them), with + between them"
            )

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """Load a pipeline for a job in the worker.

        Raises InputError for a model that this app does not offer.
        """
        if name not in (*self.models, *self.text_models):
            raise InputError(f"model {name!r:.80} is not one of this app's: choose {', '.join(self.models)}")
        if self._pipe is None or self._pipe[0] != name:
            self._pipe = None  # frees the memory of the previous model
            variant = None if name in MODELS | TEXT_MODELS else self.variant
            pipe = load_pipeline(name, self.device, self.dtype, variant=variant)
            pipe.set_progress_bar_config(disable=True)
            self._pipe = (name, pipe)
        yield self._pipe[1]

    def close(self) -> None:
        """Stop the worker and remove all folders of visitors."""
        self.worker.close()
        for _ in range(20):  # the server may still remove, or write, a file of a closing page
            shutil.rmtree(self.home, ignore_errors=True)
            if not self.home.exists():
                break
            time.sleep(0.1)


def embedded_models(models: Mapping[str, str | Path] = MODELS) -> tuple[str, ...]:
    """Return the installed embedded models: the package lacks some of the repository's models."""
    return tuple(name for name, place in models.items() if Path(place).is_dir())


def write_zip(path: Path, root: Path, files: Iterable[Path], name: str) -> Path:
    """Zip files of the folder `root`, in a folder `name` inside; each is read before the next is listed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"{name}/{file.relative_to(root)}")
    return path


PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # for events
RUNS = PRIVATE | {"concurrency_limit": None}  # for events that start a job: the worker has a queue
Change = dict[Any, Any]  # updates by component
MAX_PROMPT_CHARACTERS = 500
RANDOM, LARGEST_SEED = -1, 2**53  # the seed that means a new one; the largest exact integer of browsers
FAILED = "The run failed. The reason is in the message on this page, or in the app's log."
# An absolute path after a space, a quote, a bracket or a colon, up to its last name; not a part of an address.
ABSOLUTE_PATH = re.compile(r"""(?<![^\s'"`(\[{=,:])(?:/(?!/)|[A-Za-z]:\\)(?:[^/\\\s'"`:]+[/\\])*(?=[\w.-])""")


def public(text: str) -> str:
    """Remove paths on the owner's disk from a message; names of files stay."""
    for place in (tempfile.gettempdir(), str(Path.cwd()), str(Path.home())):  # these may contain spaces
        text = text.replace(f"{place}/", "/") if len(place) > 1 else text
    return ABSOLUTE_PATH.sub("", text)


def line(text: str, role: str = "status") -> str:
    """Return a status line, which screen readers announce."""
    return f'<p class="steer-line" role="{role}">{escape(public(text))}</p>'


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def prompts_in(text: str, most: int) -> list[str]:
    """Read the prompts of a field, one per line. Raises InputError for too many, or too long prompts."""
    prompts = [one.strip() for one in text.splitlines() if one.strip()]
    if len(prompts) > most:
        raise InputError(f"{len(prompts)} prompts: at most {most} at a time in this app")
    if (longest := max(map(len, prompts), default=0)) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"a prompt of {longest} characters: at most {MAX_PROMPT_CHARACTERS}")
    return prompts


def number(name: str, value: float | None) -> float:
    """Read a number from a field. Raises InputError if it is empty."""
    if value is None or not math.isfinite(value):
        raise InputError(f"{name}: the field is empty, give a number")
    return float(value)


def whole(name: str, value: float | None) -> int:
    """Read a whole number from a field. Raises InputError if it is empty, or a fraction."""
    checked_value = number(name, value)
    if not checked_value.is_integer():
        raise InputError(f"{name} must be a whole number, got {checked_value:g}")
    return int(checked_value)


def seed_of(value: float | None, fresh: bool = False) -> int:
    """Read the seed of a field; draw a new seed for −1 or `fresh`. Raises InputError."""
    if fresh or value == RANDOM:
        return random.randrange(2**32)
    seed = whole("seed", value)
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed must be 0 to {LARGEST_SEED}, or {RANDOM} for a new one, got {seed}")
    return seed


class JobTab:
    """A tab with a job that a visitor starts and stops: two buttons, and a status line."""

    studio: Studio
    fields: dict[str, Any]
    start: gr.Button
    stop: gr.Button
    status: gr.HTML

    def _job_buttons(self, label: str, prefix: str) -> None:
        with gr.Row():
            self.start = gr.Button(label, variant="primary", min_width=120, elem_id=f"{prefix}-start")
            look: dict[str, Any] = {"variant": "stop", "interactive": False, "min_width": 120}
            self.stop = gr.Button("Stop", **look, elem_id=f"{prefix}-stop")

    def _connect_job(self, *events: Dependency) -> None:
        """Connect the events that start the job with `fail`, and the stop button with the studio."""
        for event in events:
            event.failure(self.fail, None, [self.status, self.start, self.stop], **PRIVATE)
        self.stop.click(self.studio.stop, None, None, queue=False, **PRIVATE)

    def values(self, field_values: Change) -> dict[str, Any]:
        return {name: field_values[field] for name, field in self.fields.items()}

    def running(self, running: bool) -> Change:
        return {self.start: gr.update(interactive=not running), self.stop: gr.update(interactive=running)}

    def refuse(self, text: str) -> Change:
        """Show the reason for a refusal, as a warning and in the status, without paths on the owner's disk."""
        gr.Warning(escape(public(text)))
        return {self.status: line(text, "alert")}

    def fail(self) -> Change:
        """Show that a job failed by an unknown error, or that Gradio refuses the value of a field."""
        return self.running(False) | {self.status: line(FAILED, "alert")}


def guarded(handler: Callable[..., Iterator[Change]]) -> Callable[..., Iterator[Change]]:
    """Decorate a JobTab's handler that shows a job to its end; bad input becomes a warning and the status."""

    @wraps(handler)
    def shown(self: JobTab, *given: Any) -> Iterator[Change]:
        yield self.running(True)
        try:
            yield from handler(self, *given)
        except InputError as error:
            yield self.refuse(str(error))
        yield self.running(False)

    return shown


@contextmanager
def warning() -> Iterator[None]:
    """Show bad input as a warning, and continue after the block: an unwritable history does not end a run."""
    try:
        yield
    except InputError as error:
        gr.Warning(escape(public(str(error))))


def refusing(handler: Callable[..., Change]) -> Callable[..., Change]:
    """Decorate a tab's handler: bad input is shown in the status, and nothing else changes."""

    @wraps(handler)
    def shown(self: Any, *given: Any) -> Change:
        try:
            return handler(self, *given)
        except InputError as error:
            return {self.status: line(str(error), "alert")}

    return shown


ARCHIVE_NAME = "finetuned"  # folder inside the zip, and the name of the run's folder in its files


@dataclass(frozen=True)
class Weights:
    """Finetuned weights to steer with: `steer.apps.models.find_adapter(str(folder))` reads them.

    model            model that was finetuned
    label            label for people
    reward           reward of the training; None: preferences
    steps, guidance  sampling settings of the training
    """

    model: str
    folder: Path
    label: str
    reward: str | None
    steps: int
    guidance: float

    @property
    def archive_path(self) -> str:
        """The path of the weights beside the unpacked zip, for images, commands and programs."""
        return f"{ARCHIVE_NAME}/final"
