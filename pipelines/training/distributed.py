"""The processes of a training, as accelerate joins them."""

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
RESUME_HINT = ", see what it said; --resume goes on from a checkpoint"


class AccelerateContext:
    """Of the processes that accelerate joined; the first one writes and tells."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first one."""
        return self.rank == 0

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in their order."""
        if self.world_size == 1:
            return list(items)
        with report_lost_process(RESUME_HINT):
            return gather_object(list(items))

    def any(self, asked: bool) -> bool:
        """Whether one of them asks for it: all go the same way, or they would wait for each other for ever."""
        return any(self.gather([asked]))

    def wait(self) -> None:
        """Returns when all have come here."""
        with report_lost_process(RESUME_HINT):
            self._accelerator.wait_for_everyone()

    @contextmanager
    def translate_connection_errors(self) -> Iterator[None]:
        """Around work of this process amid which accelerate exchanges something: where another one has ended before
        its time, this one ends with an InputError. Its own errors stay what they are."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _is_connection_error(error):
                raise
            with report_lost_process(RESUME_HINT):
                raise

    def check(self, config: TrainingConfig) -> None:
        """Raises InputError where the prompts of an update cannot be shared out."""
        if config.train_batch_size % self.world_size:
            raise InputError(
                f"train_batch_size must be a multiple of the {self.world_size} processes that share them, "
                f"got {config.train_batch_size}"
            )

    @contextmanager
    def no_sync(self, prepared: Any) -> Iterator[Any]:
        """Inside, gradients are not exchanged until what it gives is called: one exchange for all of an update."""
        with ExitStack() as kept:
            kept.enter_context(self._accelerator.no_sync(prepared))
            yield kept.close


@contextmanager
def main_first(cpu: bool) -> Iterator[None]:
    """The first process runs the block before the others: they find what it wrote; if it raises, they never do.

    cpu  whether the model is on the CPU, where accelerate would else take each of several for the only one
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


def _is_connection_error(error: RuntimeError) -> bool:
    """Whether the processes lost each other: NCCL has an error of its own, gloo one that names its source file."""
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)
