"""Per-step selection and best-of-N: controls of Feynman–Kac steering, without weights.

The best of K candidates continues from every solver step (SVDD, arXiv 2408.08252), or a few of them (beam search).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from steer.diffusion.step_hooks import SolverStep
from steer.pipelines.base import SteeringOutput, SteeringPipeline, route_eta, steering_call
from steer.pipelines.fk_steering import (
    IntermediateRewards,
    ResamplingSchedule,
    Run,
    learned_value,
    route_kernel_eta,
    run_particles,
    top_k_indices,
)
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.settings import BestOfNSettings, Prompts, SelectionSettings
from steer.smc.particles import Particles


class SelectionPipeline(SteeringPipeline):
    """SVDD and beam search: the candidates with the best intermediate reward continue from every step, with children.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    svdd = SelectionPipeline(pipe, reward="scene-soft")
    out = svdd("a red circle left of a blue star", num_particles=4)
    out = svdd("a red circle left of a blue star", num_particles=8, beams=2)  # beam search
    """

    @steering_call(SelectionSettings)
    def __call__(self, prompt: Prompts, settings: SelectionSettings, call: dict[str, Any]) -> SteeringOutput:
        """Steer one call of the pipeline; all other arguments go to the pipeline's own `__call__`.

        Errors and output are as in `FKSteeringPipeline`. This is a search, without a known distribution:
        `log_weights` and `log_normaliser` are 0, and the ESS is K.
        """
        s = settings
        call, kernel_eta = route_kernel_eta(self.pipe, call, s)
        selection, schedule = Selection(s.beams, s.lam), ResamplingSchedule(s.select_steps)

        def make_run(particle_batch: ParticleBatch) -> Run:
            return SelectionRun(selection, particle_batch, kernel_eta, schedule, s, learned_value(s, self, call))

        return run_particles(self, prompt, s, call, make_run, lookahead=s.lookahead, preview=s.preview)


@dataclass(frozen=True)
class Selection:
    """The selection of B of K particles: the highest r, or a draw with probability ∝ exp(λ r)."""

    beams: int = 1
    lam: float = math.inf

    def reweight(self, particles: Particles, rewards: Tensor, progress: float) -> Particles:
        """Append intermediate rewards (B, K) to the path; weights stay equal."""
        strength = torch.full((len(rewards), 1), self.lam)
        return replace(particles, path=particles.path.append(rewards, strength))

    def select(
        self, particles: Particles, generator: Generator, count: int | None = None
    ) -> tuple[Particles, Tensor | None]:
        """Select the particles and their ancestors (B, K), in the order of the slots; None where all stay."""
        groups, size = particles.log_weights.shape
        if self.beams == size:
            return particles, None
        kept = self.keep(particles.path.rewards[-1], generator)
        ancestors = kept.repeat_interleave((count or size) // self.beams, 1)
        return particles.resample(ancestors, torch.ones(groups, dtype=torch.bool)), ancestors

    def keep(self, rewards: Tensor, generator: Generator) -> Tensor:
        """Select the slots (groups, B) that continue, in order, by rewards (groups, K); the first wins ties.

        The B largest of λ r + G, with standard Gumbel numbers G, are a draw without replacement (Gumbel-top-k, Kool et
        al. 2019), for B = 1 a categorical draw. Computed in float64 on the CPU, like all resampling.
        """
        keys = rewards.detach().cpu().double()
        if self.lam < math.inf:
            uniform = torch.rand(keys.shape, generator=generator, dtype=torch.float64)
            keys = self.lam * keys - (-uniform.log()).log()
        return top_k_indices(keys, self.beams)


class SelectionRun(Run):
    """A run whose slots continue from the selected slots."""

    steps_argument = "select_steps"
    algorithm: Selection

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(total)

    def _needs_resampling(self) -> bool:
        return self.algorithm.beams < self.particle_batch.size

    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor | None:
        """The first child keeps the solver's step, the others resample its noise: a search keeps no distribution."""
        sampled = None if self.eta is None else self._draw(solver_step, self.eta)
        if rows is None:
            return sampled
        moved = (solver_step.prev if sampled is None else sampled)[rows]
        copies = self.particle_batch.live.mask(duplicate_rows(rows))
        if not copies.any():
            return None if sampled is None else moved
        # The denoiser of a GLASS transition takes the whole batch.
        used, kept = (rows, copies) if self.glass_steps else (rows[copies], slice(None))
        moved[copies] = self._draw(solver_step, self.resampling_eta, used)[kept].to(moved.dtype)
        return moved

    def _resamples_noise(self, scheduler: Any) -> bool:
        return True


def duplicate_rows(rows: Tensor) -> Tensor:
    """Return (N,) true where a row number is a repetition."""
    return torch.stack([(rows[:place] == row).any() for place, row in enumerate(rows)])


class BestOfNPipeline(SteeringPipeline):
    """The pipeline's own batch of N images for each prompt, best first."""

    @steering_call(BestOfNSettings)
    def __call__(self, prompt: Prompts, settings: BestOfNSettings, call: dict[str, Any]) -> SteeringOutput:
        """Sample N = num_particles images of each prompt, best first; all weights are equal.

        All other arguments go to the pipeline's own `__call__`; errors and output are as in `FKSteeringPipeline`.
        """
        s = settings
        call, kernel_eta = route_eta(self.pipe, call, s.eta)
        selection, schedule = Selection(s.num_particles), ResamplingSchedule(s.preview_steps)

        def make_run(particle_batch: ParticleBatch) -> Run:
            return PreviewRun(selection, particle_batch, kernel_eta, schedule, s)

        return run_particles(self, prompt, s, call, make_run, lookahead=s.lookahead)


class PreviewRun(Run):
    """A run in which all particles stay."""

    steps_argument = "preview_steps"

    def _needs_resampling(self) -> bool:
        return False
