"""The contract of rewards: what is checked, how a part is named, and calls that take too long."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.reward import Composite, Reward, RewardError, score, score_components, with_timeout
from steer.rewards.colour import Brightness, ColourMatch
from steer.rewards.compose import (
    CombinedReward,
    Constraint,
    LogSigmoidReward,
    ProductReward,
    RewardStatistics,
    StandardisedReward,
    WeightedReward,
    worst,
)
from steer.rewards.parser import load_reward

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
Call = Callable[[Tensor, Sequence[str]], Any]


class Made:
    """A reward of a function."""

    differentiable = True

    def __init__(self, call: Call, name: str = "made") -> None:
        self.name, self._call = name, call

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._call(images, prompts)


def returns(value: Any) -> Call:
    return lambda images, prompts: value


def raises(error: BaseException) -> Call:
    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise error

    return call


def sleeps(seconds: float) -> Call:
    def call(images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(seconds)
        return images.mean((1, 2, 3))

    return call


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


BROKEN = [
    (returns(torch.tensor([0.0, torch.nan, 0.0])), "reward 'made' returned nan for image 1, prompt 'b'"),
    (returns(torch.tensor([0.0, 0.0, -torch.inf])), "reward 'made' returned -inf for image 2, prompt 'c'"),
    (returns(torch.tensor([1e300, 0, 0], dtype=torch.float64)), "reward 'made' returned 1e+300 for image 0"),
    (returns(torch.zeros(3, dtype=torch.bool)), "reward 'made' must return floats, got torch.bool"),
    (returns(torch.zeros(3, dtype=torch.complex64)), "reward 'made' must return floats, got torch.complex64"),
    (returns(torch.zeros(2)), "reward 'made' must return a tensor of shape (3,), got (2,)"),
    (returns(torch.zeros(3, 2)), "reward 'made' must return a tensor of shape (3,), got (3, 2)"),
    (returns(torch.zeros(1, 3)), "reward 'made' must return a tensor of shape (3,), got (1, 3)"),
    (returns(torch.tensor(0.0)), "reward 'made' must return a tensor of shape (3,), got ()"),
    (returns([0.0, 0.0]), "reward 'made' must return a tensor of shape (3,), got (2,)"),
    (returns(["0", "0", "0"]), "reward 'made' must return a tensor of shape (3,), got list"),
    (returns({"a": [0.0, 0.0, 0.0]}), "reward 'made' must return a tensor of shape (3,), got dict"),
    (returns(None), "reward 'made' must return a tensor of shape (3,), got NoneType"),
    (raises(KeyError("label")), "reward 'made' failed: KeyError: 'label'"),
    (raises(RuntimeError("two\nlines")), "reward 'made' failed: RuntimeError: two lines"),
]


def inside(broken: Reward) -> list[Reward]:
    """Compositions that hold a reward."""
    good = Brightness()
    return [
        CombinedReward([WeightedReward(good), WeightedReward(broken, 0.5)]),
        CombinedReward([WeightedReward(good), WeightedReward(broken)], worst),
        ProductReward([Constraint(broken, ">", 0.5), Constraint(good, ">", 0.5)]),
        StandardisedReward(broken, RewardStatistics(0.0, 1.0, 2, {})),
        LogSigmoidReward(broken, 0.5),
        CombinedReward(
            [
                WeightedReward(
                    CombinedReward(
                        [WeightedReward(StandardisedReward(broken, RewardStatistics(0.0, 1.0, 2, {})))], worst
                    )
                )
            ]
        ),
    ]


@pytest.mark.parametrize(("call", "message"), BROKEN)
def test_what_breaks_the_contract_is_named_wherever_it_stands(call: Call, message: str) -> None:
    broken = Made(call)
    for reward in (broken, *inside(broken), with_timeout(broken, 5), with_timeout(inside(broken)[0], 5)):
        for ask in (score, score_components):
            with pytest.raises(RewardError) as raised:
                ask(reward, IMAGES, PROMPTS)
            assert str(raised.value).startswith(message)


def test_scores_come_in_single_precision_on_the_cpu() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = score(Made(returns(torch.ones(3, dtype=dtype))), IMAGES, PROMPTS)
        assert found.dtype == torch.float32 and found.device.type == "cpu" and found.tolist() == [1, 1, 1]
    assert score(Made(returns(torch.zeros(0))), IMAGES[:0], []).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "b"], "one prompt an image, got 2 prompts and 3 images"),
        ([], "one prompt an image, got 0 prompts and 3 images"),
        ("abc", "a list of prompts, one an image, got one text: 'abc'"),
    ],
)
def test_there_is_one_prompt_an_image(prompts: Any, message: str) -> None:
    for reward in (Brightness(), *inside(Brightness())):
        for ask in (score, score_components):
            with pytest.raises(RewardError, match=message):
                ask(reward, IMAGES, prompts)


class Foreign:
    """A composite as a stranger writes it."""

    name, differentiable = "foreign", True

    def __init__(self, components: Call, total: Callable[[Mapping[str, Tensor]], Any]) -> None:
        self._parts, self._total = components, total

    def components(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        return self._parts(images, prompts)

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        return self._total(components)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.total(self.components(images, prompts), prompts)


def zeros(components: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(3)


@pytest.mark.parametrize(
    ("components", "total", "message"),
    [
        (returns({"a": torch.tensor([0.0, torch.nan, 0.0])}), zeros, "reward 'foreign/a' returned nan for image 1"),
        (returns({"a": torch.zeros(3, 2)}), zeros, r"reward 'foreign/a' must return .*\(3,\), got \(3, 2\)"),
        (returns({"a": 3.0}), zeros, r"reward 'foreign/a' must return .* got float"),
        (returns(torch.zeros(3)), zeros, "reward 'foreign' failed: TypeError"),
        (returns(None), zeros, "reward 'foreign' failed: TypeError"),
        (raises(OSError("gone")), zeros, "reward 'foreign' failed: OSError: gone"),
        (returns({}), lambda components: components["b"], "reward 'foreign' failed: KeyError: 'b'"),
        (returns({}), lambda components: torch.full((3,), torch.nan), "reward 'foreign' returned nan for image 0"),
    ],
)
def test_the_parts_of_a_composite_are_held_to_the_contract_too(
    components: Call, total: Callable[[Mapping[str, Tensor]], Any], message: str
) -> None:
    for reward in (Foreign(components, total), with_timeout(Foreign(components, total), 5)):
        with pytest.raises(RewardError, match=message):
            score_components(reward, IMAGES, PROMPTS)


def test_a_reward_without_parts_has_none() -> None:
    total, components = score_components(Brightness(), IMAGES, PROMPTS)
    assert components == {} and torch.equal(total, score(Brightness(), IMAGES, PROMPTS))
    assert not isinstance(Brightness(), Composite) and isinstance(inside(Brightness())[0], Composite)


@pytest.mark.parametrize(
    "slow",
    [
        Made(sleeps(3), "slow"),
        CombinedReward([WeightedReward(Brightness()), WeightedReward(Made(sleeps(3)))], name="slow"),
        Foreign(returns({}), lambda components: time.sleep(3)),
    ],
    ids=["reward", "composite", "total"],
)
def test_a_reward_that_hangs_is_an_error_in_time(slow: Reward) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=rf"reward '{slow.name}' took longer than its 0\.2 s: give it more"):
        score_components(with_timeout(slow, 0.2), IMAGES, PROMPTS)
    assert time.monotonic() - started < 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == f"reward {slow.name}")


def test_a_limit_changes_no_score_and_keeps_the_parts() -> None:
    plain = load_reward("brightness:0.3:2 + min(colour:red, jpeg:0.01)")
    timed = with_timeout(plain, 30)
    assert (timed.name, timed.differentiable) == (plain.name, plain.differentiable) and isinstance(timed, Composite)
    (total, components), (told, told_parts) = (score_components(reward, IMAGES, PROMPTS) for reward in (plain, timed))
    assert torch.equal(total, told) and torch.equal(total, score(timed, IMAGES, PROMPTS))
    assert list(components) == list(told_parts) and all(
        torch.equal(components[name], told_parts[name]) for name in components
    )
    assert len(components) == 4
    assert not isinstance(with_timeout(Brightness(), 1), Composite)
    assert with_timeout(plain, None) is plain


@pytest.mark.parametrize(
    "reward",
    [ColourMatch("red"), CombinedReward([WeightedReward(Brightness(), 2), WeightedReward(ColourMatch("red"))])],
)
def test_gradients_flow_through_a_timed_reward_where_they_are_wanted(reward: Reward) -> None:
    slopes = []
    for asked in (reward, with_timeout(reward, 30)):
        images = IMAGES.clone().requires_grad_()
        scores = score(asked, images, PROMPTS)
        scores.sum().backward()
        slopes.append(images.grad)
    assert slopes[0] is not None and slopes[0].abs().sum() > 0 and torch.equal(slopes[0], slopes[1])
    images = IMAGES.clone().requires_grad_()
    with torch.no_grad():
        assert not score(with_timeout(reward, 30), images, PROMPTS).requires_grad


def test_the_thread_has_the_modes_of_its_caller() -> None:
    seen = []

    def look(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        assert threading.current_thread() is not threading.main_thread()
        return images.mean((1, 2, 3))

    timed = with_timeout(Made(look), 30)
    score(timed, IMAGES, PROMPTS)
    with torch.no_grad():
        score(timed, IMAGES, PROMPTS)
    with torch.inference_mode():
        assert score(timed, IMAGES, PROMPTS).is_inference()
    assert seen == [(True, False), (False, False), (False, True)]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_what_is_raised_in_the_thread_keeps_type_and_message() -> None:
    class Own(Exception):
        pass

    for error in (Own("in full"), RewardError("as it is"), SystemExit(3)):
        with pytest.raises(type(error)) as raised:
            with_timeout(Made(raises(error)), 5)(IMAGES, PROMPTS)
        assert raised.value is error
    with pytest.raises(RewardError, match=r"^reward 'made' failed: Own: in full$"):
        score(with_timeout(Made(raises(Own("in full"))), 5), IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"^as it is$"):
        score(with_timeout(Made(raises(RewardError("as it is"))), 5), IMAGES, PROMPTS)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_is_above_0(seconds: float) -> None:
    for reward in (Brightness(), inside(Brightness())[0]):
        with pytest.raises(RewardError, match=r"the timeout of reward .* must be above 0 seconds, got"):
            with_timeout(reward, seconds)


@pytest.mark.parametrize("seconds", [1e12, float("inf")])
def test_a_limit_may_be_as_long_as_one_likes(seconds: float) -> None:
    assert torch.equal(score(with_timeout(Made(red), seconds), IMAGES, PROMPTS), red(IMAGES, PROMPTS))


@pytest.mark.parametrize("found", [dict, "builtins:dict", "builtins:int"])
def test_what_cannot_be_looked_into_is_no_reward(found: Any) -> None:
    with pytest.raises(RewardError):
        load_reward(found)
