"""Whether screened starts pay: what short runs foretell, and FK and best-of-n with and without them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from steer.apps.scenes.contenders import Contender, Found, Point, Samples, Spent, judged
from steer.apps.scenes.evaluate import CALL, STEERING, agreement, interval
from steer.apps.scenes.kept_runs import KeptRuns
from steer.pipelines import BestOfNPipeline, FKSteeringPipeline, SteeringOutput
from steer.pipelines.plan import highest
from steer.pipelines.starts import screened_starts

POOL = 16  # candidates of each prompt whose short and whole runs are compared
SHORT = (2, 4, 6)
WHOLE = int(CALL["num_inference_steps"])
KEPT = (1, 2, 4, 8)
PLAIN = (4, 8, 12)  # K of FK without screening
SCREENED = ((4, 8, 4), (4, 16, 4), (8, 16, 4))  # K, M, S of FK with it


@dataclass(frozen=True, eq=False)
class Whole(Samples):
    """Images of the plain pipeline by slot, not by reward, after `steps` solver steps from the same noise."""

    steps: int = WHOLE

    def about(self) -> dict[str, Any]:
        return super().about() | {"steps": self.steps}

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Found:
        return super().run(pipe, reward, prompts, seed, {**call, "num_inference_steps": self.steps})


class InSlots(BestOfNPipeline):
    """Best-of-n that does not sort."""

    def __call__(self, *args: Any, **options: Any) -> SteeringOutput:
        return super().__call__(*args, **options).in_slot_order()


@dataclass(frozen=True, eq=False)
class Screened(Contender):
    """FK from the best starts of so many candidates."""

    candidates: int = 8
    steps: int = 4

    def about(self) -> dict[str, Any]:
        return super().about() | {"candidates": self.candidates, "steps": self.steps}

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Found:
        started = time.process_time()
        searched: dict[str, Any] = {"keep": self.size, "candidates": self.candidates, "steps": self.steps}
        generator = Generator().manual_seed(seed)
        found = screened_starts(pipe, reward, list(prompts), **searched, generator=generator, **call)
        options = {"num_particles": self.size, "output_type": "pt", **found.arguments()}
        out = self.method(pipe, reward)(list(prompts), **options, **call, **self.options)
        seconds = time.process_time() - started
        exact = judged(out.images, prompts).view_as(out.rewards)
        nfe, decodes = out.cost.nfe + found.cost.nfe, out.cost.decodes + found.cost.decodes
        return Found(out.rewards, exact, Spent(nfe, decodes, seconds).times(1 / len(prompts)))


def contenders() -> tuple[list[Whole], list[Contender], list[Screened]]:
    """Plain runs of all lengths, the whole one first; FK without screened starts; FK with them."""
    whole = Whole("best-of-n", POOL, InSlots, sizes=range(1, POOL + 1))
    short = [Whole(f"after {steps} steps", POOL, InSlots, steps=steps) for steps in SHORT]
    plain = [Contender("FK", size, FKSteeringPipeline, STEERING) for size in PLAIN]
    screened = [
        Screened(f"FK from {many} after {steps}", size, FKSteeringPipeline, STEERING, candidates=many, steps=steps)
        for size, many, steps in SCREENED
    ]
    return [whole, *short], plain, screened


def starts_study(folder: Path, reward: str, prompts: Sequence[str], call: Mapping[str, Any] = CALL) -> dict[str, Any]:
    """What short runs foretell; screened best-of-K, from the same runs; FK with screened starts beside FK and
    best-of-n at equal evaluations and at equal seconds. It goes on in `folder`."""
    lengths, plain, screened = contenders()
    rivals: list[Contender] = [*lengths, *plain, *screened]
    runs = dict(zip(rivals, KeptRuns(folder, reward, call).run(rivals, prompts), strict=True))
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


def foretold(steps: int, short: Found, whole: Found) -> dict[str, Any]:
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


def screened_best(short: Found, whole: Found, steps: int, keep: int) -> Point:
    """The best by the proxy of the `keep` candidates that the short run scores highest."""
    at = highest(short.proxy, keep)
    pick = at.gather(1, whole.proxy.gather(1, at).argmax(1, keepdim=True))
    met, proxy = (one.gather(1, pick)[:, 0] for one in (whole.exact, whole.proxy))
    spent, share = whole.spent.times(keep / whole.proxy.shape[1]), short.spent
    total = (getattr(spent, name) + getattr(share, name) for name in ("evaluations", "decodes", "seconds"))
    return Point(keep, met, (met == 1).double(), proxy, None, Spent(*total))


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


def _screened_best(short: Sequence[Whole], runs: Mapping[Any, Found], whole: Whole) -> Iterator[dict[str, Any]]:
    """Beside best-of-n at equal evaluations and at equal seconds."""
    for one in short:
        for keep in KEPT:
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
    points: Mapping[Contender, Point],
    plain: Sequence[Point],
    screened: Sequence[Screened],
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
                told = {"size": one.size, "candidates": one.candidates, "steps": one.steps, "against": name}
                yield told | {"against_size": round(rival.size, 2)} | _minus(point, rival)
