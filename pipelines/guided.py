"""Feynman–Kac steering whose steps lean towards the reward: gradients inside the chain (DAS, arXiv 2501.05803)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from steer.differentiable import computes_in_fp16, own_gradients
from steer.errors import InputError
from steer.feynman_kac import FeynmanKac
from steer.pipelines.fk_run import Reading, Run, StepReport
from steer.pipelines.plan import Plan
from steer.pipelines.population import Population
from steer.proposal import draw_guided
from steer.reward import Reward, RewardError
from steer.seam import CannotSteer, Event
from steer.transition import can_redraw


class GuidedRun(Run):
    """A run of the Gaussian kernel, drawn from N(mean + γ τ² λ_j ∇r(x̂0(x_t)), τ² I) wherever rewards are read.

    The population's pipeline is a `differentiable` twin. Between the steps nothing but latents is kept: those that the
    next gradient is taken at ask for one, and have no past.
    """

    first = 1  # x_T comes out of the pipeline without a graph

    def __init__(
        self,
        algorithm: FeynmanKac,
        population: Population,
        guidance: float,
        eta: float,
        plan: Plan,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        super().__init__(algorithm, population, eta, eta, plan, observer)
        self.guidance = guidance
        self.half = computes_in_fp16(population.pipe)

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        with torch.enable_grad():
            return super().sample().detach()

    def _read(self, event: Event) -> Reading:
        previews = self.population.preview(event.x0())
        if not previews.requires_grad:
            raise CannotSteer(f"{type(self.population.pipe).__name__} lets no gradients through: use reward_guidance=0")
        rewards, _ = self.population.score(previews)
        return Reading(previews.detach(), rewards.detach(), self._gradient(event, rewards))

    def _gradient(self, event: Event, rewards: Tensor) -> Tensor:
        name, gradient = self.population.reward.name, own_gradients(rewards, event.x, self.half)
        if gradient is None:
            raise RewardError(f"reward {name!r} says that it is differentiable, but gives no gradients")
        if not gradient.isfinite().all():
            raise RewardError(f"the gradient of reward {name!r} is not finite at step {event.k}")
        self.population.count_gradients(rewards.numel())
        return gradient

    @torch.no_grad()
    def _moved(self, event: Event, rows: Tensor | None, reading: Reading | None) -> Tensor:
        kernel = event.kernel(self.resampling_eta, rows)  # which is that of every step
        if reading is None or reading.gradient is None:
            moved = kernel.sample(self.population.rng)
        else:
            # Particles and gradients go to their slots together.
            gradient = reading.gradient if rows is None else reading.gradient[rows]
            moved, log_ratio = draw_guided(kernel, self._strengths(gradient) * gradient, self.population.rng)
            living = self.population.live.of(log_ratio).cpu().view_as(self.particles.log_weights)
            self.particles = self.particles.correct(living)
        return moved.to(event.prev.dtype).requires_grad_(event.k + 1 in self.steps and not self.settled)

    def _strengths(self, like: Tensor) -> Tensor:
        """γ λ_j of every row, (B·K, 1, …)."""
        strengths = self.guidance * self.history[-1].strength.repeat_interleave(self.population.size, dim=0)
        return strengths.to(like).view(-1, *[1] * (like.dim() - 1))

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(self.first, total)

    def _needs_steps(self) -> bool:
        return self.algorithm.lam != 0


def check_guidable(scheduler: Any, reward: Reward, guidance: float, eta: float) -> None:
    """Raises InputError, or CannotSteer for a solver without the kernel, where steps cannot lean towards the reward."""
    if not 0 <= guidance < math.inf:
        raise InputError(f"reward_guidance must be at least 0 and finite, got {guidance}")
    if not 0 < eta <= 1:
        raise InputError(f"with reward_guidance eta must be above 0 and at most 1, got {eta}: steps need noise to lean")
    if not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use reward_guidance=0, or a reward that is")
    if not can_redraw(scheduler):
        raise CannotSteer(
            f"{type(scheduler).__name__} has no Gaussian kernel for reward_guidance to lean on: use another one, for "
            "example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or reward_guidance=0"
        )
