"""A tiny model to be measured."""

from typing import Any

import torch
from conftest import PROMPT, cached_pipe, sd
from torch import Tensor

from steer.apps.bench.subject import Subject

STEPS, PARTICLES, READS = 6, 4, 3  # 40, 55, 70 and 85 % of 6 steps are steps 2, 3 and 4


class Colourful:
    """Far enough apart for tiny random models to be resampled."""

    name, differentiable = "colourful", True

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return 300 * images.float().mean((1, 2, 3))


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
    return Subject("tiny", cached_pipe("sd"), call, PARTICLES, (PROMPT,), Colourful(), **shared)
