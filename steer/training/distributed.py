"""Distributed context: several processes that train one model, each with some of the samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from steer.errors import InputError

Item = TypeVar("Item")


class DistributedContext(Protocol):
    """The processes of a run: this one is `rank` of `world_size`; rows and chunks are assigned in order of rank."""

    rank: int
    world_size: int

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Gather picklable items of all processes in order of rank. Every process must call it."""
        ...


class SingleProcess:
    """The context of a run with one process."""

    rank, world_size = 0, 1

    def gather(self, items: Sequence[Item]) -> list[Item]:
        return list(items)


SINGLE_PROCESS = SingleProcess()


def sum_over_processes(context: DistributedContext, values: Sequence[float]) -> list[float]:
    """Sum each value over all processes; the result is the same to the last bit in every process."""
    return [sum(column) for column in zip(*context.gather([tuple(values)]), strict=True)]


@contextmanager
def report_lost_process(resume_hint: str) -> Iterator[None]:
    """Raise InputError where another process ended prematurely; `resume_hint` is appended to the message."""
    try:
        yield
    except RuntimeError as error:  # the connection is closed
        raise InputError(f"another process of this run ended prematurely{resume_hint}") from error
