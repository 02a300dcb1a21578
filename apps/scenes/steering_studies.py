"""Steering beside its controls on held-out prompts, at equal evaluations and at equal seconds."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import spearmanr
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.methods import load_preview
from steer.apps.models import load_pipeline
from steer.apps.plots import FAINT, INK
from steer.apps.scenes.evaluate import (
    CALL,
    IMAGES_PER_BATCH,
    STEERING,
    BestOfN,
    NoiseSearch,
    Point,
    PromptResults,
    ResultCache,
    SteeringMethod,
    exactly_right,
    interval,
)
from steer.assets import MODELS
from steer.diffusion.preview import NormalEquations, PreviewDecoder, build_preview
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.pipelines.fk_steering import DEFAULT_STEPS, FKSteeringPipeline
from steer.pipelines.selection import BestOfNPipeline, SelectionPipeline
from steer.rewards.parser import load_reward

SIZES = (1, 2, 4, 8, 16)
PART = 64  # prompts of the dearest contenders
# Chosen on scenes-tuning (`ablations`), never on the held-out prompts, as FK's own settings were: the solver's own way
# but where children part, and choices only at the steps at which FK reads rewards.
SVDD: dict[str, Any] = {"eta": 0.0, "select_steps": [8, 11, 14, 17]}
BEAM: dict[str, Any] = SVDD | {"beams": 2}
PLAIN = "best-of-n"


def contenders(sizes: Sequence[int] = SIZES, part: int = PART, large: str = "scenes-large") -> list[SteeringMethod]:
    """Everything of the study but the large model, where there is none of that name."""
    most = max(sizes)
    method_results: list[SteeringMethod] = [BestOfN(PLAIN, most, sizes=sizes)]
    for size in sizes:
        method_results.append(
            SteeringMethod("FK", size, FKSteeringPipeline, STEERING, prompts=part if size > 8 else None)
        )
    for size in (size for size in sizes if 4 <= size <= 8):
        method_results.append(SteeringMethod("SVDD", size, SelectionPipeline, SVDD, prompts=part))
        method_results.append(SteeringMethod("beam search", size, SelectionPipeline, BEAM, prompts=part))
    if 4 in sizes:
        method_results.append(SteeringMethod("SVDD, as published", 4, SelectionPipeline, prompts=part))
    method_results.append(NoiseSearch("zero-order search", 1 + most // 4, prompts=part))
    folder = MODELS.get(large, Path(large))
    if (folder / "model_index.json").exists():
        method_results.append(BestOfN(Path(large).name, 4, BestOfNPipeline, model=large, sizes=(1, 2, 4)))
    else:
        logger.info("no model %s: its row is left out; the same command adds it when there is one", large)
    return method_results


def steering_study(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    rivals: Sequence[SteeringMethod],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """Accuracy of what each contender picks, its cost, and differences over the same prompts; it goes on in `folder`.

    The first contender is best-of-n with the small model, which all others are compared with. Under "panels" the
    contenders that had all prompts, and all contenders on the prompts that each of them had.
    """
    runs = dict(zip(rivals, ResultCache(folder, reward, call).run(rivals, prompts), strict=True))
    fewest = min(len(method_results.proxy) for method_results in runs.values())
    whole = {one: method_results for one, method_results in runs.items() if len(method_results.proxy) == len(prompts)}
    part = {one: method_results.first(fewest) for one, method_results in runs.items()}
    panels = {str(len(prompts)): whole} | ({str(fewest): part} if fewest < len(prompts) else {})
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, **call, "contenders": [{"name": one.name} | one.about() for one in rivals]},
        "panels": {count: _curves(some) for count, some in panels.items()},
        "differences": {count: list(_differences(some)) for count, some in panels.items()},
    }


def _curves(runs: Mapping[SteeringMethod, PromptResults]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of the method."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for one, method_results in runs.items():
        curves.setdefault(one.name, []).extend(point.row() for point in one.points(method_results))
    return curves


def _differences(runs: Mapping[SteeringMethod, PromptResults]) -> Iterator[dict[str, Any]]:
    """Of every point: from the base, from best-of-n at equal evaluations and at equal seconds, from FK with as many
    particles, from the other models unsteered."""
    plain, *others = runs
    assert isinstance(plain, BestOfN)
    base = plain.best_of(runs[plain], 1)
    named = [(one, point) for one in others for point in one.points(runs[one])]
    steered = {point.size: point for one, point in named if one.name == "FK"}
    larger = {one.name: point for one, point in named if one.model != plain.model and point.size == 1}
    for one, point in named:
        rivals: dict[str, Point | None] = {"base": base}
        if one.model == plain.model:
            rivals["best-of-n, equal evaluations"] = plain.at_evaluations(runs[plain], point.spent.evaluations)
            rivals |= {f"{name}, unsteered": rival for name, rival in larger.items()}
        rivals["best-of-n, equal seconds"] = plain.at_seconds(runs[plain], point.spent.seconds)
        if one.name != "FK" and not isinstance(one, BestOfN | NoiseSearch):
            rivals[f"FK, K = {one.size}"] = steered.get(one.size)
        for name, rival in rivals.items():
            if rival is not None:
                sizes = {"size": round(point.size, 2), "against_size": round(rival.size, 2)}
                yield {"of": one.name, **sizes, "against": name, **point.minus(rival)}


SIZE = 4  # K
STANDARD = "standard"
EARLY, LATE, EVERY = [4, 8, 12, 16], [14, 17], [*range(8, 19)]
READ = [8, 11, 14, 17]  # as FK does where nothing is said, of 20 steps

# What is changed of the standard settings, which stand under each factor for comparison, too.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "potential": {"difference": {}, **{name: {"potential": name} for name in ("max", "sum", "now")}},
    "λ": {"5": {"lam": 5.0}, "10": {"lam": 10.0}, "25": {}, "60": {"lam": 60.0}},
    "resampled": {"when ESS < K/2": {}, "at every reading": {"ess_threshold": 1.0}},
    "read at steps": {
        "4, 8, 12, 16": {"resample_steps": EARLY},
        "8, 11, 14, 17": {},
        "14, 17": {"resample_steps": LATE},
        "8, 9, …, 18": {"resample_steps": EVERY},
    },
    "η": {"0": {}, "1": {"eta": 1.0}},
}
# Of the controls that choose at every step.
SELECTIONS: dict[str, dict[str, Any]] = {
    "SVDD": {},
    "SVDD, η = 0": {"eta": 0.0},
    "SVDD, η = 0, at 8, 11, 14, 17": {"eta": 0.0, "select_steps": READ},
    "beam search": {"beams": 2},
    "beam search, η = 0, at 8, 11, 14, 17": {"beams": 2, "eta": 0.0, "select_steps": READ},
}


def variants(
    factors: Mapping[str, Mapping[str, dict[str, Any]]] = FACTORS,
    selections: Mapping[str, dict[str, Any]] = SELECTIONS,
) -> dict[str, dict[str, SteeringMethod]]:
    """Contenders by factor and value; the standard settings are one and the same."""
    standard = SteeringMethod(STANDARD, SIZE, FKSteeringPipeline, STEERING)

    def changed(factor: str, value: str, options: dict[str, Any]) -> SteeringMethod:
        full = STEERING | options
        return SteeringMethod(f"{factor} {value}", SIZE, FKSteeringPipeline, full) if options else standard

    others = {name: SteeringMethod(name, SIZE, SelectionPipeline, options) for name, options in selections.items()}
    return {
        "method": {"FK": standard, "best-of-4": BestOfN("best-of-n", SIZE, sizes=(SIZE,)), **others},
        **{
            factor: {value: changed(factor, value, options) for value, options in values.items()}
            for factor, values in factors.items()
        },
    }


def ablations(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    factors: Mapping[str, Mapping[str, SteeringMethod]],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """A row for every value of every factor, with its difference from the standard settings; it goes on in `folder`."""
    once = list(dict.fromkeys(one for values in factors.values() for one in values.values()))
    method_results = ResultCache(folder, reward, call).run(once, prompts)
    points = {one: one.points(result)[0] for one, result in zip(once, method_results, strict=True)}
    standard = next(point for one, point in points.items() if one.name == STANDARD)
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, "particles": SIZE, **STEERING, **call},
        "factors": {
            factor: {
                value: points[one].row()
                | {"standard": points[one] is standard, "minus_standard": points[one].minus(standard)}
                | {"options": dict(one.options)}
                for value, one in values.items()
            }
            for factor, values in factors.items()
        },
    }


COLOURS = {
    "FK": "#832db6",
    "best-of-n": "#e76300",
    "SVDD": "#3f90da",
    "SVDD, as published": "#5cb5c9",
    "beam search": "#a96b59",
    "zero-order search": "#94a4a2",
}
COSTS = {"evaluations": "denoiser evaluations of a prompt", "seconds": "seconds of a prompt, one thread"}


def draw_steering(method_results: dict[str, Any], path: Path) -> None:
    """Share of prompts whose picked image is right, against evaluations and against seconds; a row for each panel."""
    panels = method_results["panels"]
    figure = Figure(figsize=(10.5, 0.5 + 3.7 * len(panels)), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row", sharex="col")
    for places, (count, curves) in zip(grid, panels.items(), strict=True):
        for axes, (cost, title) in zip(places, COSTS.items(), strict=True):
            for name, rows in curves.items():
                if name in COLOURS:
                    _curve(axes, name, rows, cost)
                else:
                    _reference(axes, name, rows, cost)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(title, color=INK)
            _plain(axes)
        subtitle = (
            f"{count} held-out prompts" if count == str(method_results["prompts"]) else f"{count} of them, all methods"
        )
        places[0].set_title(f"picked image right: {subtitle}", size=10, loc="left", color=INK)
        everything = places[1].get_legend_handles_labels()  # another model's points are drawn there only
        places[0].legend(*everything, frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)


def _curve(axes: Axes, name: str, rows: list[dict[str, Any]], cost: str) -> None:
    mean, low, high = zip(*(row["right"] for row in rows), strict=True)
    at = [row[cost] for row in rows]
    axes.plot(at, mean, color=COLOURS[name], marker="o", ms=4, lw=1.7, label=name)
    axes.fill_between(at, low, high, color=COLOURS[name], alpha=0.1, lw=0)


def _reference(axes: Axes, name: str, rows: list[dict[str, Any]], cost: str) -> None:
    """Another model: its unsteered images as a line, against time its points too: its evaluations are dearer."""
    axes.axhline(rows[0]["right"][0], color=INK, lw=1, ls="--", label=f"{name}, unsteered")
    if cost == "seconds":
        at, mean = [row[cost] for row in rows], [row["right"][0] for row in rows]
        axes.plot(at, mean, color=INK, marker="s", ms=4, lw=1, ls=":", label=f"{name}, best-of-n")


def draw_ablations(method_results: dict[str, Any], path: Path) -> None:
    """What is right with every value of every factor; hollow: the standard. Bars: 95 % of the difference from it."""
    rows = [
        (factor, value, row) for factor, values in method_results["factors"].items() for value, row in values.items()
    ]
    gaps = [sum(rows[i][0] != rows[i + 1][0] for i in range(place)) for place in range(len(rows))]
    heights = [-(place + 0.7 * gap) for place, gap in enumerate(gaps)]
    figure = Figure(figsize=(10.5, 1.2 + 0.24 * (len(rows) + 0.7 * gaps[-1])), dpi=120, layout="constrained")
    titles = {"right": "picked image right", "met": "requirements it meets", "all_right": "of all K images right"}
    grid = figure.subplots(1, len(titles), sharey=True)
    for axes, (field, title) in zip(grid, titles.items(), strict=True):
        for height, (_, _, row) in zip(heights, rows, strict=True):
            mean, (difference, low, high) = row[field][0], row["minus_standard"][field]
            axes.plot([mean - difference + low, mean - difference + high], [height] * 2, color=FAINT, lw=2, zorder=1)
            face = "white" if row["standard"] else COLOURS["FK"]
            axes.plot(mean, height, "o", ms=6, color=COLOURS["FK"], markerfacecolor=face, zorder=2)
            if row["standard"]:
                axes.axvline(mean, color=FAINT, lw=0.8, ls=":", zorder=0)
        axes.set_title(title, size=10, loc="left", color=INK)
        _plain(axes)
    names = [f"{factor}: {value}" for factor, value, _ in rows]
    grid[0].set_yticks(heights, names, size=8)
    figure.supxlabel("hollow: the standard settings; bars: 95 % interval of the difference from them", size=8, x=0.6)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.3)
    axes.tick_params(labelcolor=INK, color=FAINT)


FULL = "8 particles"  # that the others are to be as good as


@dataclass(frozen=True, eq=False)
class SinglePromptSteering(SteeringMethod):
    """Steers one prompt a call, as `steer sample` does, and keeps the image that it picks: there may be any number.

    preview  what decodes x̂0, by a word of `steer sample`
    """

    preview: str = "full"

    @property
    def images(self) -> int:
        return IMAGES_PER_BATCH

    def about(self) -> dict[str, Any]:
        return super().about() | ({} if self.preview == "full" else {"preview": self.preview})

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> PromptResults:
        """Judges the best image."""
        decoder = load_preview(self.preview, pipe)
        method_results = super().run(pipe, reward, prompts, seed, {**call, "preview": decoder})
        return replace(method_results, proxy=method_results.proxy[:, :1], exact=method_results.exact[:, :1])

    def points(self, method_results: PromptResults) -> list[Point]:
        """One; of the images beside the picked one nothing is known."""
        return [replace(point, all_right=None) for point in super().points(method_results)]


BEST = {"particle_schedule_rule": "top_k"}
HALF, QUARTER, LATE_STEPS, LAST = {8: 4}, {8: 4, 14: 2}, {14: 2}, {17: 1}
VARIANTS: dict[str, tuple[int, dict[str, Any], str]] = {  # particles, options, previews
    FULL: (8, {}, "full"),
    "4 particles": (4, {}, "full"),
    "2 particles": (2, {}, "full"),
    "8, from step 8 on 4": (8, {"particle_schedule": HALF}, "full"),
    "8, from step 8 on 4, from 14 on 2": (8, {"particle_schedule": QUARTER}, "full"),
    "16, from step 8 on 4": (16, {"particle_schedule": HALF}, "full"),
    "8, from step 8 on the best 4": (8, {"particle_schedule": HALF} | BEST, "full"),
    "8, from step 8 on the best 4, from 14 on 2": (8, {"particle_schedule": QUARTER} | BEST, "full"),
    "8, from step 14 on the best 2": (8, {"particle_schedule": LATE_STEPS} | BEST, "full"),
    "8, from step 17 on the best": (8, {"particle_schedule": LAST} | BEST, "full"),
    "12, from step 8 on the best 4, from 14 on 2": (12, {"particle_schedule": QUARTER} | BEST, "full"),
    "8, until x̂0 has 0.8": (8, {"target_reward": 0.8}, "full"),
    "8, tiny previews": (8, {}, "tiny"),
    "8, linear previews": (8, {}, "linear"),
    "8, from step 8 on the best 4, from 14 on 2, tiny": (8, {"particle_schedule": QUARTER} | BEST, "tiny"),
    "12, from step 8 on the best 4, from 14 on 2, tiny": (12, {"particle_schedule": QUARTER} | BEST, "tiny"),
}


def economy_variants() -> dict[str, SinglePromptSteering]:
    """By name; the first is the standard."""
    return {
        name: SinglePromptSteering(name, size, FKSteeringPipeline, STEERING | options, preview=preview)
        for name, (size, options, preview) in VARIANTS.items()
    }


def economies(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    some: Mapping[str, SteeringMethod],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """A row for every variant, with its difference from the first over the same prompts; it goes on in `folder`."""
    method_results = ResultCache(folder, reward, call).run(list(some.values()), prompts)
    points = {name: one.points(result)[0] for (name, one), result in zip(some.items(), method_results, strict=True)}
    first = next(iter(points.values()))
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, **STEERING, **call},
        "rows": {
            name: point.row()
            | {"minus_standard": {"proxy": interval((point.proxy - first.proxy).float()), **point.minus(first)}}
            | {"options": dict(some[name].options)}
            for name, point in points.items()
        },
    }


def draw_economies(method_results: dict[str, Any], path: Path) -> None:
    """The reward of what is picked, and whether it is right, against evaluations and against seconds."""
    figure = Figure(figsize=(11, 8.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    titles = {"proxy": f"{method_results['settings']['reward']} of the picked image", "right": "picked image right"}
    for line, (field, title) in zip(grid, titles.items(), strict=True):
        for axes, (cost, name) in zip(line, COSTS.items(), strict=True):
            _scatter(axes, method_results["rows"], field, cost)
            axes.set_title(title, size=10, loc="left", color=INK)
            axes.set_xlabel(name, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)


def _scatter(axes: Axes, rows: Mapping[str, Mapping[str, Any]], field: str, cost: str) -> None:
    for place, (name, row) in enumerate(rows.items()):
        mean, low, high = row[field]
        colour, mark = f"C{place % 10}", "os^D"[place // 10] if place else "*"
        axes.plot([row[cost]] * 2, [low, high], color=colour, alpha=0.25, lw=1.5, zorder=1)
        axes.plot(row[cost], mean, mark, ms=7 if place else 12, color=colour, label=name, zorder=2)
    axes.set_xlim(left=0)
    axes.grid(color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


logger = logging.getLogger(__name__)

PARTICLES = 8  # particles of a prompt
DECODERS = ("full", "tiny", "linear")
REWARDS = ("scene-soft", "aesthetic:scenes", "preference:scenes")
DIGITS = 6  # of a reward: what is equal up to them is a tie
REPEATS = 20
REFITTED = (1, PARTICLES)  # particles decoded in full at every step, for a linear map that is fitted again each time


def read_steps(total: int) -> list[int]:
    """The solver steps at which steering reads rewards where nothing is said."""
    return [round(share * total) for share in DEFAULT_STEPS]


def rank_correlation(truth: Tensor, guess: Tensor) -> float:
    """Spearman's ρ of two rows of rewards (K,): the correlation of ranks, equal rewards sharing the mean of theirs.

    NaN where `truth` is the same for all: there is no order to be found. 0 where only `guess` is: it found none.
    """
    first, second = (np.round(row.double().numpy(), DIGITS) for row in (truth, guess))
    if np.ptp(first) == 0:
        return float("nan")
    return 0.0 if np.ptp(second) == 0 else float(spearmanr(first, second).statistic)


@torch.no_grad()
def predicted_latents(pipe: Any, prompt: str, seed: int, call: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
    """x̂0 (K, …) of unsteered particles at each of the steps that are read, and their finished images (K, 3, H, W)."""
    steps, method_results = read_steps(call["num_inference_steps"]), []

    def watch(event: SolverStep) -> None:
        if event.k in steps:
            method_results.append(event.x0())

    with hook_steps(pipe, watch, rows=PARTICLES) as view:
        output = view(
            prompt, num_images_per_prompt=PARTICLES, generator=Generator().manual_seed(seed), output_type="pt", **call
        )
    return method_results, output.images


def refitted_previews(vae: Any, x0s: Sequence[Tensor], particles: int) -> list[Tensor]:
    """Previews (K, 3, H, W) of each step's x̂0: the full decoder's, then a linear map's that learns on at every step."""
    equations, shown = NormalEquations(), []
    for place, x0 in enumerate(x0s):
        z = x0 / vae.config.scaling_factor
        some = z[: particles if place else len(z)]
        images = vae.decode(some).sample
        equations.add(some, images)
        shown.append((images if place == 0 else equations.solve()(z)).div(2).add(0.5).clamp(0, 1))
    return shown


def preview_study(model: str, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """Rank correlations by reward, decoder and step, seconds of each decoder, and steering with each of them."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    options = {name: load_preview(name, pipe) for name in DECODERS}
    return {
        "prompts": len(prompts),
        "settings": {"model": model, "particles": PARTICLES, "steps": read_steps(call["num_inference_steps"]), **call},
        "correlation": _correlations(pipe, options, prompts, call),
        "seconds": _seconds(pipe, options, prompts[0], call),
        "steering": _steering(pipe, options, prompts, call),
    }


@torch.no_grad()
def _correlations(
    pipe: Any, options: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any]
) -> dict[str, Any]:
    """Of the rewards of cheap previews with those of full ones; and of each with the finished images'."""
    judges = {name: load_reward(name) for name in REWARDS}
    rows: dict[tuple[str, str, str], list[list[float]]] = {}
    for number, prompt in enumerate(tqdm(prompts, desc="previews", leave=False, disable=None)):
        x0s, finished = predicted_latents(pipe, prompt, number, call)
        asked = {"prompt": prompt, "num_images_per_prompt": PARTICLES, **call}
        previews = {name: build_preview(option, pipe, asked, PARTICLES) for name, option in options.items()}
        shown = {name: [preview(x0) for x0 in x0s] for name, preview in previews.items()}
        shown |= {f"linear, refitted by {some}": refitted_previews(pipe.vae, x0s, some) for some in REFITTED}
        for reward, judge in judges.items():
            scores = {name: [judge(images, [prompt] * PARTICLES) for images in some] for name, some in shown.items()}
            end = judge(finished, [prompt] * PARTICLES)
            for name, method_results in scores.items():
                pairs = {"full": scores["full"], "finished": [end] * len(x0s)}
                for what, truth in pairs.items():
                    line = [rank_correlation(*pair) for pair in zip(truth, method_results, strict=True)]
                    rows.setdefault((reward, name, what), []).append(line)
        logger.info("previews of %d of %d prompts", number + 1, len(prompts))
    return {reward: _table(rows, reward) for reward in REWARDS}


def _table(rows: Mapping[tuple[str, str, str], list[list[float]]], reward: str) -> dict[str, Any]:
    """[mean, low, high] over prompts at each step, prompts without an order left out and counted."""
    table: dict[str, Any] = {}
    for (name, decoder, what), lines in rows.items():
        if name != reward or (decoder == "full" and what == "full"):
            continue
        columns = torch.tensor(lines).T
        ranked = [column[~column.isnan()] for column in columns]
        table.setdefault(decoder, {})[f"with {what}"] = [interval(column) if len(column) else None for column in ranked]
        table[decoder][f"without order, {what}"] = [int(column.isnan().sum()) for column in columns]
    return table


def _seconds(pipe: Any, options: Mapping[str, Any], prompt: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the median processor seconds of PARTICLES previews, the first one of a linear map left out."""
    x0, _ = predicted_latents(pipe, prompt, 0, call)
    asked = {"prompt": prompt, "num_images_per_prompt": PARTICLES, **call}
    previews = {name: build_preview(option, pipe, asked, PARTICLES) for name, option in options.items()}
    first = {f"{name}, first": _process_seconds(preview, x0[0]) for name, preview in previews.items()}
    seconds_taken: dict[str, list[float]] = {name: [] for name in previews}
    for _ in range(REPEATS):  # in turns, so that what else the machine does meets all of them
        for name, preview in previews.items():
            seconds_taken[name].append(_process_seconds(preview, x0[-1]))
    median = {name: float(np.median(some)) for name, some in seconds_taken.items()}
    return {name: round(seconds, 4) for name, seconds in (median | first).items()}


@torch.no_grad()
def _process_seconds(preview: PreviewDecoder, x0: Tensor) -> float:
    started = time.process_time()
    preview(x0)
    return time.process_time() - started


def _steering(
    pipe: Any, options: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """FK by scene-soft with each decoder: whether the best image is right, its reward, both less those of the first
    decoder on the same prompts and seeds, and the cost of a prompt."""
    method, method_results = FKSteeringPipeline(pipe, REWARDS[0]), {}
    first: tuple[Tensor, Tensor] | None = None
    for name, option in options.items():
        right, rewards, decodes, started = [], [], 0, time.process_time()
        for number, prompt in enumerate(tqdm(prompts, desc=f"fk, {name}", leave=False, disable=None)):
            rng = Generator().manual_seed(number)
            own = {"num_particles": PARTICLES, "generator": rng, "output_type": "pt", **STEERING, **call}
            out = method(prompt, preview=option, **own)
            right.append(exactly_right(out, [prompt])[0, 0])
            rewards.append(out.rewards[0, 0])
            decodes += out.cost.decodes
            logger.info("fk, %s: %d of %d prompts", name, number + 1, len(prompts))
        seconds = time.process_time() - started
        picked = torch.stack(right), torch.stack(rewards)
        first = first or picked
        method_results[name] = {
            "right": interval(picked[0]),
            "reward": interval(picked[1]),
            "right_minus_full": interval(picked[0] - first[0]),
            "reward_minus_full": interval(picked[1] - first[1]),
            "decodes": round(decodes / len(prompts), 1),
            "seconds": round(seconds / len(prompts), 3),
        }
    return method_results
