"""Child processes that are killed, or run with limited resources: forked, which takes milliseconds."""

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
# Audit events that Python raises before it changes files; `Steps` counts them, and calls of fsync.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.copyfile"}
NOBODY = 65534
Action = Callable[[], Any]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or minus the signal, and its output."""

    code: int
    output: str

    def clean(self) -> bool:
        """Return whether it succeeded or refused with a one-line message."""
        last = self.output.strip().splitlines()[-1:] or [""]
        line = self.code == REFUSED or last[0].startswith("steer: ")
        return self.code == 0 or (self.code in (REFUSED, 2) and line and "Traceback" not in self.output)


def forked(action: Action, folder: Path, timeout: float = 300) -> Ended:
    """Run an action in a child and collect its output; `folder` is named if it hangs."""
    reading, writing = os.pipe()
    child = _begun(action, writing)
    os.set_blocking(reading, False)
    output, until = b"", time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        output += _heard(reading)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a child hangs at {folder}: {output.decode(errors='replace')[-2000:]}")
        time.sleep(0.002)
    output += _heard(reading)
    os.close(reading)
    return Ended(os.waitstatus_to_exitcode(ended[1]), output.decode(errors="replace"))


def _heard(reading: int) -> bytes:
    try:
        return os.read(reading, 1 << 20)
    except BlockingIOError:
        return b""


def started(action: Action, log: Path) -> int:
    """Start a child that runs an action and prints to a file; return its process id."""
    return _begun(action, os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))


def _begun(action: Action, output: int) -> int:
    """Fork with stdout and stderr redirected to an open file descriptor, which is then closed here."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(_ran(action))
    os.close(output)
    return child


def _ran(action: Action) -> int:
    """Run an action in the child, and return its exit code."""
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
    """Count file operations of this process below a folder; it is killed before operation number `fatal`.

    fsync does nothing: after SIGKILL, unlike a power cut, written data is there.
    """

    def __init__(self, folder: Path, fatal: int = -1) -> None:
        self.folder, self.fatal, self.count = str(folder), fatal, 0

    def __enter__(self) -> "Steps":
        sys.addaudithook(self._on_event)
        os.fsync = self._synced  # type: ignore[assignment]
        return self

    def _synced(self, number: int) -> None:
        if self.folder in os.readlink(f"/proc/self/fd/{number}"):
            self._step()

    def __exit__(self, *error: object) -> None:
        self.folder = "\0"  # an audit hook cannot be removed

    def _on_event(self, event: str, given: tuple[Any, ...]) -> None:
        if event in EVENTS and any(isinstance(one, str | Path) and self.folder in str(one) for one in given):
            self._step()

    def _step(self) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def steps_of(action: Action, folder: Path) -> int:
    """Count the file operations of an action below a folder, in a child."""
    count = folder.parent / f"{folder.name}.count"

    def counted() -> None:
        with Steps(folder) as steps:
            action()
        count.write_text(str(steps.count))

    ended = forked(counted, folder)
    assert ended.code == 0, ended.output
    return int(count.read_text())


def killed_at(step: int, action: Action, folder: Path) -> Ended:
    """Run an action in a child that is killed before one of its file operations."""

    def dying() -> None:
        with Steps(folder, step):
            action()

    return forked(dying, folder)


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Set a resource limit of this process; called in a child, it does not affect the parent."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Let this process open only so many more files."""
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
    """Drop root privileges, so that file permissions apply to this process."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def open_to_all(place: Path) -> None:
    """Make a path, all below it and pytest's folders above it readable for all users."""
    for path in [place, *place.parents, *place.rglob("*")]:
        mode = path.stat().st_mode
        if path.is_dir() and not mode & 0o001:
            path.chmod(mode | 0o055)
        elif path.is_file() and not mode & 0o004:
            path.chmod(mode | 0o044)


def small_disk(folder: Path, size: int) -> bool:
    """Mount a tmpfs of `size` bytes on a folder, for this process alone; return False without permission."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0 or libc.mount(b"none", b"/", None, 0x44000, None) != 0:
        return False
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0)
