"""ReNO on the one-step model beside its controls, judged by the exact scene reward."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.plots import FAINT, INK
from steer.apps.scenes.evaluate import (
    CALL,
    PROMPTS_PER_CALL,
    STEERING,
    BestOfN,
    Cost,
    Point,
    PromptResults,
    ResultCache,
    SteeringMethod,
    agreement,
    exact_rewards,
    exactly_right,
    interval,
)
from steer.apps.scenes.preferences import trained_prompts
from steer.pipelines.base import Iteration, SteeringOutput
from steer.pipelines.fk_steering import FKSteeringPipeline, top_k_indices
from steer.pipelines.initial_noise import screen_initial_noise
from steer.pipelines.reno import Backprop, NoiseSearchPipeline, ReNOPipeline
from steer.pipelines.selection import BestOfNPipeline
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
class SearchResults:
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

    def __init__(self, rows: dict[int, SearchResults]) -> None:
        self.rows, self.started = rows, time.monotonic()
        self.images, self.lengths = torch.empty(0), torch.empty(0)

    def __call__(self, now: Iteration) -> None:
        """Counts the time that judging takes too: it is next to nothing."""
        assert now.images is not None
        newest = (now.rewards >= now.best).flatten()
        first = not len(self.images)
        self.images = now.images if first else torch.where(newest[:, None, None, None], now.images, self.images)
        self.lengths = now.norms if first else torch.where(now.rewards >= now.best, now.norms, self.lengths)
        if results_at := self.rows.get(now.number + 1):
            results_at.add(self.images, now.best, self.lengths, time.monotonic() - self.started)


def run_search(
    method: Any, prompts: Sequence[str], rows: dict[int, SearchResults], options: dict[str, Any]
) -> list[SearchResults]:
    """A noise optimisation of all prompts, judged at the iterations that are the keys of `rows`."""
    for start in tqdm(range(0, len(prompts), PROMPTS_PER_CALL), desc=type(method).__name__, leave=False, disable=None):
        some, generator = list(prompts[start : start + PROMPTS_PER_CALL]), torch.Generator().manual_seed(start)
        call = {"num_particles": SEEDS, "generator": generator, "output_type": "pt", "iterations": max(rows)}
        method(some, on_iteration=Snapshots(rows), **call, **options)
    return list(rows.values())


def run_best_of_n(
    pipe: Any, reward: str, prompts: Sequence[str], sizes: Sequence[int], call: dict[str, Any]
) -> list[SearchResults]:
    """Best-of-n for every n: two samples of the largest, and of each its first n."""
    rows, most = [SearchResults(size) for size in sizes], max(sizes)
    method: Any = BestOfNPipeline(pipe, reward)
    prompts_per_call = max(1, 400 // most)
    for start in tqdm(range(0, len(prompts), prompts_per_call), desc=f"best of {most}", leave=False, disable=None):
        some, generator = list(prompts[start : start + prompts_per_call]), torch.Generator().manual_seed(start)
        options = {"num_particles": SEEDS * most, "generator": generator, "output_type": "pt", "chunk_size": 50} | call
        out = method(some, **options).in_slot_order()
        images = out.images.view(len(some) * SEEDS, most, *out.images.shape[1:])
        rewards = out.rewards.view(-1, most)
        for results_at in rows:
            best = rewards[:, : results_at.evaluations].max(1)
            picked = images[torch.arange(len(images)), best.indices]
            values = best.values.view(-1, SEEDS)
            results_at.add(
                picked, values, torch.full_like(values, torch.nan), out.cost.seconds * results_at.evaluations / most
            )
    return rows


def study(model: str, base: str, reward: str, prompts: Sequence[str], few: bool = False) -> dict[str, Any]:
    """Every method on the same prompts, SEEDS searches each; `few`: with a few evaluations only."""
    turbo, teacher = (load_pipeline(name) for name in (model, base))
    for pipe in (turbo, teacher):
        pipe.set_progress_bar_config(disable=True)
    most = 2 if few else None
    marks = {number: SearchResults(number) for number in RENO_MARKS[:most]}
    images = {number: SearchResults(1 + NEIGHBOURS * (number - 1)) for number in SEARCH_MARKS[:most]}
    search = {"neighbours": NEIGHBOURS, "num_inference_steps": 1, **SEARCH}
    methods: dict[str, Callable[[], list[SearchResults]]] = {
        "ReNO": partial(run_search, ReNOPipeline(turbo, reward), prompts, marks, RENO | {"gradient": KEPT}),
        "best-of-n": partial(run_best_of_n, turbo, reward, prompts, SIZES[:most], {"num_inference_steps": 1}),
        "zero-order search": partial(run_search, NoiseSearchPipeline(turbo, reward), prompts, images, search),
    }
    for name, pipe, steps in ((model, turbo, 2), (model, turbo, 4), (base, teacher, 20), (base, teacher, 50)):
        call = CALL | {"num_inference_steps": steps}
        methods[f"{name}, {steps} steps"] = partial(run_best_of_n, pipe, reward, prompts, (1,), call)
    return {
        "prompts": len(prompts),
        "seeds": SEEDS,
        "settings": {"model": model, "base": base, "reward": reward, "reno": RENO, "search": SEARCH},
        "methods": {name: [results_at.row(prompts) for results_at in run()] for name, run in methods.items()},
    }


def draw_study(method_results: dict[str, Any], path: Path) -> None:
    """Accuracy, and what the proxy says, against images made and against seconds."""
    figure = Figure(figsize=(10.5, 6.4), dpi=120, layout="constrained")
    colours = {"ReNO": "#832db6", "best-of-n": "#e76300", "zero-order search": "#3f90da"}
    panels = [(field, cost) for field in ("right", "proxy") for cost in ("evaluations", "seconds")]
    titles = {"right": "images that are right (exact reward)", "proxy": "reward that is optimised"}
    costs = {"evaluations": "evaluations of the reward, one image", "seconds": "seconds for one image"}
    for axes, (field_, cost) in zip(figure.subplots(2, 2, sharex="col").flatten(), panels, strict=True):
        for name, colour in colours.items():
            rows = method_results["methods"][name]
            mean, low, high = zip(*(row[field_] for row in rows), strict=True)
            axes.plot([row[cost] for row in rows], mean, color=colour, marker="o", ms=4, lw=1.7, label=name)
            axes.fill_between([row[cost] for row in rows], low, high, color=colour, alpha=0.1, lw=0)
        for dash, (name, rows) in zip(((0, (1, 1)), "--"), _references(method_results), strict=True):
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


def _references(method_results: dict[str, Any]) -> list[tuple[str, Any]]:
    base = method_results["settings"]["base"]
    return [(name, method_results["methods"][name]) for name in (f"{base}, 20 steps", f"{base}, 50 steps")]


PROMPTS = 8
COST_SEEDS = 4
STEPS = 10  # solver steps that the gradient goes through, of the multi-step model
REWARD = "scene-soft"


def _peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(model: str, checkpointing: bool, steps: int, iterations: int) -> tuple[float, float]:
    """In a process of its own: MB beyond what the loaded model and one image took, seconds an iteration."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe("a circle", num_inference_steps=1)
    before, started = _peak(), time.monotonic()
    ReNOPipeline(pipe, REWARD)(
        trained_prompts(PROMPTS),
        num_particles=COST_SEEDS,
        iterations=iterations,
        gradient=Backprop(checkpointing),
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=steps,
        **RENO,
    )
    return round(_peak() - before), round((time.monotonic() - started) / iterations, 2)


def _measure_in_subprocess(*arguments: Any) -> tuple[float, float]:
    """`measure` in a fresh process: memory that was once had is not given back in the old one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(measure, *arguments).result()


def costs(model: str, turbo: str) -> dict[str, Any]:
    """Peak memory and time of both ways back, at few and at more iterations; the time of a batch and of single runs."""
    memory = {
        f"{name}, {steps} steps, {iterations} iterations, checkpointing {'on' if on else 'off'}": dict(
            zip(("MB", "seconds"), _measure_in_subprocess(name, on, steps, iterations), strict=True)
        )
        for name, steps in ((model, STEPS), (turbo, 1))
        for iterations in (2, 8)
        for on in (True, False)
    }
    return {"images": PROMPTS * COST_SEEDS, "memory": memory, "batch": batch_ratio(turbo)}


def batch_ratio(model: str, iterations: int = 10) -> dict[str, float]:
    """Seconds of eight prompts in one batch and one after the other, in turns, the better of three each."""
    pipe, prompts = load_pipeline(model), trained_prompts(PROMPTS)
    pipe.set_progress_bar_config(disable=True)
    reno, options = ReNOPipeline(pipe, REWARD), {"iterations": iterations, **RENO}
    prompts_per_call, single = [], []
    for _ in range(3):
        prompts_per_call.append(reno(prompts, **options).cost.seconds)
        single.append(sum(reno(prompt, **options).cost.seconds for prompt in prompts))
    best = min(prompts_per_call), min(single)
    return {"batch": round(best[0], 2), "single": round(best[1], 2), "ratio": round(best[1] / best[0], 2)}


SIZE = 4  # images of each prompt
ITERATIONS = 25


def reno_then_steering(turbo: str, base: str, reward: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Accuracy of base and steered images from random and from optimised noise, beside that of the noise's own images.

    [mean, low, high] over prompts: of the best image by `reward`, and of all; `gain` is optimised minus random.
    """
    one_step, many_steps = load_pipeline(turbo), load_pipeline(base)
    for pipe in (one_step, many_steps):
        pipe.set_progress_bar_config(disable=True)
    first, plain = ReNOPipeline(one_step, reward), BestOfNPipeline(many_steps, reward)
    steered = FKSteeringPipeline(many_steps, reward)
    right: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(prompts), PROMPTS_PER_CALL), desc="then", leave=False, disable=None):
        some = list(prompts[start : start + PROMPTS_PER_CALL])
        climb = {"iterations": ITERATIONS, "gradient": KEPT, **RENO}
        noise = {"latents": _run_and_score(right, "ReNO", first, some, start, climb).in_slot_order().start.noise}
        for kind, given in (("random", {}), ("optimised", noise)):
            _run_and_score(right, f"base, {kind}", plain, some, start, given | CALL)
            _run_and_score(right, f"fk, {kind}", steered, some, start, given | STEERING | CALL)
    method_results = {name: torch.cat(rows) for name, rows in right.items()}
    return {
        "prompts": len(prompts),
        "iterations": ITERATIONS,
        "methods": {
            name: {"best": interval(v[:, 0]), "all": interval(v.mean(1))} for name, v in method_results.items()
        },
        "gain": {
            name: {"best": interval((new - old)[:, 0]), "all": interval((new - old).mean(1))}
            for name in ("base", "fk")
            for new, old in [(method_results[f"{name}, optimised"], method_results[f"{name}, random"])]
        },
    }


def _run_and_score(
    right: dict[str, list[Tensor]], name: str, method: Any, prompts: list[str], seed: int, call: dict[str, Any]
) -> Any:
    """What a method makes of some prompts; which images are right goes to `right[name]`."""
    out = method(prompts, num_particles=SIZE, output_type="pt", generator=Generator().manual_seed(seed), **call)
    right.setdefault(name, []).append(exactly_right(out, prompts))
    return out


POOL = 16  # candidates of each prompt whose short and whole runs are compared
SHORT = (2, 4, 6)
WHOLE = int(CALL["num_inference_steps"])
STARTS_KEPT = (1, 2, 4, 8)
PLAIN = (4, 8, 12)  # K of FK without screening
SCREENED = ((4, 8, 4), (4, 16, 4), (8, 16, 4))  # K, M, S of FK with it


@dataclass(frozen=True, eq=False)
class PlainSampling(BestOfN):
    """Images of the plain pipeline by slot, not by reward, after `steps` solver steps from the same noise."""

    steps: int = WHOLE

    def about(self) -> dict[str, Any]:
        return super().about() | {"steps": self.steps}

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> PromptResults:
        return super().run(pipe, reward, prompts, seed, {**call, "num_inference_steps": self.steps})


class UnsortedBestOfN(BestOfNPipeline):
    """Best-of-n that does not sort."""

    def __call__(self, *args: Any, **options: Any) -> SteeringOutput:
        return super().__call__(*args, **options).in_slot_order()


@dataclass(frozen=True, eq=False)
class ScreenedNoise(SteeringMethod):
    """FK from the best starts of so many candidates."""

    candidates: int = 8
    steps: int = 4

    def about(self) -> dict[str, Any]:
        return super().about() | {"candidates": self.candidates, "steps": self.steps}

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> PromptResults:
        started = time.process_time()
        run_search: dict[str, Any] = {"keep": self.size, "candidates": self.candidates, "steps": self.steps}
        generator = Generator().manual_seed(seed)
        method_results = screen_initial_noise(pipe, reward, list(prompts), **run_search, generator=generator, **call)
        options = {"num_particles": self.size, "output_type": "pt", **method_results.arguments()}
        out = self.method(pipe, reward)(list(prompts), **options, **call, **self.options)
        seconds = time.process_time() - started
        exact = exact_rewards(out.images, prompts).view_as(out.rewards)
        nfe, decodes = out.cost.nfe + method_results.cost.nfe, out.cost.decodes + method_results.cost.decodes
        return PromptResults(out.rewards, exact, Cost(nfe, decodes, seconds).times(1 / len(prompts)))


def contenders() -> tuple[list[PlainSampling], list[SteeringMethod], list[ScreenedNoise]]:
    """Plain runs of all lengths, the whole one first; FK without screened starts; FK with them."""
    whole = PlainSampling("best-of-n", POOL, UnsortedBestOfN, sizes=range(1, POOL + 1))
    short = [PlainSampling(f"after {steps} steps", POOL, UnsortedBestOfN, steps=steps) for steps in SHORT]
    plain = [SteeringMethod("FK", size, FKSteeringPipeline, STEERING) for size in PLAIN]
    screened = [
        ScreenedNoise(f"FK from {many} after {steps}", size, FKSteeringPipeline, STEERING, candidates=many, steps=steps)
        for size, many, steps in SCREENED
    ]
    return [whole, *short], plain, screened


def starts_study(folder: Path, reward: str, prompts: Sequence[str], call: Mapping[str, Any] = CALL) -> dict[str, Any]:
    """What short runs foretell; screened best-of-K, from the same runs; FK with screened starts beside FK and
    best-of-n at equal evaluations and at equal seconds. It goes on in `folder`."""
    lengths, plain, screened = contenders()
    rivals: list[SteeringMethod] = [*lengths, *plain, *screened]
    runs = dict(zip(rivals, ResultCache(folder, reward, call).run(rivals, prompts), strict=True))
    whole, *short = lengths
    points = {one: one.points(runs[one])[0] for one in (*plain, *screened)}
    best_of_n = partial(whole.at_evaluations, runs[whole]), partial(whole.at_seconds, runs[whole])
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, **call, "contenders": [{"name": one.name} | one.about() for one in rivals]},
        "foretold": [foretold(one.steps, runs[one], runs[whole]) for one in short],
        "best_of_n": [whole.best_of(runs[whole], n).row() for n in (1, 2, 4, 8, POOL)],
        "screened_best_of_k": list(_screened_best(short, runs, whole)),
        "fk": [{"name": one.name} | point.row() for one, point in points.items()],
        "differences": list(_differences(points, [points[one] for one in plain], screened, best_of_n)),
    }


def foretold(steps: int, short: PromptResults, whole: PromptResults) -> dict[str, Any]:
    """How the reward after a few steps goes with that of the finished image, among candidates (P, M) of one prompt:
    Pearson's and Spearman's correlation, mean over prompts, and the share of pairs that are ranked alike."""
    guess = short.proxy
    return {
        "steps": steps,
        "pearson": interval(correlation(guess, whole.proxy)),
        "spearman": interval(correlation(ranks(guess), ranks(whole.proxy))),
        "spearman_exact": interval(correlation(ranks(guess), ranks(whole.exact))),
        "pairs": round(agreement(guess, whole.proxy), 3),
        "pairs_exact": round(agreement(guess, whole.exact), 3),
        "pairs_exact_of_the_whole_run": round(agreement(whole.proxy, whole.exact), 3),
    }


def correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's, of each row of (P, M) that varies on both sides."""
    a, b = (one.float() - one.float().mean(1, keepdim=True) for one in (left, right))
    scale = a.norm(dim=1) * b.norm(dim=1)
    varies = scale > 0
    return (a * b).sum(1)[varies] / scale[varies]


def ranks(values: Tensor) -> Tensor:
    """Ranks within each row of (P, M), ties sharing their mean rank."""
    below = (values[:, :, None] > values[:, None]).sum(2)
    alike = (values[:, :, None] == values[:, None]).sum(2)
    return below + (alike - 1) / 2


def screened_best(short: PromptResults, whole: PromptResults, steps: int, keep: int) -> Point:
    """The best by the proxy of the `keep` candidates that the short run scores highest."""
    at = top_k_indices(short.proxy, keep)
    pick = at.gather(1, whole.proxy.gather(1, at).argmax(1, keepdim=True))
    met, proxy = (one.gather(1, pick)[:, 0] for one in (whole.exact, whole.proxy))
    spent, share = whole.spent.times(keep / whole.proxy.shape[1]), short.spent
    total = (getattr(spent, name) + getattr(share, name) for name in ("evaluations", "decodes", "seconds"))
    return Point(keep, met, (met == 1).double(), proxy, None, Cost(*total))


def between(points: Sequence[Point], asked: float, cost: str) -> Point | None:
    """On the line from one point to the next (by `cost`, a field of Spent), in order of it; None outside."""
    spent = [float(getattr(point.spent, cost)) for point in points]
    for low, high, start, end in zip(points, points[1:], spent, spent[1:], strict=False):
        if start <= asked <= end:
            share = (asked - start) / (end - start)
            met, right, proxy = (
                torch.lerp(getattr(low, name).double(), getattr(high, name).double(), share)
                for name in ("met", "right", "proxy")
            )
            size = low.size + share * (high.size - low.size)
            taken = low.spent.times(size / low.size)  # of particles alike, costs are as their numbers
            return Point(size, met, right, proxy, None, taken)
    return None


def _minus(point: Point, other: Point) -> dict[str, Any]:
    return point.minus(other) | {"proxy": interval((point.proxy - other.proxy).float())}


def _screened_best(
    short: Sequence[PlainSampling], runs: Mapping[Any, PromptResults], whole: PlainSampling
) -> Iterator[dict[str, Any]]:
    """Beside best-of-n at equal evaluations and at equal seconds."""
    for one in short:
        for keep in STARTS_KEPT:
            point = screened_best(runs[one], runs[whole], one.steps, keep)
            row = {"steps": one.steps, "candidates": POOL} | point.row()
            for name, rival in (
                ("equal evaluations", whole.at_evaluations(runs[whole], point.spent.evaluations)),
                ("equal seconds", whole.at_seconds(runs[whole], point.spent.seconds)),
            ):
                if rival is not None:
                    row[f"minus best-of-n, {name}"] = {"n": round(rival.size, 2)} | _minus(point, rival)
            yield row


def _differences(
    points: Mapping[SteeringMethod, Point],
    plain: Sequence[Point],
    screened: Sequence[ScreenedNoise],
    best_of_n: tuple[Callable[[float], Point | None], Callable[[float], Point | None]],
) -> Iterator[dict[str, Any]]:
    """Of FK with screened starts: from FK with as many particles, and at equal cost from FK and from best-of-n."""
    for one in screened:
        point = points[one]
        rivals = {
            "FK, as many particles": next((other for other in plain if other.size == one.size), None),
            "FK, equal evaluations": between(plain, point.spent.evaluations, "evaluations"),
            "FK, equal seconds": between(plain, point.spent.seconds, "seconds"),
            "best-of-n, equal evaluations": best_of_n[0](point.spent.evaluations),
            "best-of-n, equal seconds": best_of_n[1](point.spent.seconds),
        }
        for name, rival in rivals.items():
            if rival is not None:
                summary = {"size": one.size, "candidates": one.candidates, "steps": one.steps, "against": name}
                yield summary | {"against_size": round(rival.size, 2)} | _minus(point, rival)
