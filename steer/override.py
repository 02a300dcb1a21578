"""Something of a model set aside for the length of a block, and put back exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from steer.errors import InputError
from steer.stand_in import CONTROLNETS, DENOISERS

_NOTHING = object()


@contextmanager
def replaced(space: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """`space[name]` is `value` in the block; after it, whatever ends it, it is what it was, or nothing again.

    Of an object, `space` is its `vars()`.
    """
    before = space.get(name, _NOTHING)
    space[name] = value
    try:
        yield
    finally:
        if before is _NOTHING:
            space.pop(name, None)
        else:
            space[name] = before


def denoising_modules(target: Any) -> list[nn.Module]:
    """The modules that denoise: of a pipeline its denoisers and ControlNets, of a module itself.

    Raises InputError where there is none.
    """
    if isinstance(target, nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in (*DENOISERS, *CONTROLNETS)]
    if modules := [module for module in found if isinstance(module, nn.Module)]:
        return modules
    raise InputError(f"{type(target).__name__} has no denoiser: give a pipeline with unet or transformer, or a module")
