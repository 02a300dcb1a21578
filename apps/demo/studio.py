"""What all tabs of the demo share: the worker, the models that visitors may choose, and a folder for each visitor."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from steer.apps.demo.worker import Ticket, Worker
from steer.apps.models import load_pipeline
from steer.apps.named_rewards import names_alone
from steer.apps.specs import reward_here
from steer.assets import MODELS
from steer.errors import InputError
from steer.reward import Reward

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
        found = self.home / "visitors" / visitor  # beside nothing else: the name comes from outside
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        return found

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
        if text not in self.rewards and not names_alone(text):
            raise InputError(
                f"reward {text!r:.80}: here rewards have names (`steer rewards` lists them), with + between them"
            )
        return reward_here(text)

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
