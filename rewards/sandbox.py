"""sandbox:FILE — a reward by an untrusted author, run in a child process with limits."""

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.reward import RewardError
from steer.rewards.inputs import takes_any_images
from steer.rewards.names import option_number
from steer.rewards.remote import line
from steer.rewards.sandbox_child import frame

SECONDS, MEMORY = 20.0, 2.0  # seconds of one call; GiB
START_SECONDS = 120.0  # to import torch, and to load a CLIP
CHUNK = 1 << 20


class SandboxReward:
    """The function reward(images, prompts) of a Python file, run in a child process; never differentiable.

    path     the file; its syntax and names are checked by `steer.rewards.code_rules` first
    seconds  limit of one call;  memory: limit in GiB;  clip: the CLIP behind the helper clip_cosine
    Raises RewardError, in one line, for code that is refused, fails, exceeds a limit, or violates the contract.
    """

    differentiable = False

    def __init__(
        self, path: str, *, seconds: str | float = SECONDS, memory: str | float = MEMORY, clip: str = "scenes"
    ) -> None:
        try:
            code = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"sandbox:{path}: cannot be read ({error}): give a Python file") from error
        self._start_with(code, f"sandbox:{path}", seconds, memory, clip)

    @classmethod
    def from_code(
        cls, code: str, name: str = "written", seconds: float = SECONDS, clip: str = "scenes"
    ) -> "SandboxReward":
        """Make a reward from Python source code."""
        reward = cls.__new__(cls)
        reward._start_with(code, name, seconds, MEMORY, clip)
        return reward

    def _start_with(self, code: str, name: str, seconds: str | float, memory: str | float, clip: str) -> None:
        from steer.rewards.code_rules import refusals

        self.name, self._lock = name, threading.Lock()
        self._seconds, gigabytes = option_number("seconds", seconds), option_number("memory", memory)
        if reasons := refusals(code):
            raise RewardError(f"{name}: {'; '.join(reasons)}")
        self._first = {"code": code, "seconds": self._seconds, "memory": gigabytes, "clip": clip}
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the child without this environment's secrets, in an empty folder. Raises RewardError."""
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": tempfile.gettempdir()}
        command = [sys.executable, "-m", "steer.rewards.sandbox_child"]
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        folder = tempfile.TemporaryDirectory(prefix="steer-sandbox-")
        process = self._process = subprocess.Popen(command, **streams, env=environment, cwd=folder.name)
        self._ended = weakref.finalize(self, _end, process, folder)
        self._send(process, json.dumps(self._first).encode())
        reply = self._reply(process, START_SECONDS)
        self.network = bool(reply.get("network"))
        """Whether the child kept the network because the system allows no namespace; it still cannot open sockets."""
        return process

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        head = {"shape": list(images.shape), "prompts": list(prompts)}
        pixels = images.detach().float().cpu().contiguous().numpy().tobytes()
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            self._send(process, json.dumps(head).encode(), pixels)
            reply = self._reply(process, self._seconds)
        scores = torch.tensor(reply["scores"], dtype=torch.float32).reshape(reply["shape"])
        if tuple(scores.shape) != (len(prompts),):
            shape = f"({len(prompts)},)"
            raise RewardError(f"{self.name}: reward must return a tensor of shape {shape}, got {tuple(scores.shape)}")
        return scores.to(images.device)

    def _send(self, process: subprocess.Popen[bytes], *contents: bytes) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join(map(frame, contents)))
            process.stdin.flush()
        except OSError as error:
            raise self._failed(f"its process ended with exit code {process.wait()}") from error

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        """Read one reply within the time. Raises RewardError after ending the process."""
        end, read, size = time.monotonic() + seconds, b"", 8
        assert process.stdout is not None
        while len(read) < size:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise self._failed(f"did not return within {seconds:g} s and was ended: does it loop?")
            piece = os.read(process.stdout.fileno(), min(CHUNK, size - len(read)))
            if not piece:
                code = process.wait()
                raise self._failed(f"its process was ended by the limits of time or memory (exit code {code})")
            read += piece
            size = 8 + int.from_bytes(read[:8]) if len(read) >= 8 else 8
        reply = json.loads(read[8:])
        if "error" in reply:
            raise RewardError(f"{self.name}: {line(reply['error'])}")
        return reply

    def _failed(self, what: str) -> RewardError:
        self.close()
        return RewardError(f"{self.name}: {what}")

    def close(self) -> None:
        """End the child process; the next call starts another one."""
        self._ended()
        self._process = None


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # bytes that the child did not read
                continue
    folder.cleanup()
