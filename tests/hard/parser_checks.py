"""What every parser is held to while it is tried."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 2  # of CPU, for one input


class Finding(AssertionError):
    """A parser did what none may do."""


def check_line(told: str) -> None:
    """Raises Finding for a message that is not one line, or could not be shown."""
    if len(told.splitlines()) != 1 or re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", told):
        raise Finding(f"no line of text: {told!r}")
    if len(told) > 2000:
        raise Finding(f"a line of {len(told)} characters: {told!r:.400}")


_reached: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own audit: nothing else sees all that a process opens, imports and starts."""
    if not _watching:
        return
    if event == "import" and arguments[0].partition(".")[0] not in sys.modules:
        raise ImportError(f"{arguments[0]} is not there while parsers are tried")  # code that a text names
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec", "os.fork"):
        _reached.append(f"{event} {arguments}")
        raise PermissionError(event)


sys.addaudithook(_watch)


def _late(number: int, frame: Any) -> None:
    raise Finding(f"more than {SECONDS} seconds of CPU")


@contextmanager
def held() -> Iterator[None]:
    """Ends what takes too long; raises Finding where a program or the network was reached for."""
    _reached.clear()
    before = signal.signal(signal.SIGVTALRM, _late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    _watching.append(True)
    try:
        yield
    finally:
        _watching.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    if _reached:
        raise Finding(f"reached for {_reached}")
