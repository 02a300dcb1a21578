"""Python processes that tests start, forked from one that has imported everything: that costs milliseconds, and a
start of Python with torch and diffusers seconds.

Where torch has one thread, that process is itself forked from pytest's, before the first test. Two things
differ from `python WORDS…`: imports have happened before the process has its environment, and atexit does not run.
Where those are what a test is about, and once for every kind of start, tests take subprocess.
"""

import faulthandler
import logging
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO
from unittest import mock

import accelerate  # noqa: F401 - as all below, for those that are forked
import families  # noqa: F401
import numpy
import peft  # noqa: F401
import torch

import steer
from steer.apps import sampling  # noqa: F401

for _name in steer.__all__:
    getattr(steer, _name)
ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class Forked:
    """As much of subprocess.Popen as tests use: text streams, signals, an exit code below zero after a signal."""

    def __init__(self, words: Sequence[object], cwd: Path, env: Mapping[str, str]) -> None:
        _parent()
        (out, printing), (err, erring) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
        self.args = [str(word) for word in words]
        self._process = CONTEXT.Process(target=_become, args=(self.args, str(cwd), dict(env), printing, erring))
        self._process.start()
        self.stdout, self.stderr = _stream(out), _stream(err)
        printing.close()
        erring.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None and self._process.pid:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Return the rest of stdout and stderr, and wait for the end."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        self.wait()
        if late.finished.is_set():
            raise subprocess.TimeoutExpired(self.args, timeout, out, err)
        late.cancel()
        return out, err


def environment_with(folder: Path) -> dict[str, str]:
    """The environment of a process with one thread that also imports what lies in a folder."""
    path = filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def run(words: Sequence[object], cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """`python WORDS…`, to its end."""
    begun = Forked(words, cwd, env)
    out, err = begun.communicate()
    return subprocess.CompletedProcess(begun.args, begun.wait(), out, err)


def run_two(words: Sequence[object], cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a script as torchrun --nproc-per-node 2 does: both processes end when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [Forked(words, cwd, {**env, **both, "RANK": n, "LOCAL_RANK": n}) for n in ("0", "1")]
    with ThreadPoolExecutor(2) as pool:
        outputs = [pool.submit(one.communicate) for one in processes]
        while None in (codes := [one.returncode for one in processes]):
            if any(codes):
                for one in processes:
                    one.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        outs, errs = zip(*(one.result() for one in outputs), strict=True)
    return subprocess.CompletedProcess([*words], next(filter(None, codes), 0), "".join(outs), "".join(errs))


def fork_parent() -> None:
    """Fork the parent of all from this process. OpenMP's threads do not survive that: with some, it starts later."""
    if torch.get_num_threads() == 1:
        resource_tracker.ensure_running()
        with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
            _parent()


def _parent() -> None:
    """Start the process that all are forked from, with one thread and the tests on its path, if it is not there."""
    before = dict(os.environ)
    os.environ |= environment_with(ROOT / "tests")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before


def _fork(python: object, words: Sequence[str], kept: Sequence[int]) -> int:
    """Do in a fork of this process the work of `python -c CODE`, without pytest's hold on errors and logging."""
    if child := os.fork():
        return child
    lowest = 3
    for number in sorted(kept):
        os.closerange(lowest, number)
        lowest = number + 1
    os.closerange(lowest, os.sysconf("SC_OPEN_MAX"))
    faulthandler.disable()
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    logging.root.handlers.clear()
    try:
        exec(words[-1], {})
    finally:
        os._exit(0)


def _stream(end: Connection) -> IO[str]:
    stream = os.fdopen(os.dup(end.fileno()))
    end.close()
    return stream


def _become(words: list[str], cwd: str, env: dict[str, str], printing: Connection, erring: Connection) -> None:
    """In the child: what `python WORDS…` does."""
    for number, end in ((1, printing), (2, erring)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    plain = words[0] in ("-m", "-c")
    given = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [cwd if plain else str(Path(words[0]).parent), *given]
    sys.argv = words[1:] if plain else words
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    random.seed()  # what the parent has drawn is not for all of its children
    numpy.random.seed()
    if words[0] == "-m":
        sys.modules.pop(words[1], None)  # run again, under the name __main__
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
