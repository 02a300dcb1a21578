"""Asking about a resampling of Feynman–Kac steering: gains by hand, the same distribution for all answers."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from gaussian import GaussianPipeline, check_tilted, steered_gaussians
from soft_rewards import Soft, redness, seeded
from torch import Tensor

from steer import MODELS, FKSteeringPipeline
from steer.errors import InputError
from steer.pipelines.disagreement import Disagreement, disagreements, term_signs, value_of_asking
from steer.rewards.compose import CombinedReward, WeightedReward

FIRST = Soft(lambda images, prompts: images[:, 0].sum((1, 2)), "first")
OTHERS = Soft(lambda images, prompts: images[:, 1:].sum((1, 2, 3)), "others")
HALVES = CombinedReward([WeightedReward(FIRST, 1.0), WeightedReward(OTHERS, 1.0)])  # as TOTAL


def test_a_gain_is_that_of_the_ancestors_in_standard_deviations() -> None:
    components = {"a": torch.tensor([[0.0, 2.0], [1.0, 1.0]]), "b": torch.tensor([[3.0, 1.0], [0.0, 4.0]])}
    ancestors, previews = torch.tensor([[1, 1], [0, 1]]), torch.arange(4.0).view(4, 1, 1, 1)
    first, second = disagreements(7, components, lambda name: -1.0 if name == "b" else 1.0, ancestors, previews)
    assert first.gains == {"a": 1.0, "b": 1.0}  # a: (2 − 1) / 1; b counts the other way: −(1 − 2) / 1
    assert (first.step, first.prompt, first.deviation, first.value) == (7, 0, 0.0, 0.0)
    assert second.gains == {"a": 0.0, "b": 0.0} and second.previews.flatten().tolist() == [2.0, 3.0]
    (third,) = disagreements(
        7, {name: one[:1] for name, one in components.items()}, lambda name: 1.0, ancestors[:1], previews
    )
    assert third.gains == {"a": 1.0, "b": -1.0} and third.value == value_of_asking(0.0, 1.0)


def test_whatever_the_answers_are_the_gaussian_is_the_tilted_gaussian() -> None:
    answers: list[bool] = []

    def answer(question: Disagreement) -> bool:
        answers.append(len(answers) % 3 > 0)
        return answers[-1]

    pipe, steps = GaussianPipeline(mean=0.5, std=0.25), 8
    asked: dict[str, Any] = {"on_disagreement": answer, "ask_cost": 0.0}
    options = {"resample_steps": [4, 6], "resampler": "multinomial", "ess_threshold": 1.0, **asked}
    outs = list(steered_gaussians(pipe, 4, HALVES, num_inference_steps=steps, **options))
    check_tilted(outs, *pipe.distribution(steps, eta=1.0))
    assert sum(answers) > 100 and answers.count(False) > 100


def steered(reward: Any = HALVES, **options: Any) -> Any:
    call: dict[str, Any] = {"num_particles": 4, "lam": 30.0, "resample_steps": [4, 6], "num_inference_steps": 8}
    call |= {"ess_threshold": 1.0, "resampler": "multinomial"}
    steer = FKSteeringPipeline(GaussianPipeline(), reward)
    return steer(reward_prompt=["", ""], generator=seeded(), output_type="pt", **call | options)


def test_a_no_leaves_one_prompts_particles_where_they_are() -> None:
    questions: list[Disagreement] = []

    def only_the_second(question: Disagreement) -> bool:
        questions.append(question)
        return question.prompt == 1

    out = steered(on_disagreement=only_the_second, ask_cost=0.0)
    stay, moved = torch.arange(4).tolist(), [one.ancestors for one in out.history]
    assert all(ancestors[0].tolist() == stay for ancestors in moved) and any(a[1].tolist() != stay for a in moved)
    assert {one.step for one in questions} == {4, 6} and all(one.previews.shape == (4, 3, 1, 1) for one in questions)


def test_the_members_of_a_learned_ensemble_are_asked_about() -> None:
    asked: list[Disagreement] = []
    options = {"lam": 50.0, "ess_threshold": 1.0, "resampler": "multinomial", "resample_steps": [4, 6], "ask_cost": 0.0}
    pipe = FKSteeringPipeline(StableDiffusionPipeline.from_pretrained(MODELS["scenes"]), "preference:scenes")
    call = {"num_inference_steps": 8, "generator": seeded(), "output_type": "pt"}
    pipe("a red star", num_particles=4, on_disagreement=lambda one: bool(asked.append(one)), **options, **call)
    assert asked and all(len(one.gains) > 1 and one.value > 0 for one in asked)


def test_asking_is_silent_below_its_cost_and_where_members_agree() -> None:
    def never(question: Disagreement) -> bool:
        raise AssertionError(question)

    plain = steered()
    assert torch.equal(steered(on_disagreement=never, ask_cost=10.0).images, plain.images)
    same = CombinedReward([WeightedReward(Soft(FIRST.function, name), 0.5) for name in ("a", "b")])
    assert len(steered(same, on_disagreement=never, ask_cost=0.0).history) == 2


def test_a_weight_says_which_way_a_term_counts() -> None:
    sign = term_signs(CombinedReward([WeightedReward(FIRST, 2.0), WeightedReward(OTHERS, -0.5)]))
    assert (sign("first"), sign("others")) == (1.0, -1.0)


@pytest.mark.parametrize(
    ("reward", "options", "named"),
    [
        (redness, {}, "a learned ensemble or a weighted sum"),
        (CombinedReward([WeightedReward(FIRST, 2.0)]), {}, "a learned ensemble or a weighted sum"),
        ("preference:scenes,member=0", {}, "a learned ensemble or a weighted sum"),
        (HALVES, {"target_reward": 1.0}, "leave out value and searches"),
        (HALVES, {"value": lambda step, prompts: torch.zeros(8)}, "leave out value and searches"),
    ],
    ids=["one reward", "one term", "one member", "target", "value"],
)
def test_asking_about_nothing_is_refused(reward: Any, options: dict[str, Any], named: str) -> None:
    def answer(question: Disagreement) -> bool:
        return True

    with pytest.raises(InputError, match=named):
        steered(reward, on_disagreement=answer, **options)


def test_a_guided_run_asks_too(pipe_of: Any) -> None:
    from test_fk import steer_kwargs

    asked: list[Tensor] = []

    def answer(question: Disagreement) -> bool:
        asked.append(question.previews)
        return False

    reward = CombinedReward([WeightedReward(FIRST, 1.0), WeightedReward(OTHERS, 1.0)])
    options = {"lam": 5.0, "reward_guidance": 0.1, "ess_threshold": 1.0, "on_disagreement": answer, "ask_cost": 0.0}
    out = FKSteeringPipeline(pipe_of("sd"), reward)(
        num_particles=3, generator=seeded(), **steer_kwargs("sd"), **options
    )
    assert asked and not any(one.requires_grad for one in asked) and out.rewards.shape == (1, 3)
