"""One run of Feynman–Kac steering: what happens to the particles at each solver step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.particles import Particles
from steer.pipelines.output import Evaluation
from steer.pipelines.plan import Algorithm, Plan, Selected, best
from steer.pipelines.population import Population
from steer.seam import Answer, CannotSteer, Event
from steer.transition import redraws

DEFAULT_STEPS = (0.4, 0.55, 0.7, 0.85)  # where rewards are read, as shares of the run


@dataclass(frozen=True)
class StepReport:
    """What an observer is told after a solver step: number `step` of `total`; where rewards were read, the evaluation
    and the images (B·K, 3, H, W) of x̂0, of K particles that were left, that they were read from."""

    step: int
    total: int
    evaluation: Evaluation | None = None
    previews: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What x̂0 promises at one step, of the K particles that are left: images (B·K, 3, H, W), rewards (B, K) and, in a
    guided run, ∇r of all rows of the batch."""

    previews: Tensor
    rewards: Tensor
    gradient: Tensor | None = None


class Run:
    """The particles of one call, and what happens to them at each solver step."""

    first = 0  # the first step at which rewards may be read
    lag = 0  # steps from there to where particles are resampled by them
    steps_asked = "resample_steps"  # what the caller knows those steps as

    def __init__(
        self,
        algorithm: Algorithm,
        population: Population,
        eta: float | None,
        resampling_eta: float,
        plan: Plan,
        observer: Callable[[StepReport], None] | None,
    ) -> None:
        plan.check_size(population.size)
        self.algorithm, self.population, self.plan, self.observer = algorithm, population, plan, observer
        self.eta, self.resampling_eta = eta, resampling_eta  # of every step, None: the solver's own; where resampled
        self.steps: frozenset[int] = frozenset()  # at which rewards are read: known at the first
        self.settled = self.searched = False  # a particle has reached the target; some were chosen for being the best
        self.particles = Particles.start(population.groups, population.size)
        self.history: list[Evaluation] = []

    def sample(self) -> Tensor:
        """Runs the pipeline to its end: the finished images (B·K, 3, H, W) of the K particles that are left."""
        return self.population.sample(self.on_event)

    def on_event(self, event: Event) -> Answer:
        """One solver step: weigh the particles by r(x̂0), resample them, move them on."""
        if not self._reads_at(event):
            self._tell(StepReport(event.k, event.total))
            return None, self._moved(event, None, None)
        reading = self._read(event)
        rows = self._resampled(reading, event.k, event)
        return rows, self._moved(event, rows, reading)

    def _resampled(self, reading: Reading, step: int, event: Event) -> Tensor | None:
        """Weighs the particles by what was read at a step, and resamples them at this event: the rows that the slots
        go on from, None: all stay."""
        weighed = self.algorithm.weigh(self.particles, reading.rewards, step / event.total)
        self.particles, ancestors = self._select(weighed, step)
        stay = torch.arange(self.population.alive).expand_as(reading.rewards)
        evaluation = Evaluation(
            step, reading.rewards, weighed.path.strengths[-1], weighed.ess, stay if ancestors is None else ancestors
        )
        self.history.append(evaluation)
        self._tell(StepReport(event.k, event.total, evaluation, reading.previews))
        return None if ancestors is None else self.population.follow(ancestors).to(event.x.device)

    def _select(self, weighed: Particles, step: int) -> Selected:
        """The particles that go on and their ancestors; None: all stay where they are."""
        self.settled = self.plan.reached(weighed.path.rewards[-1])
        choice, count = (best, 1) if self.settled else self.plan.selects(step, self.population.alive)
        self.searched = self.searched or choice is best
        return choice(self.algorithm, weighed, count, self.population.rng)

    def _read(self, event: Event) -> Reading:
        return self._read_off(event.x0())

    def _read_off(self, x0: Tensor) -> Reading:
        """What the images that x̂0 stands for are worth."""
        previews = self.population.preview(x0)
        rewards, _ = self.population.score(previews)
        return Reading(previews, rewards)

    def _moved(self, event: Event, rows: Tensor | None, reading: Reading | None) -> Tensor | None:
        """Latents of the slots after this step; None: those of the solver.

        Where a reading may copy particles, all of them take the Gaussian kernel, whether they are resampled or not: a
        kernel that depended on the weights would change the law that the weights refer to.
        """
        copying = reading is not None and self.population.alive > 1 and self._needs_steps()
        resampling = copying and self._redraws(event.scheduler)
        eta = self.resampling_eta if resampling else self.eta
        return None if eta is None else event.kernel(eta, rows).sample(self.population.rng)

    def _redraws(self, scheduler: Any) -> bool:
        return self.eta is not None or redraws(scheduler)

    def _reads_at(self, event: Event) -> bool:
        """Whether rewards are read at this step. Settled at the first: copies need a noisy step after them to part."""
        if event.k == 0:
            last = event.total - self.lag - (2 if self._redraws(event.scheduler) else 3)
            own = self._default_steps(event.total)
            self.steps = self.plan.steps(own, self.first, last, event.total, self.steps_asked)
            if not self.steps and self._needs_steps():
                raise CannotSteer(f"a run of {event.total} steps has none to resample at: use best-of-N, or more steps")
        return event.k in self.steps and not self.settled

    def _default_steps(self, total: int) -> Iterable[int]:
        return (round(share * total) for share in DEFAULT_STEPS)

    def _needs_steps(self) -> bool:
        return self.population.size > 1 and self.algorithm.lam != 0

    def _tell(self, report: StepReport) -> None:
        if self.observer:
            self.observer(report)
