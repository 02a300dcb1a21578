"""A reward on another scale: standardised over the base model's samples, or as log σ above a prompt's reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.reward import Reward, RewardError
from steer.rewards.composed import Composed
from steer.staged import write_text
from steer.sums import summed, unsummed


@dataclass(frozen=True)
class Scale:
    """What a reward gives on the base model's samples: mean and standard deviation over all of them, and the
    mean over the images of each prompt."""

    mean: float
    std: float
    count: int
    prompts: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """Scales by the reward's name, and what they were measured on."""

    scales: Mapping[str, Scale]
    source: Mapping[str, object]

    def scale(self, name: str) -> Scale:
        """Raises RewardError where the reward was not calibrated."""
        if name not in self.scales:
            known = ", ".join(self.scales)
            raise RewardError(
                f"reward {name!r} is not in this calibration ({known}): `steer rewards calibrate` adds it"
            )
        return self.scales[name]

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all. Raises OSError."""
        record = {"source": dict(self.source), "scales": {name: asdict(scale) for name, scale in self.scales.items()}}
        write_text(path, summed(record))


def read_calibration(path: Path) -> Calibration:
    """Of a file that `steer rewards calibrate` wrote. Raises RewardError where it is not one."""
    try:
        record = unsummed(path.read_text(encoding="utf-8"))
        scales = {str(name): Scale(**scale) for name, scale in record["scales"].items()}
        source = dict(record.get("source", {}).items())
        numbers = [n for scale in scales.values() for n in (scale.mean, scale.std, *scale.prompts.values())]
        sound = all(math.isfinite(n) for n in numbers) and all(scale.std > 0 for scale in scales.values())
    except OSError as error:
        raise RewardError(f"{path}: cannot read the calibration ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RewardError(f"{path}: not a calibration of `steer rewards calibrate` ({str(error)[:60]})") from error
    if not sound:
        raise RewardError(f"{path}: a reward in this calibration has numbers that are not finite, or no spread")
    return Calibration(scales, source)


def measured(scores: Tensor, prompts: Sequence[str]) -> Scale:
    """The scale of scores (N,), one prompt each. Raises RewardError where they are all the same."""
    values = scores.double()
    if not len(values) or bool((values == values[0]).all()):
        raise RewardError("a reward that gives every sample the same score cannot be calibrated")
    rows = {prompt: [k for k, text in enumerate(prompts) if text == prompt] for prompt in dict.fromkeys(prompts)}
    means = {prompt: values[some].mean().item() for prompt, some in rows.items()}
    return Scale(values.mean().item(), values.std().item(), len(values), means)


class Standardised(Composed):
    """(r − mean) / std over the base model's samples: rewards of any unit on one scale."""

    def __init__(self, reward: Reward, scale: Scale) -> None:
        super().__init__([reward], f"z({reward.name})")
        self._scale = scale

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """(N,), in standard deviations."""
        return (parts[self._names[0]] - self._scale.mean) / self._scale.std


class LogSigmoid(Composed):
    """log σ((r − r_ref(prompt)) / temperature), below 0: beyond the reference there is little more to win.

    A sum of these says "good on all" (arXiv 2402.00742, equations 3 and 6): an image that fails one reward cannot
    buy it back with another.

    reference    one number, or one for each prompt
    temperature  in the reward's unit
    """

    def __init__(self, reward: Reward, reference: float | Mapping[str, float], temperature: float = 1.0) -> None:
        super().__init__([reward], f"logsigmoid({reward.name})")
        if not 0 < temperature < math.inf:
            raise RewardError(f"{self.name}: the temperature must be a number above 0, got {temperature}")
        self._reference, self._temperature = reference, temperature

    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """(N,), nats. Raises RewardError for a prompt that has no reference."""
        scores = parts[self._names[0]]
        reference = torch.tensor([self._of(prompt) for prompt in prompts], dtype=scores.dtype, device=scores.device)
        return F.logsigmoid((scores - reference) / self._temperature)

    def _of(self, prompt: str) -> float:
        if not isinstance(self._reference, Mapping):
            return self._reference
        if prompt not in self._reference:
            raise RewardError(
                f"{self.name}: no reference for the prompt {prompt!r}: calibrate with it, or give one number for all"
            )
        return self._reference[prompt]
