"""The rows of a call: forms of a call that make several images, and one call for each particle in lock step."""

from typing import Any

import diffusers
import pytest
import torch
from conftest import PROMPT, cached_pipe, call_kwargs, sd
from soft_rewards import redness, seeded
from torch import Tensor

from steer import FKSteeringPipeline, load_reward
from steer.audio import AudioReward, check_media
from steer.diffusion.rows import RandomState, RowsCall, forms
from steer.diffusion.step_hooks import SolverStep
from steer.diffusion.views import OutputShapes, zero_proxies
from steer.errors import InputError, UnsupportedPipelineError
from steer.reward import with_metadata, with_timeout

ROWS = 3
CALL = {name: value for name, value in call_kwargs("sd", ROWS).items() if name != "num_images_per_prompt"}


def one_image() -> Any:
    """A pipeline that makes one image a call, and says so with an error of its own."""
    pipe = diffusers.StableDiffusionPipeline(**cached_pipe("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(
        self: Any, prompt: str, num_inference_steps: int = 4, guidance_scale: float = 3.0, height: int = 8,
        width: int = 8, generator: Any = None, output_type: str = "pil",
    ) -> Any:  # fmt: skip
        if not isinstance(prompt, str) or isinstance(generator, list):
            raise ValueError("one prompt a call\nand not more")
        return diffusers.StableDiffusionPipeline.__call__(
            self, prompt, height, width, num_inference_steps, guidance_scale=guidance_scale, generator=generator,
            output_type=output_type,
        )  # fmt: skip

    pipe.__class__ = type("OneImage", (diffusers.StableDiffusionPipeline,), {"__call__": run})
    return pipe


def generators() -> list[torch.Generator]:
    return [seeded(row) for row in range(ROWS)]


def test_particles_of_a_pipeline_that_makes_one_image_a_call_run_in_lock_step() -> None:
    """The images are those of single calls; particles that trade places end swapped, solver history included."""
    pipe = one_image()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    single = torch.cat([pipe(**CALL, generator=one, output_type="pt").images for one in generators()])
    calls: list[tuple[int, int]] = []

    def watch(step: SolverStep) -> None:
        calls.append((step.k, len(step.x)))

    given = {"generator": generators(), "output_type": "pt"}
    assert torch.equal(RowsCall(pipe, CALL, 1, ROWS).run(pipe, watch, given), single)
    assert calls == [(k, ROWS) for k in range(4)]

    def rotate(step: SolverStep) -> tuple[Tensor, None] | None:
        return (torch.tensor([1, 2, 0]), None) if step.k == 1 else None

    given = {"generator": generators(), "output_type": "pt"}
    rotated = RowsCall(pipe, CALL, 1, ROWS).run(pipe, rotate, given)
    torch.testing.assert_close(rotated, single[[1, 2, 0]], atol=1e-6, rtol=0)


def test_particles_in_lock_step_compute_under_their_callers_autocast() -> None:
    pipe, given = one_image(), {"generator": generators(), "output_type": "pt"}
    exact = RowsCall(pipe, CALL, 1, ROWS).run(pipe, lambda step: None, given | {"generator": generators()})
    with torch.autocast("cpu", torch.bfloat16):
        single = torch.cat([pipe(**CALL, generator=one, output_type="pt").images for one in generators()])
        assert torch.equal(RowsCall(pipe, CALL, 1, ROWS).run(pipe, lambda step: None, given), single)
    assert not torch.equal(exact, single)


def test_the_random_numbers_of_the_gpu_are_restored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an attempt that drew from generators of its own, of the CPU and of a (stubbed) GPU."""
    own, gpu = seeded(1), seeded(2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", gpu.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpu.set_state)

    def draws() -> Tensor:
        return torch.stack([torch.rand(4, generator=one) for one in (own, gpu, None)])

    random = RandomState.of([own])
    first = draws()
    random.restore()
    assert torch.equal(draws(), first)


def test_particles_in_lock_step_are_steered() -> None:
    options = {
        "num_particles": ROWS,
        "lam": 3000.0,
        "resample_steps": [0, 1],
        "ess_threshold": 1.0,
        "output_type": "pt",
    }
    out = FKSteeringPipeline(one_image(), redness)(**CALL, **options, generator=generators())
    batch = FKSteeringPipeline(cached_pipe("sd"), redness)(**CALL, **options, generator=generators())
    assert any((ancestors != torch.arange(ROWS)).any() for ancestors in out.ancestors)
    torch.testing.assert_close(out.images, batch.images, atol=1e-5, rtol=0)


def test_a_call_that_no_form_fits_is_refused_with_the_reason_in_one_line() -> None:
    pipe = one_image()
    with pytest.raises(UnsupportedPipelineError) as refused:
        RowsCall(pipe, CALL | {"height": 9}, 1, ROWS).run(pipe, lambda step: None, {"output_type": "pt"})
    assert "OneImage does not run as called for 3 images (ValueError: `height` and `width` have to be" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


def test_a_pipeline_that_fails_after_its_first_step_is_refused_in_one_line() -> None:
    """The wrapped decoder fails as it does without steering; the error of a caller's callback stays as it is."""
    pipe = sd()
    pipe.vae.decoder.conv_out = torch.nn.Identity()  # so that post-processing meets 8 channels
    pipe.vae.decoder.conv_norm_out = torch.nn.GroupNorm(1, 5)
    with pytest.raises(RuntimeError) as plain:
        pipe(**CALL, output_type="pt")
    with pytest.raises(UnsupportedPipelineError) as refused:
        RowsCall(pipe, CALL, 1, ROWS).run(pipe, lambda step: None, {"output_type": "pt"})
    failure = f"StableDiffusionPipeline fails after 4 solver steps with 3 images (RuntimeError: {str(plain.value)[:25]}"
    assert failure in str(refused.value)
    assert "\n" not in str(refused.value)

    def callback(*_: object) -> dict[str, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        RowsCall(pipe, CALL | {"callback_on_step_end": callback}, 1, ROWS).run(pipe, lambda step: None, {})


def test_forms_repeat_what_each_row_needs() -> None:
    """Two prompts with two rows each: the count, repeated pictures, repeated prompts, and single calls."""
    picture = torch.rand(1, 3, 8, 8)
    call = {"prompt": ["a", "b"], "image": picture, "guidance_scale": 2.0}
    made = list(forms(cached_pipe("img2img"), call, 2, 2))
    assert [len(calls) for calls in made] == [1, 1, 1, 1, 4]
    assert made[0][0] == call | {"num_images_per_prompt": 2}
    assert made[1][0]["image"].shape == (4, 3, 8, 8) and made[1][0]["prompt"] == ["a", "b"]
    assert made[2][0]["prompt"] == ["a", "a", "b", "b"] and made[2][0]["num_images_per_prompt"] == 1
    assert [one["prompt"] for one in made[4]] == ["a", "a", "b", "b"]
    assert all(one["guidance_scale"] == 2.0 for calls in made for one in calls)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_a_silent_denoiser_answers_in_the_form_of_its_own_answers(name: str) -> None:
    pipe, shapes = cached_pipe(name), OutputShapes()
    part = "unet" if name == "sd" else "transformer"
    answers: list[tuple[Any, Any]] = []

    def listen(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        silent = zero_proxies(pipe, shapes)[part]
        shapes._outputs.clear()
        shapes._outputs[shapes._key(part, args, kwargs)] = None
        shapes.call(part, lambda *a, value=output, **k: value, *args, **kwargs)
        answers.append((output, silent(*args, **kwargs)))

    handle = getattr(pipe, part).register_forward_hook(listen, with_kwargs=True)
    try:
        pipe(**call_kwargs(name), output_type="latent")
    finally:
        handle.remove()
    for real, silent in answers:
        assert type(real) is type(silent) and len(real) == len(silent)
        assert real[0].shape == silent[0].shape and real[0].dtype == silent[0].dtype and not silent[0].any()


def test_audio_needs_a_reward_of_audio() -> None:
    reward = AudioReward(lambda waveforms, prompts, rate: waveforms.mean((1, 2)), "mean")
    for one in (reward, with_timeout(reward, 9), with_metadata(reward, {PROMPT: {}})):
        check_media(None, one, torch.zeros(2, 1, 100))
    check_media(None, load_reward("brightness"), torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="makes images, which reward 'mean' does not score: use a reward of images"):
        check_media(None, reward, torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="which reward 'brightness' does not score: use an AudioReward for waveforms"):
        check_media(None, load_reward("brightness"), torch.zeros(2, 1, 100))


def test_waveforms_are_scored_as_they_are() -> None:
    rates: list[int | None] = []

    def loudness(waveforms: Tensor, prompts: Any, rate: int | None) -> Tensor:
        rates.append(rate)
        return waveforms.abs().amax((1, 2))

    reward = AudioReward(loudness, sample_rate=44_100)
    assert torch.equal(reward(torch.full((1, 2, 5), -3.0), [PROMPT]), torch.tensor([3.0])) and rates == [44_100]
