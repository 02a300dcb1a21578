"""Checks of every parser during fuzzing: one-line messages, CPU time, no network and no programs."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 2  # of CPU, for one input


class Finding(AssertionError):
    """A parser violated one of these rules."""


def check_line(message: str) -> None:
    """Raise Finding for a message that is not one printable line."""
    if len(message.splitlines()) != 1 or re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", message):
        raise Finding(f"no line of text: {message!r}")
    if len(message) > 2000:
        raise Finding(f"a line of {len(message)} characters: {message!r:.400}")


_reached: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: block imports, network connections and programs."""
    if not _watching:
        return
    if event == "import" and arguments[0].partition(".")[0] not in sys.modules:
        raise ImportError(f"{arguments[0]} must not be imported by a parser")  # a module named in the input
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec", "os.fork"):
        _reached.append(f"{event} {arguments}")
        raise PermissionError(event)


sys.addaudithook(_watch)


def _late(number: int, frame: Any) -> None:
    raise Finding(f"more than {SECONDS} seconds of CPU")


@contextmanager
def checked() -> Iterator[None]:
    """Raise Finding if the block takes too long, starts a program or uses the network."""
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
