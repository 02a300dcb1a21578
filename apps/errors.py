"""Errors as one line, and the exit of the process. Imports nothing heavy: the command line always loads it."""

import atexit
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from steer.errors import InputError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
}


def describe_os_error(error: OSError) -> str:
    """Describe a file error: the file, the reason, the remedy."""
    description = error.strerror or str(error) or type(error).__name__
    description = f"{error.filename}: {description}" if error.filename is not None else description
    remedy = REMEDIES.get(error.errno or 0)
    return f"{description}; {remedy}" if remedy else description


class ExitGuard:
    """Context of the whole command: the process exits with its code even while a reward hangs in a thread.

    Enter it first, so that it acts after all other exit handlers. Imports nothing.
    """

    def __init__(self) -> None:
        self._code = 1  # Python's code for any other exception

    def __enter__(self) -> None:
        atexit.register(self._exit_if_hanging)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._code = 0
        elif isinstance(error, SystemExit):
            self._code = error.code if isinstance(error.code, int) else int(error.code is not None)

    def _exit_if_hanging(self) -> None:
        contract = sys.modules.get("steer.reward")
        if contract is not None and contract.has_abandoned_calls():
            exit_now(self._code)


def exit_now(code: int) -> None:
    """Flush the output and end the process without shutting the interpreter down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_writable(out: Path, place: str = "") -> None:
    """Create a folder. Raises InputError that begins with `place` (--out by default) if it is not writable."""
    from steer.files import write_errors, write_text

    with write_errors(place or f"--out {out}", "choose another folder"):
        write_text(out / ".writable", "")
        (out / ".writable").unlink()


@contextmanager
def named(subject: str) -> Iterator[None]:
    """Prefix the InputErrors of a block with their subject."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error


@contextmanager
def wrap_errors(subject: str, kept: str, memory_hint: str) -> Iterator[None]:
    """Turn errors of diffusers, of the disk and of memory into an InputError that begins with `subject`.

    kept         what work is not lost
    memory_hint  how to reduce memory use
    """
    import torch

    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(f"{subject}: the device's memory is full: {memory_hint} ({kept})") from error
    except OSError as error:
        raise InputError(f"{subject}: {describe_os_error(error)} ({kept})") from error
    except (ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{subject}: {reason} ({kept})") from error
