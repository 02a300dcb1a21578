"""Small differentiable rewards, cheap calls of the tiny pipelines, and their models in another precision."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from conftest import call_kwargs
from torch import Generator, Tensor, nn

from steer.diffusion.preview import first_output
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT

Function = Callable[[Tensor, Sequence[str]], Tensor]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Soft:
    """A function of images and prompts that says it is differentiable."""

    differentiable = True

    def __init__(self, function: Function, name: str = "soft") -> None:
        self.function, self.name = function, name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


class Sum:
    """A reward of two components."""

    name, differentiable = "sum", True

    def __init__(self, **terms: Function) -> None:
        self.terms = terms

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.total(self.components(images, prompts), prompts)

    def components(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        return {name: term(images, prompts) for name, term in self.terms.items()}

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        return torch.stack(list(components.values())).sum(0)


def pattern(images: Tensor) -> Tensor:
    """Fixed weights of the pixels of one image."""
    return torch.randn(images.shape[1:], generator=seeded(3)).to(images)


def likeness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Similarity of each image to a pattern, with a weight that depends on the prompt."""
    weights = images.new_tensor([10.0 + len(prompt) % 7 for prompt in prompts])
    return weights * (images * pattern(images)).mean((1, 2, 3)) + (images**2).mean((1, 2, 3))


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def own_kwargs(name: str, steps: int = 1) -> dict[str, Any]:
    """A cheap call without the count of images, which num_particles replaces."""
    return {key: value for key, value in call_kwargs(name, 2, steps).items() if key not in IMAGES_PER_PROMPT}


def images_of(pipe: Any, **call: Any) -> Tensor:
    return first_output(pipe(**call, output_type="pt"))


def models_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}


def in_precision(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same pipeline on models of its own."""
    other = copy.copy(pipe)
    vars(other).update({name: copy.deepcopy(model).to(dtype) for name, model in models_of(pipe).items()})
    return other
