"""The processes of one run, as started by `torchrun` or `accelerate launch`, or a single plain process.

context = launch_context()
with context.local_main_process_first():  # one download, one error message
    pipe = load(…)
todo = context.broadcast_from_main(lambda: …)
for n in context.split_indices(len(todo)): …
context.wait_for_everyone()  # then context.is_main_process merges
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
# Set by launchers; the names that accelerate reads.
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
BARRIER_TIMEOUT = timedelta(days=30)  # PyTorch's default of half an hour is shorter than some prompts take


def launch_context(cpu: bool = True) -> "LaunchContext":
    """Return the distributed context. A plain process initializes nothing distributed.

    cpu  communicate over the CPU (gloo), enough to split work; False: over GPUs if there are any (NCCL), as training
         does. An earlier set-up by accelerate is kept.
    """
    if all(os.environ.get(name, "1") == "1" for name in WORLD_SIZE_VARIABLES):
        return LaunchContext()
    import torch
    from accelerate import PartialState

    # Without a GPU and cpu=True, accelerate would ignore the other processes.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=BARRIER_TIMEOUT)
    return LaunchContext(state.process_index, state.num_processes, state.local_process_index)


def shutdown_distributed() -> None:
    """Destroy the process group before exit: otherwise PyTorch may abort the process. Imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main_process() -> bool:
    """Tell whether this process prints messages and errors for all. Imports nothing."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class LaunchContext:
    """The distributed context: process `rank` of `world_size`, `local_rank` on its machine.

    When a process of the run dies, waiting ones end too: the main process with an InputError, the others silently with
    exit code 2.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process merges the results and prints."""
        return self.rank == 0

    def split_indices(self, n: int) -> range:
        """Return this process's share of the indices 0 … n − 1; each index belongs to exactly one process."""
        return range(self.rank, n, self.world_size)

    def wait_for_everyone(self) -> None:
        """Wait until all processes have reached this point."""
        if self.world_size > 1:
            from accelerate import PartialState

            with self._fail_with_main():
                PartialState().wait_for_everyone()

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run a block in the first process of each machine before the others; if it raises, the others never run it."""
        if self.local_rank > 0:
            self.wait_for_everyone()
        yield
        if self.local_rank == 0:
            self.wait_for_everyone()

    def broadcast_from_main(self, make: Callable[[], Value]) -> Value:
        """Call `make` in the main process alone and return its result, which must pickle, in all."""
        if self.world_size == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        values = [make()] if self.is_main_process else [None]
        with self._fail_with_main():
            broadcast_object_list(values, from_process=0)
        return values[0]  # type: ignore[return-value]

    def device(self, given: str | None) -> str | None:
        """Choose the device: with several processes, "cuda" or None becomes a GPU for each."""
        import torch

        if self.world_size == 1 or given not in (None, "cuda") or not torch.cuda.is_available():
            return given
        name = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(name)  # for code that asks for plain "cuda"
        return name

    @contextmanager
    def _fail_with_main(self) -> Iterator[None]:
        try:
            with report_lost_process("; finished work is kept: run the command again to resume"):
                yield
        except InputError as error:
            if not self.is_main_process:
                raise SystemExit(2) from error
            raise
