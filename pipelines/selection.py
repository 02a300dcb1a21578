"""Per-step selection: of K candidates at every solver step the best goes on (SVDD, arXiv 2408.08252), or a few of them
(beam search). Controls of Feynman–Kac steering that weigh nothing."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from steer.arguments import coerce_arguments
from steer.diffusion.schedules import can_resample_noise
from steer.diffusion.step_hooks import SolverStep, UnsupportedPipelineError
from steer.errors import InputError
from steer.pipelines.base import SteeringOutput, SteeringPipeline, route_eta
from steer.pipelines.fk_steering import (
    IntermediateRewards,
    ResamplingSchedule,
    Run,
    StepReport,
    check_copies_diverge,
    top_k_indices,
)
from steer.pipelines.particle_batch import ParticleBatch, check_output_type
from steer.smc.particles import Particles


class SelectionPipeline(SteeringPipeline):
    """Candidates of which the best by the reward of x̂0 are kept at every step, each with children of its own.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    svdd = SelectionPipeline(pipe, reward="scene-soft")
    out = svdd("a red circle left of a blue star", num_particles=4)
    out = svdd("a red circle left of a blue star", num_particles=8, beams=2)  # beam search
    """

    @coerce_arguments
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        beams: int = 1,
        lam: float = math.inf,
        select_steps: Iterable[int] | None = None,
        eta: float | None = 1.0,
        preview: Any = "full",
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Steers one call; every other argument goes to the pipeline's own `__call__`.

        num_particles  K candidates at every step, for each prompt
        beams          B of them go on, with K/B children each; 1 is SVDD, K a plain batch
        lam            λ: B are drawn without replacement, each time with chances in proportion to exp(λ r(x̂0)); by
                       default those with the highest r(x̂0)
        select_steps   solver steps, from 0, at which rewards are read and candidates chosen; by default all of them but
                       the last, after which nothing could part
        eta            noise η of every step, 0..1, out of which candidates are drawn. None: the solver's own; it and 0
                       leave the noise that components the children to one step with η = 1, as in `FKSteeringPipeline`

        The other arguments, errors and the output are as in `FKSteeringPipeline`. But this is a search, which draws
        from no known distribution: `log_weights` and `log_normaliser` are 0, as for best-of-N, and the ESS is K.
        """
        check_output_type(output_type)
        algorithm = Selection(beams, lam)
        algorithm.check_size(num_particles)
        if num_particles > 1:
            check_candidates_diverge(self.pipe.scheduler, eta)
        call, kernel_eta = route_eta(self.pipe, call, eta)
        particle_batch = ParticleBatch(
            self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size, preview
        )
        run = SelectionRun(algorithm, particle_batch, kernel_eta, eta or 1.0, ResamplingSchedule(select_steps), on_step)
        images = run.sample()
        rewards, components = particle_batch.score(images)
        return particle_batch.output(images, rewards, components, run.particles, run.history, output_type)


@dataclass(frozen=True)
class Selection:
    """Which B of K particles go on: those with the highest r, or a draw in proportion to exp(λ r)."""

    beams: int = 1
    lam: float = math.inf

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise InputError(f"beams must be at least 1, got {self.beams}")
        if not self.lam > -math.inf:
            raise InputError(f"lam must be a finite number, or inf to take the best, got {self.lam}")

    def check_size(self, size: int) -> None:
        """Raises InputError where the beams cannot have equally many children."""
        if size >= 1 and size % self.beams:
            raise InputError(f"beams must divide num_particles, got {self.beams} of {size}")

    def reweight(self, particles: Particles, rewards: Tensor, progress: float) -> Particles:
        """Notes the rewards (B, K) of x̂0; weights stay equal."""
        strength = torch.full((len(rewards), 1), self.lam)
        return replace(particles, path=particles.path.append(rewards, strength))

    def select(
        self, particles: Particles, generator: Generator, count: int | None = None
    ) -> tuple[Particles, Tensor | None]:
        """The particles and their ancestors (B, K), in the order of the slots; None where all stay."""
        groups, size = particles.log_weights.shape
        if self.beams == size:
            return particles, None
        kept = self.keep(particles.path.rewards[-1], generator)
        ancestors = kept.repeat_interleave((count or size) // self.beams, 1)
        return particles.resample(ancestors, torch.ones(groups, dtype=torch.bool)), ancestors

    def keep(self, rewards: Tensor, generator: Generator) -> Tensor:
        """Slots (groups, B) that go on, in their order, from rewards (groups, K); among equals the first.

        The B largest of λ r + G, with standard Gumbel numbers G, are a draw without replacement (Gumbel-top-k, Kool et
        al. 2019); one of them is categorical. In float64 on the CPU, as all resampling is.
        """
        keys = rewards.detach().cpu().double()
        if self.lam < math.inf:
            uniform = torch.rand(keys.shape, generator=generator, dtype=torch.float64)
            keys = self.lam * keys - (-uniform.log()).log()
        return top_k_indices(keys, self.beams)


class SelectionRun(Run):
    """A run whose slots go on from the chosen ones."""

    steps_argument = "select_steps"
    algorithm: Selection

    def _default_steps(self, total: int) -> Iterable[int]:
        return range(total)

    def _needs_resampling(self) -> bool:
        return self.algorithm.beams < self.particle_batch.size

    def _next_latents(
        self, solver_step: SolverStep, rows: Tensor | None, intermediate: IntermediateRewards | None
    ) -> Tensor | None:
        """The first child keeps the solver's step, the others resample its noise: a search has no law to keep."""
        sampled = None if self.eta is None else solver_step.kernel(self.eta).sample(self.particle_batch.rng)
        if rows is None:
            return sampled
        moved = (solver_step.prev if sampled is None else sampled)[rows]
        copies = duplicate_rows(rows)
        if not (can_resample_noise(solver_step.scheduler) and copies.any()):
            return None if sampled is None else moved
        moved[copies] = (
            solver_step.kernel(self.resampling_eta, rows[copies]).sample(self.particle_batch.rng).to(moved.dtype)
        )
        return moved

    def _resamples_noise(self, scheduler: Any) -> bool:
        return can_resample_noise(scheduler)


def duplicate_rows(rows: Tensor) -> Tensor:
    """(N,) true where a row number has come before."""
    return torch.stack([(rows[:place] == row).any() for place, row in enumerate(rows)])


def check_candidates_diverge(scheduler: Any, eta: float | None) -> None:
    """Raises CannotSteer for a solver without the Gaussian kernel that candidates are drawn from."""
    if eta is None:
        check_copies_diverge(scheduler)
    elif not can_resample_noise(scheduler):
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} has no Gaussian kernel to draw candidates from: use another one, for example "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or eta=None for noise of its own"
        )


class BestOfNPipeline(SteeringPipeline):
    """The pipeline's own batch of N images for each prompt, best first."""

    @coerce_arguments
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        preview_steps: Iterable[int] | None = (),
        eta: float | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Arguments, errors and output as in `FKSteeringPipeline`; N is `num_particles`, and all weights are equal.

        preview_steps  solver steps, from 0, at which x̂0 is decoded and scored for `on_step` and `out.history`; the
                       images stay what they are without. None: where `FKSteeringPipeline` reads by default
        """
        check_output_type(output_type)
        call, kernel_eta = route_eta(self.pipe, call, eta)
        particle_batch = ParticleBatch(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        run = PreviewRun(
            Selection(num_particles), particle_batch, kernel_eta, 1.0, ResamplingSchedule(preview_steps), on_step
        )
        images = run.sample()
        rewards, components = particle_batch.score(images)
        return particle_batch.output(images, rewards, components, run.particles, run.history, output_type)


class PreviewRun(Run):
    """A run in which all particles stay."""

    steps_argument = "preview_steps"

    def _needs_resampling(self) -> bool:
        return False
