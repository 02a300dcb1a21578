"""What a visitor has seen of a run so far, event by event."""

import time
from dataclasses import dataclass, field
from typing import Any

from steer.apps.demo.steering import Frame, Loading, Made, Step
from steer.apps.demo.worker import Waiting

EVERY = 0.15  # seconds between two lines about single steps
PHASES = {
    "fk": "Steering",
    "best-of-n": "Sampling",
    "base": "Sampling",
    "beside": "Base images",
    "reno": "Optimising the noise",
}


@dataclass(frozen=True)
class Finished:
    """A prompt's images, and the readings on the way to them."""

    made: Made
    frames: tuple[Frame, ...]


@dataclass
class Seen:
    """The present prompt's readings, the prompts that are finished, and the line that says how far it is."""

    frames: tuple[Frame, ...] = ()
    finished: tuple[Finished, ...] = ()
    line: str = "Starting …"
    _told: float = field(default=0.0, repr=False)

    @property
    def made(self) -> Made | None:
        """What came out of the prompt whose readings are there, once it is finished."""
        last = self.finished[-1] if self.finished else None
        return last.made if last is not None and last.frames is self.frames else None

    def after(self, event: Any) -> bool:
        """Takes an event in; whether there is something to show."""
        match event:
            case Step():
                return self._stepped(event)
            case Frame():
                self.frames = (*self.frames, event)
            case Made():
                self.finished = (*self.finished, Finished(event, self.frames))
            case Waiting() | Loading():
                self.line = str(event)
            case _:
                raise TypeError(f"no event of a run: {event!r}")
        return True

    def _stepped(self, event: Step) -> bool:
        if event.step == 1 and event.phase != "beside":
            self.frames = ()
        which = f"Prompt {event.number + 1} of {event.count}. " if event.count > 1 else ""
        self.line = f"{which}{PHASES[event.phase]}: {event.step} of {event.total}"
        now = time.monotonic()
        if now - self._told < EVERY:
            return False
        self._told = now
        return True

    def conclusion(self, stopped: bool) -> str:
        """The last line."""
        if stopped and not self.finished:
            return "Stopped. Nothing was finished."
        costs = [cost for one in self.finished for cost in (one.made.cost, one.made.base_cost) if cost is not None]
        seconds = sum(cost.seconds for cost in costs)
        about = "1 prompt" if len(self.finished) == 1 else f"{len(self.finished)} prompts"
        seed = f", seed {self.finished[0].made.settings.seed}" if self.finished else ""
        return f"{'Stopped' if stopped else 'Done'}: {about} in {seconds:.1f} s{seed}."
