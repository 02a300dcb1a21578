"""Several processes that train one model, each with a share of the samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from steer.errors import InputError

Item = TypeVar("Item")


class DistributedContext(Protocol):
    """This process, `rank` of `world_size`; rows and chunks are distributed in the order of the ranks."""

    rank: int
    world_size: int

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of their numbers; they must pickle. All have to call it."""
        ...


class SingleProcess:
    """One process."""

    rank, world_size = 0, 1

    def gather(self, items: Sequence[Item]) -> list[Item]:
        return list(items)


SINGLE_PROCESS = SingleProcess()


def sum_over_processes(context: DistributedContext, values: Sequence[float]) -> list[float]:
    """Of each value its sum over all processes, the same to the last bit in all of them."""
    return [sum(column) for column in zip(*context.gather([tuple(values)]), strict=True)]


@contextmanager
def report_lost_process(resume_hint: str) -> Iterator[None]:
    """Raise InputError where another process has ended before its time; `resume_hint` says how to resume."""
    try:
        yield
    except RuntimeError as error:  # the connection to it is gone
        raise InputError(f"another process of this run ended before its time{resume_hint}") from error
