"""Images, prompts and functions in the forms that people have them: `steer.score` and calls of a loaded reward."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT, sd
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn

from steer import BestOfNPipeline, load_reward, score, score_components
from steer.reward import RewardError
from steer.rewards.inputs import as_uint8
from steer.rewards.remote import encode

# Eight bits, so that every form holds the same numbers.
BYTES = torch.randint(0, 256, (3, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = BYTES.float() / 255
ARRAYS = IMAGES.permute(0, 2, 3, 1).numpy()
PICTURES = VaeImageProcessor.numpy_to_pil(ARRAYS)
PROMPTS = ["a red circle", "a blue star", "two stars"]
BRIGHTNESS = (IMAGES * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2))

FORMS: dict[str, Any] = {
    "tensor": IMAGES,
    "8-bit tensor": BYTES,
    "array": ARRAYS,
    "8-bit array": np.stack([np.asarray(picture) for picture in PICTURES]),
    "PIL images": PICTURES,
    "tuple of PIL images": tuple(PICTURES),
    "PIL images with transparency": [picture.convert("RGBA") for picture in PICTURES],
    "list of tensors": [*IMAGES],
    "list of arrays": [*ARRAYS],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_gives_the_same_scores(form: str) -> None:
    for reward in (load_reward("brightness"), load_reward(lambda images, prompts: grey(images))):
        direct = reward(FORMS[form], PROMPTS)
        assert torch.allclose(direct, BRIGHTNESS, atol=1e-6)
        assert torch.equal(score(FORMS[form], PROMPTS, reward), direct)


def grey(images: Tensor) -> Tensor:
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2))


@pytest.mark.parametrize("name", ["scene", "scene-soft", "jpeg", "colour:red", "clip:scenes", "preference:scenes"])
def test_built_in_rewards_take_pictures_and_one_prompt(name: str) -> None:
    reward = load_reward(name)
    expected = score(IMAGES, ["a red circle"] * 3, name)
    assert torch.allclose(reward(PICTURES, "a red circle").cpu(), expected, atol=1e-5)
    assert torch.allclose(reward(PICTURES[0], "a red circle").cpu(), expected[:1], atol=1e-5)
    assert torch.allclose(reward(ARRAYS[0], ["a red circle"]).cpu(), expected[:1], atol=1e-5)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_our_own_output_is_scored_as_the_pipeline_scored_it(output_type: str) -> None:
    prompts = [PROMPT, "a star"]
    out = BestOfNPipeline(sd(), "brightness")(
        prompts, num_particles=2, num_inference_steps=2, height=8, width=8, output_type=output_type
    )
    scores = load_reward("brightness")(out.images, prompts)  # two images of each prompt, prompt after prompt
    assert torch.allclose(scores.view(2, 2), out.rewards, atol=1e-2)
    assert torch.equal(score(out.images, prompts, "brightness"), scores)


def test_images_of_a_prompt_stand_together() -> None:
    asked: list[str] = []
    score(IMAGES[[0, 1, 2, 0]], ["a", "b"], lambda images, prompts: asked.extend(prompts) or [0.0] * 4)
    assert asked == ["a", "a", "b", "b"]


def test_a_nested_list_is_a_list_of_videos() -> None:
    videos = [PICTURES, PICTURES[::-1]]
    expected = BRIGHTNESS.mean().expand(2)
    assert torch.allclose(load_reward("brightness")(videos, ["a", "b"]), expected, atol=1e-6)
    assert torch.allclose(score(IMAGES[None], "a", lambda images, prompts: grey(images).tolist()), expected[:1])


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (IMAGES, ["a", "b"], "one prompt an image, got 2 prompts and 3 images"),
        (IMAGES, [], "one prompt an image, got 0 prompts and 3 images"),
        (IMAGES[:2], ["a", "b", "c"], "one prompt an image, got 3 prompts and 2 images"),
        (torch.rand(2, 4, 8, 8), "a", r"or a list of them; got the shape \(2, 4, 8, 8\)"),
        (IMAGES.long(), "a", r"floats in \[0, 1\] or 8-bit integers, got torch.int64"),
        ([PICTURES[0], PICTURES[1].resize((3, 3))], "a", "images of one call have one size"),
        ([], "a", "PIL images, or a list of them; got list"),
        (None, "a", "PIL images, or a list of them; got NoneType"),
    ],
)
def test_other_images_and_prompts_are_refused_in_one_line(images: Any, prompts: Any, message: str) -> None:
    for call in (lambda: score(images, prompts, "brightness"), lambda: load_reward("brightness")(images, prompts)):
        with pytest.raises(RewardError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", ["brightness", load_reward("brightness"), grey, {"brightness": 1}])
def test_a_reward_in_the_place_of_the_images_is_named(first: Any) -> None:
    for function in (score, score_components):
        with pytest.raises(RewardError, match=r"write score\(images, prompts, reward\): the images come first, got"):
            function(first, IMAGES, PROMPTS)


def test_components_are_returned_by_name() -> None:
    total, components = score_components(PICTURES, "a red circle", {"brightness": 2, "jpeg": 1})
    assert list(components) == ["brightness", "jpeg"]
    assert torch.allclose(total, 2 * components["brightness"] + components["jpeg"])


class Swapped:
    """A whole Reward with its parameters in another order."""

    name, differentiable = "swapped", False

    def __call__(self, prompts: Any, images: Any) -> Any:
        return standard(images, prompts)


class KeywordModule(nn.Module):
    def forward(self, *, images: Tensor, prompts: list[str]) -> Tensor:
        return standard(images, prompts)


def standard(images: Any, prompts: Any) -> Any:
    assert list(prompts) == PROMPTS
    return grey(images)


def keyword_only(*, images: Any, prompts: Any) -> Any:
    return standard(images, prompts)


def half_keyword(images: Any, *, prompts: Any) -> Any:
    return standard(images, prompts)


def with_metadata(prompts: Any, images: Any, metadata: Any) -> Any:
    assert [row["row"] for row in metadata] == [0, 1, 2]
    return standard(images, prompts)


def with_rest(prompts: Any, images: Any, **rest: Any) -> Any:
    assert len(rest["metadata"]) == 3
    return standard(images, prompts)


def of_pictures(prompts: Any, images: list[Image.Image]) -> Any:
    assert list(prompts) == PROMPTS
    return [float(grey(torch.from_numpy(np.asarray(image) / 255).movedim(-1, 0)[None])) for image in images]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "(images, prompts)": standard,
    "(imgs, texts)": lambda imgs, texts: standard(imgs, texts),
    "(prompts, images)": lambda prompts, images: standard(images, prompts),
    "(*, images, prompts)": keyword_only,
    "(images, *, prompts)": half_keyword,
    "(**named)": lambda **named: standard(named["images"], named["prompts"]),
    "(*both)": lambda *both: standard(*both),
    "(images)": lambda images: grey(images),
    "(x)": lambda x: grey(x),
    "(prompts, images, metadata)": with_metadata,
    "(prompts, images, **rest)": with_rest,
    "(prompts, images: list[Image.Image])": of_pictures,
    "a Reward (prompts, images)": Swapped(),
    "a module (*, images, prompts)": KeywordModule(),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_every_signature_are_rewards(kind: str) -> None:
    reward = load_reward(FUNCTIONS[kind])
    rows = [{"row": row} for row in range(3)]
    assert torch.allclose(score(IMAGES, PROMPTS, reward, rows), BRIGHTNESS, atol=1e-2)
    assert not reward.differentiable


def test_a_function_of_the_prompts_alone_is_a_reward() -> None:
    assert score(IMAGES, PROMPTS, lambda prompts: [len(text) for text in prompts]).tolist() == [12, 11, 9]


@pytest.mark.parametrize(
    "rewards",
    [
        {"brightness": 2, "jpeg": 0.5},
        [{"reward": "brightness", "weight": 2}, {"jpeg": 0.5}],
        ["brightness", "brightness", {"reward": "jpeg", "weight": 0.5}],
        {"rewards": [{"brightness": 2, "jpeg": 0.5}]},
        [["brightness", "brightness"], "sum(jpeg):0.5"],
        {"brightness": 2, load_reward("jpeg"): 0.5},
        {load_reward("brightness"): 2, (lambda images, prompts: load_reward("jpeg")(images, prompts)): 0.5},
    ],
    ids=["weights", "rows", "list", "nested mapping", "nested list", "an object", "a function"],
)
def test_mappings_to_weights_and_lists_are_sums(rewards: Any) -> None:
    expected = 2 * BRIGHTNESS + 0.5 * score(IMAGES, "", "jpeg")
    assert torch.allclose(score(IMAGES, PROMPTS, rewards), expected, atol=1e-5)
    assert torch.allclose(load_reward(rewards)(PICTURES, "a"), expected, atol=1e-5)


def test_a_pipeline_takes_weights_and_lists() -> None:
    call = {"num_particles": 2, "num_inference_steps": 2, "height": 8, "width": 8}
    for rewards in ({"brightness": 5, "colour:red": 1}, ["brightness", "colour:red"]):
        assert set(BestOfNPipeline(sd(), rewards)(PROMPT, **call).components) == {"brightness", "colour:red"}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "`rewards:` must be a list of rewards"),
        ([], "reward list: `rewards:` must be a list of rewards"),
        ({"brightness": "much"}, "unknown key 'brightness'; did you mean .* Weights are finite numbers"),
        ({"brightness": True}, "Weights are finite numbers"),
        ({"brightness": float("nan")}, "Weights are finite numbers"),
        ({"nosuch": 1}, "reward 1: unknown reward 'nosuch'"),
        (["brightness", "nosuch"], "reward list, reward 2: unknown reward 'nosuch'"),
        (["brightness", 3], "reward list, reward 2: a reward is a callable"),
    ],
    ids=str,
)
def test_other_mappings_and_lists_are_refused_in_one_line(rewards: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as raised:
        load_reward(rewards)
    assert "\n" not in str(raised.value)


def test_eight_bits_are_those_that_files_hold() -> None:
    assert torch.equal(torch.from_numpy(as_uint8(IMAGES)).permute(0, 3, 1, 2), BYTES)
    assert as_uint8(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 128, 255]
    assert encode(IMAGES, PROMPTS) == encode(BYTES.double() / 255, PROMPTS)
