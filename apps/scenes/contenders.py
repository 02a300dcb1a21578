"""What the steering study compares: methods, how what they pick is judged, and what a prompt costs."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from steer.apps.scenes.evaluate import interval
from steer.apps.scenes.overoptimise import expected_best
from steer.pipelines import BestOfNPipeline, Iteration, NoiseSearchPipeline
from steer.rewards.scene import SceneReward

JUDGED = ("right", "met", "all_right")


@dataclass(frozen=True)
class Spent:
    """What one prompt took: denoiser evaluations, decoded images, seconds of processor time."""

    evaluations: float
    decodes: float
    seconds: float

    def times(self, share: float) -> "Spent":
        """A share of it."""
        return Spent(share * self.evaluations, share * self.decodes, share * self.seconds)


@dataclass(frozen=True)
class Found:
    """Of P prompts with M images: what the proxy and the exact reward say of them (P, M), and what one prompt took."""

    proxy: Tensor
    exact: Tensor
    spent: Spent

    def first(self, prompts: int) -> "Found":
        """The first so many prompts."""
        return replace(self, proxy=self.proxy[:prompts], exact=self.exact[:prompts])


@dataclass(frozen=True)
class Point:
    """The image that a method picks for each of P prompts: the share of its requirements that are met, whether all of
    them are, the proxy (P,); and where there are several, the share of a prompt's images that are right (P,)."""

    size: float
    met: Tensor
    right: Tensor
    proxy: Tensor
    all_right: Tensor | None
    spent: Spent

    def row(self) -> dict[str, Any]:
        """As plain values: [mean, low, high] over prompts, and the cost of one."""
        told: dict[str, Any] = {
            "size": round(self.size, 2),
            "prompts": len(self.right),
            "evaluations": round(self.spent.evaluations),
            "decodes": round(self.spent.decodes, 1),
            "seconds": round(self.spent.seconds, 3),
        }
        values = {name: getattr(self, name) for name in ("proxy", *JUDGED)}
        return told | {name: interval(value.float()) for name, value in values.items() if value is not None}

    def minus(self, other: "Point") -> dict[str, Any]:
        """Differences over the prompts that both have."""
        count = min(len(self.right), len(other.right))
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in JUDGED}
        return {
            "prompts": count,
            **{
                name: interval((mine[:count] - theirs[:count]).float())
                for name, (mine, theirs) in pairs.items()
                if mine is not None and theirs is not None
            },
        }


@dataclass(frozen=True, eq=False)
class Contender:
    """A method with K particles of each prompt, which picks the best by the proxy.

    method   a steering pipeline of `steer.pipelines`; `options` (plain values) go to its call
    prompts  how many of the study's prompts it gets, the first ones; None: all
    """

    name: str
    size: int
    method: Callable[[Any, str], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "scenes"
    prompts: int | None = None

    @property
    def key(self) -> str:
        """A name for its folder."""
        return re.sub(r"[^\w.]+", "-", f"{self.name} {self.size}".lower()).strip("-")

    @property
    def images(self) -> int:
        """Rows that a prompt has in a batch."""
        return self.size

    def about(self) -> dict[str, Any]:
        """What its results depend on, beside the prompts and the call."""
        method = getattr(self.method, "__name__", str(self.method))
        return {"method": method, "size": self.size, "options": dict(self.options), "model": Path(self.model).name}

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Found:
        """Judges all K images, best first."""
        options = {"num_particles": self.size, "generator": Generator().manual_seed(seed), "output_type": "pt"}
        started = time.process_time()
        out = self.method(pipe, reward)(list(prompts), **options, **call, **self.options)
        seconds = time.process_time() - started
        exact = judged(out.images, prompts).view_as(out.rewards)
        return Found(out.rewards, exact, Spent(out.cost.nfe, out.cost.decodes, seconds).times(1 / len(prompts)))

    def points(self, found: Found) -> list[Point]:
        """One: the first image of every prompt."""
        right = (found.exact == 1).double()
        return [Point(self.size, found.exact[:, 0], right[:, 0], found.proxy[:, 0], right.mean(1), found.spent)]


@dataclass(frozen=True, eq=False)
class Samples(Contender):
    """Best-of-n for many n, all from one plain batch of `size` images."""

    method: Callable[[Any, str], Any] = BestOfNPipeline
    sizes: Sequence[int] = (1, 2, 4, 8, 16)

    def points(self, found: Found) -> list[Point]:
        """For each n, the mean over all its subsets: unbiased (arXiv 2112.09332, appendix I)."""
        return [self.best_of(found, n) for n in self.sizes if n <= self.size]

    def best_of(self, found: Found, n: float) -> Point:
        """Best-of-n; between two whole numbers on the line from one to the other."""
        below, rest = int(n), n - int(n)

        def expected(value: Tensor) -> Tensor:
            low = expected_best(found.proxy, value, below)
            return low if not rest else (1 - rest) * low + rest * expected_best(found.proxy, value, below + 1)

        right = (found.exact == 1).double()
        spent = found.spent.times(n / self.size)
        return Point(n, expected(found.exact), expected(right), expected(found.proxy), right.mean(1), spent)

    def at_seconds(self, found: Found, seconds: float) -> Point | None:
        """Best-of-n of as many n as so many seconds a prompt allow; None where that is more than there are."""
        return self._of_share(found, seconds / found.spent.seconds)

    def at_evaluations(self, found: Found, evaluations: float) -> Point | None:
        """The same at equally many denoiser evaluations."""
        return self._of_share(found, evaluations / found.spent.evaluations)

    def _of_share(self, found: Found, share: float) -> Point | None:
        """Of a share of all images, at least of one; None for more than all, up to rounding."""
        return self.best_of(found, min(max(self.size * share, 1.0), self.size)) if share <= 1 + 1e-9 else None


@dataclass(frozen=True, eq=False)
class Search(Contender):
    """Zero-order search of one noise a prompt, judged after every iteration; `size` iterations in all."""

    method: Callable[[Any, str], Any] = NoiseSearchPipeline
    neighbours: int = 4

    @property
    def images(self) -> int:
        return 1

    def about(self) -> dict[str, Any]:
        return super().about() | {"neighbours": self.neighbours}

    def made(self, iterations: int) -> int:
        """Images that so many iterations make."""
        return 1 + self.neighbours * (iterations - 1)

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Found:
        """Judges the best image so far, one for each iteration."""
        best: list[Tensor] = []
        proxies: list[Tensor] = []

        def watch(now: Iteration) -> None:
            assert now.images is not None
            newest = (now.rewards >= now.best).flatten()[:, None, None, None]
            best.append(torch.where(newest, now.images, best[-1]) if best else now.images)
            proxies.append(now.best.flatten())

        options = {"generator": Generator().manual_seed(seed), "output_type": "pt", "iterations": self.size}
        started = time.process_time()
        out = self.method(pipe, reward)(
            list(prompts), neighbours=self.neighbours, on_iteration=watch, **options, **call, **self.options
        )
        seconds = time.process_time() - started
        exact = torch.stack([judged(images, prompts) for images in best], 1)
        spent = Spent(out.cost.nfe, out.cost.decodes, seconds).times(1 / len(prompts))
        return Found(torch.stack(proxies, 1), exact, spent)

    def points(self, found: Found) -> list[Point]:
        """After each iteration; the pipeline's last image, which it makes once more, is not needed."""
        right, last = (found.exact == 1).double(), self.made(self.size) + 1

        def after(number: int) -> Point:
            made, best = self.made(number + 1), found.proxy[:, number]
            return Point(made, found.exact[:, number], right[:, number], best, None, found.spent.times(made / last))

        return [after(number) for number in range(self.size)]


def judged(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The exact reward (P·M,) of images (P·M, 3, H, W), M of each prompt."""
    return SceneReward()(images, [prompt for prompt in prompts for _ in range(len(images) // len(prompts))])
