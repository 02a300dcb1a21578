"""Optimisers and learning-rate schedules, by their names in transformers and diffusers."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, get_args

from torch.optim import SGD, AdamW, Optimizer

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


def set_learning_rate(schedule: Any, learning_rate: float) -> None:
    """Change the highest rate of a restored schedule at its present step, and set the optimiser's rate accordingly."""
    inner = getattr(schedule, "scheduler", schedule)
    inner.base_lrs = [learning_rate] * len(inner.base_lrs)
    inner._last_lr = [learning_rate * scale(inner.last_epoch) for scale in inner.lr_lambdas]
    for group, present in zip(inner.optimizer.param_groups, inner._last_lr, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, present
