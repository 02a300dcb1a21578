"""The contract of rewards: checks of every call, forms of inputs and results, timeouts, truncated prompts."""

import copy
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT, cached_pipe, sd
from diffusers import StableDiffusionPipeline
from PIL import Image
from soft_rewards import own_kwargs
from torch import Tensor, nn

from steer import BestOfNPipeline, FKSteeringPipeline, ReNOPipeline, RewardBackpropTrainer, TrainingConfig
from steer.assets import MODELS
from steer.errors import InputError
from steer.reward import (
    ENCODING_LOCK,
    Composite,
    Reward,
    RewardError,
    score,
    score_components,
    token_count,
    warn_if_pipeline_truncates,
    warn_if_truncated,
    with_metadata,
    with_timeout,
)
from steer.rewards.analysis import check_reward
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
from steer.rewards.parser import combine, load_reward

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
        scores = score(Made(returns(torch.ones(3, dtype=dtype))), IMAGES, PROMPTS)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu" and scores.tolist() == [1, 1, 1]
    assert score(Made(returns(torch.zeros(0))), IMAGES[:0], []).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "b"], "one prompt per image, got 2 prompts and 3 images"),
        ([], "one prompt per image, got 0 prompts and 3 images"),
        ("abc", "a list of prompts, one per image, got one string: 'abc'"),
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
    with pytest.raises(RewardError, match=rf"reward '{slow.name}' timed out after 0\.2 s: raise its timeout"):
        score_components(with_timeout(slow, 0.2), IMAGES, PROMPTS)
    assert time.monotonic() - started < 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == f"reward {slow.name}")


def test_a_limit_changes_no_score_and_keeps_the_parts() -> None:
    plain = load_reward("brightness:0.3:2 + min(colour:red, jpeg:0.01)")
    timed = with_timeout(plain, 30)
    assert (timed.name, timed.differentiable) == (plain.name, plain.differentiable) and isinstance(timed, Composite)
    (total, components), (timed_total, timed_parts) = (
        score_components(reward, IMAGES, PROMPTS) for reward in (plain, timed)
    )
    assert torch.equal(total, timed_total) and torch.equal(total, score(timed, IMAGES, PROMPTS))
    assert list(components) == list(timed_parts) and all(
        torch.equal(components[name], timed_parts[name]) for name in components
    )
    assert len(components) == 4
    assert not isinstance(with_timeout(Brightness(), 1), Composite)
    assert with_timeout(plain, None) is plain


WHOLE = ("compares_images", "takes_videos", "takes_audio", "prompt_limit", "cost", "checklist", "relaxed")


class Whole(Made):
    """With attributes that some callers read."""

    compares_images, takes_videos, takes_audio, prompt_limit, cost = True, True, True, 77, 0.5

    def __init__(self) -> None:
        super().__init__(lambda images, prompts: images.mean((1, 2, 3)))

    def checklist(self, images: Tensor, prompts: Sequence[str]) -> list[dict[str, bool]]:
        return [{prompt: True} for prompt in prompts]

    def relaxed(self, p: Tensor, prompts: Sequence[str]) -> Tensor:
        return p.sum((1, 2))


def test_a_wrapper_has_the_attributes_of_its_reward() -> None:
    plain, metadata = Whole(), {"a": {"red": 1}}

    def whole(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    vars(whole).update({name: getattr(plain, name) for name in WHOLE})
    timed = with_timeout(plain, 9)
    wrapped = [timed, with_metadata(timed, metadata), copy.deepcopy(timed)]
    functions = [load_reward(whole), with_timeout(load_reward(whole), 9), load_reward(functools.partial(whole))]
    for one in [*wrapped, *functions]:
        reward: Any = one
        assert [getattr(reward, name) for name in WHOLE[:-2]] == [True, True, True, 77, 0.5]
        assert reward.checklist(IMAGES, PROMPTS)[0] == {"a": True}
        assert torch.equal(reward.relaxed(IMAGES, PROMPTS), IMAGES.sum((1, 2)))
        assert not hasattr(reward, "other") and not isinstance(reward, Composite)
    assert wrapped[1].metadata == metadata  # type: ignore[attr-defined]


def test_a_function_that_compares_images_gets_all_of_a_prompt() -> None:
    sizes: list[int] = []

    def rank(images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    rank.compares_images = True  # type: ignore[attr-defined]
    call = own_kwargs("sd") | {"prompt": PROMPT}
    BestOfNPipeline(cached_pipe("sd"), rank)(num_particles=3, chunk_size=2, **call)
    assert sizes == [3]


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
    modes = []

    def look(images: Tensor, prompts: Sequence[str]) -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        assert threading.current_thread() is not threading.main_thread()
        return images.mean((1, 2, 3))

    timed = with_timeout(Made(look), 30)
    score(timed, IMAGES, PROMPTS)
    with torch.no_grad():
        score(timed, IMAGES, PROMPTS)
    with torch.inference_mode():
        assert score(timed, IMAGES, PROMPTS).is_inference()
    assert modes == [(True, False), (False, False), (False, True)]
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


@pytest.mark.parametrize("given", [dict, "builtins:dict", "builtins:int"])
def test_what_cannot_be_looked_into_is_no_reward(given: Any) -> None:
    with pytest.raises(RewardError):
        load_reward(given)


# Forms of rewards


PICTURES = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
RED = PICTURES[:, 0].mean((1, 2))
CALL = {"num_inference_steps": 6, "height": 8, "width": 8, "guidance_scale": 3.0}


RETURNED = {
    "numpy": lambda red: red.numpy(),
    "numpy fp64 (N, 1)": lambda red: red.double().numpy()[:, None],
    "list": lambda red: red.tolist(),
    "tuple": lambda red: tuple(red.tolist()),
    "list of numpy": lambda red: list(red.numpy()),
    "list of tensors": lambda red: [*red],
    "list of lists": lambda red: [[value] for value in red.tolist()],
    "(N, 1)": lambda red: red[:, None],
    "(scores, info)": lambda red: (red, {"count": 3}),
    "(list, info)": lambda red: (red.tolist(), {}),
    "(numpy, None)": lambda red: (red.numpy(), None),
}


@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_scores_of_plain_kinds_are_read(kind: str, count: int) -> None:
    def red(images: Tensor, prompts: Sequence[str]) -> Any:
        return RETURNED[kind](images[:, 0].mean((1, 2)))

    for reward in (
        load_reward(red),
        with_timeout(load_reward(red), 5),
        CombinedReward([WeightedReward(load_reward(red))]),
    ):
        outcome = score(reward, PICTURES[:count], PROMPTS[:count])
        assert outcome.dtype == torch.float32 and outcome.tolist() == pytest.approx(RED[:count].tolist())


def test_whole_numbers_are_scores() -> None:
    for values in ([3, 0, -2], np.array([3, 0, -2]), torch.tensor([3, 0, -2]), (torch.tensor([3, 0, -2]), {})):
        assert score(load_reward(lambda images, prompts, v=values: v), PICTURES, PROMPTS).tolist() == [3, 0, -2]
    assert score(load_reward(lambda images, prompts: 2.5), PICTURES[:1], ["a"]).tolist() == [2.5]
    assert score(load_reward(lambda images, prompts: (1.0, 2.0)), PICTURES[:2], ["a", "b"]).tolist() == [1, 2]


def test_a_list_of_tensors_keeps_its_gradient() -> None:
    images = PICTURES.clone().requires_grad_()

    def red(images: Tensor, prompts: Sequence[str]) -> Any:
        return [image[0].mean() for image in images]

    (gradient,) = torch.autograd.grad(score(load_reward(red), images, PROMPTS).sum(), images)
    assert torch.allclose(gradient[:, 0], torch.full((3, 4, 6), 1 / 24)) and not gradient[:, 1:].any()


def shade(image: Image.Image) -> float:
    return np.asarray(image)[..., 0].mean() / 255


def undeclared(images, prompts):  # type: ignore[no-untyped-def]
    return [shade(image.convert("RGB")) for image in images]


def sized(images, prompts):  # type: ignore[no-untyped-def]
    width, height = images[0].size
    return [shade(image) for image in images] if (width, height) == (6, 4) else None


def annotated(images: list[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def annotated_in_words(images: "Sequence[Image.Image]", prompts: "list[str]") -> "list[float]":
    return annotated(list(images), prompts)


def declared(images, prompts):  # type: ignore[no-untyped-def]
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


declared.images = "pil"  # type: ignore[attr-defined]


def of_arrays(images: "np.ndarray[Any, Any]", prompts: Sequence[str]) -> Any:
    return images[..., 0].mean((1, 2))


class WithName:
    """A whole Reward that wants pictures."""

    name, differentiable, images = "named", False, "pil"

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        return annotated(images, prompts)


class Module(nn.Module):
    """A torch module has the signature of its forward."""

    def forward(self, images: "list[Image.Image]", prompts: Sequence[str]) -> Any:
        return annotated(images, prompts)


TAKES = [undeclared, sized, annotated, annotated_in_words, declared, of_arrays, WithName(), Module()]


@pytest.mark.parametrize("reward", TAKES, ids=lambda reward: getattr(reward, "__name__", type(reward).__name__))
def test_rewards_of_pictures_get_pictures(reward: Any) -> None:
    rewards = [load_reward(reward), with_timeout(load_reward(reward), 5), combine({reward: 1.0})]
    for one in [*rewards, *([] if isinstance(reward, nn.Module) else [load_reward(functools.partial(reward))])]:
        for _ in range(2):
            assert score(one, PICTURES, PROMPTS).tolist() == pytest.approx(RED.tolist(), abs=1 / 255)


def test_what_failed_with_a_tensor_once_is_not_asked_with_one_again() -> None:
    calls: list[type] = []

    def picky(images, prompts):  # type: ignore[no-untyped-def]
        calls.append(type(images))
        return undeclared(images, prompts)

    reward = load_reward(picky)
    for _ in range(3):
        score(reward, PICTURES, PROMPTS)
    assert calls == [Tensor, list, list, list]


def test_a_reward_that_took_a_tensor_once_is_not_asked_twice_when_it_fails() -> None:
    calls: list[type] = []

    def later(images, prompts):  # type: ignore[no-untyped-def]
        calls.append(type(images))
        if len(calls) > 1:
            raise ValueError("no more")
        return images.mean((1, 2, 3))

    reward = load_reward(later)
    score(reward, PICTURES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'later' failed: ValueError: no more"):
        score(reward, PICTURES, PROMPTS)
    assert calls == [Tensor, Tensor]


def test_the_first_failure_is_the_one_that_is_reported() -> None:
    def wrong(images, prompts):  # type: ignore[no-untyped-def]
        raise TypeError("tensor" if torch.is_tensor(images) else "picture")

    with pytest.raises(RewardError, match="reward 'wrong' failed: TypeError: tensor"):
        score(load_reward(wrong), PICTURES, PROMPTS)


def test_another_form_of_images_is_refused() -> None:
    def odd(images, prompts):  # type: ignore[no-untyped-def]
        return images

    odd.images = "jpeg"  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="reward 'odd': images must be one of pt, np, pil, text, ids, got 'jpeg'"):
        score(load_reward(odd), PICTURES, PROMPTS)


def test_a_function_says_that_it_is_differentiable(tmp_path: Path) -> None:
    def red(images, prompts):  # type: ignore[no-untyped-def]
        return images[:, 0].mean((1, 2))

    assert not load_reward(red).differentiable
    red.differentiable = True  # type: ignore[attr-defined]
    assert load_reward(red).differentiable and combine({red: 1}).differentiable
    size: dict[str, Any] = {"train_batch_size": 1, "num_generations": 2, "num_inference_steps": 2, "lora_rank": 2}
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=1, call={"height": 8}, **size)
    result = RewardBackpropTrainer(sd(), red, config, train_prompts=[PROMPT]).train()
    assert result.records[0]["grad_norm"] > 0
    call = CALL | {"generator": torch.Generator().manual_seed(0)}
    assert ReNOPipeline(sd(), red)(PROMPT, iterations=2, output_type="latent", **call).cost.gradients > 0
    guided = FKSteeringPipeline(sd(), red)(PROMPT, num_particles=2, reward_guidance=1.0, output_type="latent", **call)
    assert guided.cost.gradients > 0


ROWS = [{"target": 1.0}, {"target": 2.0}, {"target": 3.0}]


def by_name(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
    return torch.tensor([row.get("target", 0.0) for row in metadata])


def as_trl(images: Tensor, prompts: Sequence[str], prompt_metadata: Any) -> Any:
    return by_name(images, prompts, prompt_metadata), {}


def by_rest(images: Tensor, prompts: Sequence[str], **rest: Any) -> Any:
    return by_name(images, prompts, rest.get("metadata") or [{}] * len(images))


def optional(images: Tensor, prompts: Sequence[str], metadata: Any = None) -> Any:
    return by_name(images, prompts, metadata or [{}] * len(images))


@pytest.mark.parametrize("reward", [by_name, as_trl, by_rest, optional])
def test_metadata_reaches_every_reward_that_accepts_it(reward: Any) -> None:
    plain = load_reward(reward)
    for one in (plain, with_timeout(plain, 5), combine({reward: 1}), with_timeout(combine({reward: 1}), 5)):
        for ask in (score, lambda *given: score_components(*given)[0]):
            assert ask(one, PICTURES, PROMPTS, ROWS).tolist() == [1, 2, 3]
            assert ask(one, PICTURES, PROMPTS).tolist() == [0, 0, 0]
        table = with_metadata(one, dict(zip(PROMPTS, ROWS, strict=True)))
        assert score(table, PICTURES, ["c", "a", "?"]).tolist() == [3, 1, 0]
        assert score_components(with_metadata(table, {"b": ROWS[1]}), PICTURES, PROMPTS)[0].tolist() == [0, 2, 0]
        assert with_metadata(table, None) is one


def test_a_reward_that_takes_none_gets_no_metadata() -> None:
    assert score(load_reward("brightness"), PICTURES, PROMPTS, ROWS).shape == (3,)
    with pytest.raises(RewardError, match="metadata needs one row per image, got 2 rows and 3 images"):
        score(load_reward(by_name), PICTURES, PROMPTS, ROWS[:2])


@pytest.mark.parametrize("method", [FKSteeringPipeline, BestOfNPipeline])
def test_every_particle_is_scored_with_the_row_of_its_prompt(method: Any) -> None:
    out = method(sd(), by_name)(
        [PROMPT, "a star"],
        num_particles=2,
        metadata=ROWS[1:],
        output_type="latent",
        **CALL,
    )
    assert out.rewards.tolist() == [[2, 2], [3, 3]]
    assert method(sd(), by_name)(PROMPT, num_particles=2, metadata=ROWS[0], **CALL).rewards.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (ROWS, "metadata must be one mapping for each prompt, got 3 of them and 2 prompts"),
        (["a", "b"], "metadata must be one mapping for each prompt, got str"),
    ],
)
def test_metadata_of_another_kind_is_refused(metadata: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BestOfNPipeline(sd(), by_name)([PROMPT, "a star"], metadata=metadata, **CALL)


# Truncated prompts


LONG = "a red circle and " * 30


@pytest.fixture(autouse=True)
def forgotten() -> None:
    warn_if_truncated.cache_clear()


def truncation_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "steer.reward"]


def test_a_prompt_that_the_pipeline_cuts_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    method, limit = BestOfNPipeline(pipe, "brightness"), pipe.tokenizer.model_max_length
    tokens = len(pipe.tokenizer(LONG).input_ids)
    assert tokens > limit
    for _ in range(2):
        method([LONG, "a star"], num_particles=1, num_inference_steps=1, negative_prompt=["", ""])
    (line,) = truncation_warnings(caplog)
    assert line.startswith(f"steer: tokenizer of StableDiffusionPipeline truncates prompts to {limit} tokens")
    assert f"has {tokens}" in line
    assert repr(LONG)[:50] in line and len(line.splitlines()) == 1
    warn_if_pipeline_truncates(pipe, [LONG + "b"], {})
    assert len(truncation_warnings(caplog)) == 2, "another prompt"


def test_tokens_are_counted_in_one_thread_at_a_time() -> None:
    """A fast tokenizer keeps the padding of its last call: a count between two calls of another thread changes it."""
    counting, done = threading.Event(), threading.Event()

    def tokenizer(prompt: str, **_: Any) -> Any:
        counting.set()
        done.wait(60)
        return SimpleNamespace(input_ids=[1, 2])

    thread = threading.Thread(target=token_count, args=(tokenizer, "a star"))
    thread.start()
    counting.wait(60)
    free = ENCODING_LOCK.acquire(blocking=False)
    done.set()
    thread.join()
    assert not free and ENCODING_LOCK.acquire(blocking=False)
    ENCODING_LOCK.release()


def test_every_tokenizer_has_its_own_limit(caplog: pytest.LogCaptureFixture) -> None:
    pipe = cached_pipe("sd3")
    for length in (16, 500):
        warn_if_truncated.cache_clear()
        caplog.clear()
        warn_if_pipeline_truncates(pipe, [LONG], {"max_sequence_length": length})
        own = pipe.tokenizer.model_max_length
        by_tokenizer = {
            line.split()[1]: int(line.split("prompts to ")[1].split()[0]) for line in truncation_warnings(caplog)
        }
        expected = {"tokenizer": own, "tokenizer_2": own} | ({"tokenizer_3": 16} if length == 16 else {})
        assert by_tokenizer == expected


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["clip:scenes", "preference:scenes", "brightness + clip:scenes"])
def test_a_prompt_that_a_reward_cuts_is_warned_about_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reward: Any = load_reward(name)
    images, limit = torch.rand(2, 3, 64, 64), reward.prompt_limit
    for _ in range(2):
        score(reward, images, [LONG, "a star"])
    (line,) = truncation_warnings(caplog)
    assert f"to {limit} tokens" in line and "reward " in line
    cut = score(reward, images[:1], [LONG]) - score(reward, images[:1], [LONG + " three blue stars"])
    assert cut.abs().max() < 1e-5  # LONG was encoded beside a shorter prompt: other rounding
    finding = next(one for one in check_reward(reward, images, ["a star", "a circle"]) if one.name == "prompt limit")
    assert finding.passed is None and f"reads {limit} tokens of a prompt" in finding.detail


def test_a_reward_without_a_limit_says_that_none_is_known() -> None:
    checks = check_reward(load_reward("brightness"), torch.rand(2, 3, 8, 8), ["a", "b"])
    assert "no limit is known" in next(one for one in checks if one.name == "prompt limit").detail
