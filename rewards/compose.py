"""Composed rewards: sums, worst cases, products of constraints. Each is a Reward that reports its components.

combine({"hpsv2.1": 5, "imagereward": 1})                       Σ w_m r_m
combine([a, b], aggregate=worst)                                min_m r_m
ProductReward([Constraint(a, ">", 0.3), Constraint(b, ">", 0.5)])     Π_m σ((r_m − c_m) / temperature)
"""

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.arguments import is_number
from steer.audio import AudioReward, sample_rate_of
from steer.files import dumps_with_checksum, loads_with_checksum, write_text
from steer.reward import Metadata, Reward, RewardError, WrappedReward, compares_images, score_components, takes_videos
from steer.rewards.grammar import NUMBER, PLUS, format_number, split
from steer.rewards.inputs import rows_by_prompt, takes_any_samples
from steer.rewards.names import takes_number
from steer.rewards.remote import is_remote, read_weight
from steer.video import VideoReward, frame_rate


def read_term(text: str, takes: Callable[[str], bool] = takes_number) -> tuple[str, float]:
    """Split a term into reward and weight. A number after a host, or after a reward that takes one, is not a weight.

    takes  whether the reward of a name takes a number
    """
    if is_remote(text):
        return read_weight(text)
    name, *rest = text.split(":")
    if rest and re.fullmatch(NUMBER, rest[-1]) and (len(rest) > 1 or not takes(name)):
        return text.rpartition(":")[0], float(rest[-1])
    return text, 1.0


def weighted_name(reward: str, weight: float, takes: bool) -> str:
    """Write a named reward with its weight: the shortest text that parses to both, in sum(…) if necessary.

    takes  whether the reward takes a number
    """
    plain = [reward] if weight == 1 else []
    for text in (*plain, f"{reward}:{format_number(weight)}"):
        if read_term(text, lambda name: takes) == (reward, weight):
            return text
    return f"sum({reward}):{format_number(weight)}"


def weighted_expression(rewards: str, weight: float) -> str:
    """Write a composed reward with its weight, in sum(…) if the weight would bind to its last term."""
    if weight == 1:
        return rewards
    try:
        single_term = len(split(rewards, PLUS)) == 1 and read_term(rewards, lambda name: False)[1] == 1
    except RewardError:  # a display name with an unbalanced parenthesis
        single_term = True
    return f"{rewards if single_term else f'sum({rewards})'}:{format_number(weight)}"


class CompositeReward(ABC):
    """A reward composed of other rewards; gradients flow if all of them are differentiable."""

    images = "pt"

    def __init__(self, rewards: Sequence[Reward], name: str) -> None:
        self._rewards, self.name = tuple(rewards), name
        names = [reward.name for reward in rewards]  # numbered if a name occurs twice
        self._names = [f"{name}#{k}" if names.count(name) > 1 else name for k, name in enumerate(names)]
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.compares_images, self.takes_videos = any(map(compares_images, rewards)), any(map(takes_videos, rewards))

    @property
    def parts(self) -> dict[str, Reward]:
        """Return the rewards that this reward is composed of, by component name."""
        return dict(zip(self._names, self._rewards, strict=True))

    @property
    def prompt_limit(self) -> int | None:
        """Return the lowest prompt limit of all rewards, in tokens; None: no limit is known."""
        limits = [getattr(reward, "prompt_limit", None) for reward in self._rewards]
        return min((limit for limit in limits if limit is not None), default=None)

    def components(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> dict[str, Tensor]:
        """Return the scores (N,) of each reward and, under NAME/, of its own components."""
        scores_by_name: dict[str, Tensor] = {}
        for name, reward in zip(self._names, self._rewards, strict=True):
            scores_by_name[name], inner = score_components(reward, images, prompts, metadata)
            scores_by_name.update({f"{name}/{part}": scores for part, scores in inner.items()})
        return scores_by_name

    @property
    def component_names(self) -> tuple[str, ...]:
        """Return the names of the rewards that this reward is composed of."""
        return tuple(self._names)

    @abstractmethod
    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Compute the reward's own scores (N,) from its components'."""

    @takes_any_samples
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return self.total(self.components(images, prompts, metadata), prompts)


def plain_rewards(reward: Reward) -> dict[str, Reward]:
    """Return by name the parts of a reward that are not composed themselves, without timeouts and metadata."""
    if isinstance(reward, WrappedReward):
        return plain_rewards(reward.reward)
    if isinstance(reward, CompositeReward):
        return {name: one for part in reward.parts.values() for name, one in plain_rewards(part).items()}
    return {reward.name: reward}


@dataclass(frozen=True)
class Term:
    """A reward in a sum, by name, with its weight.

    component  name of its scores in the sum's components; empty where the reward is no sum
    """

    name: str
    weight: float
    component: str


def linear_terms(reward: Reward, weight: float = 1.0, component: str = "") -> list[Term]:
    """Return the terms of r = Σ_m w_m r_m, sums inside sums included.

    Any reward but a sum is one term: a mean, minimum, product or quantile too, and z(…), which has an offset.
    """
    while isinstance(reward, WrappedReward):
        reward = reward.reward
    weights = reward.weights if isinstance(reward, CombinedReward) else None
    if not isinstance(reward, CombinedReward) or weights is None:
        return [Term(reward.name, weight, component)]
    prefix = f"{component}/" if component else ""
    return [
        term
        for name, part in reward.parts.items()
        for term in linear_terms(part, weight * weights[name], f"{prefix}{name}")
    ]


def map_plain(reward: Reward, change: Callable[[Reward], Reward]) -> Reward:
    """Return a copy of a reward with `change` applied to all parts that are not composed themselves."""
    if not isinstance(reward, WrappedReward | CompositeReward):
        return change(reward)
    copied = copy.copy(reward)
    if isinstance(copied, WrappedReward):
        copied.reward = map_plain(copied.reward, change)
    else:
        copied._rewards = tuple(map_plain(one, change) for one in copied._rewards)
    return copied


def with_media_rates(reward: Reward, pipe: Any, call: Mapping[str, Any]) -> Reward:
    """Set the sample rate of audio rewards and the frames per second of video rewards from a pipeline's call."""

    def change(one: Reward) -> Reward:
        if isinstance(one, AudioReward):
            return replace(one, sample_rate=sample_rate_of(pipe))
        return replace(one, fps=frame_rate(pipe, call)) if isinstance(one, VideoReward) and one.fps is None else one

    return map_plain(reward, change)


Aggregate = Callable[[Tensor], Tensor]


def mean(scores: Tensor) -> Tensor:
    """Return (1/M) Σ_m r_m."""
    return scores.mean(0)


def total(scores: Tensor) -> Tensor:
    """Return Σ_m r_m."""
    return scores.sum(0)


def worst(scores: Tensor) -> Tensor:
    """Return min_m r_m (worst-case optimisation, arXiv 2310.02743)."""
    return scores.amin(0)


def mean_minus_std(scores: Tensor, lam: float = 1.0) -> Tensor:
    """Return mean_m r_m − λ std_m r_m, std with M in the denominator (uncertainty-weighted, arXiv 2310.02743)."""
    # The offset keeps the gradient finite if all rewards are equal.
    spread = (scores.var(0, correction=0) + 1e-12).sqrt()
    return scores.mean(0) - lam * spread


def quantile(scores: Tensor, q: float = 0.25) -> Tensor:
    """Return the q-quantile over the rewards, linear between neighbours; q = 0: the worst, ½: the median."""
    return torch.quantile(scores, q, dim=0)


def robust(scores: Tensor, gamma: float = 0.6) -> Tensor:
    """Return γ mean_m r_m + (1 − γ) min_m r_m: nominal and worst-case reward in one (arXiv 2409.15360).

    γ = 1: the mean, γ = 0: the minimum. The nominal reward is the mean; the source takes its most certain head instead.
    """
    return gamma * scores.mean(0) + (1 - gamma) * scores.amin(0)


AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "sum": total,
    "min": worst,
    "mean-std": mean_minus_std,
    "quantile": quantile,
    "robust": robust,
}
OPTIONS: dict[str, tuple[str, ...]] = {"mean-std": ("lam",), "quantile": ("q",), "robust": ("gamma",)}
SHARES = ("q", "gamma")  # options from 0 to 1


def aggregate(name: str, options: Mapping[str, Any], where: str) -> Aggregate:
    """Return an aggregate with its options. Raises RewardError that begins with `where` for invalid options."""
    allowed = OPTIONS.get(name, ())
    for option, value in options.items():
        if option not in allowed:
            raise RewardError(f"{where}: {name} takes {' and '.join(allowed) or 'no options'}, not {option!r}")
        if not is_number(value) or (option in SHARES and not 0 <= value <= 1):
            raise RewardError(
                f"{where}: {option} must be a {'number from 0 to 1' if option in SHARES else 'finite number'}"
            )
    return partial(AGGREGATES[name], **{option: float(value) for option, value in options.items()})


SIGNS = {">": 1.0, "<": -1.0}
CONSTRAINT_TEMPERATURE = 0.05  # temperature of a constraint, in the reward's own unit


@dataclass(frozen=True)
class WeightedReward:
    """One reward and its weight. Raises RewardError for a weight that is not a finite number."""

    reward: Reward
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.weight):
            raise RewardError(f"the weight of reward {self.reward.name!r} must be a finite number, got {self.weight!r}")

    def __str__(self) -> str:
        if isinstance(self.reward, CompositeReward):
            return weighted_expression(self.reward.name, self.weight)
        return weighted_name(self.reward.name, self.weight, getattr(self.reward, "takes_number", False))


class CombinedReward(CompositeReward):
    """An aggregate of weighted rewards: by default their sum, Σ w_m r_m."""

    def __init__(
        self, components: Sequence[WeightedReward], aggregate: Aggregate = total, name: str | None = None
    ) -> None:
        if not components:
            raise RewardError("a combination needs at least one reward")
        super().__init__([part.reward for part in components], name or _expression(components, aggregate))
        self._weights, self._aggregate = [float(part.weight) for part in components], aggregate

    @property
    def weights(self) -> dict[str, float] | None:
        """Return the weights of a sum by component; None for another aggregate."""
        function = getattr(self._aggregate, "func", self._aggregate)  # sum(…) and `combine: sum` are partials
        return dict(zip(self._names, self._weights, strict=True)) if function is total else None

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Aggregate the weighted components (N,)."""
        weighted = [weight * components[name] for name, weight in zip(self._names, self._weights, strict=True)]
        return self._aggregate(torch.stack(weighted))


def _expression(components: Sequence[WeightedReward], aggregate: Aggregate) -> str:
    """Write a combination as `steer.rewards.parser` reads it."""
    if aggregate is total:
        return " + ".join(map(str, components))
    function, options = (aggregate.func, aggregate.keywords) if isinstance(aggregate, partial) else (aggregate, {})
    own = getattr(function, "__name__", type(function).__name__)
    known = next((name for name, one in AGGREGATES.items() if one is function), own)
    inside = [*map(str, components), *(f"{name}={format_number(value)}" for name, value in options.items())]
    return f"{known}({', '.join(inside)})"


@dataclass(frozen=True)
class Constraint:
    """reward > bound (or <), softly: σ(±(r − bound) / temperature), 0..1, ½ at the bound.

    Raises RewardError for any other comparison and for an invalid bound or temperature.
    """

    reward: Reward
    sign: str
    bound: float
    temperature: float = CONSTRAINT_TEMPERATURE

    def __post_init__(self) -> None:
        valid = self.sign in SIGNS and is_number(self.bound) and is_number(self.temperature) and self.temperature > 0
        if not valid:
            raise RewardError(
                f"constraint {self.reward.name} {self.sign} {self.bound}, temperature {self.temperature}: "
                "write > or <, a finite bound, a temperature above 0"
            )

    def __str__(self) -> str:
        return f"{self.reward.name} {self.sign} {format_number(self.bound)}"

    def degree(self, scores: Tensor) -> Tensor:
        """Return the degree 0..1 to which scores (N,) satisfy the constraint."""
        return torch.sigmoid(SIGNS[self.sign] * (scores - self.bound) / self.temperature)


class ProductReward(CompositeReward):
    """Product of the degrees, 0..1, to which constraints hold: near 1 only if all of them hold."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        if not constraints:
            raise RewardError("a product needs at least one constraint, like product(hpsv2.1 > 0.25)")
        inside = [str(c) for c in constraints]
        if (own := {c.temperature for c in constraints}) != {CONSTRAINT_TEMPERATURE}:
            inside += [f"temperature={format_number(one)}" for one in sorted(own)]
        super().__init__([c.reward for c in constraints], f"product({', '.join(inside)})")
        self._constraints = tuple(constraints)

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Multiply the degrees (N,)."""
        degrees = [c.degree(components[name]) for name, c in zip(self._names, self._constraints, strict=True)]
        return torch.stack(degrees).prod(0)


@dataclass(frozen=True)
class RewardStatistics:
    """Statistics of a reward on the base model's samples.

    Mean and standard deviation over all samples, and the mean over the images of each prompt.
    """

    mean: float
    std: float
    count: int
    prompts: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """Statistics by reward name, and the images on which they are computed."""

    scales: Mapping[str, RewardStatistics]
    source: Mapping[str, object]

    def scale(self, name: str) -> RewardStatistics:
        """Return the statistics of a reward. Raises RewardError if it is not calibrated."""
        if name not in self.scales:
            known = ", ".join(self.scales)
            raise RewardError(
                f"reward {name!r} is not in this calibration ({known}): `steer rewards calibrate` adds it"
            )
        return self.scales[name]

    def save(self, path: Path) -> None:
        """Write JSON atomically. Raises OSError."""
        record = {"source": dict(self.source), "scales": {name: asdict(scale) for name, scale in self.scales.items()}}
        write_text(path, dumps_with_checksum(record))


def read_calibration(path: Path) -> Calibration:
    """Read a file of `steer rewards calibrate`. Raises RewardError for any other file."""
    try:
        record = loads_with_checksum(path.read_text(encoding="utf-8"))
        scales = {str(name): RewardStatistics(**scale) for name, scale in record["scales"].items()}
        source = dict(record.get("source", {}).items())
        numbers = [n for scale in scales.values() for n in (scale.mean, scale.std, *scale.prompts.values())]
        valid = all(math.isfinite(n) for n in numbers) and all(scale.std > 0 for scale in scales.values())
    except OSError as error:
        raise RewardError(f"{path}: cannot read the calibration ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RewardError(f"{path}: not a calibration of `steer rewards calibrate` ({str(error)[:60]})") from error
    if not valid:
        raise RewardError(f"{path}: a reward in this calibration has numbers that are not finite, or no spread")
    return Calibration(scales, source)


def reward_statistics(scores: Tensor, prompts: Sequence[str]) -> RewardStatistics:
    """Compute statistics of scores (N,), one prompt each. Raises RewardError if all scores are equal."""
    values = scores.double()
    if not len(values) or bool((values == values[0]).all()):
        raise RewardError("a reward that gives every sample the same score cannot be calibrated")
    means = {prompt: values[rows].mean().item() for prompt, rows in rows_by_prompt(prompts).items()}
    return RewardStatistics(values.mean().item(), values.std().item(), len(values), means)


class StandardisedReward(CompositeReward):
    """(r − mean) / std over the base model's samples: brings rewards of any unit to one scale."""

    def __init__(self, reward: Reward, scale: RewardStatistics) -> None:
        super().__init__([reward], f"z({reward.name})")
        self._scale = scale

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Standardise the scores (N,), in standard deviations."""
        return (components[self._names[0]] - self._scale.mean) / self._scale.std


class LogSigmoidReward(CompositeReward):
    """log σ((r − r_ref(prompt)) / temperature), below 0; saturates beyond the reference.

    A sum of these is high only if all rewards are good (arXiv 2402.00742, equations 3 and 6): no reward compensates
    for another one that fails.

    reference    one number, or one for each prompt
    temperature  in the reward's unit
    """

    def __init__(self, reward: Reward, reference: float | Mapping[str, float], temperature: float = 1.0) -> None:
        if not 0 < temperature < math.inf:
            raise RewardError(f"logsigmoid({reward.name}): the temperature must be a number above 0, got {temperature}")
        options = "" if isinstance(reference, Mapping) else f", reference={reference:g}"
        options += f", temperature={temperature:g}" if temperature != 1 else ""
        super().__init__([reward], f"logsigmoid({reward.name}{options})")
        self._reference, self._temperature = reference, temperature

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Compute (N,), nats. Raises RewardError for a prompt that has no reference."""
        scores, reference = components[self._names[0]], self._reference
        if isinstance(reference, Mapping):
            if missing := [prompt for prompt in prompts if prompt not in reference]:
                problem = f"no reference for the prompt {missing[0]!r}"
                raise RewardError(f"{self.name}: {problem}: calibrate with it, or give one number for all")
            numbers = [reference[prompt] for prompt in prompts]
        else:
            numbers = [reference] * len(prompts)
        reference_scores = torch.tensor(numbers, dtype=scores.dtype, device=scores.device)
        return F.logsigmoid((scores - reference_scores) / self._temperature)
