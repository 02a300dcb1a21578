"""The distributed context of a training, by accelerate."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import distributed

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.training.distributed import report_lost_process

Item = TypeVar("Item")
RESUME_HINT = ": see its output, and resume from the last checkpoint"


class AccelerateContext:
    """The processes of a run, launched by accelerate or torchrun; the main process writes and reports."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes

    @property
    def is_main_process(self) -> bool:
        """Whether this process has rank 0."""
        return self.rank == 0

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Gather the items of all processes, in the order of ranks."""
        if self.world_size == 1:
            return list(items)
        with report_lost_process(RESUME_HINT):
            return gather_object(list(items))

    def any(self, asked: bool) -> bool:
        """Whether any process has `asked` set; all take the same branch, or they would wait for each other forever."""
        return any(self.gather([asked]))

    def wait(self) -> None:
        """Wait for all processes."""
        with report_lost_process(RESUME_HINT):
            self._accelerator.wait_for_everyone()

    @contextmanager
    def translate_connection_errors(self) -> Iterator[None]:
        """Raise InputError where another process ended early, for work with collectives of accelerate.

        Errors of this process are not changed.
        """
        try:
            yield
        except RuntimeError as error:
            # NCCL has an error of its own; gloo's error names its source file.
            lost = isinstance(error, distributed.DistError) or "/gloo/" in str(error)
            if self.world_size == 1 or not lost:
                raise
            with report_lost_process(RESUME_HINT):
                raise

    def check(self, config: TrainingConfig) -> None:
        """Raise InputError where the prompts of an update cannot be distributed evenly, or a token is trained."""
        if self.world_size > 1 and config.prompt_prefix:
            raise InputError(
                f"context trains in one process, got {self.world_size}: use one, or leave context out for a LoRA"
            )
        if config.train_batch_size % self.world_size:
            raise InputError(
                f"train_batch_size must be a multiple of the {self.world_size} processes, got {config.train_batch_size}"
            )

    @contextmanager
    def no_sync(self, *prepared: Any) -> Iterator[Any]:
        """Defer the exchange of gradients until the yielded function is called: one exchange per update."""
        with ExitStack() as kept:
            for one in prepared:
                kept.enter_context(self._accelerator.no_sync(one))
            yield kept.close


@contextmanager
def main_first(cpu: bool) -> Iterator[None]:
    """Run the block in the main process first, then in the others; if it raises, the others never run it.

    cpu  whether the model is on the CPU; without it, accelerate would take each of several processes for the only one
    """
    state = PartialState(cpu=cpu)
    if not state.is_main_process:
        _wait(state)
    yield
    if state.is_main_process:
        _wait(state)


def _wait(state: PartialState) -> None:
    with report_lost_process(RESUME_HINT):
        state.wait_for_everyone()
