"""Foresight: how well intermediate rewards predict the final ranking of a prompt's images, by solver step."""

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.plots import COLORMAP, DPI, INK, save_figure, set_title, style_axes
from steer.apps.scoring import score_in_batches
from steer.errors import InputError
from steer.files import write_text
from steer.pipelines.fk_steering import FKSteeringPipeline
from steer.reward import Reward
from steer.training.overoptimization import interval

PROMPTS_PER_CALL = 8
CHANCE = 0.5  # of a pair's ranking without information
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # default steps, as shares of the run
Foresight = dict[str, Any]


def foresight(
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    lookaheads: Sequence[int | str] = (1, 2, 3),
    steps: Sequence[int] | None = None,
    size: int = 4,
    judge: Reward | None = None,
    call: Mapping[str, Any] | None = None,
    values: Sequence[str] = (),
) -> Foresight:
    """Measure how well intermediate rewards at some solver steps predict the rewards of finished images.

    Among `size` unsteered images of one prompt: the share of pairs in the same order by the reward at a step and by the
    finished images' rewards; 0.5 is chance. All look-aheads see the same runs.

    lookaheads  as `lookahead` of FKSteeringPipeline: 1 is x̂0
    steps       solver steps, from 0; None: at 10, 25, 40, 55, 70 and 85 % of the run
    judge       a reward of the finished images in place of `reward`, as the target of the prediction
    call        arguments of the pipeline's call
    values      folders of learned values, beside the look-aheads

    Returns "agreement", by look-ahead a [mean, low, high] over prompts for each step; "final", the agreement of the
    finished rewards themselves with the judge; "nfe", evaluations per image. Raises InputError if no prompt has two
    images of different reward.
    """
    call = dict(call or {})
    steps = _default_steps(pipe, call) if steps is None else sorted(set(steps))
    early: dict[str, Tensor] = {}
    nfe: dict[str, float] = {}
    final = truth = torch.empty(0)
    guesses: dict[str, dict[str, Any]] = {str(one): {"lookahead": one} for one in lookaheads}
    guesses |= {f"value {one}": {"value": one} for one in values}
    for name, guess in guesses.items():
        options = {"num_particles": size, "lam": 0.0, "resample_steps": steps, "output_type": "pt", **call}
        early[name], final, truth, nfe[name] = _rewards(pipe, reward, prompts, judge, options | guess, name)
    separable = torch.tensor([len(one.unique()) > 1 for one in truth])
    if not separable.any():
        raise InputError("all images of each prompt have the same reward: take more prompts, or --particles")

    def over_prompts(rewards: Tensor) -> list[float]:
        pairs = zip(rewards[separable], truth[separable], strict=True)
        return interval(torch.tensor([agreement(one[None], other[None]) for one, other in pairs]))

    return {
        "prompts": int(separable.sum()),
        "particles": size,
        "steps": list(steps),
        "agreement": {name: [over_prompts(one) for one in rewards] for name, rewards in early.items()},
        "final": over_prompts(final),
        "nfe": nfe,
    }


def _rewards(
    pipe: Any, reward: Reward, prompts: Sequence[str], judge: Reward | None, options: Mapping[str, Any], name: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return rewards (steps, P, K) at the steps, (P, K) of the finished images, (P, K) by the judge; nfe per image."""
    method, nfe = FKSteeringPipeline(pipe, reward), 0
    early, final, truth = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in tqdm(range(0, len(prompts), PROMPTS_PER_CALL), label_of(name), leave=False, disable=None):
        some = list(prompts[start : start + PROMPTS_PER_CALL])
        out = method(some, generator=Generator().manual_seed(start), **options).in_slot_order()
        early.append(torch.stack([evaluation.rewards for evaluation in out.history]))
        final.append(out.rewards)
        texts = np.repeat(some, out.rewards.shape[1]).tolist()
        judged = out.rewards if judge is None else score_in_batches(judge, out.images, texts)[0].view_as(out.rewards)
        truth.append(judged)
        nfe += out.cost.nfe
    rewards = torch.cat(final)
    return torch.cat(early, 1), rewards, torch.cat(truth), nfe / rewards.numel()


def _default_steps(pipe: Any, call: Mapping[str, Any]) -> list[int]:
    total = call.get("num_inference_steps") or signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return sorted({min(round(share * total), total - 3) for share in SHARES if total >= 3})


def agreement(guess: Tensor, truth: Tensor) -> float:
    """Return the share of pairs in rows of (P, K) with different `truth` that `guess` orders alike; ties count half."""
    separable = (truth[:, :, None] - truth[:, None]).sign()
    ranked = (guess[:, :, None] - guess[:, None]).sign()
    return ((ranked[separable > 0] + 1) / 2).mean().item()


def label_of(lookahead: str) -> str:
    """Name a look-ahead in tables and figures."""
    if lookahead == "1":
        return "x̂0"
    return f"m = {lookahead}" if lookahead.isdigit() else lookahead


def table(figures: Foresight) -> str:
    """Format the agreement by step as a Markdown table."""
    head = "| solver step, from 0 | " + " | ".join(map(str, figures["steps"])) + " | evaluations per image |"
    rows = [head, "|" + "---|" * (len(figures["steps"]) + 2)]
    for name, values in figures["agreement"].items():
        cells = " | ".join(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in values)
        rows.append(f"| {label_of(name)} | {cells} | {figures['nfe'][name]:g} |")
    return "\n".join(rows)


def draw(figures: Foresight, path: Path) -> None:
    """Draw the agreement by step, one line for each look-ahead."""
    figure = Figure(figsize=(7.2, 4), dpi=DPI, layout="constrained")
    axes, count, steps = figure.subplots(), len(figures["agreement"]), np.array(figures["steps"])
    for place, (name, values) in enumerate(figures["agreement"].items()):
        means, low, high = np.array(values).T
        at = steps + 0.01 * np.ptp(steps) * (place - (count - 1) / 2)  # side by side, so that intervals can be read
        color = colormaps[COLORMAP](0.1 + 0.7 * place / max(count - 1, 1))
        bars = np.maximum([means - low, high - means], 0)
        axes.errorbar(at, means, bars, color=color, lw=1.5, elinewidth=0.9, marker="o", ms=3.5, label=label_of(name))
    axes.axhline(CHANCE, color=INK, lw=0.8, ls=":", label="chance")
    axes.set_xticks(steps)
    axes.set_xlabel("solver step, from 0", color=INK, size=8)
    set_title(axes, f"pairs of images ranked as at the end, {figures['prompts']} prompts")
    style_axes(axes)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save_figure(figure, path)


def write(figures: Foresight, out: Path) -> None:
    """Write foresight.json, foresight.md and foresight.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "foresight.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "foresight.md", table(figures) + "\n")
    draw(figures, out / "foresight.png")
