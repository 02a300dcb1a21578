"""The preview against what the pipelines themselves make of their latents."""

import copy
from typing import Any

import pytest
import torch
from conftest import PIPELINES, cached_pipe, call_kwargs, with_scheduler
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from gaussian import GaussianPipeline
from schedulers import DIFFUSION, FLOW
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from steer.diffusion.preview import Preview, first_output

COUNT = 3
CLOSE = {"atol": 1e-6, "rtol": 0}


def seeded() -> Generator:
    return Generator().manual_seed(0)


def run(pipe: Any, call: dict[str, Any], output_type: str) -> Tensor:
    return first_output(pipe(**call, generator=seeded(), output_type=output_type))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_latents_of_a_run_become_its_images(name: str) -> None:
    pipe, call = cached_pipe(name), call_kwargs(name, COUNT)
    images = run(pipe, call, "pt")
    decoded = Preview(pipe, call)(run(pipe, call, "latent"))
    assert decoded.shape == images.shape and decoded.dtype == images.dtype
    assert images.std() > 0.05  # there is something to see
    torch.testing.assert_close(decoded, images, **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", PIPELINES)
def test_decoding_in_chunks_gives_the_same_images(name: str, chunk: int) -> None:
    pipe, call = cached_pipe(name), call_kwargs(name, COUNT)
    latents = run(pipe, call, "latent")
    torch.testing.assert_close(Preview(pipe, call, chunk)(latents), Preview(pipe, call, COUNT)(latents), **CLOSE)


def test_no_more_than_a_chunk_is_decoded_at_a_time() -> None:
    pipe, call = copy.copy(cached_pipe("sd")), call_kwargs("sd", COUNT)
    sizes: list[int] = []
    latents = run(pipe, call, "latent")
    vars(pipe)["vae"] = copy.copy(pipe.vae)
    plain = pipe.vae.decode
    vars(pipe.vae)["decode"] = lambda z, *args, **kwargs: (sizes.append(len(z)), plain(z, *args, **kwargs))[1]
    Preview(pipe, call, chunk=2)(latents)
    assert sizes == [2, 1]


@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_every_scheduler_has_a_preview(scheduler: str) -> None:
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION[scheduler]())
    check_preview(pipe, "sd")


@pytest.mark.parametrize("scheduler", FLOW)
def test_every_flow_scheduler_has_a_preview(scheduler: str) -> None:
    check_preview(with_scheduler(cached_pipe("sd3"), FLOW[scheduler]()), "sd3")


@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM", "HeunDiscrete", "KDPM2Discrete", "UniPCMultistep"])
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.3, 0.1, 0.03])
def test_image_to_image_has_a_preview_at_any_strength(strength: float, scheduler: str) -> None:
    check_preview(with_scheduler(cached_pipe("img2img"), DIFFUSION[scheduler]()), "img2img", strength=strength)


def check_preview(pipe: Any, name: str, **call: Any) -> None:
    """Any latents give the images that the plain pipeline decodes them to."""
    call = call_kwargs(name, COUNT) | call
    latents = torch.randn(COUNT, 4, 4, 4, generator=seeded())
    vae = pipe.vae
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor + (0.1 if name == "sd3" else 0.0)).sample
    expected = (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(Preview(pipe, call)(latents), expected, **CLOSE)


def test_what_belongs_to_the_run_alone_is_left_out() -> None:
    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("a preview is not a step of the run")

    pipe, call = cached_pipe("sd"), call_kwargs("sd", COUNT)
    latents = run(pipe, call, "latent")
    own = {
        "generator": seeded(),
        "latents": torch.zeros(COUNT, 4, 4, 4),
        "callback_on_step_end": never,
        "output_type": "pil",
        "return_dict": False,
    }
    torch.testing.assert_close(Preview(pipe, call | own)(latents), run(pipe, call, "pt"), **CLOSE)
    custom = {key: value for key, value in call.items() if key != "num_inference_steps"} | {"timesteps": [900, 500]}
    torch.testing.assert_close(Preview(pipe, custom)(latents), run(pipe, call, "pt"), **CLOSE)


@pytest.mark.parametrize("name", ["sd", "img2img", "flux"])
def test_no_random_number_of_the_user_is_used_up(name: str) -> None:
    generator, pipe = seeded(), cached_pipe(name)
    call = call_kwargs(name, COUNT)
    latents = run(pipe, call, "latent")
    everyones = torch.get_rng_state()
    Preview(pipe, call | {"generator": generator})(latents)
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(torch.get_rng_state(), everyones)


def test_the_users_pipeline_stays_untouched() -> None:
    pipe, call = cached_pipe("sd"), call_kwargs("sd", COUNT)
    latents = run(pipe, call, "latent")
    before, config = dict(vars(pipe)), dict(pipe.config)
    components = {name: set(vars(getattr(pipe, name))) for name in ("vae", "unet", "scheduler", "text_encoder")}
    Preview(pipe, call)(latents)
    assert vars(pipe).keys() == before.keys() and all(value is before[name] for name, value in vars(pipe).items())
    assert dict(pipe.config) == config
    assert all(set(vars(getattr(pipe, name))) == attributes for name, attributes in components.items())


def safety_checker_that_blackens_everything() -> StableDiffusionSafetyChecker:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    size = {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(vision_config=vision | size, text_config=text, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.constant_(checker.concept_embeds_weights, -2)  # every image is closer than this to every concept
    return checker


def test_no_safety_checker_sees_a_preview() -> None:
    pipe, call = copy.copy(cached_pipe("sd")), call_kwargs("sd", COUNT)
    images = run(pipe, call, "pt")
    latents = run(pipe, call, "latent")
    pipe.safety_checker = safety_checker_that_blackens_everything()
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    assert (run(pipe, call, "pt") == 0).all()
    torch.testing.assert_close(Preview(pipe, call)(latents), images, **CLOSE)


@pytest.mark.parametrize("name", PIPELINES)
def test_text_is_encoded_once_and_no_denoiser_is_run(name: str) -> None:
    pipe, call = cached_pipe(name), call_kwargs(name, COUNT)
    latents = run(pipe, call, "latent")
    calls = {"text": 0, "denoiser": 0}

    def counter(part: str) -> Any:
        def count(*_: Any) -> None:
            calls[part] += 1

        return count

    denoisers = [getattr(pipe, part) for part in ("unet", "transformer", "controlnet") if hasattr(pipe, part)]
    handles = [pipe.text_encoder.register_forward_hook(counter("text"))]
    handles += [denoiser.register_forward_hook(counter("denoiser")) for denoiser in denoisers]
    try:
        preview = Preview(pipe, call)
        preview(latents)
        first = calls["text"]
        images = [preview(latents) for _ in range(2)]
    finally:
        for handle in handles:
            handle.remove()
    assert first > 0 and calls == {"text": first, "denoiser": 0}
    assert torch.equal(*images)


def test_each_prompt_has_rows_of_its_own() -> None:
    pipe, call = cached_pipe("sd"), call_kwargs("sd", 2) | {"prompt": ["a red circle", "a blue star"]}
    torch.testing.assert_close(Preview(pipe, call)(run(pipe, call, "latent")), run(pipe, call, "pt"), **CLOSE)


def test_the_last_call_decides_what_is_decoded() -> None:
    pipe, call = cached_pipe("sd"), call_kwargs("sd", COUNT)
    latents = run(pipe, call, "latent")
    preview = Preview(pipe, call)
    preview(torch.zeros_like(latents))
    torch.testing.assert_close(preview(latents.flip(0)), run(pipe, call, "pt").flip(0), **CLOSE)


def test_a_half_precision_pipeline_takes_fp32_latents() -> None:
    pipe, call = copy.copy(cached_pipe("sd")), call_kwargs("sd", COUNT)
    for name in ("unet", "vae", "text_encoder"):
        vars(pipe)[name] = copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16)
    images = run(pipe, call, "pt")
    torch.testing.assert_close(Preview(pipe, call)(run(pipe, call, "latent").float()), images, atol=1e-2, rtol=0)


def test_a_pipeline_without_a_decoder_has_a_preview() -> None:
    pipe, call = GaussianPipeline(), {"batch_size": COUNT, "num_inference_steps": 5}
    latents = torch.rand(COUNT, 3, 1, 1)
    assert torch.equal(Preview(pipe, call)(latents), latents)


@pytest.mark.parametrize("output", [(torch.ones(1), None), {"frames": torch.ones(1)}])
def test_the_first_field_of_an_output_is_its_images(output: Any) -> None:
    assert torch.equal(first_output(output), torch.ones(1))
