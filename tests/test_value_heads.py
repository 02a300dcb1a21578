"""Values with several heads: sums of rewards against closed forms, and the rewards that heads fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import GaussianPipeline
from safetensors.torch import load_file, save_file
from soft_rewards import Soft, seeded
from torch import Tensor

from steer import FKSteeringPipeline, InputError, combine, train_value
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.diffusion.value import LearnedValue, load_value
from steer.files import atomic_write_with_checksums
from steer.pipelines.training.value import ValueConfig
from steer.reward import Reward, with_timeout
from steer.rewards.compose import linear_terms, worst
from steer.rewards.parser import load_reward

STEPS = 6
CALL = {"num_inference_steps": STEPS, "eta": 0.3}
TOTAL = Soft(lambda images, prompts: images.sum((1, 2, 3)), "total")
FIRST = Soft(lambda images, prompts: images[:, 0, 0, 0], "first")
OTHER = Soft(lambda images, prompts: images[:, 1, 0, 0], "other")


def weighted(total: float, first: float) -> Reward:
    return combine({TOTAL: total, FIRST: first})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The value of two rewards of the chain."""
    out = tmp_path_factory.mktemp("value")
    config = ValueConfig(rollouts=1024, num_particles=128, updates=300, batch_size=64, width=8, learning_rate=5e-3)
    train_value(GaussianPipeline(), weighted(1.0, 0.5), ["", "a"], out, config, CALL)
    return out


# The terms of a reward


@pytest.mark.parametrize(
    ("reward", "terms"),
    [
        ("scene", {"scene": 1.0}),
        ("scene:2", {"scene": 2.0}),
        ("scene:2 + jpeg:-0.5", {"scene": 2.0, "jpeg": -0.5}),
        ("sum(scene:2 + jpeg):3 + ocr", {"scene": 6.0, "jpeg": 3.0, "ocr": 1.0}),
        ("sum(scene, jpeg):3 + ocr", {"scene": 3.0, "jpeg": 3.0, "ocr": 1.0}),
        ({"combine": "sum", "rewards": [{"reward": "scene", "weight": 2}, "jpeg"]}, {"scene": 2.0, "jpeg": 1.0}),
        ("min(scene, jpeg):2 + ocr", {"min(scene, jpeg)": 2.0, "ocr": 1.0}),
        *((text, {text: 1.0}) for text in ("mean(scene, jpeg)", "min(scene, jpeg)", "mean-std(scene, jpeg, lam=1)")),
        *((text, {text: 1.0}) for text in ("quantile(scene, jpeg, q=0.5)", "product(scene > 0.5, jpeg > 1)")),
        ("robust(scene, jpeg, gamma=0.6)", {"robust(scene, jpeg, gamma=0.6)": 1.0}),
        ("logsigmoid(scene, reference=0)", {"logsigmoid(scene, reference=0)": 1.0}),
    ],
    ids=str,
)
def test_only_sums_have_terms(reward: Any, terms: dict[str, float]) -> None:
    for one in (load_reward(reward), with_timeout(load_reward(reward), 60)):
        assert {term.name: term.weight for term in linear_terms(one)} == terms


def test_a_term_names_its_scores_among_the_components() -> None:
    reward = combine([combine({TOTAL: 2.0, FIRST: 1.0}), combine([OTHER, FIRST], aggregate=worst)])
    images = torch.rand(4, 3, 1, 1, generator=seeded())
    components = reward.components(images, [""] * 4)
    total = sum(term.weight * components[term.component] for term in linear_terms(reward))
    torch.testing.assert_close(total, reward(images, [""] * 4))


# Several heads


@pytest.mark.hard
@pytest.mark.few(1)
def test_every_head_is_the_closed_form_of_its_reward(folder: Path) -> None:
    """E[Σ x0 | x_t] and E[x0_1 | x_t] of a linear chain, and their weighted sum."""
    pipe = GaussianPipeline()
    loaded, visited = load_value(folder, pipe), {}
    assert isinstance(loaded, LearnedValue) and loaded.config["heads"] == ["total", "first"]
    values = [LearnedValue(loaded.net, loaded.config, weights) for weights in ([1.0, 0.0], [0.0, 1.0], [2.0, -3.0])]

    def record(step: SolverStep) -> None:
        visited[step.k] = (step.x.double(), [one(step, [""] * len(step.x)).double() for one in [*values, loaded]])

    with hook_steps(pipe, record) as view:
        view(batch_size=500, generator=seeded(9), **CALL)
    transitions = pipe.transitions(STEPS, 0.3)
    for step, (x, guesses) in visited.items():
        for gain, shift, _ in transitions[step:]:
            x = gain * x + shift
        total, first = x.sum((1, 2, 3)), x[:, 0, 0, 0]
        for guess, truth in zip(guesses, (total, first, 2 * total - 3 * first, total + 0.5 * first), strict=True):
            assert 1 - (guess - truth).square().sum() / (truth - truth.mean()).square().sum() > 0.97, step
    r2 = loaded.config["r2"]
    assert set(r2) == {"total", "first"} and all(len(numbers) == STEPS for numbers in r2.values())
    assert r2["total"][-1] > 0.97 and r2["first"][-1] > 0.97


def intermediate_rewards(folder: Any, reward: Reward) -> Tensor:
    """Values (steps, K) of one unsteered run."""
    out = FKSteeringPipeline(GaussianPipeline(), reward)(
        reward_prompt="", num_particles=4, lam=0.0, value=folder, generator=seeded(), output_type="pt", **CALL
    )
    assert out.cost.decodes == out.cost.reward_calls == 4
    return torch.cat([evaluation.rewards for evaluation in out.history])


def test_the_reward_at_use_weights_the_heads(folder: Path) -> None:
    total, first = (intermediate_rewards(folder, one) for one in (TOTAL, FIRST))
    assert (total - first).abs().max() > 0.1
    for a, b in ((1.0, 0.5), (2.0, -3.0), (0.0, 4.0)):
        torch.testing.assert_close(intermediate_rewards(folder, weighted(a, b)), a * total + b * first)
    trained = load_value(folder, GaussianPipeline())  # the value itself, as a function
    torch.testing.assert_close(intermediate_rewards(trained, weighted(2.0, 1.0)), 2 * total + first)
    nested = combine([weighted(1.0, 1.0), TOTAL])
    torch.testing.assert_close(intermediate_rewards(folder, nested), 2 * total + first)


@pytest.mark.parametrize(
    ("reward", "missing"),
    [
        (OTHER, "other"),
        (combine({TOTAL: 1.0, OTHER: 2.0}), "other"),
        (combine([TOTAL, FIRST], aggregate=worst), r"min\(total, first\)"),
        (lambda images, prompts: images.sum((1, 2, 3)), "<lambda>"),
        (combine({TOTAL: 1.0, (lambda images, prompts: images.sum((1, 2, 3))): 1.0}), "<lambda>"),
    ],
)
def test_a_reward_without_a_head_is_refused(folder: Path, reward: Any, missing: str) -> None:
    heads = "has heads for the rewards 'total', 'first'"
    with pytest.raises(InputError, match=rf"{heads}, got reward '{missing}': train one for it by `steer value train`"):
        intermediate_rewards(folder, reward)


SMALL = ValueConfig(rollouts=16, updates=3, batch_size=8, width=8)


def test_any_other_composition_is_one_head(tmp_path: Path) -> None:
    reward = combine([TOTAL, FIRST], aggregate=worst)
    value = train_value(GaussianPipeline(), reward, ["a"], tmp_path, SMALL, CALL)
    assert value.config["heads"] == ["min(total, first)"]
    intermediate_rewards(tmp_path, reward)
    with pytest.raises(InputError, match=r"trained for reward 'min\(total, first\)', got reward 'total'"):
        intermediate_rewards(tmp_path, TOTAL)


def test_a_reward_twice_in_a_sum_is_refused(tmp_path: Path) -> None:
    twice = combine([TOTAL, Soft(lambda images, prompts: images.mean((1, 2, 3)), "total")])
    with pytest.raises(
        InputError, match="reward 'total' is in the sum twice, but its value has one head: give it once"
    ):
        train_value(GaussianPipeline(), twice, ["a"], tmp_path, SMALL, CALL)


def test_one_head_is_no_value_of_a_weighted_reward_without_a_name(tmp_path: Path) -> None:
    """A lambda alone is logged, as it cannot be compared."""
    train_value(GaussianPipeline(), TOTAL, ["a"], tmp_path, SMALL, CALL)
    intermediate_rewards(tmp_path, Soft(TOTAL.function, "<lambda>"))
    with pytest.raises(InputError, match="trained for reward 'total', got reward '<lambda>'"):
        intermediate_rewards(tmp_path, combine({Soft(TOTAL.function, "<lambda>"): 2.0}))


# Folders of other versions


def rewrite(folder: Path, config: dict[str, Any]) -> None:
    state = load_file(folder / "value.safetensors")
    with atomic_write_with_checksums(folder, ("value.safetensors", "value.json")) as new:
        save_file(state, new["value.safetensors"])
        new["value.json"].write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "value.json has version 3, not 2: train it again"),
        ({"heads": ["total", "first"]}, "weights do not fit value.json"),
        ({"weights": ["a"]}, "weights do not fit value.json"),
        ({"weights": [1.0, 2.0]}, "weights do not fit value.json"),
    ],
    ids=str,
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    value = train_value(GaussianPipeline(), TOTAL, ["a"], tmp_path, SMALL, CALL)
    rewrite(tmp_path, dict(value.config) | change)
    with pytest.raises(InputError, match=message):
        intermediate_rewards(tmp_path, TOTAL)
