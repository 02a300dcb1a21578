"""Base, best-of-N and Feynman–Kac steering side by side, judged by the exact scene reward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.pipelines import BestOfNPipeline, FKSteeringPipeline, SteeringOutput
from steer.pipelines.held_out import interval as bootstrap
from steer.rewards.scene import SceneReward

TOGETHER = 8  # prompts in one call
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


class Judge:
    """Runs one method over all prompts: exact correctness of every image (P, K), best first, and the cost."""

    def __init__(self, pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> None:
        self.pipe, self.prompts, self.call = pipe, prompts, call

    def run(self, name: str, method: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        right, outputs = [], []
        for start in tqdm(range(0, len(self.prompts), TOGETHER), desc=name, leave=False, disable=None):
            prompts = list(self.prompts[start : start + TOGETHER])
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
    judge = Judge(pipe, prompts, call)
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
    watching = FKSteeringPipeline(pipe, reward)
    early, final, right = [], [], []
    for start in tqdm(range(0, len(prompts), TOGETHER), desc="foresight", leave=False, disable=None):
        some = list(prompts[start : start + TOGETHER])
        options = {"num_particles": size, "lam": 0.0, "resample_steps": steps, "output_type": "pt", **call}
        out = watching(some, generator=torch.Generator().manual_seed(start), **options).in_slot_order()
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
    apart = (truth[:, :, None] - truth[:, None]).sign()
    ranked = (guess[:, :, None] - guess[:, None]).sign()
    pairs = apart > 0
    return ((ranked[pairs] + 1) / 2).mean().item()
