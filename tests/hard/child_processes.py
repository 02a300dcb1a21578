"""Children of this process that are killed, or that the machine refuses something: forked, so that one costs
milliseconds and not a Python's start."""

import ctypes
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steer.errors import InputError

REFUSED, BROKE = 70, 71  # exit codes of a child: an InputError; any other exception
# What Python tells of before it does it, and fsync, which is told of here.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.copyfile"}
NOBODY = 65534
Action = Callable[[], Any]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or the signal below zero, and what it said."""

    code: int
    said: str

    def clean(self) -> bool:
        """Whether it did its work, or refused in one line."""
        last = self.said.strip().splitlines()[-1:] or [""]
        line = self.code == REFUSED or last[0].startswith("steer: ")
        return self.code == 0 or (self.code in (REFUSED, 2) and line and "Traceback" not in self.said)


def forked(action: Action, folder: Path, timeout: float = 300) -> Ended:
    """Runs an action in a child, about `folder`, and listens to what it says."""
    reading, writing = os.pipe()
    child = _begun(action, writing)
    os.set_blocking(reading, False)
    said, until = b"", time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        said += _heard(reading)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child hangs at {folder}: {said.decode(errors='replace')[-2000:]}")
        time.sleep(0.002)
    said += _heard(reading)
    os.close(reading)
    return Ended(os.waitstatus_to_exitcode(ended[1]), said.decode(errors="replace"))


def _heard(reading: int) -> bytes:
    try:
        return os.read(reading, 1 << 20)
    except BlockingIOError:
        return b""


def started(action: Action, log: Path) -> int:
    """The number of a child that runs an action; its words go to a file."""
    return _begun(action, os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))


def _begun(action: Action, said: int) -> int:
    """Forks, with what the child says going to a file that is open here, and is closed here."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os._exit(_ran(action))
    os.close(said)
    return child


def _ran(action: Action) -> int:
    """Runs an action in the child, which never comes back to the tests."""
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
    code = 0
    try:
        torch.set_num_threads(1)  # the threads of the parent are not here
        action()
    except InputError as error:
        sys.stderr.write(str(error))
        code = REFUSED if "\n" not in str(error) else BROKE
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - it ends in the child's exit code
        traceback.print_exc(file=sys.stderr)
        code = BROKE
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


class Steps:
    """Counts what this process does to files below a folder; before number `fatal` it is killed.

    Nothing is brought to the disk: a kill loses nothing that a power cut would.
    """

    def __init__(self, folder: Path, fatal: int = -1) -> None:
        self.folder, self.fatal, self.count = str(folder), fatal, 0

    def __enter__(self) -> "Steps":
        sys.addaudithook(self._told)
        os.fsync = self._synced  # type: ignore[assignment]
        return self

    def _synced(self, number: int) -> None:
        if self.folder in os.readlink(f"/proc/self/fd/{number}"):
            self._step()

    def __exit__(self, *error: object) -> None:
        self.folder = "\0"  # a hook stays

    def _told(self, event: str, given: tuple[Any, ...]) -> None:
        if event in EVENTS and any(isinstance(one, str | Path) and self.folder in str(one) for one in given):
            self._step()

    def _step(self) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def steps_of(action: Action, folder: Path) -> int:
    """How many steps an action takes below a folder, in a child."""
    count = folder.parent / f"{folder.name}.count"

    def counted() -> None:
        with Steps(folder) as steps:
            action()
        count.write_text(str(steps.count))

    ended = forked(counted, folder)
    assert ended.code == 0, ended.said
    return int(count.read_text())


def killed_at(step: int, action: Action, folder: Path) -> Ended:
    """Runs an action in a child that is killed at one of its steps."""

    def dying() -> None:
        with Steps(folder, step):
            action()

    return forked(dying, folder)


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """A limit of this process (in a child: its parent has none)."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Only so many more files may be open in this process."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    with limited(resource.RLIMIT_NOFILE, highest + 9):
        taken = []
        while len(taken) <= highest:
            try:
                taken.append(os.dup(2))
            except OSError:
                break
        for number in taken[:more]:
            os.close(number)
        assert len(taken) >= more
        yield


def as_nobody() -> None:
    """Permissions count for this process: root has none to heed."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def open_to_all(place: Path) -> None:
    """Lets others look into pytest's own folders above a place, and read what is in it."""
    for path in [place, *place.parents, *place.rglob("*")]:
        mode = path.stat().st_mode
        if path.is_dir() and not mode & 0o001:
            path.chmod(mode | 0o055)
        elif path.is_file() and not mode & 0o004:
            path.chmod(mode | 0o044)


def small_disk(folder: Path, size: int) -> bool:
    """Puts a file system of `size` bytes in the place of a folder, for this process alone; False where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0 or libc.mount(b"none", b"/", None, 0x44000, None) != 0:
        return False
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0)
