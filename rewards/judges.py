"""Judges of two images from a reward, a hierarchy of factors or a vision-language model, and tournaments by a judge.

A judge has `compare(images_a, images_b, prompts)`, which returns P(a ≻ b) (N,) (`steer.reward.Judge`). Its preferences
need not be transitive: there may be no reward with the same order.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.reward import Judge, Reward, RewardError, compare, score
from steer.rewards.chat import ChatClient, ChatMessage, ChatReply
from steer.rewards.grammar import format_number
from steer.rewards.inputs import as_png, rows_by_prompt, takes_any_images

PAIRS_AT_ONCE = 32  # pairs of images in memory
PAIR_QUESTION = (
    'Both images were made from the text "{prompt}". Which one fits the text better, or is better made where both fit '
    "it: the first (A) or the second (B)? Answer A or B."
)


class RewardJudge:
    """P(a ≻ b) = σ((r(a) − r(b)) / T): Bradley–Terry, T in the reward's unit."""

    def __init__(self, reward: Reward, temperature: float = 1.0) -> None:
        if not 0 < temperature < math.inf:
            raise RewardError(f"as-judge({reward.name}): the temperature must be a number above 0, got {temperature}")
        option = "" if temperature == 1 else f", temperature={format_number(temperature)}"
        self.reward, self.temperature, self.name = reward, temperature, f"as-judge({reward.name}{option})"

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return P(a ≻ b) (N,)."""
        return torch.sigmoid(
            (score(self.reward, images_a, prompts) - score(self.reward, images_b, prompts)) / self.temperature
        )


as_judge = RewardJudge


@dataclass(frozen=True)
class Factor:
    """A reward, and the margin ≥ 0, in the reward's unit, up to which two images count as equal."""

    reward: Reward
    margin: float = 0.0

    def __str__(self) -> str:
        return f"{self.reward.name} > {format_number(self.margin)}" if self.margin else self.reward.name


class HierarchyJudge:
    """Factors by importance: the first whose difference exceeds its margin decides, ½ if none does (HERON).

    P(a ≻ b) = 1[z_i(a) > z_i(b)] for i = min{i : |z_i(a) − z_i(b)| > δ_i}. Less important factors do not compensate.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        if not factors or not all(0 <= factor.margin < math.inf for factor in factors):
            raise RewardError("hierarchy(…) takes rewards with margins of at least 0, like hierarchy(A > 0.1, B)")
        self.factors, self.name = tuple(factors), f"hierarchy({', '.join(map(str, factors))})"

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return P(a ≻ b) (N,): 0, ½ or 1. A factor is computed only if all previous factors leave a tie."""
        preferred, open_rows = torch.full((len(prompts),), 0.5), torch.arange(len(prompts))
        for factor in self.factors:
            if not len(open_rows):
                break
            texts = [prompts[row] for row in open_rows]
            a, b = (score(factor.reward, images[open_rows.to(images.device)], texts) for images in (images_a, images_b))
            difference = (a - b).detach()
            decided = difference.abs() > factor.margin
            preferred[open_rows[decided]] = (difference[decided] > 0).float()
            open_rows = open_rows[~decided]
        return preferred


class EndpointJudge:
    """A vision-language model behind an endpoint that sees both images: P(A) / (P(A) + P(B)) of its first token.

    Both orders are asked and averaged, so that a preference for the first place cancels: P(a ≻ b) + P(b ≻ a) = 1.
    """

    def __init__(self, client: ChatClient, question: str = PAIR_QUESTION, top_logprobs: int = 20) -> None:
        self.client, self._question, self._top = client, question, top_logprobs
        self.name = f"judge:{client.url},model={client.model}"

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return P(a ≻ b) (N,) from 2 N requests."""
        texts = [self._question.replace("{prompt}", prompt) for prompt in prompts]
        files = list(zip(as_png(images_a), as_png(images_b), strict=True))
        messages = [ChatMessage(text, pair) for text, pair in zip(texts, files, strict=True)]
        messages += [ChatMessage(text, pair[::-1]) for text, pair in zip(texts, files, strict=True)]
        options = {"max_tokens": 1, "logprobs": True, "top_logprobs": self._top}
        first = torch.tensor([self._read(reply) for reply in self.client.ask(messages, **options)])
        forward, backward = first.chunk(2)
        return (forward + 1 - backward) / 2

    def _read(self, reply: ChatReply) -> float:
        """Return P(A) / (P(A) + P(B)). Raises RewardError if neither token is listed."""
        a, b = reply.probability("A"), reply.probability("B")
        if a + b == 0:
            raise self.client.error(
                f"answers with neither A nor B: {reply.text[:40]!r}, {len(reply.first)} log-probabilities"
            )
        return a / (a + b)


class Tournament:
    """Win rate of each image against the other images of its prompt in the same call, 0..1; black box.

    w_i = 1/(K − 1) Σ_{j ≠ i} P(x_i ≻ x_j) (SPO, arXiv 2401.04056). Scores depend on the other images of the call:
    `compares_images` makes pipelines score all particles of a prompt at once. K (K − 1) / 2 comparisons per prompt.
    Raises RewardError for a prompt with a single image.
    """

    differentiable = False
    compares_images = True

    def __init__(self, judge: Judge) -> None:
        self.judge, self.name = judge, f"tournament({judge.name})"

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = rows_by_prompt(prompts)
        if alone := [prompt for prompt, some in rows.items() if len(some) < 2]:
            raise RewardError(
                f"{self.name}: {alone[0]!r:.80} has one image in this call: compare at least two of a prompt"
            )
        pairs = [pair for some in rows.values() for pair in itertools.combinations(some, 2)]
        wins, played = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            a, b = (list(side) for side in zip(*pairs[start : start + PAIRS_AT_ONCE], strict=True))
            p = compare(self.judge, images[a], images[b], [prompts[row] for row in a])
            for side, won in ((a, p), (b, 1 - p)):
                wins.index_add_(0, torch.tensor(side), won)
                played.index_add_(0, torch.tensor(side), torch.ones(len(side)))
        return (wins / played).to(images.device)
