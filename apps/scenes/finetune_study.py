"""The finetuning runs side by side: how far rewards rose on prompts that were learnt from, and on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steer.apps.scenes.evaluate import interval
from steer.apps.scenes.finetune_runs import JUDGED, PLANS, Plan, read_judged, train
from steer.pipelines import FinetuneResult

LAST = 5  # updates before the weights that were kept, whose KL is averaged
HALVES = {"seen": slice(None, JUDGED), "unseen": slice(JUDGED, None)}


@dataclass(frozen=True)
class Run:
    """A finished run: its plan, how it ended, and its evaluations by update."""

    plan: Plan
    result: FinetuneResult
    judged: Mapping[int, Mapping[str, Any]]

    @property
    def last(self) -> int:
        """Updates behind the weights it ended with."""
        assert self.result.weights_step is not None, "finished"
        return self.result.weights_step

    @property
    def before_kept(self) -> list[Any]:
        """Records of the last updates before those weights."""
        return [one for one in self.result.records if one["step"] <= self.last][-LAST:]

    def rewards(self, step: int, name: str, half: str) -> dict[str, float]:
        """Of each prompt of a half the mean reward after so many updates."""
        prompts, values = self.judged[step]["prompts"][HALVES[half]], self.judged[step]["rewards"][name][HALVES[half]]
        found: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            found.setdefault(prompt, []).append(value)
        return {prompt: float(np.mean(some)) for prompt, some in found.items()}

    def rises(self, step: int, name: str, half: str) -> dict[str, float]:
        """Since the start."""
        before, after = (self.rewards(at, name, half) for at in (0, step))
        return {prompt: after[prompt] - value for prompt, value in before.items()}


def study(folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Trains what is planned and not finished, and tells how it went; `only` begins the names of some.

    Rises are [mean, low, high], 95 % bootstrap intervals over prompts of what several seeds have in the mean.
    """
    names = [name for name in PLANS if not only or name.startswith(tuple(only))]
    runs = [Run(PLANS[name], train(name, folder), read_judged(folder / name)) for name in names]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.plan.shows, []).append(run)
    return {
        "rows": [row(shows, some) for shows, some in groups.items()],
        "differences": differences(groups),
    }


def row(shows: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The runs of one plan with several seeds."""
    first, names = runs[0], list(runs[0].judged[0]["rewards"])
    records = [run.result.records for run in runs]
    return {
        "shows": shows,
        "seeds": len(runs),
        "updates": [run.result.step for run in runs],
        "kept": [run.last for run in runs],
        "stopped": [run.result.stopped for run in runs],
        "images": len(records[0]) * 32,
        "seconds": round(float(np.mean([sum(one["seconds"] for one in some) for some in records]))),
        "kl": round(float(np.mean([one["kl"] for run in runs for one in run.before_kept])), 1),
        "rewards": {name: {half: told(runs, name, half) for half in HALVES} for name in names},
        "curves": {
            name: {
                half: [[step, *mean_rise(runs, step, name, half)] for step in sorted(first.judged)] for half in HALVES
            }
            for name in names
        },
    }


def told(runs: Sequence[Run], name: str, half: str) -> dict[str, Any]:
    """Base, end, and the rise between the two; also the rise by each seed."""
    before = [run.rewards(0, name, half).values() for run in runs]
    after = [run.rewards(run.last, name, half).values() for run in runs]
    return {
        "base": round(float(np.mean([list(some) for some in before])), 4),
        "end": round(float(np.mean([list(some) for some in after])), 4),
        "rise": interval(
            torch.tensor(list(mean_by_prompt([run.rises(run.last, name, half) for run in runs]).values()))
        ),
        "by_seed": [round(float(np.mean(list(run.rises(run.last, name, half).values()))), 4) for run in runs],
    }


def mean_rise(runs: Sequence[Run], step: int, name: str, half: str) -> list[float]:
    """[mean, low, high] of the rise up to one update."""
    return interval(
        torch.tensor(list(mean_by_prompt([run.rises(step, name, half) for run in runs if step in run.judged]).values()))
    )


def mean_by_prompt(rises: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the seeds that have a prompt."""
    prompts = dict.fromkeys(prompt for some in rises for prompt in some)
    return {prompt: float(np.mean([some[prompt] for some in rises if prompt in some])) for prompt in prompts}


def differences(groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """PRDP's rise minus another method's, prompt by prompt, where both were trained on the same prompts."""
    found: dict[str, Any] = {}
    for size in ("few", "many"):
        ours = groups.get(f"prdp, {size} prompts")
        for other in ("ddpo", "grpo"):
            theirs = groups.get(f"{other}, {size} prompts")
            if ours and theirs:
                names = list(ours[0].judged[0]["rewards"])
                found[f"prdp minus {other}, {size} prompts"] = {
                    name: {half: paired(ours, theirs, name, half) for half in HALVES} for name in names
                }
    return found


def paired(ours: Sequence[Run], theirs: Sequence[Run], name: str, half: str) -> list[float]:
    """[mean, low, high] over the prompts that both have."""
    first, second = (mean_by_prompt([run.rises(run.last, name, half) for run in some]) for some in (ours, theirs))
    return interval(torch.tensor([first[prompt] - second[prompt] for prompt in first if prompt in second]))
