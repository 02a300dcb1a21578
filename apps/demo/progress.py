"""Progress of a run: a bar, and the remaining seconds at the measured pace."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from steer.apps.demo.studio import line

SHORTEST = 1.5  # remaining seconds below which none are shown


@dataclass
class Throttle:
    """A view's updates, with at least `interval` seconds between two."""

    interval: float
    _last: float = 0.0

    def due(self) -> bool:
        """Return whether the view may be updated now; if so, its next update waits."""
        if (now := time.monotonic()) - self._last < self.interval:
            return False
        self._last = now
        return True


@dataclass
class Progress:
    """The finished share of a run, and its pace over all steps after the first, which may load or compile.

    share  0 to 1; None before the first step
    """

    clock: Callable[[], float] = time.monotonic
    share: float | None = None
    _first: tuple[float, float] | None = None  # time and share
    _elapsed: float = 0.0

    def update(self, share: float) -> None:
        """Add a step, after which `share` is done."""
        now = self.clock()
        self._first = self._first or (now, share)
        self._elapsed, self.share = now - self._first[0], share

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds to the end; None before the second step."""
        if self.share is None or self._first is None or self.share <= self._first[1]:
            return None
        return self._elapsed * (1 - self.share) / (self.share - self._first[1])

    def status(self, text: str) -> str:
        """Return a status line with the remaining time, above a bar; the bar has no value before the first step."""
        left = self.seconds_left
        remaining = "" if left is None or left < SHORTEST else f", about {duration(left)} left"
        value = "" if self.share is None else f' max="1" value="{self.share:.3f}"'
        return f'{line(text + remaining)}<progress class="steer-progress" aria-label="Progress"{value}></progress>'


def duration(seconds: float) -> str:
    """Write seconds for people, in two digits or so: 8 s, 50 s, 3 min, 2 h."""
    if seconds < 99.5:
        step = 1 if seconds < 10 else 5
        return f"{max(step, step * math.ceil(seconds / step - 0.5)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99 * 60 else f"{seconds / 3600:.0f} h"
