"""Client of OpenAI-compatible chat endpoints: retries, bounded concurrency, a cache on disk, counted cost.

The key comes only from the environment variable STEER_CHAT_TOKEN. It appears in no message, log or cache: replies of
the server are redacted before they are read. Replies are bounded in bytes and time, and redirects are not followed.
"""

import base64
import hashlib
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from steer.errors import InputError
from steer.files import make_folder, user_cache, write_text
from steer.reward import RewardError
from steer.rewards.remote import LOCAL, checked_url, line, read_token

TOKEN = "STEER_CHAT_TOKEN"
TIMEOUT, MAX_ATTEMPTS, CONCURRENCY = 120.0, 4, 8  # seconds of one attempt; attempts; requests at once
RETRY_DELAY, MAX_DELAY = 0.5, 60.0  # seconds before the second attempt, doubled for each later one; at most
RETRIED = {408, 425, 429, 500, 502, 503, 504}
MAX_REPLY_BYTES = 4_000_000


@dataclass
class ChatCost:
    """Numbers of answered requests, cached replies and repeated attempts, and tokens as the server counts them."""

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} completion tokens"
        return f"{self.calls} requests answered, {self.cached} from the cache, {self.retries} retries, {tokens}"


@dataclass(frozen=True)
class ChatMessage:
    """One user message: images as PNG files, then the text."""

    text: str
    images: tuple[bytes, ...] = ()

    def content(self) -> list[dict[str, Any]]:
        """Return the content in the endpoint's format."""
        urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in self.images]
        return [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": self.text},
        ]


@dataclass(frozen=True)
class ChatReply:
    """Text of a reply, and its most probable first tokens with their log-probabilities; () if the server sends none."""

    text: str
    first: tuple[tuple[str, float], ...] = ()

    def probability(self, *answers: str) -> float:
        """Return the probability that the first token is one of the answers, in any case; 0 if none is listed."""
        wanted = {answer.lower() for answer in answers}
        return sum(math.exp(p) for token, p in self.first if token.strip().lower() in wanted)


def default_cache() -> Path:
    """Return this user's folder of cached replies."""
    return user_cache("chat")


class ChatClient:
    """Client of a model behind an OpenAI-compatible endpoint, at temperature 0.

    url          http(s)://HOST[:PORT]/v1; requests go to URL/chat/completions
    model        name of the model on that server
    timeout      seconds per attempt;  tries: attempts per request;  concurrency: requests at the same time
    cache        folder of replies, named by the checksum of the request; None: no cache
    Raises RewardError, with one line that names the endpoint.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = TIMEOUT,
        tries: int = MAX_ATTEMPTS,
        concurrency: int = CONCURRENCY,
        cache: Path | None = None,
    ) -> None:
        parts = checked_url(url, TOKEN)
        self.url, self.model, self.cost = url.rstrip("/"), model, ChatCost()
        self._timeout, self._tries, self._concurrency, self._cache = timeout, tries, concurrency, cache
        self._lock = threading.Lock()
        # Use the proxies of the environment, but not for this machine itself.
        self._http = httpx.Client(timeout=timeout, trust_env=parts.hostname not in LOCAL)

    def ask(self, messages: Sequence[ChatMessage], **options: Any) -> list[ChatReply]:
        """Send each distinct message once and return the replies in order; `options` are fields of the request."""
        bodies = [self._body(message, options) for message in messages]
        distinct = list(dict.fromkeys(bodies))
        with ThreadPoolExecutor(self._concurrency, "steer-chat") as threads:
            try:
                replies = dict(zip(distinct, threads.map(self._answer, distinct), strict=True))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)  # cancels the requests that have not begun
                raise
        return [replies[body] for body in bodies]

    def _body(self, message: ChatMessage, options: Mapping[str, Any]) -> bytes:
        user = {"role": "user", "content": message.content()}
        return json.dumps({"model": self.model, "messages": [user], "temperature": 0, **options}).encode()

    def _answer(self, body: bytes) -> ChatReply:
        key = hashlib.sha256(self.url.encode() + b"\n" + body).hexdigest()
        path = self._cache / key[:2] / f"{key}.json" if self._cache else None
        if path is not None and (stored := _read_cached(path)) is not None:
            self._count(cached=1)
            return stored
        text = self._request(body)
        try:
            reply, usage = read_reply(json.loads(text))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise self.error(f"answers with something else than a chat completion: {line(text[:120])!r}") from error
        self._count(calls=1, **usage)
        if path is not None:
            try:
                make_folder(path.parent)
                write_text(path, json.dumps({"text": reply.text, "first": reply.first}))
            except OSError as error:
                raise RewardError(f"cache={self._cache}: cannot be written ({error.strerror}): give another") from error
        return reply

    def _request(self, body: bytes) -> str:
        """Return the body of a successful reply, without the key. Raises RewardError."""
        problem = ""
        for attempt in range(1, self._tries + 1):
            delay = RETRY_DELAY * 2 ** (attempt - 1)
            try:
                status, text, wait = self._post(body)
            except httpx.TimeoutException:
                problem = f"timed out after {self._timeout:g} s: increase timeout="
            except httpx.HTTPError as error:
                problem = f"cannot be reached ({line(error) or type(error).__name__}): is a server running there?"
            else:
                if status == 200:
                    return text
                problem = f"answers with status {status}: {_message(text)}"
                if status in (401, 403):
                    problem += f"; the key is read from the environment variable {TOKEN}"
                if status not in RETRIED:
                    raise self.error(problem)
                delay = max(delay, wait)
            if attempt < self._tries:
                self._count(retries=1)
                time.sleep(min(delay, MAX_DELAY))
        raise self.error(f"{problem} (attempt {self._tries} of {self._tries})")

    def _post(self, body: bytes) -> tuple[int, str, float]:
        """Send one request; return the status, the redacted text, and the seconds that the server asks to wait."""
        token = self._token()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        end, read = time.monotonic() + self._timeout, b""
        with self._http.stream("POST", f"{self.url}/chat/completions", content=body, headers=headers) as response:
            for piece in response.iter_bytes():
                read += piece
                if len(read) > MAX_REPLY_BYTES:
                    raise self.error(f"answers with more than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the reply trickles")
        text = read.decode(errors="replace")
        wait = response.headers.get("Retry-After", "")
        return (
            response.status_code,
            text.replace(token, "***") if token else text,
            float(wait) if wait.isdecimal() else 0,
        )

    def _token(self) -> str | None:
        try:
            return read_token(TOKEN)
        except InputError as error:
            raise RewardError(str(error)) from error

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.cost, name, getattr(self.cost, name) + amount)

    def error(self, what: str) -> RewardError:
        """Create the error for this endpoint, in one line."""
        return RewardError(f"chat endpoint {self.url!r} (model {self.model!r}) {what}")


def read_reply(payload: Any) -> tuple[ChatReply, dict[str, int]]:
    """Read the first choice of a chat completion, and the tokens used. Raises ValueError, KeyError, TypeError."""
    choice = payload["choices"][0]
    text = choice["message"].get("content") or ""
    tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    first = tuple((one["token"], float(one["logprob"])) for one in tokens)
    if not isinstance(text, str) or not all(isinstance(token, str) and not math.isnan(p) for token, p in first):
        raise ValueError("content must be text, log-probabilities numbers")
    usage = payload.get("usage") or {}
    return ChatReply(text, first), {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}


def _read_cached(path: Path) -> ChatReply | None:
    """Read a cached reply; None if it is missing or corrupt, so that it is replaced."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return ChatReply(str(stored["text"]), tuple((str(token), float(p)) for token, p in stored["first"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _message(text: str) -> str:
    """Return the message of an error reply in one line."""
    try:
        payload = json.loads(text)
        error = payload.get("error", payload)
        return line(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        return line(text)
