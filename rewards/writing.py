"""Rewards written by a language model, ranked by a person or a judge, and refined (ICPL, arXiv 2410.14660).

In each iteration the designer, a chat model, writes K files. A critic refuses files that break the rules or the
contract, and asks for corrections. The accepted files are ranked by the images that they prefer; the next request
contains their code and ranks.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.reward import Judge, Reward, RewardError, compare, score
from steer.rewards.analysis import check_reward
from steer.rewards.chat import ChatClient, ChatMessage
from steer.rewards.sandbox import SandboxReward

CHECKED_IMAGES = 8
CHECKS = ("contract", "determinism", "batch invariance")  # checks of `check_reward` that a written reward must pass
MAX_ERRORS = 6  # errors listed in a request
TEMPERATURE, MAX_TOKENS = 0.7, 2000

CONTRACT = """Write a reward for images, in Python.

Goal: {goal}

The file defines reward(images, prompts). images is a float32 tensor (N, 3, H, W) in [0, 1], prompts a list of N texts.
It returns a finite tensor (N,): higher is better. It is deterministic, and the score of an image does not depend on the
other images of the batch. Allowed modules: torch, torch.nn.functional, torch.fft, torch.linalg, torch.special, math. No
classes, no files, no network, no attributes that begin with an underscore; at most 200 lines. Given functions:
luma(images) -> (N, H, W), brightness 0..1
saturation(images) -> (N, H, W), max - min of the channels
colour_mask(images, "red", width=0.25) -> (N, H, W), closeness to a CSS colour, 0..1
edges(images) -> (N, H, W), length of the gradient of the luma
blur(images, sigma) -> (N, 3, H, W)
clip_cosine(images, texts) -> (N,), cosine of image and text by a CLIP; texts is one text or a list
"""
ASK = """
This is file {number} of {candidates} in iteration {iteration} of {iterations}. Make it different from the others.
Answer with the whole file in one ```python block."""


@dataclass
class Candidate:
    """A written reward that passed the critic: its code, its scores (N,) of the images, its rank, 1 the best."""

    code: str
    reward: Reward
    scores: Tensor
    iteration: int
    rank: int = 0

    def order(self) -> list[int]:
        """Return the indices of the images, best first."""
        return self.scores.argsort(descending=True, stable=True).tolist()


@dataclass
class Iteration:
    """One iteration: the ranked candidates, best first, and the reasons for which files were refused."""

    number: int
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


Rank = Callable[[Sequence[Candidate]], Sequence[int]]  # candidates → their indices, best first


@dataclass(frozen=True)
class WritingSettings:
    """Settings of `write_rewards`. Raises InputError for numbers below 1."""

    candidates: int = 6
    iterations: int = 5
    repairs: int = 2  # attempts to correct one file
    seconds: float = 20.0  # limit of one call of a written reward

    def __post_init__(self) -> None:
        if min(self.candidates, self.iterations) < 1 or self.repairs < 0 or not self.seconds > 0:
            raise InputError("candidates and iterations must be at least 1, repairs at least 0, seconds above 0")


def write_rewards(
    goal: str,
    client: ChatClient,
    images: Tensor,
    prompts: Sequence[str],
    rank: Rank,
    settings: WritingSettings = WritingSettings(),
    make: Callable[..., Reward] = SandboxReward.from_code,
) -> Iterator[Iteration]:
    """Yield each iteration; its first candidate is the best reward so far.

    images  (N, 3, H, W) that candidates are tested on and ranked by, with N prompts;  rank: a person or a judge
    make    code → Reward: in a child process with limits, unless you trust the designer
    Raises RewardError if no file of an iteration passes, or if the endpoint fails.
    """
    if len(images) < 2:
        raise InputError(f"rewards are ranked by the images that they prefer: give at least 2, got {len(images)}")
    previous = Iteration(0)
    for number in range(1, settings.iterations + 1):
        current = Iteration(number, previous.candidates[:1])  # the best one stays among the candidates
        for k in range(1, settings.candidates + 1):
            errors = (current.refused or previous.refused)[-MAX_ERRORS:]
            ask = ASK.format(number=k, iteration=number, **vars(settings))
            request = CONTRACT.format(goal=goal) + _feedback(previous, errors) + ask
            made = _written(request, client, images, prompts, settings, make, current.refused)
            if made is not None:
                current.candidates.append(replace(made, iteration=number))
        if not current.candidates:
            raise RewardError(
                f"iteration {number}: no file of the model passed; the last reason: {current.refused[-1]}"
            )
        _put_in_order(current, rank)
        yield current
        previous = current


def _put_in_order(current: Iteration, rank: Rank) -> None:
    order = list(rank(current.candidates)) if len(current.candidates) > 1 else [0]
    if sorted(order) != list(range(len(current.candidates))):
        raise InputError(f"a ranking names each of {len(current.candidates)} candidates once, got {order}")
    current.candidates = [replace(current.candidates[k], rank=place) for place, k in enumerate(order, 1)]


def _written(
    request: str,
    client: ChatClient,
    images: Tensor,
    prompts: Sequence[str],
    settings: WritingSettings,
    make: Callable[..., Reward],
    refused: list[str],
) -> Candidate | None:
    """Ask for one file and its corrections; None if the last one is refused too. Reasons are appended to `refused`."""
    text = request
    for _ in range(settings.repairs + 1):
        reply = client.ask([ChatMessage(text)], temperature=TEMPERATURE, max_tokens=MAX_TOKENS)[0].text
        code = code_of(reply)
        made = criticise(code, images, prompts, settings.seconds, make)
        if isinstance(made, Candidate):
            return made
        refused.append(made)
        text = f"{request}\n\nYour file\n```python\n{code}\n```\nwas refused: {made}\nCorrect it."
    return None


def code_of(reply: str) -> str:
    """Return the content of the last code block of a reply, or the whole reply if it has none."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", reply, re.DOTALL)
    return (blocks[-1] if blocks else reply).strip() + "\n"


def criticise(
    code: str, images: Tensor, prompts: Sequence[str], seconds: float, make: Callable[..., Reward]
) -> Candidate | str:
    """Test rules, contract, determinism, batches and spread of scores; return a candidate or a reason to refuse."""
    try:
        reward = make(code, "the file", seconds)
        for result in check_reward(reward, images[:CHECKED_IMAGES], prompts[:CHECKED_IMAGES], CHECKS):
            if result.passed is False:
                return f"{result.name}: {result.detail}"
        scores = score(reward, images, prompts)
    except RewardError as error:
        return str(error).removeprefix("the file: ")
    if bool((scores == scores[0]).all()):
        return f"it gives all {len(scores)} images the same score, {scores[0].item():.4g}"
    return Candidate(code, reward, scores, 0)


def _feedback(previous: Iteration, refused: Sequence[str]) -> str:
    """Return a request's section about the last iteration: code and ranks, best first, and errors to avoid."""
    parts = []
    if previous.candidates:
        parts.append(
            "\nFiles of the last iteration, ranked by the images that they prefer, best first. Improve on rank 1."
        )
    for one in previous.candidates:
        low, middle, high = one.scores.min().item(), one.scores.mean().item(), one.scores.max().item()
        parts.append(f"Rank {one.rank}, scores {low:.4g} to {high:.4g}, mean {middle:.4g}:\n```python\n{one.code}```")
    if refused:
        parts.append("\nErrors of earlier files, to avoid:\n" + "\n".join(f"- {reason}" for reason in refused))
    return "\n".join(parts)


def rank_by_judge(judge: Judge, goal: str, images: Tensor, keep: int = 4) -> Rank:
    """Return a ranking by a judge, which sees the goal as prompt.

    Two candidates are compared on the images that they rank most differently. Candidate i wins a comparison with the
    probability that the judge prefers the image ranked higher by i to the image ranked higher by j. The order of the
    candidates is by the mean of these probabilities.
    """

    def rank(candidates: Sequence[Candidate]) -> list[int]:
        ranks = torch.stack([one.scores.argsort().argsort().double() for one in candidates])
        wins = torch.zeros(len(candidates), dtype=torch.float64)
        for i in range(len(candidates)):
            for j in range(i + 1, len(candidates)):
                order = (ranks[i] - ranks[j]).argsort(descending=True)
                count = min(keep, len(order) // 2)
                first, second = order[:count], order.flip(0)[:count]
                p = compare(judge, images[first], images[second], [goal] * count).double().mean()
                wins[i] += p
                wins[j] += 1 - p
        return wins.argsort(descending=True, stable=True).tolist()

    return rank


def summary(one: Iteration) -> str:
    """Describe an iteration in one line."""
    return f"iteration {one.number}: {len(one.candidates)} files ranked, {len(one.refused)} refused"


def as_record(one: Iteration) -> dict[str, Any]:
    """Return an iteration as JSON: code, scores and ranks of its candidates, and the reasons for refusals."""
    shown = [
        {"rank": c.rank, "iteration": c.iteration, "scores": c.scores.tolist(), "code": c.code} for c in one.candidates
    ]
    return {"iteration": one.number, "candidates": shown, "refused": one.refused}
