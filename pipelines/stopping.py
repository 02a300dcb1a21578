"""Ctrl-C and SIGTERM as a wish: what runs ends at its next safe place."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.0  # seconds between two signals of one wish


class Stopped(Exception):
    """Ends a run between two things that belong together."""


class StopRequest:
    """Whether somebody asked for the end.

    agreed  of several processes, whether one of them was asked: a signal reaches each at another time
    """

    def __init__(self, agreed: Callable[[bool], bool] = bool) -> None:
        self.asked, self._agreed, self._first = False, agreed, 0.0

    def check(self) -> None:
        """Raises Stopped once somebody asked."""
        if self._agreed(self.asked):
            raise Stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C a second time: at once. Launchers send signals twice, but not so far apart.
        if self.asked and number == signal.SIGINT and time.monotonic() - self._first > PATIENCE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, time.monotonic()


@contextmanager
def stop_request(agreed: Callable[[bool], bool] = bool) -> Iterator[StopRequest]:
    """Inside, the signals of the main thread are taken as a request; the handlers of before come back."""
    request = StopRequest(agreed)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
