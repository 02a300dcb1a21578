"""Errors of jobs in one line, and the end of the process. Nothing heavy is imported: the command line ends here."""

import atexit
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from safetensors import SafetensorError

from steer.errors import InputError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open: ulimit -n 4096"),
}


def describe_os_error(error: OSError) -> str:
    """The file, what is wrong with it, and what can be done."""
    description = error.strerror or str(error) or type(error).__name__
    description = f"{error.filename}: {description}" if error.filename is not None else description
    remedy = REMEDIES.get(error.errno or 0)
    return f"{description}; {remedy}" if remedy else description


class ExitGuard:
    """Around the whole command: the process ends with its exit code, even where a reward still hangs in a thread.

    It registers first, so that it acts after all else that runs at the end of a process. Imports nothing.
    """

    def __init__(self) -> None:
        self._code = 1  # what Python makes of any other exception

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
    """Ends the process with what it has said, and without shutting the interpreter down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def named(what: str) -> Iterator[None]:
    """An InputError inside begins with what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


@contextmanager
def wrap_errors(named: str, kept: str, less: str) -> Iterator[None]:
    """What diffusers refuses, the disk or the memory end as an InputError that begins with `named`.

    kept  what is not lost; less: what needs less memory
    """
    import torch

    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(f"{named}: the device's memory is full: {less} ({kept})") from error
    except OSError as error:
        raise InputError(f"{named}: {describe_os_error(error)} ({kept})") from error
    except (ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{named}: {reason} ({kept})") from error
