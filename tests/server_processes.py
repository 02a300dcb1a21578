"""Processes that serve, started and reaped."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from preloaded import Forked

# What a served reward may do. `armed` is a file beside it: while it is there, the process comes to harm at stars.
REWARDS = """
import ctypes, os, sys, threading
from pathlib import Path
import torch

ARMED = Path(__file__).with_name("armed")
inside = threading.Lock()

def armed(prompts):
    return "star" in prompts[0] and ARMED.exists()

def red(images, prompts):
    return images[:, 0].mean((1, 2))

def exits(images, prompts):
    if armed(prompts):
        os._exit(3)
    return red(images, prompts)

def crashes(images, prompts):
    if armed(prompts):
        ctypes.string_at(0)
    return red(images, prompts)

def stalls(images, prompts):
    if armed(prompts):
        threading.Event().wait()
    return red(images, prompts)

def hangs(images, prompts):
    if "star" in prompts[0]:
        ARMED.with_name("hanging").touch()
        threading.Event().wait()
    return red(images, prompts)

def spins(images, prompts):
    while True:
        (torch.randn(200, 200) @ torch.randn(200, 200)).sum().item()

def raises(images, prompts):
    raise KeyError("a\\nlabel")

def not_a_number(images, prompts):
    return torch.full((len(images),), float("nan"))

def alone(images, prompts):
    if not inside.acquire(blocking=False):
        raise RuntimeError("two at once")
    found = red(images, prompts)
    for _ in range(200):
        torch.randn(60, 60) @ torch.randn(60, 60)
    inside.release()
    return found
"""


@dataclass
class Served:
    """A server process, and the first line that it printed."""

    process: Forked
    url: str

    def end(self, number: int) -> tuple[int, str, str]:
        """Send a signal; return exit code, the rest of stdout, and stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.wait(), out, err


@contextmanager
def process(*words: object, folder: Path, **environment: str) -> Iterator[Served]:
    """Python with these words in a folder, where `own_served.py` lies. It does not outlive the block."""
    (folder / "own_served.py").write_text(REWARDS)
    started = Forked(words, folder, os.environ | {"PYTHONFAULTHANDLER": "0"} | environment)
    try:
        yield Served(started, started.stdout.readline().strip())
    finally:
        started.kill()
        started.communicate()


def serving(spec: str, folder: Path, *words: object, **environment: str) -> AbstractContextManager[Served]:
    """`steer rewards serve SPEC`."""
    return process("-m", "steer.apps.cli.main", "rewards", "serve", spec, *words, folder=folder, **environment)
