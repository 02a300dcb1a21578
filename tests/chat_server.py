"""An OpenAI-compatible endpoint in this process that answers by a function of the request, and records requests."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

Answer = Callable[["Request"], Any]  # a completion (dict), a text, or (status, body, headers)


@dataclass(frozen=True)
class Request:
    """A received request."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return str(self.body["messages"][0]["content"][-1]["text"])

    @property
    def images(self) -> list[np.ndarray]:
        """The images (H, W, 3), 0..1."""
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        files = [BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))) for url in urls]
        return [np.asarray(Image.open(file)) / 255 for file in files]


@dataclass
class Served:
    """The server's address, its requests in the order of arrival, and the most that it worked on at once."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    at_once: int = 0


def completion(text: str = "", tops: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if tops is not None:
        listed = [{"token": token, "logprob": p} for token, p in tops.items()]
        choice["logprobs"] = {"content": [{"token": listed[0]["token"], "top_logprobs": listed}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@contextmanager
def serve(answer: Answer, delay: float = 0.0) -> Iterator[Served]:
    served, lock, busy = Served(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            request = Request(json.loads(raw), dict(self.headers))
            with lock:
                served.requests.append(request)
                busy[0] += 1
                served.at_once = max(served.at_once, busy[0])
            time.sleep(delay)
            reply = answer(request)
            with lock:
                busy[0] -= 1
            status, body, headers = reply if isinstance(reply, tuple) else (200, reply, {})
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        yield served
        server.shutdown()
