"""Does noise that was optimised for the one-step model serve the multi-step one? A second stage, measured."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.scenes.evaluate import CALL, STEERING, TOGETHER, exactly_right, interval
from steer.apps.scenes.noise_study import KEPT, RENO
from steer.pipelines import BestOfNPipeline, FKSteeringPipeline, ReNOPipeline

SIZE = 4  # images of each prompt
ITERATIONS = 25


def second_stage(turbo: str, base: str, reward: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Accuracy of base and steered images from random and from optimised noise, beside that of the noise's own images.

    [mean, low, high] over prompts: of the best image by `reward`, and of all; `gain` is optimised minus random.
    """
    one_step, many_steps = load_pipeline(turbo), load_pipeline(base)
    for pipe in (one_step, many_steps):
        pipe.set_progress_bar_config(disable=True)
    first, plain = ReNOPipeline(one_step, reward), BestOfNPipeline(many_steps, reward)
    steered = FKSteeringPipeline(many_steps, reward)
    right: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(prompts), TOGETHER), desc="then", leave=False, disable=None):
        some = list(prompts[start : start + TOGETHER])
        climb = {"iterations": ITERATIONS, "gradient": KEPT, **RENO}
        noise = {"latents": _judged(right, "ReNO", first, some, start, climb).in_slot_order().start.noise}
        for kind, given in (("random", {}), ("optimised", noise)):
            _judged(right, f"base, {kind}", plain, some, start, given | CALL)
            _judged(right, f"fk, {kind}", steered, some, start, given | STEERING | CALL)
    found = {name: torch.cat(rows) for name, rows in right.items()}
    return {
        "prompts": len(prompts),
        "iterations": ITERATIONS,
        "methods": {name: {"best": interval(v[:, 0]), "all": interval(v.mean(1))} for name, v in found.items()},
        "gain": {
            name: {"best": interval((new - old)[:, 0]), "all": interval((new - old).mean(1))}
            for name in ("base", "fk")
            for new, old in [(found[f"{name}, optimised"], found[f"{name}, random"])]
        },
    }


def _judged(
    right: dict[str, list[Tensor]], name: str, method: Any, prompts: list[str], seed: int, call: dict[str, Any]
) -> Any:
    """What a method makes of some prompts; which images are right goes to `right[name]`."""
    out = method(prompts, num_particles=SIZE, output_type="pt", generator=Generator().manual_seed(seed), **call)
    right.setdefault(name, []).append(exactly_right(out, prompts))
    return out
