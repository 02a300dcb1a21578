"""The processes that share one run, as `torchrun` or `accelerate launch` start them; one where it was started plainly.

here = launch_context()
with here.local_main_process_first():      # what is downloaded is downloaded once, what is wrong is said once
    pipe = load(…)
todo = here.from_main(lambda: …)
for n in here.share(len(todo)): …
here.wait()                  # then here.is_main merges
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from steer.errors import InputError
from steer.training.distributed import report_lost_process

Value = TypeVar("Value")
# Where launchers say how many processes they started, as accelerate reads it.
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
BARRIER_TIMEOUT = timedelta(
    days=30
)  # that one process may wait for the others; by default they give up after half an hour


def launch_context(cpu: bool = True) -> "LaunchContext":
    """This process among those of its run. A plain process is the only one, and nothing distributed is begun for it.

    cpu  whether they talk to each other over the CPU (gloo), which is all that sharing work takes; False: over their
         GPUs where there are any (NCCL), as training does. What accelerate has set up before stays as it is.
    """
    if all(os.environ.get(name, "1") == "1" for name in WORLD_SIZE_VARIABLES):
        return LaunchContext()
    import torch
    from accelerate import PartialState

    # Without cpu=True accelerate would take each of several processes on a machine without a GPU for the only one.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=BARRIER_TIMEOUT)
    return LaunchContext(state.process_index, state.num_processes, state.local_process_index)


def shutdown_distributed() -> None:
    """Ends what the processes of a run have between them, once they have done all. Imports nothing.

    PyTorch may abort a process that exits without.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that says what all of them would say. Imports nothing."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class LaunchContext:
    """One of `world_size` processes; `local_rank` is its number on its own machine.

    Where another one has ended before its time, whoever waits ends too: the main process with an InputError, the
    others, which have nothing to add, with exit code 2.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this one merges what the others made, and has the last word."""
        return self.rank == 0

    def split_indices(self, n: int) -> range:
        """The indices among 0 … n − 1 that are this process's: together the processes have each exactly once."""
        return range(self.rank, n, self.world_size)

    def wait_for_everyone(self) -> None:
        """Returns when all have come here."""
        if self.world_size > 1:
            from accelerate import PartialState

            with self._fail_with_main():
                PartialState().wait_for_everyone()

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the block before the others; if it raises, the others never do."""
        if self.local_rank > 0:
            self.wait_for_everyone()
        yield
        if self.local_rank == 0:
            self.wait_for_everyone()

    def broadcast_from_main(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the main process, for all; it must pickle. In the others it is not called."""
        if self.world_size == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        box = [make()] if self.is_main_process else [None]
        with self._fail_with_main():
            broadcast_object_list(box, from_process=0)
        return box[0]  # type: ignore[return-value]

    def device(self, given: str | None) -> str | None:
        """Where to run: of several processes that are told "cuda" or nothing, each has a GPU of its own."""
        import torch

        if self.world_size == 1 or given not in (None, "cuda") or not torch.cuda.is_available():
            return given
        own = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(own)  # for whatever says no more than "cuda"
        return own

    @contextmanager
    def _fail_with_main(self) -> Iterator[None]:
        try:
            with report_lost_process("; what was finished is kept, the same command goes on"):
                yield
        except InputError as error:
            if not self.is_main_process:
                raise SystemExit(2) from error
            raise
