"""How `steer sample` makes the images of a prompt: the settings of a run, and the methods by name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steer.choices import choose
from steer.errors import InputError
from steer.noise import OPTIMISERS
from steer.pipelines import (
    BestOfNPipeline,
    FKSteeringPipeline,
    Iteration,
    NoiseSearchPipeline,
    ReNOPipeline,
    SelectionPipeline,
    SteeringOutput,
    StepReport,
)
from steer.pipelines.noise_gradient import GRADIENTS, check_differentiable
from steer.pipelines.noise_search import Neighbours
from steer.pipelines.reno import ONE_STEP, Ascent
from steer.pipelines.selection import Selection
from steer.potentials import POTENTIALS, TEMPERINGS
from steer.preview import accepted_only
from steer.resampling import RESAMPLERS
from steer.reward import Reward


@dataclass(frozen=True)
class SampleSettings:
    """What decides the images. Saved in the report, and compared when a run goes on.

    A setting with a default is younger than the first reports: where one lacks it, the default is what was done.
    lam None stands for the method's own.
    """

    model: str
    method: str
    reward: str
    particles: int
    steps: int | None
    guidance: float | None
    lam: float | None
    potential: str
    resampler: str
    tempering: str
    ess_threshold: float
    eta: float | None
    seed: int
    compare: bool
    dtype: str | None
    reward_guidance: float = 0.0
    iterations: int = 50
    optimiser: str = "sgd"
    lr: float | None = None
    regularisation: float = 0.01
    gradient: str = "backprop"
    patience: int | None = None
    restarts: int = 0
    neighbours: int = 4
    distance: float = 0.5
    beams: int = 2

    def __post_init__(self) -> None:
        if self.lam is None and self.method in METHODS:
            object.__setattr__(self, "lam", METHODS[self.method].lam)

    @property
    def strength(self) -> float:
        """λ, infinite where it has no limit."""
        return math.inf if self.lam is None else self.lam

    def check(self) -> None:
        """Raises InputError for a name or number that cannot be, before any model is loaded."""
        for kind, table in TABLES.items():
            choose(kind, getattr(self, kind), table)
        for name, count in (("particles", self.particles), ("steps", self.steps), ("iterations", self.iterations)):
            if count is not None and count < 1:
                raise InputError(f"--{name} must be at least 1, got {count}")
        if not 0 < self.ess_threshold <= 1:
            raise InputError(f"--ess-threshold must be above 0 and at most 1, got {self.ess_threshold}")
        for name, number in (("lam", self.lam), ("guidance", self.guidance)):
            if number is not None and not math.isfinite(number):
                raise InputError(f"--{name} must be a finite number, got {number}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"--eta must be from 0 to 1, got {self.eta}")
        if not 0 <= self.reward_guidance < math.inf:
            raise InputError(f"--reward-guidance must be at least 0 and finite, got {self.reward_guidance}")
        rule = OPTIMISERS[self.optimiser]
        rule = rule if self.lr is None else replace(rule, lr=self.lr)
        try:  # what moves the noise knows its own limits, and names what is beyond them as the options do
            Ascent(GRADIENTS[self.gradient], rule, self.regularisation, patience=self.patience, restarts=self.restarts)
            Neighbours(self.neighbours, self.distance)
        except InputError as error:
            raise InputError(f"--{error}") from error


@dataclass(frozen=True)
class Job:
    """One prompt to steer. A method that goes on from iteration to iteration keeps `state_file`, and tells each one.

    on_step        told every solver step by the other methods; what it raises ends the run
    preview_steps  where best-of-n and base, which need none, look at x̂0 for it; None: where fk does
    """

    pipe: Any
    reward: Reward
    prompt: str
    settings: SampleSettings
    state_file: Path
    on_iteration: Callable[[Iteration], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    preview_steps: tuple[int, ...] | None = ()

    @property
    def call(self) -> dict[str, Any]:
        """What every method is called with. None stands for the method's default, else for the pipeline's own."""
        given = {
            "num_particles": self.settings.particles,
            "eta": self.settings.eta,
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance,
        }
        defaults = accepted_only(self.pipe, METHODS[self.settings.method].defaults)
        said = {name: value for name, value in given.items() if value is not None}
        return defaults | said | {"generator": torch.Generator().manual_seed(self.settings.seed)}


def _fk(job: Job) -> SteeringOutput:
    return FKSteeringPipeline(job.pipe, job.reward)(
        job.prompt,
        lam=job.settings.strength,
        potential=job.settings.potential,
        resampler=job.settings.resampler,
        tempering=job.settings.tempering,
        ess_threshold=job.settings.ess_threshold,
        reward_guidance=job.settings.reward_guidance,
        on_step=job.on_step,
        **job.call,
    )


def _svdd(job: Job) -> SteeringOutput:
    method = SelectionPipeline(job.pipe, job.reward)
    return method(job.prompt, lam=job.settings.strength, on_step=job.on_step, **job.call)


def _beam(job: Job) -> SteeringOutput:
    method = SelectionPipeline(job.pipe, job.reward)
    return method(job.prompt, beams=job.settings.beams, on_step=job.on_step, **job.call)


def _best_of_n(job: Job) -> SteeringOutput:
    method = BestOfNPipeline(job.pipe, job.reward)
    return method(job.prompt, preview_steps=job.preview_steps, on_step=job.on_step, **job.call)


def _base(job: Job) -> SteeringOutput:
    return _best_of_n(job).in_slot_order()


def _reno(job: Job) -> SteeringOutput:
    return ReNOPipeline(job.pipe, job.reward)(
        job.prompt,
        iterations=job.settings.iterations,
        optimiser=job.settings.optimiser,
        lr=job.settings.lr,
        regularisation=job.settings.regularisation,
        gradient=job.settings.gradient,
        patience=job.settings.patience,
        restarts=job.settings.restarts,
        state_file=job.state_file,
        on_iteration=job.on_iteration,
        **job.call,
    )


def _noise_search(job: Job) -> SteeringOutput:
    return NoiseSearchPipeline(job.pipe, job.reward)(
        job.prompt,
        iterations=job.settings.iterations,
        neighbours=job.settings.neighbours,
        distance=job.settings.distance,
        state_file=job.state_file,
        on_iteration=job.on_iteration,
        **job.call,
    )


def _any_reward(settings: SampleSettings, reward: Reward) -> None:
    """Values are enough."""


def _guiding_reward(settings: SampleSettings, reward: Reward) -> None:
    if settings.reward_guidance and not reward.differentiable:
        raise InputError(f"reward {reward.name!r} is not differentiable: use --reward-guidance 0, or another reward")


def _dividing_beams(settings: SampleSettings, reward: Reward) -> None:
    try:
        Selection(settings.beams).check_size(settings.particles)
    except InputError as error:
        raise InputError(f"--{str(error).replace('num_particles', '--particles')}") from error


def _climbed_reward(settings: SampleSettings, reward: Reward) -> None:
    check_differentiable(reward, GRADIENTS[settings.gradient])


@dataclass(frozen=True)
class Method:
    """What a name of --method stands for.

    run       makes the images of one prompt
    check     raises InputError for settings or a reward that the method can do nothing with, before any model is loaded
    defaults  what it, and the base beside it, calls the pipeline with where the user says nothing
    iterates  whether it goes on from iteration to iteration, with a trace
    lam       its λ where the user says nothing; None: without limit
    """

    run: Callable[[Job], SteeringOutput]
    check: Callable[[SampleSettings, Reward], None] = _any_reward
    defaults: Mapping[str, Any] = field(default_factory=dict)
    iterates: bool = False
    lam: float | None = 10.0


METHODS = {
    "fk": Method(_fk, check=_guiding_reward),
    "svdd": Method(_svdd, lam=None),
    "beam": Method(_beam, check=_dividing_beams),
    "best-of-n": Method(_best_of_n),
    "base": Method(_base),
    "reno": Method(_reno, check=_climbed_reward, defaults=ONE_STEP, iterates=True),
    "noise-search": Method(_noise_search, iterates=True),
}

TABLES: dict[str, Mapping[str, Any]] = {
    "method": METHODS,
    "potential": POTENTIALS,
    "resampler": RESAMPLERS,
    "tempering": TEMPERINGS,
    "optimiser": OPTIMISERS,
    "gradient": GRADIENTS,
}
