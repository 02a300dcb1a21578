"""Base, best-of-N and Feynman–Kac steering side by side, judged by the exact scene reward."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.plots import FAINT, INK
from steer.errors import InputError
from steer.files import read_image, write_text
from steer.pipelines.base import Iteration, SteeringOutput
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.reno import NoiseSearchPipeline
from steer.pipelines.selection import BestOfNPipeline
from steer.pipelines.training.evaluation import interval as bootstrap
from steer.reward import score_components
from steer.rewards.compose import mean, mean_minus_std, worst
from steer.rewards.parser import load_reward
from steer.rewards.scene import SceneReward

PROMPTS_PER_CALL = 8  # prompts in one call
# Chosen on scenes-tuning, never on the held-out prompts.
STEERING = {"lam": 25.0}
CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}


def interval(values: Tensor) -> list[float]:
    """Mean of (N,) values and its 95 % bootstrap interval over them, to four digits."""
    return [round(number, 4) for number in bootstrap(values)]


def exactly_right(out: SteeringOutput, prompts: Sequence[str]) -> Tensor:
    """1 for every image (P, K) that meets all of its prompt's requirements, else 0."""
    read = [prompt for prompt in prompts for _ in range(out.rewards.shape[1])]
    return (SceneReward()(out.images, read) == 1).float().view_as(out.rewards)


class MethodRunner:
    """Runs one method over all prompts: exact correctness of every image (P, K), best first, and the cost."""

    def __init__(self, pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> None:
        self.pipe, self.prompts, self.call = pipe, prompts, call

    def run(self, name: str, method: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        right, outputs = [], []
        for start in tqdm(range(0, len(self.prompts), PROMPTS_PER_CALL), desc=name, leave=False, disable=None):
            prompts = list(self.prompts[start : start + PROMPTS_PER_CALL])
            generator = torch.Generator().manual_seed(start)
            out: SteeringOutput = method(prompts, generator=generator, output_type="pt", **self.call, **options)
            right.append(exactly_right(out, prompts))
            outputs.append(out)
        costs = {field: sum(getattr(out.cost, field) for out in outputs) for field in ("nfe", "decodes", "seconds")}
        return torch.cat(right), costs


def compare(
    model: str, prompts: Sequence[str], reward: str, size: int, steering: dict[str, Any], call: dict[str, Any]
) -> dict[str, Any]:
    """Exact accuracy of all methods on the same prompts and seeds, at equal evaluations and at equal seconds.

    `size` is K; `steering` are further options of FKSteeringPipeline; `call` goes to all methods. Accuracies are
    [mean, low, high] over prompts: of the best image by `reward`, of all K images, and of any (what the exact
    reward, as the judge of the finished images, would have picked).
    """
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    judge = MethodRunner(pipe, prompts, call)
    plain, plain_cost = judge.run("best-of-n", BestOfNPipeline(pipe, reward), num_particles=size)
    steered, cost = judge.run("fk", FKSteeringPipeline(pipe, reward), num_particles=size, **steering)
    more = max(size, round(size * cost["seconds"] / plain_cost["seconds"]))
    wider, wider_cost = judge.run("best-of-n, equal seconds", BestOfNPipeline(pipe, reward), num_particles=more)
    return {
        "prompts": len(prompts),
        "settings": {"model": model, "reward": reward, "particles": size, **steering, **call},
        "base": {"all": interval(plain.mean(1)), "cost": plain_cost},
        "best_of_n": {"best": interval(plain[:, 0]), "any": interval(plain.amax(1)), "cost": plain_cost},
        "best_of_n_equal_seconds": {
            "n": more,
            "best": interval(wider[:, 0]),
            "any": interval(wider.amax(1)),
            "cost": wider_cost,
        },
        "fk": {
            "best": interval(steered[:, 0]),
            "any": interval(steered.amax(1)),
            "all": interval(steered.mean(1)),
            "cost": cost,
        },
        "fk_minus_base": interval(steered[:, 0] - plain.mean(1)),
        "fk_all_minus_base": interval(steered.mean(1) - plain.mean(1)),
        "fk_minus_best_of_n": interval(steered[:, 0] - plain[:, 0]),
        "fk_minus_best_of_n_equal_seconds": interval(steered[:, 0] - wider[:, 0]),
    }


def foresight(
    model: str, prompts: Sequence[str], reward: str, size: int, steps: Sequence[int], call: dict[str, Any]
) -> dict[str, Any]:
    """How well the reward of x̂0 at each step foretells the end, among unsteered images of one prompt.

    For each step: `order`, the share of pairs that the finished images' rewards rank the same way, and `right`, the
    share of pairs of a right and a wrong finished image (by the exact reward) in which the right one leads; its last
    number is for the finished images themselves. 0.5 is chance.
    """
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    steering_pipe = FKSteeringPipeline(pipe, reward)
    early, final, right = [], [], []
    for start in tqdm(range(0, len(prompts), PROMPTS_PER_CALL), desc="foresight", leave=False, disable=None):
        some = list(prompts[start : start + PROMPTS_PER_CALL])
        options = {"num_particles": size, "lam": 0.0, "resample_steps": steps, "output_type": "pt", **call}
        out = steering_pipe(some, generator=torch.Generator().manual_seed(start), **options).in_slot_order()
        early.append(torch.stack([evaluation.rewards for evaluation in out.history]))
        final.append(out.rewards)
        right.append(exactly_right(out, some))
    guesses = torch.cat(early, 1)
    return {
        "prompts": len(prompts),
        "steps": list(steps),
        "order": [round(agreement(guess, torch.cat(final)), 3) for guess in guesses],
        "right": [round(agreement(guess, torch.cat(right)), 3) for guess in (*guesses, torch.cat(final))],
    }


def agreement(guess: Tensor, truth: Tensor) -> float:
    """Of the pairs in a row of (P, K) that `truth` tells apart, the share that `guess` ranks alike; ties count half."""
    separable = (truth[:, :, None] - truth[:, None]).sign()
    ranked = (guess[:, :, None] - guess[:, None]).sign()
    pairs = separable > 0
    return ((ranked[pairs] + 1) / 2).mean().item()


SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 256
OTHERS = ("preference:scenes", "clip:scenes")
CURVE_COLOURS = ("#832db6", "#e76300", "#3f90da", "#a96b59", "#bd1f01", "#94a4a2")


def kl_of_best_of_n(n: int) -> float:
    """An upper bound of the KL from the base model, nats: log n − (n − 1)/n (arXiv 2204.05862, 2401.01879)."""
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Tensor, value: Tensor, n: int) -> Tensor:
    """E[value of the image that the proxy likes best among n], for each prompt (P,), over all n-subsets of M images.

    The k-th of M images, worst first, is the best of a random n-subset with probability C(k−1, n−1) / C(M, n): an
    unbiased estimate from one sample of M (arXiv 2112.09332, appendix I). proxy, value: (P, M).
    """
    total = proxy.shape[1]
    order = proxy.argsort(dim=1, stable=True)
    ranks = torch.arange(1, total + 1, dtype=torch.float64)
    log_chance = _log_choose(ranks - 1, n - 1) - _log_choose(torch.tensor(float(total)), n)
    chance = torch.where(ranks >= n, log_chance.exp(), 0.0)
    return (value.double().gather(1, order) * chance).sum(1)


def _log_choose(n: Tensor, k: int) -> Tensor:
    """log C(n, k), fp64; where n < k a number that nobody reads."""
    n = n.double().clamp(min=k)
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def curves(folder: Path, ensemble: str, others: Sequence[str] = OTHERS) -> dict[str, Any]:
    """For every proxy and n: its own standardised score and the exact reward of the image that it picks, [mean, low,
    high] over prompts. "one member" is the mean over the members of what each would pick alone.

    folder    files of `python -m steer.apps.scenes many`
    ensemble  a learned reward of several members
    """
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    gold = torch.tensor([row["gold"] for row in rows]).view(len(prompts), -1)
    members = torch.stack([*_scores(ensemble, rows)[1].values()])
    proxies = {
        "picked by the exact reward": [gold],
        "one member": [*members],
        f"mean of {len(members)}": [mean(members)],
        f"worst of {len(members)}": [worst(members)],
        f"mean − std of {len(members)}": [mean_minus_std(members)],
        **{spec: [_scores(spec, rows)[0]] for spec in others},
    }
    return {
        "prompts": len(prompts),
        "images": gold.shape[1],
        "ensemble": ensemble,
        "n": list(SIZES),
        "kl": [round(kl_of_best_of_n(n), 3) for n in SIZES],
        "proxies": {name: _curve([proxy.view_as(gold) for proxy in some], gold) for name, some in proxies.items()},
        "against_one_member": {
            name: [interval((_picked(some, gold, n) - _picked(proxies["one member"], gold, n)).float()) for n in SIZES]
            for name, some in proxies.items()
        },
        "members": _disagreement(members.view(-1, *gold.shape)),
    }


def _picked(proxies: Sequence[Tensor], gold: Tensor, n: int) -> Tensor:
    """The exact reward (P,) of what proxies of one kind pick, on average."""
    return torch.stack([expected_best(proxy.view_as(gold), gold, n) for proxy in proxies]).mean(0)


def _disagreement(members: Tensor) -> dict[str, float]:
    """Of members' scores (K, P, M): by how much they differ about a prompt, and about an image beside that."""
    prompts = members.mean(2, keepdim=True)
    return {
        "std_of_prompt_means": round(prompts.std(0).mean().item(), 3),
        "std_within_prompts": round((members - prompts).std(0).mean().item(), 3),
    }


def _curve(proxies: Sequence[Tensor], gold: Tensor) -> dict[str, list[list[float]]]:
    """What proxies (P, M) of one kind, on average, say of their picks, and what is true of them."""
    own = [(proxy - proxy.mean()) / proxy.std() for proxy in proxies]
    values = {"proxy": own, "gold": [gold] * len(own), "right": [(gold == 1).float()] * len(own)}
    return {
        field: [
            interval(torch.stack([expected_best(p, v, n) for p, v in zip(proxies, some, strict=True)]).mean(0).float())
            for n in SIZES
        ]
        for field, some in values.items()
    }


@torch.no_grad()
def _scores(spec: str, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a reward and of its parts, (N,) each."""
    reward, scored = load_reward(spec), []
    for start in tqdm(range(0, len(rows), BATCH), desc=spec, leave=False, disable=None):
        some = rows[start : start + BATCH]
        images = torch.stack([read_image(row["image"]) for row in some])
        scored.append(score_components(reward, images, [row["prompt"] for row in some]))
    totals, parts = zip(*scored, strict=True)
    return torch.cat(totals), {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def draw_curves(method_results: dict[str, Any], path: Path) -> None:
    """Left what each proxy says of the image that it picks, right what the exact reward says."""
    figure = Figure(figsize=(10.5, 4.3), dpi=120, layout="constrained")
    oracle, *proxies = method_results["proxies"]
    titles = {"proxy": "what the proxy says (its own standard deviations)", "gold": "what is true (exact reward)"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, colour in zip(proxies, CURVE_COLOURS, strict=True):
            mean_, low, high = zip(*method_results["proxies"][name][kind], strict=True)
            axes.plot(method_results["n"], mean_, color=colour, lw=1.7, marker="o", ms=3.5, label=name)
            axes.fill_between(method_results["n"], low, high, color=colour, alpha=0.07, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(method_results["n"], [str(n) for n in method_results["n"]])
        axes.set_xlabel("n of best-of-n", color=INK)
        axes.set_title(title, size=10, loc="left", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, alpha=0.3)
    best = [value for value, _, _ in method_results["proxies"][oracle]["gold"]]
    figure.axes[1].plot(method_results["n"], best, color=INK, lw=1.2, ls=":", label=oracle)
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


JUDGED = ("right", "met", "all_right")


@dataclass(frozen=True)
class Cost:
    """What one prompt took: denoiser evaluations, decoded images, seconds of processor time."""

    evaluations: float
    decodes: float
    seconds: float

    def times(self, share: float) -> "Cost":
        """A share of it."""
        return Cost(share * self.evaluations, share * self.decodes, share * self.seconds)


@dataclass(frozen=True)
class PromptResults:
    """Of P prompts with M images: what the proxy and the exact reward say of them (P, M), and what one prompt took."""

    proxy: Tensor
    exact: Tensor
    spent: Cost

    def first(self, prompts: int) -> "PromptResults":
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
    spent: Cost

    def row(self) -> dict[str, Any]:
        """As plain values: [mean, low, high] over prompts, and the cost of one."""
        summary: dict[str, Any] = {
            "size": round(self.size, 2),
            "prompts": len(self.right),
            "evaluations": round(self.spent.evaluations),
            "decodes": round(self.spent.decodes, 1),
            "seconds": round(self.spent.seconds, 3),
        }
        values = {name: getattr(self, name) for name in ("proxy", *JUDGED)}
        return summary | {name: interval(value.float()) for name, value in values.items() if value is not None}

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
class SteeringMethod:
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

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> PromptResults:
        """Judges all K images, best first."""
        options = {"num_particles": self.size, "generator": Generator().manual_seed(seed), "output_type": "pt"}
        started = time.process_time()
        out = self.method(pipe, reward)(list(prompts), **options, **call, **self.options)
        seconds = time.process_time() - started
        exact = exact_rewards(out.images, prompts).view_as(out.rewards)
        return PromptResults(out.rewards, exact, Cost(out.cost.nfe, out.cost.decodes, seconds).times(1 / len(prompts)))

    def points(self, method_results: PromptResults) -> list[Point]:
        """One: the first image of every prompt."""
        right = (method_results.exact == 1).double()
        return [
            Point(
                self.size,
                method_results.exact[:, 0],
                right[:, 0],
                method_results.proxy[:, 0],
                right.mean(1),
                method_results.spent,
            )
        ]


@dataclass(frozen=True, eq=False)
class BestOfN(SteeringMethod):
    """Best-of-n for many n, all from one plain batch of `size` images."""

    method: Callable[[Any, str], Any] = BestOfNPipeline
    sizes: Sequence[int] = (1, 2, 4, 8, 16)

    def points(self, method_results: PromptResults) -> list[Point]:
        """For each n, the mean over all its subsets: unbiased (arXiv 2112.09332, appendix I)."""
        return [self.best_of(method_results, n) for n in self.sizes if n <= self.size]

    def best_of(self, method_results: PromptResults, n: float) -> Point:
        """Best-of-n; between two whole numbers on the line from one to the other."""
        below, rest = int(n), n - int(n)

        def expected(value: Tensor) -> Tensor:
            low = expected_best(method_results.proxy, value, below)
            return low if not rest else (1 - rest) * low + rest * expected_best(method_results.proxy, value, below + 1)

        right = (method_results.exact == 1).double()
        spent = method_results.spent.times(n / self.size)
        return Point(
            n, expected(method_results.exact), expected(right), expected(method_results.proxy), right.mean(1), spent
        )

    def at_seconds(self, method_results: PromptResults, seconds: float) -> Point | None:
        """Best-of-n of as many n as so many seconds a prompt allow; None where that is more than there are."""
        return self._of_share(method_results, seconds / method_results.spent.seconds)

    def at_evaluations(self, method_results: PromptResults, evaluations: float) -> Point | None:
        """The same at equally many denoiser evaluations."""
        return self._of_share(method_results, evaluations / method_results.spent.evaluations)

    def _of_share(self, method_results: PromptResults, share: float) -> Point | None:
        """Of a share of all images, at least of one; None for more than all, up to rounding."""
        return self.best_of(method_results, min(max(self.size * share, 1.0), self.size)) if share <= 1 + 1e-9 else None


@dataclass(frozen=True, eq=False)
class NoiseSearch(SteeringMethod):
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

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> PromptResults:
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
        exact = torch.stack([exact_rewards(images, prompts) for images in best], 1)
        spent = Cost(out.cost.nfe, out.cost.decodes, seconds).times(1 / len(prompts))
        return PromptResults(torch.stack(proxies, 1), exact, spent)

    def points(self, method_results: PromptResults) -> list[Point]:
        """After each iteration; the pipeline's last image, which it makes once more, is not needed."""
        right, last = (method_results.exact == 1).double(), self.made(self.size) + 1

        def after(number: int) -> Point:
            made, best = self.made(number + 1), method_results.proxy[:, number]
            return Point(
                made,
                method_results.exact[:, number],
                right[:, number],
                best,
                None,
                method_results.spent.times(made / last),
            )

        return [after(number) for number in range(self.size)]


def exact_rewards(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The exact reward (P·M,) of images (P·M, 3, H, W), M of each prompt."""
    return SceneReward()(images, [prompt for prompt in prompts for _ in range(len(images) // len(prompts))])


logger = logging.getLogger(__name__)

IMAGES_PER_BATCH = 32  # images in one call, whatever K: seconds are then those of one and the same batch


@dataclass
class ResultCache:
    """Results in `folder`, of contenders steered by `reward`; `call` goes to every pipeline.

    On the CPU, where seconds of processor time tell what a method costs, whatever else the machine does.
    """

    folder: Path
    reward: str
    call: Mapping[str, Any]
    _pipes: dict[str, Any] = field(default_factory=dict)

    def run(self, contenders: Sequence[SteeringMethod], prompts: Sequence[str]) -> list[PromptResults]:
        """What each contender found; only what is not in the folder is computed.

        Raises InputError for results of other settings, or prompts, in the folder.
        """
        work = [(one, start, some) for one in contenders for start, some in _groups(one, prompts)]
        groups: dict[SteeringMethod, list[dict[str, Any]]] = {one: [] for one in contenders}
        with tqdm(total=sum(len(some) for _, _, some in work), unit="prompt", disable=None) as bar:
            for one, start, some in work:
                bar.set_description(f"{one.name}, {one.size}")
                groups[one].append(self._cached(one, start, some))
                bar.update(len(some))
        return [_merged(groups[one]) for one in contenders]

    def _cached(self, one: SteeringMethod, start: int, prompts: list[str]) -> dict[str, Any]:
        path = self.folder / one.key / f"{start:04d}.json"
        about = one.about() | {"reward": self.reward, "call": dict(self.call), "prompts": prompts}
        about = json.loads(json.dumps(about))  # as it comes back from the file
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept.get("about") != about:
                raise InputError(
                    f"{path} holds results of other settings or prompts; delete it, or choose another --out"
                )
            return kept
        method_results = one.run(self._pipe(one.model), self.reward, prompts, start, self.call)
        spent = method_results.spent.times(len(prompts))
        kept = {
            "about": about,
            "proxy": method_results.proxy.tolist(),
            "exact": method_results.exact.tolist(),
            "spent": {"evaluations": spent.evaluations, "decodes": spent.decodes, "seconds": spent.seconds},
        }
        write_text(path, json.dumps(kept) + "\n")
        logger.info("%s, prompts from %d on: %.1f s", one.key, start, spent.seconds)
        return kept

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            self._pipes[model] = load_pipeline(model, "cpu")
            self._pipes[model].set_progress_bar_config(disable=True)
        return self._pipes[model]


def _groups(one: SteeringMethod, prompts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Its prompts in groups that fill one call, each with the number of its first."""
    own, prompts_per_call = prompts[: one.prompts], max(1, IMAGES_PER_BATCH // one.images)
    return [(start, list(own[start : start + prompts_per_call])) for start in range(0, len(own), prompts_per_call)]


def _merged(groups: Sequence[Mapping[str, Any]]) -> PromptResults:
    count = sum(len(group["proxy"]) for group in groups)
    proxy, exact = (torch.tensor([row for group in groups for row in group[name]]) for name in ("proxy", "exact"))
    total = {name: sum(group["spent"][name] for group in groups) for name in groups[0]["spent"]}
    return PromptResults(proxy, exact, Cost(**total).times(1 / count))
