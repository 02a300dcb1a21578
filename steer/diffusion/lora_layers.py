"""LoRA layers of peft: find them in modules, and switch their adapters on and off."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn


def lora_layers(modules: Iterable[nn.Module], name: str | None = None) -> list[Any]:
    """Return the LoRA layers of modules; with `name`, only the layers that have an adapter of this name."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)]
    return [layer for layer in layers if name is None or name in layer.lora_A]


def enabled_adapters(modules: Iterable[nn.Module]) -> dict[Any, list[str]]:
    """Return the adapters that are on, by layer."""
    return {layer: list(layer.active_adapters) for layer in lora_layers(modules) if not layer.disable_adapters}


def switch_adapters(modules: Iterable[nn.Module], adapters: Mapping[Any, Iterable[str]]) -> None:
    """Switch on these adapters of LoRA layers, and all others off."""
    for layer in lora_layers(modules):
        layer.enable_adapters(layer in adapters)
        if layer in adapters:
            layer.set_adapter(list(adapters[layer]))


def adapter_disabler(modules: Iterable[nn.Module]) -> Callable[[], AbstractContextManager[None]]:
    """Make a context that disables all adapters of modules: outputs are then bit-identical to the base model."""
    layers = lora_layers(modules)

    @contextmanager
    def off() -> Iterator[None]:
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    return off
