"""Figures of an evaluation: means with their intervals over prompts, differences, win rates, tasks, costs."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from steer.apps.evaluation_contest import Contest
from steer.apps.evaluation_runs import mean_cost
from steer.apps.evaluation_store import Json, Stored
from steer.pipelines.held_out import interval

Table = Mapping[str, Tensor]  # by reward


def figures(contest: Contest, particles: Sequence[int], stored: Sequence[Stored], kl_prompts: int) -> Json:
    """All of evaluation.json: what was asked, and of every contender its figures and its runs.

    An interval is [mean, low, high]: 95 %, a bootstrap over prompts. The first contender is what the others are
    compared with.
    """
    prompts = [{"prompt": prompt} for prompt in contest.prompts]
    if contest.tags is not None:
        prompts = [one | {"tag": tag} for one, tag in zip(prompts, contest.tags, strict=True)]
    contenders = []
    for size, one in zip(particles, stored, strict=True):
        told = one.about | {"particles": size} | _figures(contest, one, stored[0])
        if one.about["weights"] is not None:
            told["kl"] = one.kl.get(str(kl_prompts))
        runs = [{"prompt": place} | run for place in range(len(prompts)) for run in one.runs[place]]
        contenders.append(told | {"made": one.made, "runs": runs})
    return contest.identity() | {"prompts": prompts, "contenders": contenders}


def _figures(contest: Contest, one: Stored, first: Stored) -> Json:
    picked, everything = tables(contest, one)
    against = tables(contest, first)[0]
    rewards: Json = {}
    for name in contest.rewards:
        rewards[name] = {"picked": over_prompts(picked[name]), "all": over_prompts(everything[name])}
        if one is not first:
            rewards[name] |= compared(picked[name], against[name])
    diverse = [value for place in range(len(contest.prompts)) if (value := one.diversity[place]) is not None]
    runs = [run for some in one.runs.values() for run in some]
    return {
        "rewards": rewards,
        "tasks": None if contest.tags is None else _by_task(contest.tags, picked, everything),
        "diversity": interval(torch.tensor(diverse)) if diverse else None,
        "cost": mean_cost(runs),
        "stopped": sum(run["stopped"] is not None for run in runs),
    }


def tables(contest: Contest, one: Stored) -> tuple[Table, Table]:
    """By reward (prompts, seeds): of the image that a run picks, its first; and the mean of all that it made."""

    def table(name: str, value: Callable[[list[float]], float]) -> Tensor:
        places = range(len(contest.prompts))
        told = [[value(run["rewards"][name]) for run in one.runs[n]] for n in places]
        return torch.tensor(told, dtype=torch.float64)

    return {n: table(n, itemgetter(0)) for n in contest.rewards}, {n: table(n, fmean) for n in contest.rewards}


def over_prompts(values: Tensor) -> list[float]:
    """[mean, low, high] of (prompts, seeds): seeds are averaged, prompts are drawn anew."""
    return interval(values.mean(1).float())


def compared(values: Tensor, first: Tensor) -> dict[str, list[float]]:
    """Against the first contender, by prompt and seed: the paired difference, and the win rate."""
    return {"difference": over_prompts(values - first), "wins": over_prompts(wins(values, first))}


def wins(values: Tensor, first: Tensor) -> Tensor:
    """1 where a value is above that of the first contender, ½ where both are equal, else 0."""
    return (values > first).float() + 0.5 * (values == first).float()


def _by_task(tags: Sequence[str], picked: Table, everything: Table) -> dict[str, Any]:
    """The means of `_figures` for each tag, in the order of the prompts."""
    found: dict[str, Any] = {}
    for tag in dict.fromkeys(tags):
        rows = torch.tensor([place for place, one in enumerate(tags) if one == tag])
        found[tag] = {
            "prompts": len(rows),
            "rewards": {
                name: {"picked": over_prompts(picked[name][rows]), "all": over_prompts(everything[name][rows])}
                for name in picked
            },
        }
    return found
