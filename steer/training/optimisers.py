"""Optimisers and learning-rate schedules, by their names in transformers and diffusers."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Literal, get_args

from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from steer.errors import InputError

OptimiserName = Literal["adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"]
ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "lion_8bit": "Lion8bit"}


def optimiser_class(name: OptimiserName) -> Callable[..., Optimizer]:
    """Return the optimiser class for a name of transformers' `optim`; 8-bit optimisers come from bitsandbytes.

    Raises InputError for another name, and where bitsandbytes is missing.
    """
    if name not in get_args(OptimiserName):
        raise InputError(f"optim must be one of {', '.join(get_args(OptimiserName))}, got {name!r}")
    if name not in BITSANDBYTES:
        return {"adamw_torch": AdamW, "sgd": SGD}[name]
    try:
        return getattr(import_module("bitsandbytes.optim"), BITSANDBYTES[name])
    except ImportError as error:
        raise InputError(f"optim {name} needs bitsandbytes: pip install bitsandbytes, or use adamw_torch") from error


def create_optimiser(
    name: OptimiserName, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> Optimizer:
    """Create the optimiser with this name. Raises InputError as `optimiser_class` does."""
    return optimiser_class(name)(list(parameters), lr=learning_rate, weight_decay=weight_decay)


def create_schedule(
    name: ScheduleName, optimiser: Optimizer, warmup_steps: int, max_steps: int, num_cycles: int = 1, power: float = 1.0
) -> LambdaLR:
    """Create diffusers' learning-rate schedule with this name.

    num_cycles  for cosine_with_restarts: number of restarts from the highest rate
    power       for polynomial; 1 is linear
    """
    return get_scheduler(
        name,
        optimiser,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_steps,
        num_cycles=num_cycles,
        power=power,
    )


def set_learning_rate(schedule: Any, learning_rate: float) -> None:
    """Change the highest rate of a restored schedule at its present step, and set the optimiser's rate accordingly."""
    inner = getattr(schedule, "scheduler", schedule)
    inner.base_lrs = [learning_rate] * len(inner.base_lrs)
    inner._last_lr = [learning_rate * scale(inner.last_epoch) for scale in inner.lr_lambdas]
    for group, present in zip(inner.optimizer.param_groups, inner._last_lr, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, present
