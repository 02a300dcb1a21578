"""How cheap previews rank particles beside the full decoder, and what each decoder takes."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.preview_words import preview_named
from steer.apps.scenes.evaluate import STEERING, exactly_right, interval
from steer.linear_decoder import NormalEquations
from steer.pipelines import FKSteeringPipeline
from steer.pipelines.fk_run import DEFAULT_STEPS
from steer.previews import Previews, new_preview
from steer.reward import load_reward
from steer.seam import Event, steered

logger = logging.getLogger(__name__)

SIZE = 8  # particles of a prompt
DECODERS = ("full", "tiny", "linear")
REWARDS = ("scene-soft", "aesthetic:scenes", "preference:scenes")
DIGITS = 6  # of a reward: what is equal up to them is a tie
REPEATS = 20
REFITTED = (1, SIZE)  # particles decoded in full at every step, for a linear map that is fitted again each time


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
def guesses(pipe: Any, prompt: str, seed: int, call: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
    """x̂0 (K, …) of unsteered particles at each of the steps that are read, and their finished images (K, 3, H, W)."""
    steps, found = read_steps(call["num_inference_steps"]), []

    def watch(event: Event) -> None:
        if event.k in steps:
            found.append(event.x0())

    with steered(pipe, watch, rows=SIZE) as view:
        output = view(
            prompt, num_images_per_prompt=SIZE, generator=Generator().manual_seed(seed), output_type="pt", **call
        )
    return found, output.images


def refitted(vae: Any, x0s: Sequence[Tensor], particles: int) -> list[Tensor]:
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
    options = {name: preview_named(name, pipe) for name in DECODERS}
    return {
        "prompts": len(prompts),
        "settings": {"model": model, "particles": SIZE, "steps": read_steps(call["num_inference_steps"]), **call},
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
        x0s, finished = guesses(pipe, prompt, number, call)
        asked = {"prompt": prompt, "num_images_per_prompt": SIZE, **call}
        previews = {name: new_preview(option, pipe, asked, SIZE) for name, option in options.items()}
        shown = {name: [preview(x0) for x0 in x0s] for name, preview in previews.items()}
        shown |= {f"linear, refitted by {some}": refitted(pipe.vae, x0s, some) for some in REFITTED}
        for reward, judge in judges.items():
            scores = {name: [judge(images, [prompt] * SIZE) for images in some] for name, some in shown.items()}
            end = judge(finished, [prompt] * SIZE)
            for name, found in scores.items():
                pairs = {"full": scores["full"], "finished": [end] * len(x0s)}
                for what, truth in pairs.items():
                    line = [rank_correlation(*pair) for pair in zip(truth, found, strict=True)]
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
    """Processor seconds of SIZE previews: of all that a preview takes, the linear map's first one apart; the median."""
    x0, _ = guesses(pipe, prompt, 0, call)
    asked = {"prompt": prompt, "num_images_per_prompt": SIZE, **call}
    previews = {name: new_preview(option, pipe, asked, SIZE) for name, option in options.items()}
    first = {f"{name}, first": _taken(preview, x0[0]) for name, preview in previews.items()}
    taken: dict[str, list[float]] = {name: [] for name in previews}
    for _ in range(REPEATS):  # in turns, so that what else the machine does meets all of them
        for name, preview in previews.items():
            taken[name].append(_taken(preview, x0[-1]))
    median = {name: float(np.median(some)) for name, some in taken.items()}
    return {name: round(seconds, 4) for name, seconds in (median | first).items()}


@torch.no_grad()
def _taken(preview: Previews, x0: Tensor) -> float:
    started = time.process_time()
    preview(x0)
    return time.process_time() - started


def _steering(
    pipe: Any, options: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """FK by scene-soft with each decoder: whether the best image is right, its reward, both less those of the first
    decoder on the same prompts and seeds, and the cost of a prompt."""
    method, found = FKSteeringPipeline(pipe, REWARDS[0]), {}
    first: tuple[Tensor, Tensor] | None = None
    for name, option in options.items():
        right, rewards, decodes, started = [], [], 0, time.process_time()
        for number, prompt in enumerate(tqdm(prompts, desc=f"fk, {name}", leave=False, disable=None)):
            rng = Generator().manual_seed(number)
            own = {"num_particles": SIZE, "generator": rng, "output_type": "pt", **STEERING, **call}
            out = method(prompt, preview=option, **own)
            right.append(exactly_right(out, [prompt])[0, 0])
            rewards.append(out.rewards[0, 0])
            decodes += out.cost.decodes
            logger.info("fk, %s: %d of %d prompts", name, number + 1, len(prompts))
        seconds = time.process_time() - started
        picked = torch.stack(right), torch.stack(rewards)
        first = first or picked
        found[name] = {
            "right": interval(picked[0]),
            "reward": interval(picked[1]),
            "right_minus_full": interval(picked[0] - first[0]),
            "reward_minus_full": interval(picked[1] - first[1]),
            "decodes": round(decodes / len(prompts), 1),
            "seconds": round(seconds / len(prompts), 3),
        }
    return found
