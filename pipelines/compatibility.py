"""Compatibility of a diffusers pipeline with steer, measured by short runs of two particles.

Each check compares with an independent truth: the pipeline's own call, or a second path to the same images.
"""

import copy
import functools
import inspect
import itertools
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from steer.arguments import IMAGES_PER_PROMPT
from steer.audio import AudioReward, is_audio
from steer.diffusion.modular import as_callable
from steer.diffusion.preview import filter_call_kwargs, first_output
from steer.diffusion.schedules import gaussian_transition, step_levels
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError
from steer.pipelines.fk_steering import FKSteeringPipeline, StepReport
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.racing import RacingPipeline
from steer.pipelines.reno import ReNOPipeline
from steer.reward import Reward
from steer.rewards.parser import load_reward
from steer.training.rollout import Rows, Sampler, log_probs

PARTICLES = 2
TOLERANCE = 2e-3  # for pixels in [0, 1], and for log-densities relative to their size
LAST_BITS = 1e-5  # for pixels: a larger difference is not rounding
ROUNDING = 4e-3  # for pixels that a safety checker returns in 8 bits
SEED = 3
EVALUATED = 1  # the solver step whose intermediate rewards are checked
WHOLE_RUN = 99  # more coarse steps than a run has: a look-ahead over all steps that are left


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check: "ok", "refused" (an InputError), "differs" (a wrong result) or "traceback"."""

    state: str
    reason: str = ""


class _Differs(Exception):
    """A result that differs from the truth."""


@dataclass(frozen=True)
class _TracedStep:
    """A solver step from x to `end`, by `calls` evaluations of each row; `ddim`: the end of DDIM's step with η = 0."""

    calls: int
    x: Tensor
    end: Tensor
    ddim: Tensor

    @classmethod
    def of(cls, solver_step: SolverStep) -> "_TracedStep":
        x, x0, end = solver_step.x.float(), solver_step.x0(), solver_step.prev.float()
        if solver_step.k == solver_step.total - 1:
            return cls(solver_step.calls, x, end, x0)  # some schedules end before the image, a look-ahead does not
        levels = step_levels(solver_step.scheduler, solver_step.t, solver_step.index)
        return cls(solver_step.calls, x, end, gaussian_transition(x, x0, *levels, 0.0).mean)


@dataclass
class PipelineCheck:
    """The checks of one pipeline; `call` holds the arguments of its call for one prompt, without a generator."""

    pipe: Any
    call: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.pipe = as_callable(self.pipe)

    def row(self, names: Any = None) -> dict[str, Outcome]:
        """Run the checks and return their outcomes by name."""
        return {name: self._outcome(CHECKS[name]) for name in names or CHECKS}

    def _outcome(self, check: Callable[["PipelineCheck"], None]) -> Outcome:
        try:
            check(self)
        except InputError as error:
            return Outcome("refused", str(error).splitlines()[0])
        except _Differs as error:
            return Outcome("differs", str(error))
        except Exception as error:  # noqa: BLE001  # a foreign traceback is the finding that this check reports
            last = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome("traceback", f"{type(error).__name__}: {error} ({last.name}:{last.lineno})".splitlines()[0])
        return Outcome("ok")

    def split(self) -> tuple[Any, dict[str, Any]]:
        """Return new copies of the prompt and of the other arguments."""
        call = {name: _copied(value) for name, value in self.call.items()}
        return call.pop("prompt", None), call

    def plain_call(self, seed: int) -> dict[str, Any]:
        """Return new copies of the arguments of a plain call."""
        prompt, call = self.split()
        pt = filter_call_kwargs(self.pipe, {"output_type": "pt", "generator": Generator().manual_seed(seed)})
        return call | ({} if prompt is None else {"prompt": prompt}) | pt

    def plain(self, seed: int) -> Tensor:
        """Make the images of one plain call."""
        try:
            return first_output(self.pipe(**self.plain_call(seed)))
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            name, reason = type(self.pipe).__name__, (str(error).strip() or "no reason").splitlines()[0]
            raise InputError(
                f"the plain call of {name} fails ({type(error).__name__}: {reason}): fix that call first"
            ) from error

    def equals_plain(self, given: Tensor, plain: Tensor, what: str) -> None:
        """Raise _Differs unless two tensors are equal to the bit, or as close as repeated plain calls are."""
        _equal(given, plain, 0.0 if torch.equal(given, plain) else self._rounding, what)

    @functools.cached_property
    def _rounding(self) -> float:
        """Tolerance of a run that should equal a plain call: 0, or ten times the last bits in which plain calls differ.

        Calls of Stable Diffusion 3 with a ControlNet differ by some 1e-7 on a CPU.
        """
        first, *others = (self.plain(SEED) for _ in range(3))
        gap = max(float((other.double() - first.double()).abs().max()) for other in others)
        return 10 * gap if gap < LAST_BITS else 0.0

    @functools.cached_property
    def reward(self) -> Reward:
        """A differentiable reward for the pipeline's output: brightness, or the loudness of audio."""
        _, media = self.plain_batch
        return AudioReward(_loudness, "loudness", differentiable=True) if is_audio(media) else load_reward("brightness")

    @functools.cached_property
    def plain_batch(self) -> tuple[ParticleBatch, Tensor]:
        """The particle batch of the call, and its images without steering."""
        batch = self.batch()
        if len(images := batch.sample(_nothing)) != PARTICLES:
            name, count = type(self.pipe).__name__, len(images)
            raise InputError(f"{name} makes {count} images of {PARTICLES} rows: a particle is one image")
        return batch, images

    @functools.cached_property
    def trace(self) -> "list[_TracedStep]":
        """The solver steps of the batch without steering."""
        steps: list[_TracedStep] = []

        def record(solver_step: SolverStep) -> None:
            steps.append(_TracedStep.of(solver_step))

        self.batch().sample(record)
        return steps

    def moved(self, *ancestors: int) -> Tensor:
        """Make the images of a batch whose particles continue those of `ancestors` from the second step on."""

        def move(solver_step: SolverStep) -> tuple[Tensor, None] | None:
            moves = solver_step.k == min(EVALUATED, solver_step.total - 1)
            return (torch.tensor(ancestors), None) if moves else None

        return self.batch().sample(move)

    def batch(self) -> ParticleBatch:
        """Make a particle batch of the call, with a generator for each row."""
        prompt, call = self.split()
        given = call | {"generator": _generators()}
        return ParticleBatch(self.pipe, load_reward("brightness"), prompt, PARTICLES, given)


def load_object(spec: str) -> Any:
    """Return the pipeline `module:NAME`, or the pipeline that this function or class returns without arguments.

    Raises InputError where there is none.
    """
    sys.path.insert(0, "")
    try:
        made = pkgutil.resolve_name(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{spec} cannot be imported ({error}): use module:NAME of a file in this folder") from error
    finally:
        sys.path.remove("")
    if callable(made) and (inspect.isclass(made) or inspect.isroutine(made)):
        try:
            made = made()
        except TypeError as error:
            raise InputError(f"{spec} must make a pipeline without arguments ({error}): name a function") from error
    if not hasattr(made, "scheduler"):
        raise InputError(f"{spec} is a {type(made).__name__} without a scheduler: name a diffusers pipeline")
    return made


PICTURES = ("image", "control_image", "mask_image", "conditioning_image", "video", "control_video", "mask")


def example_call(pipe: Any, prompt: str, steps: int, size: int) -> dict[str, Any]:
    """Return arguments of a cheap call, with pictures of `size` pixels width where the signature requires some."""
    parameters = inspect.signature(type(as_callable(pipe)).__call__).parameters
    draws = Generator().manual_seed(SEED)
    call: dict[str, Any] = {}
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty or name in ("image", "mask_image", "control_image")
        if name in PICTURES and required:
            pixels = torch.rand((size, size, 3), generator=draws).numpy()
            picture = VaeImageProcessor.numpy_to_pil(pixels)[0]
            picture = picture.convert("L") if "mask" in name else picture
            call[name] = [picture] * 5 if "video" in name else picture
    if "prompt" in parameters:
        call["prompt"] = prompt
    if "num_inference_steps" in parameters:
        call["num_inference_steps"] = steps
    return call


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else copy.copy(value)


def _loudness(waveforms: Tensor, prompts: Sequence[str], sample_rate: int | None) -> Tensor:
    return waveforms.float().square().flatten(1).mean(1)


def _generators() -> list[Generator]:
    """Return a generator for each particle; the first particle's is the same as in the plain call."""
    return [Generator().manual_seed(SEED + row) for row in range(PARTICLES)]


def _nothing(solver_step: SolverStep) -> None:
    return None


def check_steps(check: PipelineCheck) -> None:
    """Compare the images of a run with step hooks and the plain call: equal to the bit where two plain calls are."""
    plain = check.plain(SEED)
    with hook_steps(check.pipe, _nothing) as view:
        check.equals_plain(first_output(view(**check.plain_call(SEED))), plain, "a watched run")


def check_rows(check: PipelineCheck) -> None:
    """Compare the first particle of a batch with a plain call with the same generator.

    Other particles may draw in another order: some pipelines draw once for all rows, then for each.
    """
    _, images = check.plain_batch
    try:
        _equal(images[:1], _batched(check.plain(SEED), images), ROUNDING, "a particle of a batch")
    except _Differs as error:
        count = next((name for name in IMAGES_PER_PROMPT if filter_call_kwargs(check.pipe, {name: 1})), None)
        if count is None:
            raise
        own = first_output(check.pipe(**check.plain_call(SEED) | {"generator": _generators(), count: PARTICLES}))
        _equal(images, own, 0.0, "a batch of particles")
        raise InputError(f"in the pipeline's own call for several images too, {error} from the call for one") from error


def check_swap(check: PipelineCheck) -> None:
    """Check that particles that trade places after the second step make images in swapped order.

    A solver that adds its own noise, different for each slot, is exempt: there, copies of one particle diverge.
    """
    _, plain = check.plain_batch
    swapped = check.moved(1, 0)
    if swapped.shape == plain.shape and (swapped - plain.flip(0)).abs().max() > TOLERANCE:
        first, second = check.moved(0, 0)
        if (first - second).abs().max() > TOLERANCE:
            return
    _equal(swapped, plain.flip(0), TOLERANCE, "a run of particles that trade places")
    if plain[0].shape == plain[1].shape and torch.equal(plain[0], plain[1]):
        raise _Differs("both particles made the same image")


def check_unsteered(check: PipelineCheck) -> None:
    """Compare the images at λ = 0 with the plain batch: equal to the bit where two plain calls are."""
    prompt, call = check.split()
    _, plain = check.plain_batch
    out = FKSteeringPipeline(check.pipe, check.reward)(
        prompt, num_particles=PARTICLES, lam=0.0, generator=_generators(), output_type="pt", **call
    )
    check.equals_plain(out.in_slot_order().images, plain, "λ = 0")


def check_fk(check: PipelineCheck) -> None:
    """Check that steering resamples by the reward of previews, with finite rewards."""
    prompt, call = check.split()
    out = FKSteeringPipeline(check.pipe, check.reward)(
        prompt, num_particles=PARTICLES, lam=1e8, ess_threshold=1.0, generator=_generators(), output_type="pt", **call
    )
    if not out.rewards.isfinite().all():
        raise _Differs("rewards are not finite")
    if not any((ancestors != torch.arange(PARTICLES)).any() for ancestors in out.ancestors):
        raise _Differs("no particle was resampled")


def check_lookahead(check: PipelineCheck) -> None:
    """Look ahead at the second step: the run is as without, at λ = 0, and each evaluation is counted.

    If the solver makes DDIM's steps, as the look-ahead does, a look-ahead over all steps predicts the run's own images.
    """
    prompt, call = check.split()
    _, plain = check.plain_batch
    previews: list[Tensor] = []

    def on_step(report: StepReport) -> None:
        previews.extend([] if report.previews is None else [report.previews])

    call |= {"generator": _generators(), "output_type": "pt", "num_particles": PARTICLES}
    steps = {"lam": 0.0, "lookahead": WHOLE_RUN, "resample_steps": [EVALUATED], "on_step": on_step}
    out = FKSteeringPipeline(check.pipe, check.reward)(prompt, **call, **steps)
    images = out.in_slot_order().images
    check.equals_plain(images, plain, "a run with look-ahead at λ = 0")
    ahead = check.trace[EVALUATED:]
    _check_evaluations(out.cost.nfe, PARTICLES * (sum(step.calls for step in check.trace) + len(ahead) - 1))
    if _makes_ddim_steps(ahead):
        _equal(previews[0], images, ROUNDING, "the look-ahead over all steps that are left")


def check_race(check: PipelineCheck) -> None:
    """Check that the better of two starts wins and ends as in the whole batch, and that the other costs nothing more.

    The starts are ranked at the second step, by a look-ahead of two coarse steps.
    """
    prompt, call = check.split()
    call |= {"generator": _generators(), "output_type": "pt", "num_particles": PARTICLES}
    out = RacingPipeline(check.pipe, check.reward)(prompt, lookahead=2, rungs={EVALUATED: 1}, **call)
    (rung,) = out.history
    winner = int(rung.rewards[0].argmax())
    if rung.ancestors[0].tolist() != [winner]:
        raise _Differs(f"start {rung.ancestors[0].tolist()} wins with rewards {rung.rewards[0].tolist()}")
    _equal(out.images, check.moved(winner, winner)[:1], ROUNDING, "the winner of a race")
    calls = [step.calls for step in check.trace]
    both, alone = calls[: EVALUATED + 1], calls[EVALUATED + 1 :]
    _check_evaluations(out.cost.nfe, PARTICLES * (sum(both) + bool(alone)) + sum(alone))


def _check_evaluations(counted: int, expected: int) -> None:
    if counted != expected:
        raise _Differs(f"{counted} denoiser evaluations are counted, not {expected}")


def _makes_ddim_steps(steps: Sequence[_TracedStep]) -> bool:
    """Return whether these are DDIM's steps with η = 0, and the pipeline does not edit the latents between them."""
    own = max(_gap(step.end, step.ddim) for step in steps)
    edits = [_gap(before.end, after.x) for before, after in itertools.pairwise(steps)]
    return max([own, *edits]) < LAST_BITS * 10


def check_preview(check: PipelineCheck) -> None:
    """Compare the preview of the final latents with the images."""
    batch, images = check.plain_batch
    _equal(batch.preview(batch.latents), images, TOLERANCE, "the preview of the final latents")


def check_reno(check: PipelineCheck) -> None:
    """Take one step of noise optimisation; compare the first image with the plain pipeline's."""
    _, plain = check.plain_batch
    prompt, call = check.split()
    if (guidance := inspect.signature(type(check.pipe).__call__).parameters.get("guidance_scale")) is not None:
        call.setdefault("guidance_scale", guidance.default)  # ReNO's own default is 0, for one-step models
    first: list[Tensor] = []

    def observe(iteration: Any) -> None:
        first.append(iteration.images)

    out = ReNOPipeline(check.pipe, check.reward)(
        prompt,
        num_particles=PARTICLES,
        iterations=2,
        generator=_generators(),
        on_iteration=observe,
        output_type="pt",
        **call,
    )
    if not out.rewards.isfinite().all():
        raise _Differs("rewards are not finite")
    _equal(first[0], plain, TOLERANCE, "the first image of the search")


def check_rollout(check: PipelineCheck) -> None:
    """Compare the log-densities of a replay with the rollout's."""
    prompt, call = check.split()
    sampler = Sampler(check.pipe, call)
    texts = (prompt,) * PARTICLES if isinstance(prompt, str) else tuple(prompt or ("",) * PARTICLES)
    texts = texts if len(texts) == PARTICLES else (texts[0],) * PARTICLES
    seeds = tuple(range(SEED, SEED + PARTICLES))
    stored, _ = sampler.rollout(Rows(texts, seeds, seeds))
    again = log_probs(sampler, stored)
    scale = float(stored.log_probs.abs().max())
    _equal(again / scale, stored.log_probs / scale, TOLERANCE, "a replay")


CHECKS: dict[str, Callable[[PipelineCheck], None]] = {
    "steps": check_steps,
    "rows": check_rows,
    "swap": check_swap,
    "lam0": check_unsteered,
    "fk": check_fk,
    "lookahead": check_lookahead,
    "race": check_race,
    "preview": check_preview,
    "reno": check_reno,
    "rollout": check_rollout,
}


def _batched(images: Tensor, like: Tensor) -> Tensor:
    return images[None] if images.dim() < like.dim() else images


def _equal(given: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    """Raise _Differs unless two tensors agree."""
    if given.shape != truth.shape:
        raise _Differs(f"{what} has shape {tuple(given.shape)}, not {tuple(truth.shape)}")
    if not torch.isfinite(given).all() or not torch.isfinite(truth).all():
        raise _Differs(f"{what} is not finite")
    gap = _gap(given, truth)
    if gap > tolerance:
        raise _Differs(f"{what} differs by {gap:.2g}")


def _gap(given: Tensor, truth: Tensor) -> float:
    return float((given.double() - truth.double()).abs().max())
