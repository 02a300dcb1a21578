"""Work in other threads: under the caller's modes, and on CUDA beside the caller's own in a stream of its own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Begin(Protocol):
    """Begins some work; what it returns waits for the result, and raises what the work raised."""

    def __call__(self, work: Callable[[], T], /) -> Callable[[], T]: ...


class Modes:
    """What a thread computes under on a device: with or without gradients, in inference mode, with autocast, and on
    CUDA in which stream. A new thread has none of them."""

    def __init__(self, device: torch.device) -> None:
        self.gradients, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kind = device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Another thread computes as this one did, within the block."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(*self.autocast),
            torch.cuda.stream(self.stream),
        ):
            yield


@contextmanager
def at_once(device: torch.device) -> Iterator[Begin]:
    """Yields what does the work when it is begun: the slow twin of `in_background`."""

    def begin(work: Callable[[], T]) -> Callable[[], T]:
        result = work()
        return lambda: result

    yield begin


@contextmanager
def in_background(device: torch.device) -> Iterator[Begin]:
    """Yields what does the work, piece after piece, in a thread while the caller goes on.

    On CUDA it has a stream, which begins after what the caller's stream has been given so far; what the caller does
    after it has waited for a result comes after that on the device too. At the end of the block all work is done.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "steer-background") as thread:

        def begin(work: Callable[[], T]) -> Callable[[], T]:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                modes = Modes(device)

            def worked() -> T:
                with modes():
                    return work()

            begun = thread.submit(worked)

            def result() -> T:
                found = begun.result()
                if stream is not None:
                    _hand_over(found, stream, torch.cuda.current_stream(device))
                return found

            return result

        yield begin


def _hand_over(found: object, stream: torch.cuda.Stream, to: torch.cuda.Stream) -> None:
    """What was made in one stream is used in another from now on: its memory is not given away before that is done."""
    to.wait_stream(stream)
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(to)
