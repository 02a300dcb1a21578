"""Ctrl-C and SIGTERM as a wish: what runs ends at its next safe place."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Ends a run between two things that belong together."""


class StopRequest:
    """Whether somebody asked for the end."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raises Stopped once somebody asked."""
        if self.asked:
            raise Stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:  # a second time: at once
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside, the signals of the main thread are taken as a request; the handlers of before come back."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
