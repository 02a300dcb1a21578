"""`http://HOST:PORT/`: a reward that another process serves, by `steer rewards serve` or else in its protocol.

Both sides are the standard library's HTTP: neither environment has to agree with the other on a version of anything.
The other side is not believed: a reply is bounded in bytes and in time, no redirect is followed, no proxy asked.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from steer.contract import RewardError
from steer.errors import InputError
from steer.rewards.grammar import NUMBER
from steer.rewards.remote_protocol import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_REPLY,
    PROTOCOL,
    TOKEN,
    encode,
    line,
    read_json,
    read_scores,
    read_token,
)

TIMEOUT, TRIES = 120.0, 3  # seconds for one try from connecting to the last byte; tries
PAUSE = 0.2  # seconds before the second try, doubled before each that follows
BUSY = 503
GONE = (OSError, IncompleteRead)  # worth another try: the process may be back


class Remote:
    """Scores images over HTTP, as 8-bit PNGs; never differentiable. The name is the address.

    address  http(s)://HOST[:PORT][/PATH][,timeout=SECONDS][,tries=COUNT]; a token comes from STEER_REWARD_TOKEN
    The server is asked who it is at once. Raises RewardError where none answers, or not in this protocol; so does
    every call that fails, in one line that names the address. Only connections that fail or break are tried again.
    """

    differentiable = False

    def __init__(self, address: str) -> None:
        self.name, *options = address.split(",")
        self._place = _place(self.name)
        given = _options(self.name, options)
        self._timeout, self._tries = given.get("timeout", TIMEOUT), int(given.get("tries", TRIES))
        told = self._asked("GET", "", None)
        if told.get("protocol") != PROTOCOL:
            raise self._error(f"speaks protocol {told.get('protocol')!r:.20}, this side {PROTOCOL}")
        self.serves = line(told.get("name"))
        """What the other side calls its reward."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.shape[-2] * images.shape[-1]
        if pixels > MOST_PIXELS:
            raise RewardError(f"reward {self.name!r}: images of {pixels} pixels, at most {MOST_PIXELS} are sent")
        if not images.isfinite().all():
            raise RewardError(f"reward {self.name!r}: images that are not finite cannot be sent")
        at_once = min(MOST_IMAGES, MOST_PIXELS // max(pixels, 1))
        starts = range(0, len(prompts), at_once)
        scores = [self._scored(images[n : n + at_once], prompts[n : n + at_once]) for n in starts]
        return torch.cat([torch.zeros(0), *scores]).to(images.device)

    def _scored(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        told = self._asked("POST", "score", encode(images, prompts))
        try:
            return read_scores(told, len(prompts))
        except RewardError as error:
            raise self._error(f"answers wrongly: {error}") from error

    def _asked(self, method: str, path: str, body: bytes | None) -> Mapping[str, Any]:
        """The JSON of a reply. Raises RewardError."""
        for attempt in range(1, self._tries + 1):
            try:
                status, reply = self._place.request(method, path, body, self._timeout)
            except TimeoutError as error:
                raise self._error(f"took longer than its {self._timeout:g} s: raise ,timeout=, or mend it") from error
            except GONE as error:
                if attempt == self._tries:
                    how = line(getattr(error, "strerror", None) or error) or type(error).__name__
                    raise self._error(f"cannot be reached ({how}): is `steer rewards serve` running there?") from error
            except HTTPException as error:
                raise self._error(f"does not answer in HTTP ({type(error).__name__}: {line(error)})") from error
            else:
                if status != BUSY or attempt == self._tries:
                    return self._read(status, reply)
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last try returns or raises")

    def _read(self, status: int, reply: bytes) -> Mapping[str, Any]:
        if len(reply) > MOST_REPLY:
            raise self._error(f"answers with more than {MOST_REPLY} bytes")
        try:
            told = read_json(reply)
        except InputError as error:
            raise self._error(f"answers with status {status}, {error}") from error
        if status != 200:
            raise self._error(f"answers with status {status}: {line(told.get('error'))}")
        return told

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward {self.name!r} {what}")


@dataclass(frozen=True)
class _Place:
    """Where a server is."""

    secure: bool
    host: str
    port: int | None
    path: str  # ends in /

    def request(self, method: str, path: str, body: bytes | None, timeout: float) -> tuple[int, bytes]:
        """Status and body, of which no more is read than one byte above MOST_REPLY.

        timeout  seconds for all of it. Raises TimeoutError, ConnectionError, HTTPException, OSError.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := read_token():
            headers["Authorization"] = f"Bearer {token}"
        connection = (HTTPSConnection if self.secure else HTTPConnection)(self.host, self.port, timeout=timeout)
        with _limited(connection, timeout) as late:
            connection.connect()
            if late.is_set():  # there was no connection yet that could be closed
                raise TimeoutError
            connection.request(method, self.path + path, body, headers)
            response = connection.getresponse()
            return response.status, _bounded(response)


def _bounded(response: HTTPResponse) -> bytes:
    """The body, or the first MOST_REPLY + 1 bytes of a longer one. Raises IncompleteRead where it breaks off."""
    found = b""
    while len(found) <= MOST_REPLY and (piece := response.read(MOST_REPLY + 1 - len(found))):
        found += piece
    if len(found) <= MOST_REPLY and response.length:
        raise IncompleteRead(found, response.length)
    return found


@contextmanager
def _limited(connection: HTTPConnection, seconds: float) -> Iterator[threading.Event]:
    """Closes the connection when the time is up, however many bytes trickle in. Raises TimeoutError then."""
    late = threading.Event()

    def end() -> None:
        late.set()
        if isinstance(connection.sock, socket.socket):
            with suppress(OSError):  # the other side was first
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    except (*GONE, HTTPException) as error:
        if late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        connection.close()
    if late.is_set():
        raise TimeoutError


def _place(address: str) -> _Place:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:
        raise RewardError(f"reward {address!r:.200}: not an address ({line(error)})") from error
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RewardError(
            f"reward at {host!r:.200}: an address is written into reports and images, so it holds no name, password, "
            f"? or #: a token goes into the environment variable {TOKEN}"
        )
    if not host or not re.fullmatch(r"[!-~]*", address):
        raise RewardError(f"reward {address!r:.200}: not an address, http://HOST:PORT/ is one")
    return _Place(parts.scheme == "https", host, port, parts.path.rstrip("/") + "/")


def _options(name: str, options: Sequence[str]) -> dict[str, float]:
    given = {}
    for option in options:
        key, _, value = option.partition("=")
        whole = key == "tries"
        if key not in ("timeout", "tries") or not re.fullmatch(r"[1-9]\d?" if whole else NUMBER, value):
            raise RewardError(f"reward {name!r}: takes timeout=SECONDS and tries=1 to 99, got {option!r:.80}")
        given[key] = float(value)
    if not given.get("timeout", 1) > 0:
        raise RewardError(f"reward {name!r}: timeout= must be above 0 seconds")
    return given
