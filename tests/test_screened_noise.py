"""ScreenedNoise starts: the pipeline's own noise to the bit, the best by an independent sort, and what they cost."""

import math
from typing import Any

import pytest
import torch
from conftest import PIPELINES, PROMPT, cached_pipe, call_kwargs, with_scheduler
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from gaussian import GaussianPipeline
from soft_rewards import Soft, images_of, likeness, own_kwargs, seeded
from torch import Tensor

from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.fk_steering import top_k_indices
from steer.pipelines.initial_noise import ScreenedNoise, screen_initial_noise, unscaled

REWARD = Soft(likeness)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCHEDULERS = [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDPMScheduler, LCMScheduler]
CASES = [(name, None) for name in PIPELINES if name != "img2img"] + [("sd", one) for one in SCHEDULERS]


def pipeline(name: str, scheduler: Any = None) -> Any:
    pipe = cached_pipe(name)
    return with_scheduler(pipe, scheduler.from_config(pipe.scheduler.config)) if scheduler else pipe


def screened(name: str = "sd", scheduler: Any = None, reward: Any = REWARD, **options: Any) -> ScreenedNoise:
    call = own_kwargs(name, 4) | {"keep": 3, "candidates": 7, "steps": 2, "generator": seeded(4)} | options
    return screen_initial_noise(pipeline(name, scheduler), reward, **call)


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_as_many_candidates_as_are_kept_change_nothing(name: str, scheduler: Any) -> None:
    pipe, generator = pipeline(name, scheduler), seeded(4)
    plain = images_of(pipe, **call_kwargs(name, 3, 4), generator=seeded(4))
    before = generator.get_state()
    result = screened(name, scheduler, candidates=3, generator=generator)
    assert torch.equal(generator.get_state(), before) and result.chosen.tolist() == [[0, 1, 2]]
    for _ in range(2):
        assert torch.equal(images_of(pipe, **call_kwargs(name, 3, 4) | result.arguments()), plain)


def test_generators_of_the_rows_are_the_pipelines_own_too() -> None:
    pipe = pipeline("sd", EulerAncestralDiscreteScheduler)
    plain = images_of(pipe, **call_kwargs("sd", 3, 4), generator=[seeded(s) for s in (5, 6, 7)])
    result = screened(scheduler=EulerAncestralDiscreteScheduler, candidates=3, generator=[seeded(s) for s in (5, 6, 7)])
    assert torch.equal(images_of(pipe, **call_kwargs("sd", 3, 4) | result.arguments()), plain)


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_the_best_of_the_candidates_are_kept(name: str, scheduler: Any) -> None:
    """Each candidate's reward is that of its own run, which its noise alone brings back."""
    result = screened(name, scheduler)
    best = sorted(range(7), key=lambda c: -result.rewards[0, c].item())[:3]
    assert result.chosen.tolist() == [sorted(best)]
    everything = screened(name, scheduler, keep=7)
    if scheduler is None or scheduler is EulerDiscreteScheduler:  # other solvers add random noise
        call = own_kwargs(name, 2) | {"latents": result.noise, "generator": seeded(9)}
        count = {key: 3 for key in call_kwargs(name, 3) if key.startswith("num_") and key.endswith("_per_prompt")}
        images = images_of(pipeline(name, scheduler), **call, **count)
        frames = images if images.dim() == 4 else images.flatten(0, 1)
        rewards = likeness(frames, [PROMPT] * len(frames)).view(3, -1).mean(1)
        torch.testing.assert_close(rewards, result.rewards[0, result.chosen[0]], **CLOSE)
    assert everything.noise.shape == (7, *result.noise.shape[1:])


def test_the_first_candidates_are_the_pipelines_own_and_more_only_add() -> None:
    few, many = screened(candidates=5), screened(candidates=9)
    assert torch.equal(few.rewards, many.rewards[:, :5])
    own = screened(candidates=3)
    assert torch.equal(own.rewards, many.rewards[:, :3])
    assert many.rewards.gather(1, many.chosen).sum() >= few.rewards.gather(1, few.chosen).sum()
    for noise, candidate in zip(many.noise, many.chosen[0].tolist(), strict=True):
        assert any(torch.equal(noise, one) for one in own.noise) == (candidate < 3)


@pytest.mark.few(4)
@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("candidate_batch_size", [1, 2, 3, 7, 20])
def test_batches_of_candidates_change_nothing(scheduler: Any, candidate_batch_size: int) -> None:
    whole = screened(scheduler=scheduler, candidate_batch_size=7)
    components = screened(scheduler=scheduler, candidate_batch_size=candidate_batch_size)
    torch.testing.assert_close(components.rewards, whole.rewards, **CLOSE)
    assert torch.equal(components.chosen, whole.chosen) and torch.equal(components.noise, whole.noise)


def test_no_batch_is_larger_than_the_real_one_and_everything_is_counted() -> None:
    sizes: list[int] = []

    def watching(images: Tensor, prompts: Any) -> Tensor:
        sizes.append(len(images))
        return likeness(images, prompts)

    prompts = ["a red circle", "a blue star"]
    result = screened(reward=Soft(watching), prompt=prompts, chunk_size=99)
    assert sizes == [6, 6, 2] and result.rewards.shape == (2, 7) and result.noise.shape[0] == 6
    assert (result.cost.nfe, result.cost.decodes, result.cost.reward_calls) == (2 * 7 * 2, 14, 14)
    assert result.cost.seconds > 0 and result.cost.gradients == 0


def test_each_prompt_has_candidates_of_its_own() -> None:
    result = screened(prompt=["a red circle", "a red circle"])
    pool = screened(prompt=["a red circle", "a red circle"], keep=7, candidates=7)
    assert not torch.equal(result.rewards[0], result.rewards[1])
    rows = [result.rewards[b, c] for b in range(2) for c in result.chosen[b].tolist()]
    pipe, call = pipeline("sd"), own_kwargs("sd", 2) | {"prompt": ["a red circle"] * 2}
    images = images_of(pipe, **call, latents=result.noise, generator=seeded(), num_images_per_prompt=3)
    torch.testing.assert_close(likeness(images, ["a red circle"] * 6), torch.stack(rows), **CLOSE)
    assert len({tuple(one.flatten().tolist()) for one in pool.noise}) == 14


def test_fresh_candidates_are_standard_normal_in_a_closed_form() -> None:
    """With an exact denoiser a run gives shift + gain · ε: rewards tell the noise."""
    pipe, gain, shift = GaussianPipeline(), 1.0, 0.0
    for slope, offset, _ in pipe.transitions(10, 0.0):
        gain, shift = slope * gain, slope * shift + offset

    def first_pixel(images: Tensor, prompts: Any) -> Tensor:
        return images[:, 0, 0, 0]

    options = {"keep": 4, "candidates": 600, "steps": 10, "candidate_batch_size": 300}
    result = screen_initial_noise(pipe, Soft(first_pixel), **options, generator=seeded(1), num_inference_steps=20)
    noise = ((result.rewards - shift) / gain)[0]
    torch.testing.assert_close(result.noise[:, 0, 0, 0], noise[result.chosen[0]], rtol=1e-3, atol=1e-3)
    assert abs(noise.mean()) < 4 / math.sqrt(600) and abs(noise.std() - 1) < 4 / math.sqrt(1200)
    assert result.noise[:, 0, 0, 0].min() >= noise.sort().values[-4] - 1e-3


def test_of_equal_rewards_the_lower_number_wins() -> None:
    assert top_k_indices(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]]), 2).tolist() == [[1, 2], [0, 3]]
    flat = screened(reward=Soft(lambda images, prompts: images.mean((1, 2, 3)) * 0))
    assert flat.chosen.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scaled_noise_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    noise = torch.randn(20_000, generator=seeded()).to(dtype)
    noise[:2] = torch.tensor([0.0, -0.0])
    for scale in (1.0, 14.6146, torch.tensor(157.407), 0.7):
        assert torch.equal(unscaled(noise * scale, scale) * scale, noise * scale)


def test_without_a_generator_the_global_numbers_decide_and_move_on() -> None:
    torch.manual_seed(3)
    first, second = screened(generator=None), screened(generator=None)
    torch.manual_seed(3)
    assert torch.equal(screened(generator=None).noise, first.noise) and not torch.equal(first.noise, second.noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 2}, "candidates must be at least keep, 3, got 2"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"candidate_batch_size": 0}, "candidate_batch_size must be at least 1"),
        ({"latents": torch.zeros(3, 4, 4, 4)}, "latents and screened noise exclude each other"),
        ({"timesteps": [900, 500]}, "timesteps and screened noise exclude each other"),
        ({"sigmas": [9.0, 0.5]}, "sigmas and screened noise exclude each other"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt is the steering pipeline's own"),
        ({"stepz": 2}, "takes no argument 'stepz'"),
    ],
)
def test_calls_that_cannot_be_screened_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        screened(**options)


def test_a_pipeline_that_starts_from_an_image_is_refused() -> None:
    with pytest.raises(UnsupportedPipelineError, match="does not take its starting noise as latents"):
        screened("img2img")


def test_the_calls_own_observer_does_not_see_the_short_runs() -> None:
    def never(*args: Any) -> dict[str, Any]:
        raise AssertionError("a short run is not the user's")

    screened(callback_on_step_end=never)
