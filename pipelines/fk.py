"""Feynman–Kac steering of a diffusers pipeline (arXiv 2501.06848)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.choices import choose
from steer.errors import InputError
from steer.feynman_kac import FeynmanKac
from steer.particles import Particles
from steer.pipelines.method import SteeringMethod, route_eta
from steer.pipelines.output import Evaluation, SteeringOutput
from steer.pipelines.population import Population, check_output_type
from steer.potentials import POTENTIALS, TEMPERINGS, Potential, Tempering
from steer.resampling import RESAMPLERS, Resampler
from steer.seam import Answer, CannotSteer, Event
from steer.transition import can_redraw, copies_part

DEFAULT_STEPS = (0.4, 0.55, 0.7, 0.85)  # where rewards are read, as shares of the run


@dataclass(frozen=True)
class StepReport:
    """What an observer is told after a solver step: number `step` of `total`; where rewards were read, the evaluation
    and the images (B·K, 3, H, W) of x̂0 that they were read from."""

    step: int
    total: int
    evaluation: Evaluation | None = None
    previews: Tensor | None = None


class FKSteeringPipeline(SteeringMethod):
    """Particles that are weighed by the reward of x̂0 on their way, and resampled.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    steer = FKSteeringPipeline(pipe, reward="scene-soft")
    out = steer("a red circle left of a blue star", num_particles=4, lam=25.0)
    out.images[0], out.rewards[0, 0]
    """

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_particles: int = 4,
        lam: float = 10.0,
        potential: str | Potential = "difference",
        resampler: str | Resampler = "systematic",
        tempering: str | Tempering = "constant",
        resample_steps: Iterable[int] | None = None,
        ess_threshold: float = 0.5,
        eta: float | None = None,
        chunk_size: int = 8,
        reward_prompt: str | Sequence[str] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SteeringOutput:
        """Steers one call; every other argument goes to the pipeline's own `__call__`.

        prompt          one, or several: each has particles of its own
        num_particles   K, in place of num_images_per_prompt
        lam             λ: the result is drawn from p(x0) exp(λ r(x0)); 0 gives the pipeline's own batch
        potential       difference, max, sum, now, or a function of a path's rewards
        resampler       systematic, stratified, residual, ssp, multinomial, or a function
        tempering       of λ along the run: constant, geometric, ess, or a function
        resample_steps  solver steps, from 0, at which rewards are read; by default at 40, 55, 70 and 85 % of the run
        ess_threshold   resample when ESS < threshold · K (adaptive); 1: at every one of those steps (scheduled)
        eta             noise η of every step, 0..1. By default the solver's own; the copies that resampling makes
                        take one step of the Gaussian kernel with η = 1, so that they part
        chunk_size      images decoded and scored at a time
        reward_prompt   what the reward reads instead of the prompt (needed with prompt_embeds)
        on_step         an observer of every solver step; what it raises ends the run
        output_type     pil, np, pt or latent

        Raises InputError for arguments that do not fit, CannotSteer (an InputError) for a pipeline or scheduler that
        cannot be steered, RewardError (an InputError) for a reward that breaks its contract.
        """
        check_output_type(output_type)
        if num_particles > 1 and lam != 0:
            check_copies_part(self.pipe.scheduler)
        algorithm = FeynmanKac(
            lam,
            choose("potential", potential, POTENTIALS),
            choose("resampler", resampler, RESAMPLERS),
            choose("tempering", tempering, TEMPERINGS),
            ess_threshold,
        )
        call, kernel_eta = route_eta(self.pipe, call, eta)
        population = Population(self.pipe, self.reward, prompt, num_particles, call, reward_prompt, chunk_size)
        # A step without noise would not part copies: for them η = 0 becomes 1.
        run = _Run(algorithm, population, kernel_eta, eta or 1.0, resample_steps, on_step)
        images = population.sample(run.on_event)
        rewards, parts = population.score(images)
        particles = algorithm.finish(run.particles, rewards)
        return population.output(images, rewards, parts, particles, run.history, output_type)


class _Run:
    """The particles of one call, and what happens to them at each solver step."""

    def __init__(
        self,
        algorithm: FeynmanKac,
        population: Population,
        eta: float | None,
        copy_eta: float,
        steps: Iterable[int] | None,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        self.algorithm, self.population, self.observer = algorithm, population, observer
        self.eta, self.copy_eta = eta, copy_eta  # of every step, None: the solver's own; of a copy's first step
        self.steps = None if steps is None else frozenset(steps)
        self.particles = Particles.start(population.groups, population.size)
        self.history: list[Evaluation] = []

    def on_event(self, event: Event) -> Answer:
        """One solver step: weigh the particles by r(x̂0), resample them, move them on."""
        if not self._reads_at(event):
            self._tell(StepReport(event.k, event.total))
            return None, self._moved(event, None)
        previews = self.population.preview(event.x0())
        rewards, _ = self.population.score(previews)
        weighed = self.algorithm.weigh(self.particles, rewards, event.k / event.total)
        self.particles, ancestors = self.algorithm.select(weighed, self.population.rng)
        stay = torch.arange(self.population.size).expand_as(rewards)
        evaluation = Evaluation(
            event.k, rewards, weighed.path.strengths[-1], weighed.ess, stay if ancestors is None else ancestors
        )
        self.history.append(evaluation)
        self._tell(StepReport(event.k, event.total, evaluation, previews))
        rows = None if ancestors is None else self.population.rows(ancestors).to(event.x.device)
        return rows, self._moved(event, rows)

    def _moved(self, event: Event, rows: Tensor | None) -> Tensor | None:
        """Where the slots go on from (None: where the solver took them). The first child of a particle goes its
        parent's way, each further one is drawn anew, so that copies part under deterministic solvers too."""
        taken = None if self.eta is None else event.kernel(self.eta).sample(self.population.rng)
        if rows is None:
            return taken
        moved = (event.prev if taken is None else taken)[rows]
        copies = repeated(rows)
        if not (can_redraw(event.scheduler) and copies.any()):
            return None if taken is None else moved
        moved[copies] = event.kernel(self.copy_eta, rows[copies]).sample(self.population.rng).to(moved.dtype)
        return moved

    def _reads_at(self, event: Event) -> bool:
        """Whether rewards are read at this step. Settled at the first: copies need a noisy step after them to part."""
        if event.k == 0:
            last = event.total - (2 if can_redraw(event.scheduler) else 3)
            self.steps = evaluated_steps(self.steps, event.total, last)
            if not self.steps and self.population.size > 1 and self.algorithm.lam != 0:
                raise CannotSteer(f"a run of {event.total} steps has none to resample at: use best-of-N, or more steps")
        return event.k in (self.steps or ())

    def _tell(self, report: StepReport) -> None:
        if self.observer:
            self.observer(report)


def evaluated_steps(asked: frozenset[int] | None, total: int, last: int) -> frozenset[int]:
    """The steps asked for, or the default shares of a run of `total`; none after `last`. Raises InputError."""
    if asked is None:
        return frozenset(step for share in DEFAULT_STEPS if (step := min(round(share * total), last)) >= 0)
    if wrong := sorted(step for step in asked if not 0 <= step <= last):
        raise InputError(f"resample_steps: {wrong[0]} is not from 0 to {last}, in a run of {total} steps")
    return asked


def repeated(rows: Tensor) -> Tensor:
    """(N,) true where a row number has come before."""
    return torch.stack([(rows[:place] == row).any() for place, row in enumerate(rows)])


def check_copies_part(scheduler: Any) -> None:
    """Raises CannotSteer for a deterministic solver without a Gaussian kernel: resampled copies would stay one."""
    if not copies_part(scheduler):
        raise CannotSteer(
            f"{type(scheduler).__name__} is deterministic and has no Gaussian kernel: resampled particles would never "
            "part. Use another one, for example pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
