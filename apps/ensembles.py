"""Commands about ensembles of rewards: lower bounds of a truth."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from steer.apps.reward_specs import resolve_reward
from steer.apps.scoring import images_with_prompts, score_all
from steer.rewards.conformal import describe, fit_lower_bound


def score_each(specs: Sequence[str], images: Path, prompt: str | None, device: str) -> tuple[Tensor, list[str]]:
    """Score the images of a folder by each reward, (M, N), and return their N prompts."""
    paths, prompts = images_with_prompts(images, prompt)
    return torch.stack([score_all(resolve_reward(one), paths, prompts, device=device) for one in specs]), prompts


def calibrate_bound(
    rewards: Sequence[str],
    truth: str,
    images: Path,
    prompt: str | None,
    level: float,
    out: Path,
    optimised: Path | None,
    device: str,
) -> Iterator[str]:
    """Fit and save a lower bound of the reward `truth` by others, and yield what is printed.

    optimised  images that were optimised by these rewards: the share on which the bound holds is reported
    Raises InputError, see `fit_lower_bound`.
    """
    scores, prompts = score_each([*rewards, truth], images, prompt, device)
    names = [resolve_reward(one).name for one in (*rewards, truth)]
    bound = fit_lower_bound(names[:-1], scores[:-1], scores[-1], prompts, names[-1], level)
    bound.save(out)
    yield f"{describe(bound)} → {out}"
    if optimised is not None:
        scores, prompts = score_each([*rewards, truth], optimised, prompt, device)
        holds = (scores[-1] >= bound.of(scores[:-1].double())).double().mean().item()
        yield f"it holds on {holds:.0%} of {len(prompts)} optimised images: optimisation voids the level"
