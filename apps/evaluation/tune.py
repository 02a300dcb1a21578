"""Tuning: choose options of steering on prompts, at an equal number of evaluations, and keep them as a preset."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.methods import METHODS
from steer.apps.prompts import SETTINGS
from steer.apps.settings import SamplingConfig
from steer.arguments import plain_value
from steer.errors import InputError
from steer.files import dumps_with_checksum, read_json, write_text
from steer.pipelines.base import SteeringOutput
from steer.pipelines.racing import first_solver_step, plan_race, race_cost
from steer.reward import Reward
from steer.smc.particles import FeynmanKac, Particles
from steer.training.overoptimization import interval

RESULTS, TABLE, PRESET = "tune.json", "tune.md", "preset.yaml"
SEARCH_STEPS = ((0.25, 0.4, 0.6), (0.1, 0.25, 0.4), (0.25, 0.5))  # shares of the run
SAMPLING_STEPS = ((0.4, 0.55, 0.7, 0.85), (0.25, 0.4, 0.6), (0.4, 0.6))
LOOKAHEADS = (1, 2, 3)
RACE_LOOKAHEADS = (1, 3, 4, 6)
DRAFT_STEPS = 5
CONTROL = "best-of-n"


@dataclass(frozen=True)
class Candidate:
    """A method with K particles and options: within the budget, by the documented cost of the method."""

    name: str
    method: str
    particles: int
    options: Mapping[str, Any] = field(default_factory=dict)


def picture_candidates(budget: int, steps: int) -> Iterator[Candidate]:
    """Yield searches for one picture within a budget of evaluations: best-of-N, drafts, races and beam searches."""
    count = budget // steps
    yield Candidate(CONTROL, CONTROL, count)
    if steps > DRAFT_STEPS and (drafts := (budget - steps) // DRAFT_STEPS) > 1:
        yield Candidate(f"drafts {drafts}", "drafts", 1, {"drafts": drafts, "draft_steps": DRAFT_STEPS})
    for m in RACE_LOOKAHEADS:
        try:
            race = plan_race(budget, steps, lookahead=m)
        except InputError:  # the budget is too small for a race of two
            continue
        shown = plain_value(race.rungs)
        yield Candidate(f"race {race.starts} {shown} m={m}", "race", race.starts, {"rungs": race.rungs, "lookahead": m})
    for shares in SEARCH_STEPS:
        places = sorted({round(share * steps) for share in shares if round(share * steps) <= steps - 2})
        for m in LOOKAHEADS:
            for parents in (1, 2, 4):
                size = next(
                    (n for n in range(count, parents, -1) if _keeps(n, parents, places, steps, m, budget)), None
                )
                if size is not None and places:
                    own = {"rungs": dict.fromkeys(places, size), "branches": size // parents, "lookahead": m}
                    name = f"beam {parents} × {size // parents} at {plain_value(places)} m={m}"
                    yield Candidate(name, "race", size, own)


def _keeps(size: int, parents: int, places: Sequence[int], steps: int, m: int, budget: int) -> bool:
    """Return whether a beam search with `size` slots is possible and within the budget."""
    return size % parents == 0 and race_cost(size, dict.fromkeys(places, size), steps, m) <= budget


def sample_candidates(budget: int, steps: int) -> Iterator[Candidate]:
    """Yield Feynman–Kac steering within a budget of evaluations: resampling steps, look-ahead and K."""
    yield Candidate(CONTROL, CONTROL, budget // steps)
    for shares in SAMPLING_STEPS:
        places = sorted({round(share * steps) for share in shares if round(share * steps) <= steps - 3})
        for m in LOOKAHEADS:
            further = sum(min(m, steps - place) - 1 for place in places)
            size = budget // (steps + further)
            if places and size > 1:
                own = {"resample_steps": places, "lookahead": m}
                yield Candidate(f"fk {size} at {plain_value(places)} m={m}", "fk", size, own)


CANDIDATES = {"picture": picture_candidates, "samples": sample_candidates}


def tune(
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    budget: int,
    out: Path,
    purpose: str = "picture",
    lam: float | str | None = None,
    call: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run all candidates within `budget` evaluations for each prompt, and write the best as a preset.

    purpose  picture: the score of a prompt is its best reward; samples: the mean reward under the weights at strength
             `lam`, which is too low with few particles or bad steps. lam="auto": the λ at which the images of
             best-of-N have an ESS of half of them, the same for all candidates, which the preset contains
    call     arguments of the pipeline's call
    shared   further settings for the preset, such as the model

    Each finished candidate is kept in tune.json, and the same call resumes. Raises InputError for a budget of less
    than two images, and for a folder of another tuning.
    """
    call = dict(call or {})
    first, _ = first_solver_step(pipe, reward, prompts[0], call, None)
    steps = first.total
    if budget < 2 * steps:
        raise InputError(f"budget: {budget} evaluations are fewer than two images of {steps} steps: give more")
    header = {"prompts": list(prompts), "budget": budget, "purpose": purpose, "lam": lam, "call": call, "seed": seed}
    header |= {"reward": reward.name, **(shared or {})}
    results = _open_results(out, header)
    candidates = list(CANDIDATES[purpose](budget, steps))
    if lam == "auto" and "lam" not in results:
        results["lam"] = _strength(candidates[0], pipe, reward, prompts, call, seed)
    strength = None if lam is None else float(results["lam"] if lam == "auto" else lam)
    for candidate in tqdm(candidates, "candidates", disable=None):
        if candidate.name not in results["scores"]:
            scores, nfe = _scores(candidate, pipe, reward, prompts, call, strength, seed)
            results["scores"][candidate.name], results["nfe"][candidate.name] = scores, nfe
            write_text(out / RESULTS, dumps_with_checksum(results))
    best = max(candidates, key=lambda one: sum(results["scores"][one.name]))
    write_text(out / TABLE, table(results) + "\n")
    preset = _preset(best, strength, call, reward, shared or {})
    write_text(out / PRESET, yaml.safe_dump(preset, sort_keys=False, allow_unicode=True))
    return results | {"best": best.name, "preset": preset}


def _open_results(out: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Read the results so far, or start new ones. Raises InputError for results of another tuning."""
    path, header = out / RESULTS, json.loads(json.dumps(header))
    if not path.exists():
        return {"header": header, "scores": {}, "nfe": {}}
    stored = read_json(path, "a tuning of steer", "; choose another --out")
    if stored.get("header") != header:
        raise InputError(f"--out {out} holds a tuning of other prompts or settings; choose another --out")
    return stored


def _outputs(
    candidate: Candidate,
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    seed: int,
    options: Mapping[str, Any],
) -> Iterator[SteeringOutput]:
    """Run a candidate on every prompt, with the same seeds for all."""
    pipeline = METHODS[candidate.method].pipeline(pipe, reward)
    own = {"num_particles": candidate.particles, "output_type": "latent", **candidate.options, **call, **options}
    for number, prompt in enumerate(prompts):
        yield pipeline(prompt, generator=Generator().manual_seed(seed + number), **own)


def _strength(
    control: Candidate, pipe: Any, reward: Reward, prompts: Sequence[str], call: Mapping[str, Any], seed: int
) -> float:
    """Return the λ with an ESS of half of the images of best-of-N, on average over prompts.

    Raises InputError if no prompt has two images of different reward.
    """
    rewards = torch.cat([out.rewards for out in _outputs(control, pipe, reward, prompts, call, seed, {})])
    lam = FeynmanKac().at_half_ess(Particles.start(*rewards.shape), rewards, 1.0).lam
    if lam == 0:
        raise InputError("lam: all images of each prompt have the same reward, which chooses none: give a number")
    return lam


def _scores(
    candidate: Candidate,
    pipe: Any,
    reward: Reward,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    lam: float | None,
    seed: int,
) -> tuple[list[float], float]:
    """Run a candidate on every prompt, with the same seeds for all; return scores, and evaluations per prompt."""
    scores, nfe = list[float](), 0
    for out in _outputs(candidate, pipe, reward, prompts, call, seed, {"lam": lam} if candidate.method == "fk" else {}):
        weights = out.log_weights if candidate.method == "fk" or lam is None else lam * out.rewards
        picked = out.rewards.max() if lam is None else (weights.softmax(1) * out.rewards).sum()
        scores.append(float(picked))
        nfe += out.cost.nfe
    return scores, nfe / len(prompts)


def table(results: Mapping[str, Any]) -> str:
    """Format the candidates as a Markdown table, best first, with differences from best-of-N on the same prompts."""
    control = torch.tensor(results["scores"][CONTROL])
    rows = ["| candidate | evaluations | score | against best-of-N |", "|---|---|---|---|"]
    for name, scores in sorted(results["scores"].items(), key=lambda one: -sum(one[1])):
        values = torch.tensor(scores)
        rows.append(f"| {name} | {results['nfe'][name]:g} | {_shown(values)} | {_shown(values - control)} |")
    return "\n".join(rows)


def _shown(values: Tensor) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _preset(
    best: Candidate, lam: float | None, call: Mapping[str, Any], reward: Reward, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of the best candidate, in the form of `steer sample --preset`."""
    values = {**shared, "method": best.method, "particles": best.particles}
    values |= {SETTINGS[name]: value for name, value in call.items() if name in SETTINGS}
    values |= {name: plain_value(value) for name, value in best.options.items()}
    values |= {"lam": lam} if best.method == "fk" else {}
    SamplingConfig.of(**values)  # raises if a value is invalid
    return values
