"""Groups of processes of one run: forked with the environment of torchrun, which is faster; and torchrun itself."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState
from child_processes import Action, Ended, started

from steer.apps.processes import shutdown_distributed

LONGEST = 120.0  # seconds that a run may take


@dataclass(frozen=True)
class ProcessGroup:
    """Child processes of one distributed run, and their log files."""

    children: Sequence[int]
    logs: Sequence[Path]

    @classmethod
    def begun(cls, actions: Sequence[Action], folder: Path) -> "ProcessGroup":
        """Start one process per action; several form one distributed run. They print to files beside `folder`."""
        port, count = _free_port(), len(actions)
        logs = [folder.parent / f"{folder.name}.output-{index}" for index in range(count)]
        members = [_member(action, index, count, port) for index, action in enumerate(actions)]
        return cls([started(member, log) for member, log in zip(members, logs, strict=True)], logs)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or one of the processes has ended."""
        until = time.monotonic() + LONGEST
        while not condition() and time.monotonic() < until:
            if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in self.children):
                return
            time.sleep(0.002)

    def kill(self, members: Iterable[int]) -> None:
        """Send SIGKILL to some of them at once; it has no effect on one that has ended."""
        self._signal(signal.SIGKILL, members)

    def ended(self, patience: float = 0.1) -> list[Ended]:
        """Wait for all of them. If one fails, send SIGTERM to the others after `patience` seconds, as torchrun does."""
        begun, codes, signalled_at = time.monotonic(), dict[int, int](), None
        while waited := [index for index in range(len(self.children)) if index not in codes]:
            now = time.monotonic()
            if now > begun + LONGEST:
                self.kill(waited)
                raise AssertionError(f"{waited} hang: {[log.read_text()[-2000:] for log in self.logs]}")
            if any(codes.values()):
                signalled_at = signalled_at or now + patience
                if now > signalled_at:
                    self._signal(signal.SIGTERM, waited)
                    signalled_at = now + LONGEST
            for index in waited:
                if (one := os.waitpid(self.children[index], os.WNOHANG))[0]:
                    codes[index] = os.waitstatus_to_exitcode(one[1])
            time.sleep(0.002)
        return [Ended(codes[index], log.read_text()) for index, log in enumerate(self.logs)]

    def _signal(self, number: int, members: Iterable[int]) -> None:
        for index in members:
            os.kill(self.children[index], number)


class Launched:
    """A command of `steer` on two processes, started by torchrun."""

    def __init__(self, words: Iterable[str], log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "steer.apps.cli.main", *words]
        with log.open("w") as log_file:
            given = os.environ | {"OMP_NUM_THREADS": "1"}
            self.launcher = subprocess.Popen(command, env=given, stdout=log_file, stderr=log_file)
        self.log = log

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or the launcher has ended."""
        until = time.monotonic() + LONGEST
        while not condition() and self.launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.005)

    def kill(self) -> int:
        """Send SIGKILL to the launcher and its workers, which would survive it; return the number of workers."""
        task = Path(f"/proc/{self.launcher.pid}/task")
        workers = [int(word) for file in task.glob("*/children") for word in file.read_text().split()]
        for process in (self.launcher.pid, *workers):
            os.kill(process, signal.SIGKILL)
        self.launcher.wait()
        for worker in workers:
            while _is_alive(worker):
                time.sleep(0.005)
        return len(workers)

    def ended(self) -> Ended:
        """Wait for the launcher."""
        return Ended(self.launcher.wait(LONGEST), self.log.read_text())


def _is_alive(process: int) -> bool:
    """Return whether a process that is not a child of this one is still running."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _member(action: Action, index: int, count: int, port: int) -> Action:
    def run() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # set by earlier tests
        if count > 1:
            where = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in where.items()}
        action()
        shutdown_distributed()

    return run


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
