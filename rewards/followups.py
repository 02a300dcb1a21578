"""vqa:MODEL,followups=FILE: is approval or disapproval the likelier answer of a model to the image?

    r(x, p) = mean_{f ∈ F+} l(f) − mean_{f ∈ F−} l(f),   l(f) = 1/|f| log P(f | x, question(p)),   |f| in tokens

Follow-up likelihood as a reward (FLR, arXiv 2409.13948). F+ = {Yes}, F− = {No} is `unit=log-odds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steer.errors import InputError
from steer.reward import RewardError
from steer.rewards.inputs import rows_by_prompt, takes_any_images
from steer.tables import read_text
from steer.yaml_text import read_yaml

QUESTION = 'The image was made from the text "{prompt}".'


class Answers(Protocol):
    """A model that scores given answers."""

    differentiable: bool

    def answers(self, images: Tensor, question: str, texts: Sequence[str], per_token: bool = False) -> Tensor:
        """Return log P (N, A) of A answers to one question about images (N, 3, H, W)."""


@dataclass(frozen=True)
class Followups:
    """Approving and disapproving sentences about an image, and the question they answer; {prompt} is the prompt."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    question: str = QUESTION


class FollowupReward:
    """Mean log-likelihood per token of approving sentences minus the mean for disapproving ones, in nats."""

    def __init__(self, name: str, model: Answers, followups: Followups) -> None:
        self.name, self._model, self._followups = name, model, followups
        self.differentiable = model.differentiable

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        one, scores, order = self._followups, list[Tensor](), list[int]()
        for prompt, rows in rows_by_prompt(prompts).items():
            texts = [text.replace("{prompt}", prompt) for text in (one.question, *one.positive, *one.negative)]
            likelihoods = self._model.answers(images[rows], texts[0], texts[1:], per_token=True)
            split = (len(one.positive), len(one.negative))
            positive, negative = (part.mean(1) for part in likelihoods.split(split, 1))
            scores.append(positive - negative)
            order += rows
        return torch.cat(scores)[torch.tensor(order).argsort()]


def read_option_file(option: str, path: Path) -> Any:
    """Read the YAML file that an option names. Raises RewardError."""
    try:
        return read_yaml(read_text(path), f"{option}={path}")
    except OSError as error:
        raise RewardError(f"{option}={path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise RewardError(str(error)) from error


def read_followups(path: Path) -> Followups:
    """Read a YAML file with the lists `positive` and `negative` and, in place of the default, a `question`.

    Raises RewardError.
    """
    data = read_option_file("followups", path)
    lists: list[Any] = [data.get(name) for name in ("positive", "negative")] if isinstance(data, dict) else []
    valid = len(lists) == 2 and set(data) <= {"positive", "negative", "question"}
    valid = valid and all(isinstance(one, list) and one and all(map(_is_text, one)) for one in lists)
    if not valid or not _is_text(data.get("question", QUESTION)):
        raise RewardError(f"followups={path}: expected lists of sentences, positive: and negative:, and a question:")
    return Followups(tuple(lists[0]), tuple(lists[1]), data.get("question", QUESTION))


def _is_text(given: object) -> bool:
    return isinstance(given, str) and bool(given.strip())
