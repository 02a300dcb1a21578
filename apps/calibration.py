"""Measurements of rewards on the images of a folder: the jobs of `steer rewards calibrate`, `herding`, `benchmark`."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.apps.reward_specs import resolve_reward
from steer.apps.scoring import images_with_prompts, score_all, score_contrasts, score_each
from steer.errors import InputError
from steer.files import write_text
from steer.rewards.analysis import contrast_pairs, spearman
from steer.rewards.benchmark import WRONG_IMAGES, OneToMany, best_of_n_gain, image_questions, one_to_many
from steer.rewards.compose import Calibration, read_calibration, reward_statistics
from steer.rewards.conformal import describe, fit_lower_bound
from steer.rewards.herding import herding, overrated, render_herding


def calibrate_rewards(
    rewards: Sequence[str], images: Path, prompt: str | None, out: Path, device: str
) -> Iterator[str]:
    """Measure the statistics of each reward, add them to the calibration `out`, and yield a line about each.

    Raises RewardError for a reward that gives every image the same score.
    """
    paths, prompts = images_with_prompts(images, prompt)
    scales = dict(read_calibration(out).scales) if out.exists() else {}
    for reward in map(resolve_reward, rewards):
        scale = reward_statistics(score_all(reward, paths, prompts, device=device), prompts)
        scales[reward.name] = scale
        Calibration(scales, {"images": os.path.relpath(images, out.parent), "count": len(paths)}).save(out)
        yield f"{reward.name}: mean {scale.mean:.4g}, std {scale.std:.4g} over {scale.count} images"


def calibrate_bound(
    rewards: Sequence[str],
    truth: str,
    level: float,
    optimised: Path | None,
    images: Path,
    prompt: str | None,
    out: Path,
    device: str,
) -> Iterator[str]:
    """Fit and save a lower bound of the reward `truth` by others, and yield a line about it.

    optimised  images optimised by these rewards: a second line has the share of them for which the bound holds
    Raises InputError, see `fit_lower_bound`.
    """
    members = [resolve_reward(one) for one in (*rewards, truth)]
    paths, prompts = images_with_prompts(images, prompt)
    (*names, name), scores = [one.name for one in members], score_each(members, paths, prompts, device)
    bound = fit_lower_bound(names, scores[:-1], scores[-1], prompts, name, level)
    bound.save(out)
    yield f"{describe(bound)} → {out}"
    if optimised is not None:
        scores = score_each(members, *images_with_prompts(optimised, prompt), device)
        holds = (scores[-1] >= bound.of(scores[:-1].double())).double().mean().item()
        yield f"it holds on {holds:.0%} of {scores.shape[1]} optimised images: optimisation voids the level"


SHOWN = 5  # overrated images of a folder that the text lists; the file has all


def measure_herding(
    rewards: Sequence[str], gold: str | None, folders: Sequence[Path], prompt: str | None, out: Path | None, device: str
) -> Iterator[str]:
    """Measure common errors of rewards on the images of each folder, yield a text about it, and write all to `out`.

    gold  a reward that is the truth: list the images that all members overrate compared with it
    """
    members, figures = [resolve_reward(one) for one in (*rewards, *([gold] if gold else []))], list[dict[str, Any]]()
    for folder in folders:
        paths, prompts = images_with_prompts(folder, prompt)
        scores = score_each(members, paths, prompts, device)
        result = herding(rewards, scores[: len(rewards)], prompts)
        wrong = overrated(scores[:-1], scores[-1], prompts) if gold else []
        listed = [{"image": str(paths[k]), "prompt": prompts[k], "scores": scores[:, k].tolist()} for k in wrong]
        figures.append({"images": str(folder), "count": len(paths), **result.figures(), "overrated": listed})
        yield f"{folder}: {len(prompts)} images\n{render_herding(result)}"
        if gold:
            names = ", ".join(paths[k].name for k in wrong[:SHOWN])
            yield f"overrated by all, by {gold}: {len(wrong)}" + (f", the worst {names}" if wrong else "")
    if out is not None:
        write_text(out, json.dumps({"rewards": rewards, "gold": gold, "folders": figures}, indent=1) + "\n")


def benchmark_rewards(
    rewards: Sequence[str], gold: str | None, paths: Sequence[Path], prompts: Sequence[str], device: str
) -> Iterator[str]:
    """Yield a table of the one-to-many accuracy of rewards, over changed prompts and over wrong images of a prompt.

    gold  a reward that is the truth: its best images of each prompt are right. Without it all images are right, only
          prompts are changed, and there is no gain of best-of-n.
    Raises InputError if there are no wrong candidates of either kind.
    """
    truth = None if gold is None else score_all(resolve_reward(gold), paths, prompts, device=device)
    changed, questions = contrast_pairs(prompts), list[tuple[int, list[int]]]()
    if truth is not None:
        questions, right = image_questions(truth, prompts), dict(image_questions(truth, prompts, least=0))
        changed = [(row, contrast) for row, contrast in changed if row in right]
    if not changed and not questions:
        raise InputError(
            f"--images: no right image has a prompt with a colour, a count or a relation to change, and no prompt has "
            f"{WRONG_IMAGES} wrong images by --gold"
        )
    yield HEAD + ("  best-of-n" if gold else "")
    columns, gains = dict[str, list[float]](), list[float]()
    for spec in rewards:
        scores, wrong = score_contrasts(resolve_reward(spec), paths, prompts, changed, device=device)
        gains += [] if truth is None else [best_of_n_gain(scores, truth, prompts)]
        for kind, one in _answers(scores, wrong, [row for row, _ in changed], questions).items():
            numbers = f"{one.one_to_one:4.0%}  {one.one_to_many:4.0%}  {one.reciprocal_rank:4.2f}"
            gain = f"  {gains[-1]:+9.3f}" if gains else ""
            yield f"{spec:32}  {kind:20} {one.questions:9}  {one.candidates:5.1f}  {numbers}{gain}"
            columns.setdefault(f"1:1 against {kind}", []).append(one.one_to_one)
            columns.setdefault(f"1:n against {kind}", []).append(one.one_to_many)
    if len(gains) > 2:
        for name, values in columns.items():
            yield f"Spearman with the gain of best-of-n: {spearman(values, gains):5.2f}  {name}"


HEAD = f"{'reward':32}  right against        questions   each   1:1   1:n   MRR"


def _answers(
    scores: Tensor, wrong: Tensor, rows: Sequence[int], questions: Sequence[tuple[int, Sequence[int]]]
) -> dict[str, OneToMany]:
    """Return the metrics of a reward for each kind of questions that occurs."""
    results = {"changed prompts": one_to_many(scores, wrong, rows)} if rows else {}
    if questions:
        right, others = [row for row, _ in questions], [row for _, some in questions for row in some]
        owner = [k for k, (_, some) in enumerate(questions) for _ in some]
        results["images of its prompt"] = one_to_many(scores[right], scores[others], owner)
    return results
