"""Slope guards: of ReNO against a hackable reward, of reward backpropagation against values by hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
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
from steer.training.distributed import SINGLE_PROCESS
from steer.training.gradient import reward_gradient
from steer.training.guards import SlopeLimit
from steer.training.rollout import Rows


def test_a_limit_scales_each_image_by_itself() -> None:
    """κ = 3 and s₀ = 2 leave norms of the sum up to 6."""
    limit = SlopeLimit(3.0, base=2.0)
    for norms, bounded in (
        ([1.0, 2.0, 3.0, 40.0], [1.0, 2.0, 3.0, 6.0]),
        ([50.0, 7.0, 6.0, 0.0], [6.0, 6.0, 6.0, 0.0]),
    ):
        x = torch.zeros(4, 3, 2, 2, requires_grad=True)
        direction = torch.tensor(norms).view(-1, 1, 1, 1) * torch.ones(4, 3, 2, 2) / math.sqrt(12)
        (gradient,) = torch.autograd.grad((limit.apply(x * 1, 1) * direction).sum(), x)
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), torch.tensor(bounded))
        assert limit.base == 2.0
    free = SlopeLimit(None)
    x = torch.ones(1, 3, 1, 1, requires_grad=True)
    assert torch.equal(torch.autograd.grad((100 * free.apply(x * 1, 1)).sum(), x)[0], torch.full((1, 3, 1, 1), 100.0))


@dataclass
class OtherProcess:
    """The context of one of two processes: the slopes that the other one has are known."""

    rank: int
    others: list[Tensor]
    world_size = 2

    def gather(self, items: Sequence[Any]) -> list[Any]:
        return [*items, *self.others] if torch.is_tensor(items[0]) else list(items) * 2


def slope_gradient(slopes: Sequence[Sequence[float]], limit: SlopeLimit, context: Any = SINGLE_PROCESS) -> float:
    """d(mean reward)/dθ of images θ u, ‖u‖ = 1, in chunks of these slopes: the rewards are slope · Σ u x."""
    theta, u = torch.ones((), requires_grad=True), torch.ones(3, 2, 2) / math.sqrt(12)
    rows = [Rows(tuple(map(str, some)), (0,) * len(some), (0,) * len(some)) for some in slopes]

    def steep(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(one) for one in prompts]) * (images * u).sum((1, 2, 3))

    sampler: Any = SimpleNamespace(several=False, finish=lambda chunk, last: theta * u.expand(len(chunk.rows), 3, 2, 2))
    batch: Any = SimpleNamespace(chunks=[SimpleNamespace(rows=one) for one in rows], steps=(0,), references=())
    reward_gradient(
        sampler, batch, Soft(steep, "steep"), 1, limit=limit, penalties={}, on_policy=True,
        backward=Tensor.backward, on_chunk=lambda: None, context=context,
    )  # fmt: skip
    assert theta.grad is not None
    return -theta.grad.item()


@pytest.mark.parametrize("chunks", [[[1, 2, 3, 40]], [[40], [1, 2, 3]], [[3, 40], [2, 1]]])
def test_the_unit_of_a_limit_is_that_of_the_whole_first_update(chunks: list[list[float]]) -> None:
    """Slopes 1, 2, 3 and 40 have the median (of torch, the lower one) 2; κ = 3: (1 + 2 + 3 + 6)/4, in any chunks."""
    limit = SlopeLimit(3.0)
    assert slope_gradient(chunks, limit) == pytest.approx(3.0) and limit.base == pytest.approx(2.0)
    assert slope_gradient([[50, 6]], limit) == pytest.approx(6.0)  # of the first update, whatever the number of images
    shares = [slope_gradient([own], SlopeLimit(3.0), OtherProcess(rank, [torch.tensor(rest)]))
              for rank, (own, rest) in enumerate([([1.0, 2.0], [3.0, 40.0]), ([3.0, 40.0], [1.0, 2.0])])]  # fmt: skip
    assert sum(shares) / 2 == pytest.approx(3.0)  # the mean over processes is the gradient


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
