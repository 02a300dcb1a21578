"""The other side of `steer.rewards.remote`: one reward behind HTTP, in an environment of its own.

The standard library's server, so that this environment needs nothing beyond what its reward needs. Calls of the reward
are one after another: models are not thread-safe.
"""

import hmac
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from steer import __version__
from steer.contract import Reward, RewardError, score
from steer.errors import InputError
from steer.rewards.remote_protocol import MOST_BYTES, PROTOCOL, decode, line

MOST_AT_ONCE = 8  # requests that are read or wait; each holds its images
IDLE = 30.0  # seconds without a byte after which a connection is closed
GRACE = 10.0  # seconds that a call which is going on may take at the end
LOCAL = ("127.0.0.1", "::1", "localhost")


class Refused(Exception):
    """A request that is not answered with scores: status, and one line."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves one reward. `serve_until_told` is the loop; port 0 is any that is free, see `url`.

    token   what requests must bring as a bearer; None: nothing
    device  where the images are scored
    Raises InputError where the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.reward, self._token, self._device = reward, token, device
        self._one_by_one, self._free = threading.Lock(), threading.BoundedSemaphore(MOST_AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({line(error)})") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def about(self) -> dict[str, Any]:
        """What GET answers."""
        return {"protocol": PROTOCOL, "name": self.reward.name, "differentiable": False, "version": __version__}

    def check_token(self, header: str) -> None:
        """Raises Refused where the bearer is another."""
        if self._token is not None and not hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode()):
            raise Refused(401, "this server wants its token, in the client's environment as STEER_REWARD_TOKEN")

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the few requests at once. Raises Refused where all are taken."""
        if not self._free.acquire(blocking=False):
            raise Refused(503, "busy: too many requests at once")
        try:
            yield
        finally:
            self._free.release()

    def scores(self, body: bytes) -> list[float]:
        """Of a request's body. Raises Refused."""
        try:
            images, prompts = decode(body)
        except InputError as error:
            raise Refused(400, str(error)) from error
        try:
            with self._one_by_one, torch.no_grad():
                return score(self.reward, images.to(self._device), prompts).tolist()
        except RewardError as error:
            raise Refused(422, str(error)) from error

    def serve_until_told(self, ready: Callable[[], None]) -> bool:
        """Serves until SIGINT or SIGTERM. In the main thread. Whether no call of the reward was left going on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=self.shutdown, daemon=True).start())
        ready()
        self.serve_forever(poll_interval=0.1)
        self.server_close()
        # A request is over when its reply is written, and gives its place back then.
        end = time.monotonic() + GRACE
        return all(self._free.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(MOST_AT_ONCE))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "steer", ""
    timeout = IDLE

    def do_GET(self) -> None:
        self._answer(self._about)

    def do_POST(self) -> None:
        self._answer(self._scored)

    def _about(self) -> dict[str, Any]:
        self.server.check_token(self.headers.get("Authorization", ""))
        if self.path != "/":
            raise Refused(404, "GET / tells what this is, POST /score scores")
        return self.server.about()

    def _scored(self) -> dict[str, Any]:
        self.server.check_token(self.headers.get("Authorization", ""))
        if self.path != "/score":
            raise Refused(404, "GET / tells what this is, POST /score scores")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "a request needs its Content-Length")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refused(413, f"a request has at most {MOST_BYTES} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "the request broke off")
        return {"scores": self.server.scores(body)}

    def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
        """One reply, and the connection is closed: what is left of a refused request is never read as another."""
        self.close_connection = True
        try:
            with self.server.place():
                try:
                    self._send(200, work())
                except Refused as error:
                    self._send(error.status, {"error": line(error)})
        except Refused as error:
            self._send(error.status, {"error": line(error)})
        except OSError:  # the client is gone, or was idle
            return

    def _send(self, status: int, told: dict[str, Any]) -> None:
        body = json.dumps(told, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing: the one line with the address is for programs to read."""
