"""How `steer sample` makes the images of a prompt: the methods by name."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steer.apps.preview_words import preview_named
from steer.apps.sample_settings import SampleSettings
from steer.errors import InputError
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
from steer.pipelines.reno import ONE_STEP
from steer.pipelines.selection import Selection
from steer.pipelines.starts import screened_starts
from steer.preview import accepted_only
from steer.reward import Reward

Off = Callable[[], AbstractContextManager[None]]
On = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """One prompt to steer. A method with iterations saves each one to `state_file`, if any, and tells it.

    on_step        told every solver step by the other methods; what it raises ends the run
    preview_steps  where best-of-n and base, which need none, look at x̂0 for it; None: where fk does
    unworn         inside, the pipeline is without its finetuned weights
    started        arguments of the call in place of its own: noise that was chosen before
    arguments      of the pipeline's call, which the prompt's row of a prompt file gives
    faster         what is switched on while it runs: (pipeline) → a context that gives the pipeline to call
    """

    pipe: Any
    reward: Reward
    prompt: str
    settings: SampleSettings
    state_file: Path | None
    on_iteration: Callable[[Iteration], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    preview_steps: tuple[int, ...] | None = ()
    unworn: Off = nullcontext
    faster: On = nullcontext
    started: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, method: str | None = None) -> SteeringOutput:
        """The images of the prompt, by its own method or another one."""
        with self.faster(self.pipe) as pipe:
            return METHODS[method or self.settings.method].run(replace(self, pipe=pipe))

    @property
    def call(self) -> dict[str, Any]:
        """What every method is called with. None stands for the method's default, else for the pipeline's own."""
        given: dict[str, Any] = {
            "num_particles": self.settings.particles,
            "eta": self.settings.eta,
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance,
        }
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"generator": torch.Generator().manual_seed(self.settings.seed)}
        return (
            accepted_only(self.pipe, METHODS[self.settings.method].defaults)
            | given
            | dict(self.arguments)
            | dict(self.started)
        )


Run = Callable[[Job], SteeringOutput]


def _screened(run: Run) -> Run:
    """The same from starts that a short run likes, where they are asked for."""

    def screened(job: Job) -> SteeringOutput:
        settings, call = job.settings, job.call
        if settings.start_candidates is None:
            return run(job)
        own = {name: value for name, value in call.items() if name not in ("num_particles", "eta")}
        starts = screened_starts(
            job.pipe,
            job.reward,
            job.prompt,
            keep=settings.particles,
            candidates=settings.start_candidates,
            steps=settings.start_steps,
            **own,
        )
        output = run(replace(job, started=starts.arguments()))
        return replace(output, cost=output.cost.plus(starts.cost))

    return screened


def _fk(job: Job) -> SteeringOutput:
    return FKSteeringPipeline(job.pipe, job.reward)(
        job.prompt,
        lam=job.settings.strength,
        potential=job.settings.potential,
        resampler=job.settings.resampler,
        tempering=job.settings.tempering,
        ess_threshold=job.settings.ess_threshold,
        reward_guidance=job.settings.reward_guidance,
        narrow=job.settings.schedule,
        narrow_choice=job.settings.narrow_choice,
        target_reward=job.settings.target,
        draw=job.settings.draw,
        overlap=job.settings.overlap,
        preview=preview_named(job.settings.preview, job.pipe),
        on_step=job.on_step,
        **job.call,
    )


def _svdd(job: Job) -> SteeringOutput:
    method, preview = SelectionPipeline(job.pipe, job.reward), preview_named(job.settings.preview, job.pipe)
    return method(job.prompt, lam=job.settings.strength, preview=preview, on_step=job.on_step, **job.call)


def _beam(job: Job) -> SteeringOutput:
    method, preview = SelectionPipeline(job.pipe, job.reward), preview_named(job.settings.preview, job.pipe)
    return method(job.prompt, beams=job.settings.beams, preview=preview, on_step=job.on_step, **job.call)


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
        target=job.settings.target,
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
        target=job.settings.target,
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
    """

    run: Run
    check: Callable[[SampleSettings, Reward], None] = _any_reward
    defaults: Mapping[str, Any] = field(default_factory=dict)
    iterates: bool = False


METHODS = {
    "fk": Method(_screened(_fk), check=_guiding_reward),
    "svdd": Method(_screened(_svdd)),
    "beam": Method(_screened(_beam), check=_dividing_beams),
    "best-of-n": Method(_screened(_best_of_n)),
    "base": Method(_base),
    "reno": Method(_reno, check=_climbed_reward, defaults=ONE_STEP, iterates=True),
    "noise-search": Method(_noise_search, iterates=True),
}
