"""A tiny model to be measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROMPT, cached_pipe, sd
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from steer.apps.bench.subject import Subject
from steer.diffusion.views import denoisers_in

STEPS, PARTICLES, READS = 6, 4, 3  # 40, 55, 70 and 85 % of 6 steps are steps 2, 3 and 4


class Colourful:
    """Far enough apart for tiny random models to be resampled."""

    name, differentiable = "colourful", True

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return 300 * images.float().mean((1, 2, 3))


def module_names(subject: Subject) -> dict[type, str]:
    """The classes of the modules whose rows are counted. A VAE's decode calls its decoder."""
    names: dict[type, str] = {Decoder: "decoder", DecoderTiny: "tiny decoder"}
    for pipe in filter(None, (subject.pipe, subject.one_step)):
        names |= {type(getattr(pipe, name)): "denoiser" for name in denoisers_in(pipe)}
        texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
        names |= {type(part): "text encoder" for part in texts if part is not None}
    return names


def rows_of(run: Callable[[], Any], subject: Subject) -> dict[str, int]:
    """The rows that go through the models and the reward in a run; those of calls that keep a graph apart."""
    rows: dict[str, int] = {}
    names, score = module_names(subject), type(subject.judge()).__call__

    def count(name: str, output: Tensor) -> None:
        name += " with a graph" * output.requires_grad
        rows[name] = rows.get(name, 0) + len(output)

    def forwarded(module: Any, given: Any, output: Any) -> None:
        if type(module) in names:
            count(names[type(module)], next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    def scored(self: Any, images: Tensor, prompts: Any) -> Tensor:
        scores = score(self, images, prompts)
        count("reward", scores)
        return scores

    with pytest.MonkeyPatch.context() as patch, register_module_forward_hook(forwarded):
        patch.setattr(type(subject.judge()), "__call__", scored)
        run()
    return rows


def fresh() -> Any:
    """A tiny Stable Diffusion of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_subject() -> Subject:
    """Measured in a tenth of a second."""
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    shared = {"one_step": fresh(), "make_trainable": fresh, "pairs": 3, "update_steps": 3}
    return Subject("tiny", cached_pipe("sd"), call, PARTICLES, PROMPT, Colourful(), **shared)
