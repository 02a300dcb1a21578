"""Guidance by an expanded prompt and its original, against explicit denoiser calls; `steer sample --original`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, cached_pipe, call_kwargs
from PIL import Image
from torch import Generator, Tensor

from steer import FKSteeringPipeline, InputError, two_prompts
from steer.apps.models import load_pipeline

EXPANDED, ORIGINAL = "a red circle and a black square", "a red circle"


@pytest.fixture(scope="module")
def scenes() -> Any:
    pipe = load_pipeline("scenes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, prompt: Any, **call: Any) -> Tensor:
    result: Tensor = pipe(prompt=prompt, generator=Generator().manual_seed(0), output_type="latent", **call)[0]
    return result


def test_the_guidance_is_the_sum_of_two_with_three_explicit_calls(scenes: Any) -> None:
    w1, w2, steps = 1.5, 3.0, 5
    scheduler = type(scenes.scheduler).from_config(scenes.scheduler.config)
    scheduler.set_timesteps(steps)
    texts = [scenes.encode_prompt(text, "cpu", 1, False)[0] for text in ("", ORIGINAL, EXPANDED)]
    x = torch.randn(
        1, *latents_of(scenes, ORIGINAL, num_inference_steps=1).shape[1:], generator=Generator().manual_seed(0)
    )
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            none, first, second = (
                scenes.unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample for text in texts
            )
            guided = none + w1 * (first - none) + w2 * (second - none)
            x = scheduler.step(guided, t, x).prev_sample
    view = two_prompts(scenes, {EXPANDED: ORIGINAL}, w1 / (w1 + w2))
    mixed = latents_of(view, EXPANDED, num_inference_steps=steps, guidance_scale=w1 + w2)
    torch.testing.assert_close(mixed, x, rtol=0, atol=1e-4)
    assert (mixed - latents_of(scenes, EXPANDED, num_inference_steps=steps, guidance_scale=w1 + w2)).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_are_the_plain_calls_bit_for_bit(scenes: Any, share: float) -> None:
    call = {"num_inference_steps": 4, "guidance_scale": 3.0}
    view = two_prompts(scenes, {EXPANDED: ORIGINAL}, share)
    plain = latents_of(scenes, ORIGINAL if share else EXPANDED, **call)
    assert torch.equal(latents_of(view, EXPANDED, **call), plain)
    other = "two blue stars"
    assert torch.equal(latents_of(view, other, **call), latents_of(scenes, other, **call)), "others stay alone"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_one_step_is_linear_in_the_share_for_every_family(name: str) -> None:
    """A step of these solvers is linear in the denoiser's output, and so is guidance: the mix of both ends."""
    pipe = cached_pipe(name)
    pipe.set_progress_bar_config(disable=True)
    call = call_kwargs(name, images=1, steps=1)
    call.pop("prompt", None)
    one, other = (latents_of(pipe, [text], **call) for text in (EXPANDED, ORIGINAL))
    mixed = latents_of(two_prompts(pipe, {EXPANDED: ORIGINAL}, 0.3), [EXPANDED], **call)
    assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(mixed, one + 0.3 * (other - one), rtol=0, atol=1e-5)


def test_particles_are_steered_with_it_and_share_zero_is_the_plain_run(scenes: Any) -> None:
    def run(pipe: Any) -> Any:
        steer = FKSteeringPipeline(pipe, "brightness")
        given: dict[str, Any] = {"num_inference_steps": 4, "num_particles": 2, "lam": 20.0, "output_type": "pt"}
        return steer([EXPANDED, "two blue stars"], generator=Generator().manual_seed(0), **given).images

    mixed, plain = (run(two_prompts(scenes, {EXPANDED: ORIGINAL}, share)) for share in (0.5, 0.0))
    assert torch.equal(plain, run(scenes))
    assert not torch.equal(mixed[:2], plain[:2])
    torch.testing.assert_close(mixed[2:], plain[2:], rtol=0, atol=1e-3)  # the other prompt of the call


def test_keywords_without_a_name_reach_the_pipeline(scenes: Any) -> None:
    steps: list[int] = []
    view = two_prompts(scenes, {EXPANDED: ORIGINAL}, 0.5)
    call: dict[str, Any] = {"num_inference_steps": 2, "callback_steps": 1}
    latents_of(view, "two blue stars", callback=lambda step, t, latents: steps.append(step), **call)
    assert steps == [0, 1]


def test_a_share_out_of_range_is_refused(scenes: Any) -> None:
    with pytest.raises(InputError, match=r"from 0 to 1, got 1\.5"):
        two_prompts(scenes, {}, 1.5)


@pytest.mark.hard
def test_steer_sample_centres_the_guidance_and_replays_it(steer: Steer, tmp_path: Path) -> None:
    words = [
        "sample",
        ORIGINAL,
        "--expand",
        "scenes-text",
        "--reward",
        "scene-soft",
        "--steps",
        "4",
        "--particles",
        "2",
    ]
    pixels = {}
    for share in ("0.5", "0"):
        out = tmp_path / share
        assert steer(*words, "--original", share, "--out", out)[0] == 0
        entry = json.loads((out / "report.json").read_text())["prompts"][0]
        pixels[share] = Image.open(out / entry["images"][0]).tobytes()
    assert pixels["0.5"] != pixels["0"]
    code, printed, err = steer("sample", "--replay", tmp_path / "0.5" / entry["images"][0], "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in printed, err
    code, _, err = steer("sample", ORIGINAL, "--original", "0.5", "--out", tmp_path / "no")
    assert code != 0 and "give --expand too" in err


@pytest.mark.hard
def test_the_original_is_kept_where_expansions_lie(scenes: Any) -> None:
    """`scene` of the original prompt: a share of .5 is above 0, outside the interval over 24 prompts."""
    from steer.apps.prompts import load_prompts
    from steer.rewards.parser import load_reward
    from steer.training.overoptimization import interval

    texts = [text for text in load_prompts("scenes-tuning") if " and " not in text and " of " not in text][:24]
    lies = {f"{text} and a black square": text for text in texts if "black square" not in text}
    scores, reward = {}, load_reward("scene-soft")
    for share in (0.5, 0.0):
        view = two_prompts(scenes, lies, share)
        call = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}
        images = torch.as_tensor(view(prompt=list(lies), generator=Generator().manual_seed(0), **call).images)
        scores[share] = reward(images, list(lies.values()))
    assert interval(scores[0.5] - scores[0.0])[1] > 0
