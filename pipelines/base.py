"""The steering pipeline that all methods share, and what it returns."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

from steer.diffusion.schedules import clip_limit, descends_from
from steer.errors import InputError
from steer.rewards.parser import load_reward


class SteeringPipeline:
    """A method over `pipe`, a diffusers pipeline that stays untouched, and `reward`: a Reward, a function
    (images, prompts) → (N,), or a name (see `steer.rewards.parser.load_reward`)."""

    def __init__(self, pipe: Any, reward: Any) -> None:
        self.pipe = pipe
        self.reward = load_reward(reward)

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str], reward: Any, **options: Any) -> Self:
        """Loads a diffusers pipeline by hub name or folder; `options` go to DiffusionPipeline.from_pretrained."""
        return cls(DiffusionPipeline.from_pretrained(model, **options), reward)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the diffusers pipeline, as its own `to` does."""
        self.pipe.to(*args, **kwargs)
        return self


def route_eta(pipe: Any, call: dict[str, Any], eta: float | None) -> tuple[dict[str, Any], float | None]:
    """Route η to the pipeline where it and its solver know η (DDIM), else to the Gaussian kernel.

    The kernel takes it too where DDIM's own step is another one: with x̂0 clipped but not ε̂, or not finite at zero SNR.
    """
    if eta is None:
        return call, None
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be from 0 to 1, got {eta}")
    accepts_eta = all("eta" in inspect.signature(f).parameters for f in (type(pipe).__call__, pipe.scheduler.step))
    own = accepts_eta and (eta == 0 or not _step_differs_from_kernel(pipe.scheduler))
    return (call | {"eta": eta}, None) if own else (call, eta)


MIN_ALPHA_CUMPROD = 1e-6  # ᾱ below which 1 − ᾱ_s − τ² of a DDIM step may round to a negative number


def _step_differs_from_kernel(scheduler: Any) -> bool:
    clips = clip_limit(scheduler) < math.inf or bool(scheduler.config.get("thresholding"))
    return descends_from(scheduler, {"DDIMScheduler"}) and (
        clips or float(scheduler.alphas_cumprod.min()) < MIN_ALPHA_CUMPROD
    )


@dataclass(frozen=True)
class Cost:
    """What a call spent. nfe: denoiser evaluations, one per particle and model call (a guided pair counts once);
    decodes: images decoded by the model's own VAE, previews included; reward_calls: images scored; seconds: wall clock;
    gradients: images differentiated (about two more evaluations of everything for each, three where activations are
    recomputed); other_decodes: previews by a cheaper decoder, which `decodes` leaves out."""

    nfe: int
    decodes: int
    reward_calls: int
    seconds: float
    gradients: int = 0
    other_decodes: int = 0

    def plus(self, other: "Cost") -> "Cost":
        """Of both together."""
        return Cost(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)})


@dataclass(frozen=True)
class ResamplingInfo:
    """The rewards (B, K) of x̂0 at one solver step, the strength λ_j (B, 1) used, the ESS (B,) before resampling and the
    ancestors (B, K) that the slots went on from."""

    step: int
    rewards: Tensor
    strength: Tensor
    ess: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class Iteration:
    """One iteration of a noise optimisation, number `number` of `total`, by slot: rewards (B, K) and those of their
    components, ‖ε‖/√D (B, K), the best rewards (B, K) so far; for observers also the images (B·K, 3, H, W)."""

    number: int
    total: int
    rewards: Tensor
    components: Mapping[str, Tensor]
    norms: Tensor
    best: Tensor
    images: Tensor | None = None


@dataclass(frozen=True)
class InitialNoise:
    """Where images came from: noise (B·K, …) in the model's dtype, and a seed for each of what the solver adds."""

    noise: Tensor
    seeds: tuple[int, ...]

    def arguments(self) -> dict[str, Any]:
        """For the pipeline's own call, which then makes these images again: `latents` and `generator`."""
        return {"latents": self.noise, "generator": [Generator().manual_seed(seed) for seed in self.seeds]}

    def rows(self, rows: Sequence[int]) -> "InitialNoise":
        """Those of some images."""
        return InitialNoise(self.noise[list(rows)], tuple(self.seeds[row] for row in rows))


@dataclass(frozen=True)
class SteeringOutput:
    """Images and what is known of them, by default best first within each of B prompts of K particles.

    images          B·K of them, prompt after prompt, in the requested output type
    rewards         (B, K) of the finished images
    components           of a reward made of others: the scores (B, K) of each, by name
    log_weights     (B, K) unnormalised; their softmax weighs the images as draws from p(x0) exp(λ r(x0))
    log_normaliser  (B,)   log of the estimate of E_p[exp(λ r(x0))]
    latents         (B·K, …) final latents
    nsfw_content_detected  (B, K) bool: images that the pipeline's safety checker blackened, after they were scored;
                    None where it has none, or a noise was optimised
    order           (B, K) the slot of the run that each image comes from
    history         one Evaluation per evaluated step, in slots of that step
    cost            evaluations and seconds
    start           of an optimised noise: that noise, in the order of the images
    trace           of an optimised noise: its iterations, by slot
    stopped         why a run ended before its time, with the best so far; else None
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

    def in_slot_order(self) -> "SteeringOutput":
        """The same with images as the pipeline made them, not sorted by reward."""
        slots = self.order.argsort(1)
        groups, size = slots.shape
        rows = (slots + torch.arange(groups)[:, None] * size).flatten().tolist()
        return replace(
            self,
            images=[self.images[row] for row in rows] if isinstance(self.images, list) else self.images[rows],
            rewards=self.rewards.gather(1, slots),
            components={name: scores.gather(1, slots) for name, scores in self.components.items()},
            log_weights=self.log_weights.gather(1, slots),
            latents=self.latents[rows],
            order=torch.arange(size).expand(groups, size),
            nsfw_content_detected=None if (flags := self.nsfw_content_detected) is None else flags.gather(1, slots),
            start=self.start and self.start.rows(rows),
        )

    @property
    def ess(self) -> list[Tensor]:
        """Effective sample size (B,) at each evaluated step, before resampling."""
        return [evaluation.ess for evaluation in self.history]

    @property
    def ancestors(self) -> list[Tensor]:
        """Ancestors (B, K) at each evaluated step: the slot before it that each slot goes on from."""
        return [evaluation.ancestors for evaluation in self.history]
