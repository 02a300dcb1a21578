"""Rewards as others write them: what they return, what they take, gradients of functions, metadata of prompts."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT, sd
from PIL import Image
from torch import Tensor, nn

from steer import BestOfNPipeline, FKSteeringPipeline, ReNOPipeline, RewardBackpropTrainer, TrainingConfig
from steer.errors import InputError
from steer.reward import RewardError, score, score_components, with_metadata, with_timeout
from steer.rewards.compose import CombinedReward, WeightedReward
from steer.rewards.parser import combine, load_reward

IMAGES = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
RED = IMAGES[:, 0].mean((1, 2))
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
        outcome = score(reward, IMAGES[:count], PROMPTS[:count])
        assert outcome.dtype == torch.float32 and outcome.tolist() == pytest.approx(RED[:count].tolist())


def test_whole_numbers_are_scores() -> None:
    for values in ([3, 0, -2], np.array([3, 0, -2]), torch.tensor([3, 0, -2]), (torch.tensor([3, 0, -2]), {})):
        assert score(load_reward(lambda images, prompts, v=values: v), IMAGES, PROMPTS).tolist() == [3, 0, -2]
    assert score(load_reward(lambda images, prompts: 2.5), IMAGES[:1], ["a"]).tolist() == [2.5]
    assert score(load_reward(lambda images, prompts: (1.0, 2.0)), IMAGES[:2], ["a", "b"]).tolist() == [1, 2]


def test_a_list_of_tensors_keeps_its_gradient() -> None:
    images = IMAGES.clone().requires_grad_()

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
    """Of a torch module the signature is that of forward."""

    def forward(self, images: "list[Image.Image]", prompts: Sequence[str]) -> Any:
        return annotated(images, prompts)


TAKES = [undeclared, sized, annotated, annotated_in_words, declared, of_arrays, WithName(), Module()]


@pytest.mark.parametrize("reward", TAKES, ids=lambda reward: getattr(reward, "__name__", type(reward).__name__))
def test_rewards_of_pictures_get_pictures(reward: Any) -> None:
    rewards = [load_reward(reward), with_timeout(load_reward(reward), 5), combine({reward: 1.0})]
    for one in [*rewards, *([] if isinstance(reward, nn.Module) else [load_reward(functools.partial(reward))])]:
        for _ in range(2):
            assert score(one, IMAGES, PROMPTS).tolist() == pytest.approx(RED.tolist(), abs=1 / 255)


def test_what_failed_with_a_tensor_once_is_not_asked_with_one_again() -> None:
    calls: list[type] = []

    def picky(images, prompts):  # type: ignore[no-untyped-def]
        calls.append(type(images))
        return undeclared(images, prompts)

    reward = load_reward(picky)
    for _ in range(3):
        score(reward, IMAGES, PROMPTS)
    assert calls == [Tensor, list, list, list]


def test_a_reward_that_took_a_tensor_once_is_not_asked_twice_when_it_fails() -> None:
    calls: list[type] = []

    def later(images, prompts):  # type: ignore[no-untyped-def]
        calls.append(type(images))
        if len(calls) > 1:
            raise ValueError("no more")
        return images.mean((1, 2, 3))

    reward = load_reward(later)
    score(reward, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward 'later' failed: ValueError: no more"):
        score(reward, IMAGES, PROMPTS)
    assert calls == [Tensor, Tensor]


def test_the_first_failure_is_the_one_that_is_reported() -> None:
    def wrong(images, prompts):  # type: ignore[no-untyped-def]
        raise TypeError("tensor" if torch.is_tensor(images) else "picture")

    with pytest.raises(RewardError, match="reward 'wrong' failed: TypeError: tensor"):
        score(load_reward(wrong), IMAGES, PROMPTS)


def test_another_form_of_images_is_refused() -> None:
    def odd(images, prompts):  # type: ignore[no-untyped-def]
        return images

    odd.images = "jpeg"  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="reward 'odd': images must be one of pt, np, pil, got 'jpeg'"):
        score(load_reward(odd), IMAGES, PROMPTS)


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
            assert ask(one, IMAGES, PROMPTS, ROWS).tolist() == [1, 2, 3]
            assert ask(one, IMAGES, PROMPTS).tolist() == [0, 0, 0]
        table = with_metadata(one, dict(zip(PROMPTS, ROWS, strict=True)))
        assert score(table, IMAGES, ["c", "a", "?"]).tolist() == [3, 1, 0]
        assert score_components(with_metadata(table, {"b": ROWS[1]}), IMAGES, PROMPTS)[0].tolist() == [0, 2, 0]
        assert with_metadata(table, None) is one


def test_a_reward_that_takes_none_gets_no_metadata() -> None:
    assert score(load_reward("brightness"), IMAGES, PROMPTS, ROWS).shape == (3,)
    with pytest.raises(RewardError, match="metadata has one row an image, got 2 rows and 3 images"):
        score(load_reward(by_name), IMAGES, PROMPTS, ROWS[:2])


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
