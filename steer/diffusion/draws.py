"""Normal draws inside a pipeline's call, recorded or replaced: the starting noise of any pipeline, with gradients."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = (torch.randn, torch.randn_like, Tensor.normal_)
POSTERIOR = "GaussianDistribution.sample"  # a draw of an autoencoder: DiagonalGaussianDistribution and its namesakes


class _Draws(TorchFunctionMode):
    """Mode that calls `on_draw(value)` for every normal draw of this thread and gives its result to the caller.

    The draw itself is always made, so that the generator goes through the same states. Draws from a VAE's posterior,
    by which image-conditioned pipelines encode their image, are left alone.
    """

    def __init__(self, on_draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.on_draw = on_draw

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func not in DRAWS or _in_posterior():
            return value
        result = self.on_draw(value)
        in_place = func is Tensor.normal_ and result is not value
        return value.copy_(result) if in_place else result


def _in_posterior() -> bool:
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_qualname.endswith(POSTERIOR):
            return True
    return False


@contextmanager
def recorded_draws() -> Iterator[list[Tensor]]:
    """Yield a list to which the normal draws of this thread are added, in their order."""
    draws: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        draws.append(value.detach().clone())  # some pipelines scale theirs in place
        return value

    with _Draws(record):
        yield draws


@contextmanager
def replaced_draw(noise: Tensor, number: int) -> Iterator[None]:
    """Replace one normal draw of this thread by `noise` (N, …), through which gradients flow.

    number  number of the draw, from 0; if each row has a generator of its own, of the first of N one-row draws
    """
    rows, count = list(noise), 0

    def replace(value: Tensor) -> Tensor:
        nonlocal count
        place, count = count - number, count + 1
        whole = value.numel() == noise.numel()
        if place < 0 or place >= (1 if whole else len(rows)):
            return value
        given = noise if whole else rows[place]
        return given.to(device=value.device, dtype=value.dtype).reshape(value.shape)

    with _Draws(replace):
        yield


def find_draw(draws: Sequence[Tensor], sizes: Sequence[int], rows: int) -> tuple[int, Tensor] | None:
    """Return the number of the starting noise among the draws before the first denoiser call, and the noise (N, …).

    The starting noise is the first draw with as many elements per row as the latents at the first solver step, or else
    as a denoiser input: `sizes`, in this order of preference. It is one draw of all rows, or N draws of one row each.
    None where no draw fits.
    """
    for size in sizes:
        for number, draw in enumerate(draws):
            following = draws[number : number + rows]
            if len(draw) == rows and draw.numel() == rows * size:
                return number, draw
            by_row = len(following) == rows and all(one.shape == (1, *draw.shape[1:]) for one in following)
            if by_row and draw.numel() == size:
                return number, torch.cat(list(following))
    return None
