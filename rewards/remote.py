"""Remote rewards `http://HOST:PORT/`: client, server (`steer rewards serve`) and protocol.

Both sides use the standard library's HTTP, so that the two environments need no common package versions.
The client does not trust the server: replies are bounded in bytes and time, and no redirect or proxy is used.
"""

import base64
import binascii
import hmac
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steer.errors import InputError
from steer.files import DECODE_ERRORS
from steer.reward import Reward, RewardError, score
from steer.rewards.grammar import NUMBER
from steer.rewards.inputs import as_png, takes_any_images

PROTOCOL = 1
MAX_IMAGES, MAX_PIXELS = 32, 2**24  # limits of one request
MAX_REQUEST_BYTES = 80_000_000  # MAX_PIXELS of noise as PNG in base64, and the prompts
MAX_REPLY_BYTES = 1_000_000  # bytes
MAX_LINE_LENGTH = 300  # characters of the other side's message
ADDRESS = r"https?://[^\s,()]+"
TOKEN = "STEER_REWARD_TOKEN"  # an environment variable: options appear in reports and process lists


def is_remote(text: str) -> bool:
    """Return whether a term is the address of a reward, with or without options and weight."""
    return re.match(r"https?://", text) is not None


def read_weight(text: str) -> tuple[str, float]:
    """Split a term into (address with options, weight). After a host without a path, a number is its port."""
    if written := re.fullmatch(rf"(https?://[^/\s]+(?:/\S*?|,\S*?)):({NUMBER})", text):
        return written[1], float(written[2])
    return text, 1.0


def encode(images: Tensor, prompts: Sequence[str]) -> bytes:
    """Encode the body of a request: images (N, 3, H, W), clamped to [0, 1] and rounded to 8 bits."""
    payload = [base64.b64encode(file).decode() for file in as_png(images)]
    return json.dumps({"protocol": PROTOCOL, "images": payload, "prompts": list(prompts)}).encode()


def decode(body: bytes) -> tuple[Tensor, list[str]]:
    """Decode a request: images (N, 3, H, W) in [0, 1] and prompts. Raises InputError, one line."""
    payload = read_json(body)
    if payload.get("protocol") != PROTOCOL:
        raise InputError(f"this side uses protocol {PROTOCOL}, got {payload.get('protocol')!r:.20}")
    images, prompts = payload.get("images"), payload.get("prompts")
    if not isinstance(images, list) or not isinstance(prompts, list):
        raise InputError("`images` and `prompts` must be lists")
    if not all(isinstance(text, str) for text in images + prompts):
        raise InputError("`images` must hold base64 texts, `prompts` texts")
    if not 0 < len(images) <= MAX_IMAGES or len(images) != len(prompts):
        raise InputError(f"1 to {MAX_IMAGES} images, and as many prompts: got {len(images)} and {len(prompts)}")
    try:
        # All sizes are checked before the first pixel is decoded.
        files = [Image.open(BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) for text in images]
        if len({file.size for file in files}) > 1 or any(file.mode != "RGB" for file in files):
            raise InputError("images must be 8-bit RGB and all of one size")
        if (pixels := len(files) * files[0].width * files[0].height) > MAX_PIXELS:
            raise InputError(f"{pixels} pixels in one request: at most {MAX_PIXELS}")
        arrays = np.stack([np.asarray(file) for file in files])
    except InputError:
        raise
    except (*DECODE_ERRORS, binascii.Error) as error:
        raise InputError(f"an image cannot be read as PNG ({line(error)})") from error
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255, prompts


def read_scores(payload: Mapping[str, Any], count: int) -> Tensor:
    """Read the scores of a reply, (count,) fp32; the contract checks that they are finite. Raises RewardError."""
    scores = payload.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"{count} images must have a list of {count} scores, got {got}")
    if wrong := [one for one in scores if isinstance(one, bool) or not isinstance(one, int | float)]:
        raise RewardError(f"scores must be numbers, got {wrong[0]!r:.40}")
    try:
        return torch.tensor([float(one) for one in scores])
    except OverflowError as error:
        raise RewardError("scores must fit in fp32") from error


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises InputError."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {line(body[:60].decode(errors='replace'))!r}") from error
    if not isinstance(payload, dict):
        raise InputError(f"not a JSON object but {type(payload).__name__}")
    return payload


def line(message: object) -> str:
    """Reduce a message of the other side to one printable line."""
    text = " ".join(str(message).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:MAX_LINE_LENGTH]


def read_token(variable: str = TOKEN) -> str | None:
    """Read the token from the environment, for client or server; None if it is not set. Raises InputError."""
    token = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError(f"{variable} must be of printable ASCII without spaces")
    return token or None


TIMEOUT, MAX_ATTEMPTS = 120.0, 3  # seconds per attempt from connecting to the last byte; attempts
RETRY_DELAY = 0.2  # seconds before the second attempt, doubled for each later one
SERVICE_UNAVAILABLE = 503
RETRYABLE_ERRORS = (OSError, IncompleteRead)  # a restarted server may answer the next attempt


class RemoteReward:
    """Reward that a server computes from 8-bit PNGs, over HTTP; never differentiable. The name is the address.

    address  http(s)://HOST[:PORT][/PATH][,timeout=SECONDS][,tries=COUNT]; a token comes from STEER_REWARD_TOKEN
    The server is contacted at once. Raises RewardError, with one line that names the address, if the server does not
    answer in this protocol, and for every call that fails. Only failed or broken connections are retried.
    """

    differentiable = False

    def __init__(self, address: str) -> None:
        self.name, *options = address.split(",")
        self._url = checked_url(self.name)
        given = _options(self.name, options)
        self._timeout, self._tries = given.get("timeout", TIMEOUT), int(given.get("tries", MAX_ATTEMPTS))
        payload = self._request("GET", "", None)
        if payload.get("protocol") != PROTOCOL:
            raise self._error(f"uses protocol {payload.get('protocol')!r:.20}, this side {PROTOCOL}")
        self.serves = line(payload.get("name"))
        """Name of the reward on the server."""

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.shape[-2] * images.shape[-1]
        if pixels > MAX_PIXELS:
            raise RewardError(f"reward {self.name!r}: images of {pixels} pixels, at most {MAX_PIXELS} are sent")
        if not images.isfinite().all():
            raise RewardError(f"reward {self.name!r}: images that are not finite cannot be sent")
        batch_size = min(MAX_IMAGES, MAX_PIXELS // max(pixels, 1))
        scores = [torch.zeros(0)]
        for n in range(0, len(prompts), batch_size):
            some = prompts[n : n + batch_size]
            payload = self._request("POST", "score", encode(images[n : n + batch_size], some))
            try:
                scores.append(read_scores(payload, len(some)))
            except RewardError as error:
                raise self._error(f"answers wrongly: {error}") from error
        return torch.cat(scores).to(images.device)

    def _request(self, method: str, path: str, body: bytes | None) -> Mapping[str, Any]:
        """Send a request and return the JSON of the reply. Raises RewardError."""
        for attempt in range(1, self._tries + 1):
            try:
                status, reply = self._send(method, path, body)
            except TimeoutError as error:
                remedy = "increase ,timeout= or fix the reward"
                raise self._error(f"timed out after {self._timeout:g} s: {remedy}") from error
            except RETRYABLE_ERRORS as error:
                if attempt == self._tries:
                    how = line(getattr(error, "strerror", None) or error) or type(error).__name__
                    raise self._error(f"cannot be reached ({how}): is `steer rewards serve` running there?") from error
            except HTTPException as error:
                raise self._error(f"does not answer in HTTP ({type(error).__name__}: {line(error)})") from error
            else:
                if status != SERVICE_UNAVAILABLE or attempt == self._tries:
                    return self._read(status, reply)
            time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _send(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Return status and body within the timeout; at most MAX_REPLY_BYTES + 1 bytes of the body are read.

        Raises TimeoutError, ConnectionError, HTTPException (IncompleteRead if the body ends early), OSError.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := read_token():
            headers["Authorization"] = f"Bearer {token}"
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=self._timeout)
        with _deadline(connection, self._timeout) as expired:
            connection.connect()
            if expired.is_set():  # at the deadline there was no connection to close yet
                raise TimeoutError
            connection.request(method, f"{self._url.path.rstrip('/')}/{path}", body, headers)
            response, reply = connection.getresponse(), b""
            while len(reply) <= MAX_REPLY_BYTES and (piece := response.read(MAX_REPLY_BYTES + 1 - len(reply))):
                reply += piece
            if len(reply) <= MAX_REPLY_BYTES and response.length:
                raise IncompleteRead(reply, response.length)
            return response.status, reply

    def _read(self, status: int, reply: bytes) -> Mapping[str, Any]:
        if len(reply) > MAX_REPLY_BYTES:
            raise self._error(f"answers with more than {MAX_REPLY_BYTES} bytes")
        try:
            payload = read_json(reply)
        except InputError as error:
            raise self._error(f"answers with status {status}, {error}") from error
        if status != 200:
            raise self._error(f"answers with status {status}: {line(payload.get('error'))}")
        return payload

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward {self.name!r} {what}")


@contextmanager
def _deadline(connection: HTTPConnection, seconds: float) -> Iterator[threading.Event]:
    """Close the connection at the deadline, even if data still arrives, and raise TimeoutError."""
    expired = threading.Event()

    def end() -> None:
        expired.set()
        if isinstance(connection.sock, socket.socket):
            with suppress(OSError):  # the other side closed it first
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    except (*RETRYABLE_ERRORS, HTTPException) as error:
        if expired.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        connection.close()
    if expired.is_set():
        raise TimeoutError


def checked_url(address: str, token: str = TOKEN) -> SplitResult:
    """Split an address. Raises RewardError for an invalid one, or one with more than host, port and path.

    token  the environment variable that holds the token of such addresses
    """
    try:
        url = urlsplit(address)
        _, host = url.port, url.hostname or ""
        host.encode("idna")
    except ValueError as error:
        raise RewardError(f"reward {address!r:.200}: not an address ({line(error)})") from error
    if url.username or url.password or url.query or url.fragment:
        raise RewardError(
            f"reward at {host!r:.200}: addresses are written into reports and images, so they must not hold a name, "
            f"password, ? or #: put a token into the environment variable {token}"
        )
    if not host or not re.fullmatch(r"[!-~]*", address):
        raise RewardError(f"reward {address!r:.200}: not an address, http://HOST:PORT/ is one")
    return url


def _options(name: str, options: Sequence[str]) -> dict[str, float]:
    patterns, given = {"tries": r"[1-9]\d?", "timeout": NUMBER}, dict[str, float]()
    for option in options:
        key, _, value = option.partition("=")
        if key not in patterns or not re.fullmatch(patterns[key], value):
            raise RewardError(f"reward {name!r}: takes timeout=SECONDS and tries=1 to 99, got {option!r:.80}")
        if key in given:
            raise RewardError(f"reward {name!r}: {key}= is given twice: give it once")
        given[key] = float(value)
    if not given.get("timeout", 1) > 0:
        raise RewardError(f"reward {name!r}: timeout= must be above 0 seconds")
    return given


MAX_CONCURRENT_REQUESTS = 8  # requests that are read or wait; each holds its images in memory
IDLE_TIMEOUT = 30.0  # seconds without a byte after which a connection is closed
SHUTDOWN_TIMEOUT = 10.0  # seconds for the running call to finish
LOCAL = ("127.0.0.1", "::1", "localhost")


class RequestError(Exception):
    """A refused request: HTTP status, and one line."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Server of one reward. `serve_until_signal` is the loop; port 0 selects a free port, see `url`.

    token   bearer token that requests need; None: no token
    device  device on which images are scored
    Raises InputError if the address cannot be used.
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
        self._one_by_one, self._free = threading.Lock(), threading.BoundedSemaphore(MAX_CONCURRENT_REQUESTS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({line(error)})") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def about(self) -> dict[str, Any]:
        """Return the reply to GET."""
        return {"protocol": PROTOCOL, "name": self.reward.name, "differentiable": False}

    def check_token(self, header: str) -> None:
        """Raise RequestError if the bearer token is wrong."""
        if self._token is not None and not hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode()):
            raise RequestError(
                401, "this server requires its token: set STEER_REWARD_TOKEN in the client's environment"
            )

    @contextmanager
    def request_slot(self) -> Iterator[None]:
        """Hold one of the few slots for concurrent requests. Raises RequestError if all are in use."""
        if not self._free.acquire(blocking=False):
            raise RequestError(503, "busy: too many requests at once")
        try:
            yield
        finally:
            self._free.release()

    def scores(self, body: bytes) -> list[float]:
        """Score a request's body. Raises RequestError."""
        try:
            images, prompts = decode(body)
        except InputError as error:
            raise RequestError(400, str(error)) from error
        try:
            with self._one_by_one, torch.no_grad():
                return score(self.reward, images.to(self._device), prompts).tolist()
        except RewardError as error:
            raise RequestError(422, str(error)) from error

    def serve_until_signal(self, ready: Callable[[], None]) -> bool:
        """Serve until SIGINT or SIGTERM, in the main thread; return whether all calls of the reward have ended."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=self.shutdown, daemon=True).start())
        ready()
        self.serve_forever(poll_interval=0.1)
        self.server_close()
        # A request releases its slot when its reply is written.
        end = time.monotonic() + SHUTDOWN_TIMEOUT
        return all(self._free.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(MAX_CONCURRENT_REQUESTS))


class Handler(BaseHTTPRequestHandler):
    """Handler of one connection."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "steer", ""
    timeout = IDLE_TIMEOUT

    def do_GET(self) -> None:
        self._answer("/", self.server.about)

    def do_POST(self) -> None:
        self._answer("/score", self._score_batch)

    def _score_batch(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(411, "a request needs its Content-Length")
        if len(length) > 12 or int(length) > MAX_REQUEST_BYTES:
            raise RequestError(413, f"a request has at most {MAX_REQUEST_BYTES} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestError(400, "the request broke off")
        return {"scores": self.server.scores(body)}

    def _answer(self, path: str, work: Callable[[], dict[str, Any]]) -> None:
        """Send one reply and close the connection: the rest of a refused request is never read as another request."""
        self.close_connection = True
        with suppress(OSError):  # the client disconnected, or was idle
            try:
                with self.server.request_slot():
                    self._send(*self._reply(path, work))
            except RequestError as error:
                self._send(error.status, {"error": line(error)})

    def _reply(self, path: str, work: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        try:
            self.server.check_token(self.headers.get("Authorization", ""))
            if self.path != path:
                raise RequestError(404, "use GET / or POST /score")
            return 200, work()
        except RequestError as error:
            return error.status, {"error": line(error)}

    def _send(self, status: int, payload: dict[str, Any]) -> None:
        body = json.dumps(payload, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: programs read the one line with the address."""
