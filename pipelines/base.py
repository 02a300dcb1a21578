"""The base of the steering pipelines, and their output."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, ClassVar, ParamSpec, Protocol, Self, TypeVar, cast, overload

import torch
from diffusers.utils import BaseOutput
from torch import Generator, Tensor

from steer.arguments import KeywordChecked, Settings, coerce_value
from steer.assets import MODELS, TEXT_MODELS
from steer.diffusion.draws import replaced_draw
from steer.diffusion.modular import as_callable
from steer.diffusion.schedules import clip_limit, descends_from, ignores_eta
from steer.diffusion.seeds import Generators, copy_generators
from steer.errors import InputError
from steer.pipelines.settings import IntermediateSettings, Prompts, read_arguments
from steer.pipelines.text.masked_diffusion import left_out, pipeline_class
from steer.registry import did_you_mean
from steer.rewards.parser import load_reward

EMBEDDED = MODELS | TEXT_MODELS


class RewardedPipeline(KeywordChecked):
    """A diffusers pipeline, which stays unchanged, and a reward.

    The reward is a Reward, a function (images, prompts) → (N,), a name, a dict of weights or a list (see
    `steer.load_reward`).
    """

    other_names: ClassVar[Mapping[str, str]] = dict.fromkeys(("pipeline", "model"), "pipe") | dict.fromkeys(
        ("reward_funcs", "reward_fn"), "reward"
    )

    def __init__(self, pipe: Any, reward: Any) -> None:
        if isinstance(pipe, str | PathLike):
            place = f"MODELS[{pipe!r}]" if pipe in EMBEDDED else repr(str(pipe))
            raise InputError(
                f"pipe must be a loaded pipeline, got {str(pipe)!r}: give DiffusionPipeline.from_pretrained({place})"
            )
        self.pipe = as_callable(pipe)
        self.reward = load_reward(reward)

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str], reward: Any, **options: Any) -> Self:
        """Load a pipeline by hub name, folder or embedded name, such as "scenes".

        options  arguments of DiffusionPipeline.from_pretrained
        """
        source = EMBEDDED.get(str(model), model)
        return cls(pipeline_class(source).from_pretrained(source, **{**left_out(source), **options}), reward)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the diffusers pipeline, as its own `to` does."""
        self.pipe.to(*args, **kwargs)
        return self


class SteeringPipeline(RewardedPipeline):
    """A steering method for a diffusers pipeline; attributes of the pipeline are read and set through it."""

    @classmethod
    def _hint(cls, name: str, known: Sequence[str]) -> str:
        """Name the call for one of its settings; else the nearest argument of the constructor."""
        if name in [*inspect.signature(cls.__call__).parameters][2:-1]:  # without self, prompt and the pipeline's own
            return f"say it in the call, {cls.__name__}(pipe, reward)(prompt, {name}=…)"
        return super()._hint(name, known)

    def __getattr__(self, name: str) -> Any:
        if name == "pipe" or name.startswith("__"):  # a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("pipe", "reward") or not hasattr(self.pipe, name)
        object.__setattr__(self if own else self.pipe, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.pipe)})


P = ParamSpec("P")
S = TypeVar("S", bound=Settings)
S_contra = TypeVar("S_contra", bound=Settings, contravariant=True)


class SteeringMethod(Protocol[S_contra]):
    """The body of a method's call, with checked settings; `call` holds the pipeline's own arguments."""

    def __call__(
        self, pipeline: Any, prompt: Prompts, settings: S_contra, call: dict[str, Any], /
    ) -> "SteeringOutput": ...


class SteeringCall(Protocol[P]):
    """The call of a steering pipeline for type checkers and editors, with the fields of its settings as keywords."""

    @overload
    def __call__(self, prompt: Prompts = None, /, *args: P.args, **settings: P.kwargs) -> "SteeringOutput": ...
    @overload
    def __call__(self, prompt: Prompts = None, **settings_and_pipeline_call: Any) -> "SteeringOutput": ...


def steering_call(settings: Callable[P, S]) -> Callable[[SteeringMethod[S]], SteeringCall[P]]:
    """Decorate the body of a method's call: signature and docstring are derived from the settings dataclass."""
    kind = cast(type[Settings], settings)
    shared = {one.name for one in fields(IntermediateSettings)} - {"num_particles"}  # shown after the method's own
    parameters = sorted(inspect.signature(kind).parameters.values(), key=lambda one: one.name in shared)

    def decorate(method: SteeringMethod[S]) -> SteeringCall[P]:
        @functools.wraps(method)
        def call(self: Any, prompt: Prompts = None, **arguments: Any) -> Any:
            return_dict = coerce_value("return_dict", bool, arguments.pop("return_dict", True))
            own, rest = read_arguments(kind, arguments)
            check_known(rest, self.pipe, kind)
            output = method(self, coerce_value("prompt", Prompts, prompt), own, rest)
            return output if return_dict else output.to_tuple()

        table = "\n".join(f"{one.name:23} {kind.help()[one.name]}" for one in parameters)
        table += f"\n{'return_dict':23} false returns the output's `to_tuple()`, whose first entry is the images"
        call.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\n{table}"
        shown = [inspect.Parameter("self", _POSITIONAL), inspect.Parameter("prompt", _POSITIONAL, default=None)]
        rest = inspect.Parameter("pipeline_call", inspect.Parameter.VAR_KEYWORD, annotation=Any)
        call.__dict__["__signature__"] = inspect.Signature([*shown, *parameters, rest])
        return cast(SteeringCall[P], call)

    return decorate


OTHER_NAMES = {  # words for arguments of a steering call in other libraries and in `steer sample`
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "n": "num_particles",
    "num_samples": "num_particles",
    "batch_size": "num_particles",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}


def check_known(call: Mapping[str, Any], pipe: Any, settings: type[Settings]) -> None:
    """Raise InputError for an argument that neither the method nor the pipeline's own call knows."""
    _, *accepted = inspect.signature(type(pipe).__call__).parameters.values()  # without self
    own = [one.name for one in accepted if one.kind in (_POSITIONAL, _KEYWORD)]
    known = [*(one.name for one in fields(settings)), "metadata", *own]
    if unknown := [name for name in call if name not in known]:
        kind = type(pipe).__name__
        see = f"see the arguments of {kind}.__call__ and {settings.__name__}"
        raise InputError(
            f"{kind} takes no argument {unknown[0]!r}: {did_you_mean(unknown[0], known, see, OTHER_NAMES)}"
        )


_POSITIONAL, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def route_eta(pipe: Any, call: dict[str, Any], eta: float | None) -> tuple[dict[str, Any], float | None]:
    """Route η to the pipeline where it and its solver know η (DDIM), else to the Gaussian kernel.

    The kernel also takes η where DDIM's own step is different: with x̂0 clipped but not ε̂, or not finite at zero SNR.
    """
    if eta is None:
        return call, None
    scheduler = pipe.scheduler
    own = takes_eta(pipe) and not ignores_eta(scheduler) and (eta == 0 or not _step_differs_from_kernel(scheduler))
    return (call | {"eta": eta}, None) if own else (call, eta)


def takes_eta(pipe: Any) -> bool:
    """Return whether both pipeline and scheduler accept η."""
    return all("eta" in inspect.signature(one).parameters for one in (type(pipe).__call__, pipe.scheduler.step))


MIN_ALPHA_CUMPROD = 1e-6  # ᾱ below which 1 − ᾱ_s − τ² of a DDIM step may round to a negative number


def _step_differs_from_kernel(scheduler: Any) -> bool:
    clips = clip_limit(scheduler) < math.inf or bool(scheduler.config.get("thresholding"))
    return descends_from(scheduler, {"DDIMScheduler"}) and (
        clips or float(scheduler.alphas_cumprod.min()) < MIN_ALPHA_CUMPROD
    )


@dataclass(frozen=True)
class Cost:
    """The cost of a call.

    nfe            denoiser evaluations, one per particle and model call (a guided pair counts once)
    decodes        images decoded by the model's own VAE, previews included
    reward_calls   images scored
    seconds        wall clock
    gradients      images differentiated; each costs about two more evaluations of everything, or three where
                   activations are recomputed
    other_decodes  previews by a cheaper decoder, which `decodes` leaves out
    """

    nfe: int
    decodes: int
    reward_calls: int
    seconds: float
    gradients: int = 0
    other_decodes: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Return the sum of both costs."""
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})


@dataclass(frozen=True)
class ResamplingInfo:
    """The evaluation and resampling at one solver step.

    Rewards (B, K) of x̂0, the strength λ_j (B, 1) used, the ESS (B,) before resampling, ancestors (B, K) of the slots.
    """

    step: int
    rewards: Tensor
    strength: Tensor
    ess: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class Iteration:
    """Iteration `number` of `total` of a noise optimisation, by slot.

    Rewards (B, K) and their components, ‖ε‖/√D (B, K), the best rewards (B, K) so far; for observers also the images
    (B·K, 3, H, W).
    """

    number: int
    total: int
    rewards: Tensor
    components: Mapping[str, Tensor]
    norms: Tensor
    best: Tensor
    images: Tensor | None = None


@dataclass(frozen=True)
class InitialNoise:
    """Starting noise (B·K, …) of images in the model's dtype, and the way to give it to the pipeline's own call.

    seeds      one for each image, for everything else that the call draws
    draws      whether the plain call draws this noise itself; then the generators are advanced past it
    draw       number of the call's normal draw that the noise replaces; None: the noise is passed as `latents`
    generator  the call's own generators, where images need them; rows that share a generator use it in order
    """

    noise: Tensor
    seeds: tuple[int, ...]
    draws: bool = False
    draw: int | None = None
    generator: Generators | None = None

    def arguments(self) -> dict[str, Any]:
        """Return `latents` and `generator` for the pipeline's own call, which then makes these images again.

        Where `draw` is a number, return the generators alone: make the call inside `applied()`.
        """
        if self.generator is not None:
            return {"generator": copy_generators(self.generator)}
        generators = [Generator().manual_seed(seed) for seed in self.seeds]
        if self.draw is not None:
            return {"generator": generators}
        if self.draws:
            for generator in generators:
                torch.randn(self.noise.shape[1:], dtype=self.noise.dtype, generator=generator)
        return {"latents": self.noise, "generator": generators}

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which the pipeline's next call in this thread starts from this noise."""
        return nullcontext() if self.draw is None else replaced_draw(self.noise, self.draw)

    def rows(self, rows: Sequence[int]) -> "InitialNoise":
        """Select the noise of some images."""
        several = self.generator if isinstance(self.generator, list) else None
        generator = self.generator if several is None else [several[row] for row in rows]
        seeds = tuple(self.seeds[row] for row in rows)
        return replace(self, noise=self.noise[list(rows)], seeds=seeds, generator=generator)


@dataclass(frozen=True)
class Elites:
    """The best image of every cell of MAP-Elites, of B prompts × C cells.

    pictures   (B, C, 3, 64, 64) of 8 bits, scaled to squares
    rewards    (B, C), −∞ where a cell is empty
    names      names of the descriptors
    shape      number of intervals of each; the cells are their combinations, the last descriptor changing fastest
    low, high  (D,) ends of the ranges that the intervals divide
    """

    pictures: Tensor
    rewards: Tensor
    names: tuple[str, ...]
    shape: tuple[int, ...]
    low: Tensor
    high: Tensor


@dataclass
class SteeringOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """The images of a call, best first within each of B prompts of K particles; an object, a dict and a tuple.

    images          B·K images, prompt after prompt, in the requested output type
    rewards         (B, K) of the finished images
    components      scores (B, K) of the components of a composed reward, by name
    log_weights     (B, K) unnormalised; their softmax gives the weights of the images as draws from p(x0) exp(λ r(x0))
    log_normaliser  (B,)   log of the estimate of E_p[exp(λ r(x0))]
    latents         (B·K, …) final latents
    nsfw_content_detected  (B, K) bool: images that the pipeline's safety checker blackened, after they were scored;
                    None without a checker, or where noise was optimised
    lam             the strength λ of Feynman–Kac steering, as given or as chosen by lam="auto"; None in other methods
    elites          the archive of MAP-Elites; None in other methods
    order           (B, K) the slot of the run that each image comes from
    history         one ResamplingInfo per evaluated step, in the slots of that step
    cost            evaluations and seconds
    start           optimised noise, in the order of the images
    trace           iterations of an optimised noise, by slot
    stopped         reason for an early end with the best images so far; else None
    """

    images: Any
    rewards: Tensor
    components: Mapping[str, Tensor]
    log_weights: Tensor
    log_normaliser: Tensor
    latents: Tensor
    order: Tensor
    history: tuple[ResamplingInfo, ...]
    cost: Cost
    start: InitialNoise | None = None
    trace: tuple[Iteration, ...] = ()
    stopped: str | None = None
    nsfw_content_detected: Tensor | None = None
    lam: float | None = None
    elites: Elites | None = None

    def in_slot_order(self) -> "SteeringOutput":
        """Return the output with images as the pipeline made them, not sorted by reward."""
        return replace(
            self._ranked(self.order.argsort(1)), order=torch.arange(self.order.shape[1]).expand_as(self.order)
        )

    def best(self, count: int) -> "SteeringOutput":
        """Return the output with the first `count` images of each prompt alone."""
        groups, size = self.order.shape
        return self._ranked(torch.arange(min(count, size)).expand(groups, -1))

    def _ranked(self, ranks: Tensor) -> "SteeringOutput":
        """Return the output with the images of ranks (B, n) within their prompts, in this order."""
        groups, size = self.order.shape
        rows = (ranks + torch.arange(groups)[:, None] * size).flatten().tolist()
        return replace(
            self,
            images=[self.images[row] for row in rows] if isinstance(self.images, list) else self.images[rows],
            rewards=self.rewards.gather(1, ranks),
            components={name: scores.gather(1, ranks) for name, scores in self.components.items()},
            log_weights=self.log_weights.gather(1, ranks),
            latents=self.latents[rows],
            order=self.order.gather(1, ranks),
            nsfw_content_detected=None if (flags := self.nsfw_content_detected) is None else flags.gather(1, ranks),
            start=self.start and self.start.rows(rows),
        )

    @property
    def ess(self) -> list[Tensor]:
        """Effective sample size (B,) at each evaluated step, before resampling."""
        return [evaluation.ess for evaluation in self.history]

    @property
    def ancestors(self) -> list[Tensor]:
        """Ancestors (B, K) at each evaluated step: the slot that each slot is resampled from."""
        return [evaluation.ancestors for evaluation in self.history]
