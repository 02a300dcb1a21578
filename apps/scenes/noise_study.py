"""ReNO on the one-step model beside its controls, judged by the exact scene reward."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.pictures import FAINT, INK
from steer.apps.scenes.evaluate import CALL, TOGETHER, interval
from steer.pipelines import BestOfNPipeline, Iteration, NoiseSearchPipeline, ReNOPipeline
from steer.pipelines.noise_gradient import Backprop
from steer.rewards.scene import SceneReward

SEEDS = 2  # searches of each prompt: how far apart they end is the diversity
RENO_MARKS = (1, 5, 10, 25, 50)  # iterations at which the best so far is judged
NEIGHBOURS = 4
SEARCH_MARKS = (1, 3, 7, 13, 26, 51)  # iterations of the zero-order search: 1, 9, 25, 49, 101 and 201 images
SIZES = (1, 10, 25, 50, 100, 200)  # n of best-of-n
# Chosen on scenes-tuning, never on the held-out prompts.
RENO: dict[str, Any] = {"lr": 5.0}
SEARCH: dict[str, Any] = {"distance": 0.5}
KEPT = Backprop(checkpointing=False)  # memory is no matter at 64×64 pixels


@dataclass
class Seen:
    """What a method had found after so many evaluations of an image, over all prompts: a row of the table."""

    evaluations: int
    images: list[Tensor] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, images: Tensor, rewards: Tensor, lengths: Tensor, seconds: float) -> None:
        """The images (B·SEEDS, 3, H, W) of some prompts, their rewards and ‖ε‖/√D (B, SEEDS; NaN: not looked at), what
        they took."""
        self.images.append(images)
        self.rewards.append(rewards)
        self.lengths.append(lengths)
        self.seconds += seconds

    def row(self, prompts: Sequence[str]) -> dict[str, Any]:
        """[mean, low, high] over prompts, and the cost of one image."""
        images = torch.cat(self.images).view(len(prompts), SEEDS, *self.images[0].shape[1:])
        met = torch.stack([SceneReward()(images[:, seed], prompts) for seed in range(SEEDS)], 1)
        return {
            "evaluations": self.evaluations,
            "seconds": round(self.seconds / met.numel(), 3),
            "right": interval((met == 1).float().mean(1)),
            "met": interval(met.mean(1)),
            "proxy": interval(torch.cat(self.rewards).mean(1)),
            "norm": None if (norm := torch.cat(self.lengths).mean()).isnan() else round(norm.item(), 4),
            "diversity": interval((images[:, 0] - images[:, 1]).abs().mean((1, 2, 3))),
        }


class Snapshots:
    """An observer that keeps, at some iterations, the best image so far of every search."""

    def __init__(self, rows: dict[int, Seen]) -> None:
        self.rows, self.started = rows, time.monotonic()
        self.images, self.lengths = torch.empty(0), torch.empty(0)

    def __call__(self, now: Iteration) -> None:
        """Counts the time that judging takes too: it is next to nothing."""
        assert now.images is not None
        newest = (now.rewards >= now.best).flatten()
        first = not len(self.images)
        self.images = now.images if first else torch.where(newest[:, None, None, None], now.images, self.images)
        self.lengths = now.norms if first else torch.where(now.rewards >= now.best, now.norms, self.lengths)
        if seen := self.rows.get(now.number + 1):
            seen.add(self.images, now.best, self.lengths, time.monotonic() - self.started)


def searched(method: Any, prompts: Sequence[str], rows: dict[int, Seen], options: dict[str, Any]) -> list[Seen]:
    """A noise optimisation of all prompts, judged at the iterations that are the keys of `rows`."""
    for start in tqdm(range(0, len(prompts), TOGETHER), desc=type(method).__name__, leave=False, disable=None):
        some, generator = list(prompts[start : start + TOGETHER]), torch.Generator().manual_seed(start)
        call = {"num_particles": SEEDS, "generator": generator, "output_type": "pt", "iterations": max(rows)}
        method(some, on_iteration=Snapshots(rows), **call, **options)
    return list(rows.values())


def sampled(pipe: Any, reward: str, prompts: Sequence[str], sizes: Sequence[int], call: dict[str, Any]) -> list[Seen]:
    """Best-of-n for every n: two samples of the largest, and of each its first n."""
    rows, most = [Seen(size) for size in sizes], max(sizes)
    method: Any = BestOfNPipeline(pipe, reward)
    together = max(1, 400 // most)
    for start in tqdm(range(0, len(prompts), together), desc=f"best of {most}", leave=False, disable=None):
        some, generator = list(prompts[start : start + together]), torch.Generator().manual_seed(start)
        options = {"num_particles": SEEDS * most, "generator": generator, "output_type": "pt", "chunk_size": 50} | call
        out = method(some, **options).in_slot_order()
        images = out.images.view(len(some) * SEEDS, most, *out.images.shape[1:])
        rewards = out.rewards.view(-1, most)
        for seen in rows:
            best = rewards[:, : seen.evaluations].max(1)
            picked = images[torch.arange(len(images)), best.indices]
            values = best.values.view(-1, SEEDS)
            seen.add(picked, values, torch.full_like(values, torch.nan), out.cost.seconds * seen.evaluations / most)
    return rows


def study(model: str, base: str, reward: str, prompts: Sequence[str], few: bool = False) -> dict[str, Any]:
    """Every method on the same prompts, SEEDS searches each; `few`: with a few evaluations only."""
    turbo, teacher = (load_pipeline(name) for name in (model, base))
    for pipe in (turbo, teacher):
        pipe.set_progress_bar_config(disable=True)
    most = 2 if few else None
    marks = {number: Seen(number) for number in RENO_MARKS[:most]}
    images = {number: Seen(1 + NEIGHBOURS * (number - 1)) for number in SEARCH_MARKS[:most]}
    search = {"neighbours": NEIGHBOURS, "num_inference_steps": 1, **SEARCH}
    methods: dict[str, Callable[[], list[Seen]]] = {
        "ReNO": partial(searched, ReNOPipeline(turbo, reward), prompts, marks, RENO | {"gradient": KEPT}),
        "best-of-n": partial(sampled, turbo, reward, prompts, SIZES[:most], {"num_inference_steps": 1}),
        "zero-order search": partial(searched, NoiseSearchPipeline(turbo, reward), prompts, images, search),
    }
    for name, pipe, steps in ((model, turbo, 2), (model, turbo, 4), (base, teacher, 20), (base, teacher, 50)):
        call = CALL | {"num_inference_steps": steps}
        methods[f"{name}, {steps} steps"] = partial(sampled, pipe, reward, prompts, (1,), call)
    return {
        "prompts": len(prompts),
        "seeds": SEEDS,
        "settings": {"model": model, "base": base, "reward": reward, "reno": RENO, "search": SEARCH},
        "methods": {name: [seen.row(prompts) for seen in run()] for name, run in methods.items()},
    }


def draw_study(found: dict[str, Any], path: Path) -> None:
    """Accuracy, and what the proxy says, against images made and against seconds."""
    figure = Figure(figsize=(10.5, 6.4), dpi=120, layout="constrained")
    colours = {"ReNO": "#832db6", "best-of-n": "#e76300", "zero-order search": "#3f90da"}
    panels = [(field, cost) for field in ("right", "proxy") for cost in ("evaluations", "seconds")]
    titles = {"right": "images that are right (exact reward)", "proxy": "reward that is optimised"}
    costs = {"evaluations": "evaluations of the reward, one image", "seconds": "seconds for one image"}
    for axes, (field_, cost) in zip(figure.subplots(2, 2, sharex="col").flatten(), panels, strict=True):
        for name, colour in colours.items():
            rows = found["methods"][name]
            mean, low, high = zip(*(row[field_] for row in rows), strict=True)
            axes.plot([row[cost] for row in rows], mean, color=colour, marker="o", ms=4, lw=1.7, label=name)
            axes.fill_between([row[cost] for row in rows], low, high, color=colour, alpha=0.1, lw=0)
        for dash, (name, rows) in zip(((0, (1, 1)), "--"), _references(found), strict=True):
            axes.axhline(rows[0][field_][0], color=INK, lw=1, ls=dash, label=name)
        axes.set_xscale("log")
        axes.set_title(titles[field_], size=10, loc="left", color=INK)
        if field_ == "proxy":
            axes.set_xlabel(costs[cost], color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def _references(found: dict[str, Any]) -> list[tuple[str, Any]]:
    base = found["settings"]["base"]
    return [(name, found["methods"][name]) for name in (f"{base}, 20 steps", f"{base}, 50 steps")]
