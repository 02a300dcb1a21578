"""Analyses beside the contender tables: over-optimisation of a proxy reward, optimised noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.plots import DPI, INK, MET, MISSED, save_figure, set_title, style_axes
from steer.apps.scenes.training import CALL, interval
from steer.apps.scenes.world import right
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.pipelines.reno import Backprop, ReNOPipeline
from steer.pipelines.selection import BestOfNPipeline
from steer.rewards.compose import mean, mean_minus_std, robust, worst
from steer.training.overoptimization import best_of_n_kl, expected_best

PROMPTS_PER_CALL = 8
LAM = 25.0  # of Feynman–Kac steering, chosen on scenes-tuning, never on the held-out prompts
Figures = dict[str, Any]


def quiet_pipeline(model: str) -> Any:
    """A pipeline without progress bars."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- unsteered images

PER_ROW = 12


def draw_unsteered(model: str, prompts: Sequence[str], path: Path) -> Figures:
    """Draw one image of each prompt in a frame, green where it is right and red where not; return their number."""
    pipe, images = quiet_pipeline(model), []
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        some, generator = list(prompts[start : start + PROMPTS_PER_CALL]), Generator().manual_seed(start)
        images.append(pipe(some, generator=generator, output_type="pt", **CALL).images)
    passed = right(torch.cat(images), prompts).bool().tolist()
    rows = -(-len(prompts) // PER_ROW)
    figure = Figure(figsize=(PER_ROW * 0.95, rows * 1.4), dpi=DPI, layout="constrained")
    for axes in figure.subplots(rows, PER_ROW, squeeze=False).flat[len(prompts) :]:
        axes.set_axis_off()
    for axes, prompt, image, ok in zip(figure.axes, prompts, torch.cat(images), passed, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("\n".join(wrap(prompt, 17)), size=6, color=INK)
        axes.spines[:].set(color=MET if ok else MISSED, lw=1.8)
    save_figure(figure, path)
    return {"model": model, "prompts": len(prompts), "right": sum(passed)}


# ---- optimised noise for the multi-step model


def reno_then_steering(
    turbo: str,
    base: str,
    reward: str,
    prompts: Sequence[str],
    size: int = 4,
    iterations: int = 25,
    call: Mapping[str, Any] = CALL,
) -> Figures:
    """Compare the multi-step model, plain and steered, from random and from optimised noise.

    [mean, low, high] over prompts of right images: of the best by `reward`, and of all; `gain` is optimised minus
    random.
    """
    first, many_steps = ReNOPipeline(quiet_pipeline(turbo), reward), quiet_pipeline(base)
    methods: list[tuple[str, Any, dict[str, Any]]] = [
        ("base", BestOfNPipeline(many_steps, reward), {}),
        ("fk", FKSteeringPipeline(many_steps, reward), {"lam": LAM}),
    ]
    correct: dict[str, list[Tensor]] = {}

    def run(name: str, method: Any, some: list[str], seed: int, **options: Any) -> Any:
        out = method(some, num_particles=size, output_type="pt", generator=Generator().manual_seed(seed), **options)
        rows = right(out.images, np.repeat(some, size).tolist()).view(-1, size)
        correct.setdefault(name, []).append(rows)
        return out

    for start in tqdm(range(0, len(prompts), PROMPTS_PER_CALL), desc="then", leave=False, disable=None):
        some = list(prompts[start : start + PROMPTS_PER_CALL])
        optimised = run("ReNO", first, some, start, iterations=iterations, gradient=Backprop(checkpointing=False))
        noises = {"random": {}, "optimised": {"latents": optimised.in_slot_order().start.noise}}
        for kind, noise in noises.items():
            for name, method, options in methods:
                run(f"{name}, {kind}", method, some, start, **noise, **options, **call)
    rows = {name: torch.cat(values) for name, values in correct.items()}
    gains = {name: rows[f"{name}, optimised"] - rows[f"{name}, random"] for name, _, _ in methods}
    return {"prompts": len(prompts), "iterations": iterations} | {
        kind: {name: {"best": interval(v[:, 0]), "all": interval(v.mean(1))} for name, v in table.items()}
        for kind, table in (("methods", rows), ("gain", gains))
    }


# ---- over-optimisation

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLOURS = ("#832db6", "#e76300", "#3f90da", "#ffa90e", "#a96b59", "#bd1f01", "#94a4a2")


def curves(report: Mapping[str, Any], ensemble: str) -> Figures:
    """Measure best-of-n by every proxy: its standardised score and the exact reward of its picks, with intervals.

    "one member" is the mean over the members of the picks of each alone.
    report    evaluation.json of docs/studies/overoptimisation.yaml: many images of each prompt, and their rewards
    ensemble  one of these rewards, learned, of several members; `scene` is the exact one, the others are proxies too
    """
    runs = report["contenders"][0]["runs"]
    rewards = {name: torch.tensor([run["rewards"][name] for run in runs]) for name in report["rewards"]}
    gold, components = rewards.pop("scene"), [run["components"][ensemble] for run in runs]
    members = torch.stack([torch.tensor([run[name] for run in components]) for name in components[0]])
    proxies = {
        "picked by the exact reward": [gold],
        "one member": [*members],
        f"mean of {len(members)}": [mean(members)],
        f"worst of {len(members)}": [worst(members)],
        f"robust of {len(members)}": [robust(members)],
        f"mean − std of {len(members)}": [mean_minus_std(members)],
        **{name: [scores] for name, scores in rewards.items() if name != ensemble},
    }

    def picked(some: Sequence[Tensor], values: Sequence[Tensor], n: int) -> Tensor:
        """Values (P,) of the picks of proxies of one kind, their mean."""
        return torch.stack([expected_best(p, v, n) for p, v in zip(some, values, strict=True)]).mean(0)

    def curve(some: Sequence[Tensor]) -> dict[str, list[list[float]]]:
        own = [(proxy - proxy.mean()) / proxy.std() for proxy in some]
        values = {"proxy": own, "gold": [gold] * len(own), "right": [(gold == 1).float()] * len(own)}
        return {kind: [interval(picked(some, value, n)) for n in SIZES] for kind, value in values.items()}

    def gold_of(name: str, n: int) -> Tensor:
        return picked(proxies[name], [gold] * len(proxies[name]), n)

    return {
        "prompts": len(gold),
        "images": gold.shape[1],
        "ensemble": ensemble,
        "n": list(SIZES),
        "kl": [round(best_of_n_kl(n), 3) for n in SIZES],
        "proxies": {name: curve(some) for name, some in proxies.items()},
        "against_one_member": {
            name: [interval(gold_of(name, n) - gold_of("one member", n)) for n in SIZES] for name in proxies
        },
        "members": _disagreement(members),
    }


def _disagreement(members: Tensor) -> dict[str, float]:
    """Measure the disagreement of members' scores (K, P, M) on prompts, and on the images of a prompt."""
    prompts = members.mean(2, keepdim=True)
    return {
        "std_of_prompt_means": round(prompts.std(0).mean().item(), 3),
        "std_within_prompts": round((members - prompts).std(0).mean().item(), 3),
    }


def draw_curves(figures: Figures, path: Path) -> None:
    """Draw each proxy's score of its picks on the left, their exact reward on the right."""
    figure = Figure(figsize=(10.5, 4.3), dpi=DPI, layout="constrained")
    oracle, *proxies = figures["proxies"]
    titles = {"proxy": "score by the proxy (its own standard deviations)", "gold": "exact reward"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, colour in zip(proxies, COLOURS, strict=True):
            means, low, high = zip(*figures["proxies"][name][kind], strict=True)
            axes.plot(figures["n"], means, color=colour, lw=1.7, marker="o", ms=3.5, label=name)
            axes.fill_between(figures["n"], low, high, color=colour, alpha=0.07, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(figures["n"], [str(n) for n in figures["n"]])
        axes.set_xlabel("n of best-of-n", color=INK)
        set_title(axes, title)
        style_axes(axes)
    best = [value for value, _, _ in figures["proxies"][oracle]["gold"]]
    figure.axes[1].plot(figures["n"], best, color=INK, lw=1.2, ls=":", label=oracle)
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)
