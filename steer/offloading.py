"""Weights that are moved to the device for each call."""

from torch import nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the weights of a model, or of a part of it, at each call."""
    for module in model.modules():
        hook, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
        moves = type(hook).__name__ in ("CpuOffload", "SequentialHook") or getattr(hook, "offload", False)
        if moves or "group_offloading" in getattr(registry, "hooks", ()):
            return True
    return False
