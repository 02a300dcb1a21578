"""Weights that FSDP has divided between processes: DTensors. Of plain tensors all here is the tensor itself."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by name. What FSDP has brought together for a call is divided again before: a whole copy
    that a call left would hide what is written into the parts."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return dict(module.named_parameters())


def whole(value: Tensor) -> Tensor:
    """All of it, in every process; all of them have to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def divided_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, divided as another one is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Writes a whole tensor into a parameter, or into this process's part of it."""
    parameter.copy_(divided_as(value, parameter))
