"""Something of a model set aside for the length of a block, and put back exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

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
    """The modules that denoise: of a pipeline its denoisers and ControlNets, as far as it has any; a module itself."""
    if isinstance(target, nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in (*DENOISERS, *CONTROLNETS)]
    return [module for module in found if isinstance(module, nn.Module)]
