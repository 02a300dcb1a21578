"""How the command's process ends."""

import atexit
import os
import sys
from types import TracebackType


class Ending:
    """Around the whole command: the process ends with its exit code, even where a reward still hangs in a thread.

    It registers first, so that it acts after all else that runs at the end of a process. Imports nothing.
    """

    def __init__(self) -> None:
        self._code = 1  # what Python makes of any other exception

    def __enter__(self) -> None:
        atexit.register(self._at_last)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._code = 0
        elif isinstance(error, SystemExit):
            self._code = error.code if isinstance(error.code, int) else int(error.code is not None)

    def _at_last(self) -> None:
        contract = sys.modules.get("steer.contract")
        if contract is not None and contract.calls_left_behind():
            end_now(self._code)


def end_now(code: int) -> None:
    """Ends the process with what it has said, and without shutting the interpreter down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
