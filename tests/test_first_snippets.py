"""The snippets that a new user writes without documentation: each of them runs."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from steer import (
    MODELS,
    BestOfNPipeline,
    FKSteeringPipeline,
    GRPOTrainer,
    InputError,
    NoiseSearchPipeline,
    ReNOPipeline,
    SelectionPipeline,
    load_reward,
)

PROMPT = "a red circle left of a blue star"
CALL: dict[str, Any] = {"num_inference_steps": 4}
PIPELINES = {
    FKSteeringPipeline: CALL | {"lam": 20.0},
    SelectionPipeline: CALL,
    BestOfNPipeline: CALL,
    ReNOPipeline: {"iterations": 2},
    NoiseSearchPipeline: CALL | {"iterations": 2},
}


def pipeline() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness_of_pil(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image.convert("L")).mean()) / 255 for image in images]


# Rewards


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "reward",
    [
        lambda images, prompts: images.mean((1, 2, 3)),
        lambda prompts, images: images.mean((1, 2, 3)),  # by name, in the other order
        lambda images, prompts: images.mean((1, 2, 3)).numpy(),
        lambda images, prompts: images.mean((1, 2, 3)).tolist(),
        lambda images, prompts: [float(image.mean()) for image in images],
        lambda images, prompts: np.array([np.float64(image.mean()) for image in images]),
        brightness_of_pil,
        lambda images, prompts: brightness_of_pil(images, prompts),
    ],
    ids=["tensor", "keyword order", "numpy", "list", "floats", "float64", "pil", "pil lambda"],
)
def test_a_function_is_a_reward(pipe: Any, reward: Any) -> None:
    out = FKSteeringPipeline(pipe, reward)(PROMPT, num_particles=2, generator=seeded(), **CALL)
    expected = FKSteeringPipeline(pipe, lambda images, prompts: images.mean((1, 2, 3)))(
        PROMPT, num_particles=2, generator=seeded(), **CALL
    )
    assert len(out.images) == 2 and isinstance(out.images[0], Image.Image)
    assert out.rewards.shape == expected.rewards.shape == (1, 2)


def test_dicts_and_lists_of_rewards_are_sums(pipe: Any) -> None:
    weights = {"brightness": 2, "scene-soft": 1}
    call = {"num_particles": 2, "generator": seeded(), **CALL}
    out = BestOfNPipeline(pipe, weights)(PROMPT, **call)
    assert set(out.components) == {"brightness", "scene-soft"}
    listed = BestOfNPipeline(pipe, ["brightness", "scene-soft"])(PROMPT, **call | {"generator": seeded()})
    torch.testing.assert_close(listed.rewards, sum(listed.components.values()))


def test_a_reward_scores_our_own_output(pipe: Any) -> None:
    out = BestOfNPipeline(pipe, "brightness")(PROMPT, num_particles=2, generator=seeded(), **CALL)
    scores = load_reward("brightness")(out.images, PROMPT)
    torch.testing.assert_close(scores.view(1, 2), out.rewards, atol=0.01, rtol=0)


# Calls


@pytest.mark.few(2)
@pytest.mark.parametrize("method", PIPELINES, ids=[one.__name__ for one in PIPELINES])
def test_every_output_is_one_of_diffusers(pipe: Any, method: Any) -> None:
    out = method(pipe, "brightness")(PROMPT, num_images_per_prompt=2, generator=seeded(), **PIPELINES[method])
    assert isinstance(out, BaseOutput) and len(out.images) == 2
    assert out["images"] is out.images and out[0] is out.images and out.to_tuple()[0] is out.images
    assert torch.equal(out["rewards"], out.rewards) and out.rewards.shape == (1, 2)
    images, rewards = out[:2]
    assert images is out.images and rewards is out.rewards


@pytest.mark.few(2)
@pytest.mark.parametrize("method", PIPELINES, ids=[one.__name__ for one in PIPELINES])
def test_images_per_prompt_are_particles(pipe: Any, method: Any) -> None:
    steer, call = method(pipe, "brightness"), PIPELINES[method]
    by_name, by_particles = (
        steer(PROMPT, generator=seeded(), output_type="pt", **call | {name: 2}).images
        for name in ("num_images_per_prompt", "num_particles")
    )
    assert torch.equal(by_name, by_particles)
    with pytest.raises(InputError, match="num_images_per_prompt and num_particles are the same: give one of them"):
        steer(PROMPT, num_images_per_prompt=2, num_particles=2, **call)


def test_arguments_of_the_pipeline_are_passed_on(pipe: Any) -> None:
    steps: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        return tensors

    out = FKSteeringPipeline(pipe, "scene-soft")(
        [PROMPT, "two stars"],
        negative_prompt=["a circle", "a cross"],
        num_particles=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        num_inference_steps=4,
        callback_on_step_end=callback,
        generator=seeded(),
        output_type="np",
    )
    assert out.images.shape == (4, 64, 64, 3) and steps == [0, 1, 2, 3]


def test_return_dict_is_that_of_diffusers(pipe: Any) -> None:
    steer, call = BestOfNPipeline(pipe, "brightness"), CALL | {"num_images_per_prompt": 2, "output_type": "pt"}
    outputs = [steer(PROMPT, generator=seeded(), return_dict=given, **call) for given in (True, False)]
    out, as_tuple = outputs[0], outputs[1]
    assert type(as_tuple) is tuple and len(as_tuple) == len(out.to_tuple())
    assert torch.equal(as_tuple[0], out.images) and torch.equal(as_tuple[1], out.rewards) and len(out.images) == 2
    with pytest.raises(InputError, match="return_dict must be True or False, got 'no'"):
        steer(PROMPT, return_dict="no", **CALL)


@pytest.mark.parametrize("name", ["num_images_per_prompt", "batch_size"])
def test_a_number_of_images_is_not_hidden_by_return_dict(name: str) -> None:
    """`batch_size` is an argument of unconditional pipelines, and no steering call may lose it in silence."""
    pipe = BatchSized.from_pretrained(MODELS["scenes"])
    hint = "batch_size is the steering pipeline's own: say num_particles|num_images_per_prompt and num_particles are"
    with pytest.raises(InputError, match=hint):
        FKSteeringPipeline(pipe, "brightness")(PROMPT, num_particles=2, return_dict=False, **{name: 2})


class BatchSized(StableDiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """A pipeline whose call has a batch_size, as unconditional ones have."""

    def __call__(self, *args: Any, batch_size: int = 1, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_a_misspelt_argument_has_a_suggestion(pipe: Any) -> None:
    with pytest.raises(InputError, match="StableDiffusionPipeline takes no argument 'lamb': did you mean lam"):
        FKSteeringPipeline(pipe, "brightness")(PROMPT, lamb=3)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("seed", "did you mean generator=torch.Generator().manual_seed(seed)?"),
        ("n", "did you mean num_particles?"),
        ("num_samples", "did you mean num_particles?"),
        ("batch_size", "did you mean num_particles?"),
        ("steps", "did you mean num_inference_steps?"),
        ("num_particle", "did you mean num_particles?"),
        ("zzz", "see the arguments of StableDiffusionPipeline.__call__ and FKSettings"),
        ("self_", "see the arguments of StableDiffusionPipeline.__call__ and FKSettings"),
    ],
)
def test_an_unknown_argument_of_a_call_is_one_line_with_the_right_name(pipe: Any, given: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        FKSteeringPipeline(pipe, "brightness")(PROMPT, **{given: 2})
    assert str(error.value) == f"StableDiffusionPipeline takes no argument {given!r}: {hint}"


@pytest.mark.parametrize("method", PIPELINES, ids=[one.__name__ for one in PIPELINES])
def test_an_unknown_argument_of_a_steering_pipeline_has_a_suggestion(pipe: Any, method: Any) -> None:
    for given, meant in {"reward_fn": "reward", "reward_funcs": "reward", "rewards": "reward"}.items():
        with pytest.raises(InputError) as error:
            method(pipe, **{given: "brightness"})
        assert str(error.value) == f"{method.__name__} takes no argument {given!r}: did you mean {meant}?"
    assert [*inspect.signature(method).parameters] == ["pipe", "reward"]


@pytest.mark.parametrize("method", PIPELINES, ids=[one.__name__ for one in PIPELINES])
def test_a_setting_of_the_call_given_to_the_constructor_leads_to_the_call(pipe: Any, method: Any) -> None:
    own = "num_particles" if "num_particles" in inspect.signature(method.__call__).parameters else "iterations"
    with pytest.raises(InputError) as error:
        method(pipe, "brightness", **{own: 2})
    call = f"{method.__name__}(pipe, reward)(prompt, {own}=…)"
    assert str(error.value) == f"{method.__name__} takes no argument {own!r}: say it in the call, {call}"


# The wrapped pipeline


def test_attributes_are_the_pipelines() -> None:
    pipe = pipeline()
    steer = FKSteeringPipeline(pipe, "brightness")
    assert steer.to("cpu") is steer and steer.to(torch.float32) is steer
    assert steer.scheduler is pipe.scheduler and steer.vae is pipe.vae and steer.device == pipe.device
    steer.enable_attention_slicing()
    steer.vae.enable_tiling()
    steer.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(steer.scheduler.config, timestep_spacing="trailing")
    steer.scheduler = scheduler
    assert pipe.scheduler is scheduler and "scheduler" not in vars(steer)
    assert {"enable_attention_slicing", "reward", "from_pretrained"} <= set(dir(steer))
    steer.reward = load_reward("jpeg")
    assert steer.reward.name == "jpeg"
    with pytest.raises(AttributeError, match="enable_everything"):
        steer.enable_everything()


@pytest.mark.parametrize("method", PIPELINES, ids=[one.__name__ for one in PIPELINES])
def test_a_pipeline_is_loaded_by_name(method: Any) -> None:
    steer = method.from_pretrained(MODELS["scenes"], reward="brightness", torch_dtype=torch.float32)
    assert isinstance(steer, method) and isinstance(steer.pipe, StableDiffusionPipeline)


def test_embedded_models_are_loaded_by_name() -> None:
    steer = BestOfNPipeline.from_pretrained("scenes", reward="brightness")
    assert isinstance(steer.pipe, StableDiffusionPipeline)


@pytest.mark.parametrize("kind", [*PIPELINES, GRPOTrainer], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("given", "place"),
    [("scenes", "MODELS['scenes']"), ("me/model", "'me/model'"), (Path("me/model"), "'me/model'")],
    ids=["embedded", "hub", "path"],
)
def test_the_name_of_a_model_is_no_pipeline(kind: Any, given: Any, place: str) -> None:
    with pytest.raises(InputError) as error:
        kind(given, "brightness")
    message = f"pipe must be a loaded pipeline, got {str(given)!r}: give DiffusionPipeline.from_pretrained({place})"
    assert str(error.value) == message


def test_editors_show_the_arguments() -> None:
    import inspect

    parameters = inspect.signature(FKSteeringPipeline.__call__).parameters
    assert list(parameters)[:4] == ["self", "prompt", "num_particles", "lam"] and "pipeline_call" in parameters
    assert parameters["lam"].default == "auto"
    documentation = FKSteeringPipeline.__call__.__doc__ or ""
    assert all(name in documentation for name in list(parameters)[2:-1])
