"""Slope guards: of ReNO against a hackable reward, of reward backpropagation against values by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import PROMPT, cached_pipe, with_scheduler
from diffusers import LCMScheduler
from soft_rewards import Soft, own_kwargs, seeded
from torch import Tensor

from steer import ReNOPipeline
from steer.errors import InputError
from steer.pipelines.training.reward_backprop import RewardBackpropConfig
from steer.training.guards import SlopeLimit


def test_a_limit_scales_each_image_by_itself() -> None:
    """Gradients of norms 1, 2, 3 and 40: the median (of torch, the lower one) is 2, κ = 3 leaves norms up to 6."""
    limit = SlopeLimit(3.0)
    for norms, bounded in (
        ([1.0, 2.0, 3.0, 40.0], [1.0, 2.0, 3.0, 6.0]),
        ([50.0, 7.0, 6.0, 0.0], [6.0, 6.0, 6.0, 0.0]),
    ):
        x = torch.zeros(4, 3, 2, 2, requires_grad=True)
        direction = torch.tensor(norms).view(-1, 1, 1, 1) * torch.ones(4, 3, 2, 2) / math.sqrt(12)
        (gradient,) = torch.autograd.grad((limit.apply(x * 1) * direction).sum(), x)
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), torch.tensor(bounded))
        assert limit.base == pytest.approx(2.0)  # of the first update
    free = SlopeLimit(None)
    x = torch.ones(1, 3, 1, 1, requires_grad=True)
    assert torch.equal(torch.autograd.grad((100 * free.apply(x * 1)).sum(), x)[0], torch.full((1, 3, 1, 1), 100.0))


def hackable(start: float) -> Any:
    """Brightness is the truth up to a little above the start; beyond, the reward rises 60 times as fast."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        bright = images.mean((1, 2, 3))
        return bright + 60 * torch.relu(bright - start - 0.005)

    return Soft(reward, "hackable")


def test_a_search_ends_before_a_cliff() -> None:
    pipe = cached_pipe("sd")
    pipe = with_scheduler(pipe, LCMScheduler.from_config(pipe.scheduler.config))
    call = own_kwargs("sd", 1) | {"guidance_scale": 0.0, "generator": seeded(), "output_type": "pt"}
    prompt = call.pop("prompt", PROMPT)
    plain = pipe(prompt, **call | {"generator": seeded()}).images.mean().item()
    options = {"iterations": 8, "lr": 5.0, "regularisation": 0.0, "num_particles": 1}
    reno = ReNOPipeline(pipe, hackable(plain))
    free = reno(prompt, **call | {"generator": seeded()}, **options)
    guarded = reno(prompt, **call | {"generator": seeded()}, **options, max_slope=3.0)
    assert free.images.mean().item() > plain + 0.007  # it goes over the cliff
    assert plain <= guarded.images.mean().item() + 1e-3 and guarded.images.mean().item() <= plain + 0.0051
    assert len(guarded.trace) < len(free.trace)


def test_what_has_no_slope_is_refused() -> None:
    pipe = cached_pipe("sd")
    pipe = with_scheduler(pipe, LCMScheduler.from_config(pipe.scheduler.config))
    call = own_kwargs("sd", 1) | {"guidance_scale": 0.0}
    prompt = call.pop("prompt", PROMPT)
    with pytest.raises(InputError, match="max_slope needs gradient backprop"):
        ReNOPipeline(pipe, hackable(0.0))(prompt, **call, iterations=2, gradient="zero-order", max_slope=3.0)
    with pytest.raises(InputError, match="max_slope needs gradients of one scale"):
        RewardBackpropConfig(max_slope=3.0, mixed_precision="fp16")
