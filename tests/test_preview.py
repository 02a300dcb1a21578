"""Previews against the pipelines' own decoding: the full VAE, other autoencoders, the linear map."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PIPELINES, cached_pipe, call_kwargs, with_scheduler
from diffusers import AutoencoderTiny, UNet2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from gaussian import GaussianPipeline
from schedulers import DIFFUSION, FLOW
from soft_rewards import Soft, in_precision, likeness, own_kwargs, redness, seeded
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor

from steer import FKSteeringPipeline, SelectionPipeline
from steer.diffusion import preview as preview_module
from steer.diffusion import preview as previews
from steer.diffusion.differentiable import differentiable
from steer.diffusion.preview import (
    PREVIEWS,
    RADIUS,
    LinearDecoder,
    LinearPreview,
    NormalEquations,
    Preview,
    build_preview,
    first_output,
)
from steer.errors import InputError

COUNT = 3
CLOSE = {"atol": 1e-6, "rtol": 0}


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


@pytest.mark.few(6)
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


@pytest.mark.few(8)
@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_every_scheduler_has_a_preview(scheduler: str) -> None:
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION[scheduler]())
    check_preview(pipe, "sd")


@pytest.mark.parametrize("scheduler", FLOW)
def test_every_flow_scheduler_has_a_preview(scheduler: str) -> None:
    check_preview(with_scheduler(cached_pipe("sd3"), FLOW[scheduler]()), "sd3")


@pytest.mark.few(2)
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


def test_the_pipeline_is_unchanged() -> None:
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


# Other decoders


IMAGES = [name for name in PIPELINES if name != "wan"]
CLOSER = {"atol": 1e-5, "rtol": 0}


def tiny(latents: int = 4, **config: Any) -> AutoencoderTiny:
    """Doubles the size, as the autoencoder of the tiny pipelines does, but scales latents in a way of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = AutoencoderTiny(
            latent_channels=latents,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            **{"scaling_factor": 0.7, "shift_factor": 0.2} | config,
        )
        for parameter in made.parameters():  # a fresh one is grey
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def run_named(pipe: Any, name: str, output_type: str) -> Tensor:
    return first_output(pipe(**call_kwargs(name, COUNT), generator=seeded(), output_type=output_type))


@pytest.mark.parametrize("name", IMAGES)
def test_the_pipelines_own_vae_as_decoder_gives_the_same_bits(name: str) -> None:
    pipe, call = cached_pipe(name), call_kwargs(name, COUNT)
    latents = run_named(pipe, name, "latent")
    assert torch.equal(Preview(pipe, call, 2, pipe.vae)(latents), Preview(pipe, call, 2)(latents))


@pytest.mark.few(4)
@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("name", IMAGES)
def test_another_autoencoder_decodes_as_if_it_were_the_pipelines_own(name: str, chunk: int) -> None:
    pipe, decoder = cached_pipe(name), tiny()
    with_it = copy.copy(pipe)
    with_it.vae = decoder
    images, latents = run_named(with_it, name, "pt"), run_named(with_it, name, "latent")
    preview = Preview(pipe, call_kwargs(name, COUNT), chunk, decoder)
    actual = preview(latents)
    assert images.std() > 0.05 and (images - Preview(pipe, call_kwargs(name, COUNT))(latents)).abs().max() > 0.1
    torch.testing.assert_close(actual, images, **CLOSER)
    assert preview.decodes == 0


def test_the_scaling_is_that_of_the_decoders_configuration() -> None:
    latents = torch.randn(COUNT, 4, 4, 4, generator=seeded())
    taesd = tiny(scaling_factor=1.0, shift_factor=0.0)  # as TAESD has them: it takes the latents as they are
    with torch.no_grad():
        expected = (taesd.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    for name in ("sd", "sdxl", "sd3", "pixart"):
        actual = Preview(cached_pipe(name), call_kwargs(name, COUNT), 8, taesd)(latents)
        torch.testing.assert_close(actual, expected, **CLOSER)
    # Flux packs 2 × 2 latents into one token.
    packed = F.pixel_unshuffle(latents, 2).flatten(2).movedim(1, 2)
    actual = Preview(cached_pipe("flux"), call_kwargs("flux", COUNT), 8, taesd)(packed)
    torch.testing.assert_close(actual, expected, **CLOSER)


def test_a_decoder_keeps_its_own_precision() -> None:
    pipe, call = copy.copy(cached_pipe("sd")), call_kwargs("sd", COUNT)
    latents = run_named(pipe, "sd", "latent")
    for name in ("unet", "vae", "text_encoder"):
        vars(pipe)[name] = copy.deepcopy(getattr(pipe, name)).to(torch.bfloat16)
    decoder = tiny()
    actual = Preview(pipe, call, 8, decoder)(latents)
    with torch.no_grad():
        given = latents.to(torch.bfloat16) / 0.7
        exact = (decoder.decode(given.float()).sample / 2 + 0.5).clamp(0, 1)
    assert decoder.dtype == torch.float32
    torch.testing.assert_close(actual.float(), exact, atol=4e-3, rtol=0)  # one rounding, at the end
    linear = LinearPreview(pipe, call)
    first, second = linear(latents), linear(latents)
    assert first.dtype == second.dtype == torch.bfloat16 and second.isfinite().all()


@pytest.mark.parametrize("guided", [False, True])
def test_an_fp16_vae_that_is_decoded_in_fp32_stays_fp16(guided: bool) -> None:
    """SDXL switches such a VAE to fp32 for the call and back."""
    own = in_precision(cached_pipe("sdxl"), torch.float16)
    assert own.vae.config.force_upcast
    pipe, call = differentiable(own, one_call=True) if guided else own, call_kwargs("sdxl", COUNT)
    latents = torch.randn(COUNT, 4, 4, 4, generator=seeded()).half()
    decoder = tiny().half()
    with torch.no_grad():
        expected = (decoder.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(Preview(pipe, call, 8, decoder)(latents), expected, atol=2e-3, rtol=0)
    linear, full = LinearPreview(pipe, call), Preview(pipe, call)
    first, second = linear(latents), linear(latents)
    assert torch.equal(first, full(latents)) and second.isfinite().all()
    assert (second - first).abs().mean() < 0.1
    assert own.vae.dtype == decoder.dtype == torch.float16


def test_a_decoder_follows_the_latents_to_their_device() -> None:
    decoder, ran = tiny(), []
    decoder.decoder.register_forward_hook(lambda module, *_: ran.append(next(module.parameters()).device.type))
    decode = preview_module._in_own_precision(decoder)
    for home in ("meta", "meta", "cpu"):
        latents = torch.zeros(1, 4, 4, 4, device=home)
        assert decode(latents, return_dict=False)[0].device.type == home
    assert ran == ["meta", "meta", "cpu"] and decoder.device.type == "cpu"


def test_decoder_and_pipeline_are_unchanged() -> None:
    pipe, decoder = cached_pipe("sd"), tiny()
    before, own, weights = dict(vars(pipe)), set(vars(decoder)), copy.deepcopy(decoder.state_dict())
    vae = set(vars(pipe.vae))
    latents = run_named(pipe, "sd", "latent")
    for option in ("linear", decoder):
        preview = build_preview(option, pipe, call_kwargs("sd", COUNT), 8)
        preview(latents)
        preview(latents)
    assert all(value is before[name] for name, value in vars(pipe).items()) and set(vars(pipe.vae)) == vae
    assert set(vars(decoder)) == own and all(torch.equal(decoder.state_dict()[name], w) for name, w in weights.items())


# The linear map


def explicit_features(z: Tensor, radius: int) -> np.ndarray:
    """Every site's neighbourhood, channel by channel and row by row, and a one: by loops."""
    n, c, h, w = z.shape
    rows = []
    for i, y, x in itertools.product(range(n), range(h), range(w)):
        around = [
            z[i, k, min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)].item()
            for k in range(c)
            for dy in range(-radius, radius + 1)
            for dx in range(-radius, radius + 1)
        ]
        rows.append([*around, 1.0])
    return np.array(rows)


def explicit_blocks(images: Tensor, scale: int) -> np.ndarray:
    n, _, height, width = images.shape
    return np.array(
        [
            images[i, :, y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].flatten().tolist()
            for i, y, x in itertools.product(range(n), range(height // scale), range(width // scale))
        ]
    )


@pytest.mark.parametrize(("radius", "scale"), [(0, 2), (1, 2), (2, 1), (1, 8)])
@pytest.mark.parametrize("ridge", [1e-12, 0.3])
def test_the_fit_is_that_of_least_squares(radius: int, scale: int, ridge: float) -> None:
    z, images = torch.randn(5, 2, 5, 6, generator=seeded()), torch.rand(5, 3, 5 * scale, 6 * scale, generator=seeded(1))
    equations = NormalEquations(radius, ridge)
    for some in (slice(0, 2), slice(2, 5)):
        equations.add(z[some], images[some])
    features, blocks = explicit_features(z, radius), explicit_blocks(images, scale)
    size = features.shape[1] - 1
    weight = np.sqrt(ridge * (features[:, :size] ** 2).sum() / size)
    # ‖Φ W − Y‖² + λ ‖W‖² is the error of least squares with rows √λ I below Φ and 0 below Y.
    below = np.concatenate([weight * np.eye(size), np.zeros((size, 1))], 1)
    targets = np.concatenate([blocks, np.zeros((size, blocks.shape[1]))])
    solution = np.linalg.lstsq(np.concatenate([features, below]), targets, rcond=None)[0]
    new = torch.randn(2, 2, 4, 3, generator=seeded(2))
    solved = equations.solve()(new)
    expected = explicit_features(new, radius) @ solution
    np.testing.assert_allclose(explicit_blocks(solved, scale), expected, atol=2e-5)


def test_an_exactly_linear_decoder_is_recovered() -> None:
    radius, scale, channels = 2, 4, 4
    weight = torch.randn(3 * scale**2, channels, 5, 5, generator=seeded()) / 10
    truth = LinearDecoder(weight, torch.randn(3 * scale**2, generator=seeded(1)))
    z = torch.randn(8, channels, 8, 8, generator=seeded(2))
    equations = NormalEquations(radius, ridge=1e-12)
    equations.add(z, truth(z))
    fitted = equations.solve()
    torch.testing.assert_close(fitted.weight, truth.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.bias, truth.bias, atol=1e-5, rtol=0)
    other = torch.randn(2, channels, 6, 10, generator=seeded(3))
    torch.testing.assert_close(fitted(other), truth(other), atol=1e-5, rtol=0)


def test_a_fit_of_few_sites_stays_finite_and_near_what_it_saw() -> None:
    """Two images of 4 × 4 sites are fewer than the 101 numbers that a neighbourhood and the bias have."""
    z, images = torch.randn(2, 4, 4, 4, generator=seeded()), torch.rand(2, 3, 8, 8, generator=seeded(1))
    equations = NormalEquations(RADIUS)
    equations.add(z, images)
    fitted = equations.solve()
    assert (fitted(z) - images).abs().mean() < 0.5 * (images - images.mean((0, 2, 3), keepdim=True)).abs().mean()
    assert fitted(torch.randn(20, 4, 4, 4, generator=seeded(2))).abs().max() < 5


@pytest.mark.parametrize("made", [(1, 3, 9, 8), (1, 3, 8, 16), (1, 4, 8, 8)])
def test_images_that_are_no_multiple_of_the_latents_are_refused(made: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="s × s pixels"):
        NormalEquations().add(torch.zeros(1, 4, 4, 4), torch.zeros(made))


@pytest.mark.parametrize("name", IMAGES)
def test_the_first_previews_are_the_full_decoders_and_the_later_ones_the_maps(name: str) -> None:
    pipe, call = cached_pipe(name), call_kwargs(name, COUNT)
    latents = run_named(pipe, name, "latent")
    linear, full = LinearPreview(pipe, call, 2), Preview(pipe, call, 2)
    assert torch.equal(linear(latents), full(latents)) and linear.decodes == full.decodes == COUNT
    later = linear(latents.flip(0) * 0.9)
    assert linear.decodes == COUNT and later.shape == (COUNT, 3, 8, 8)
    assert later.min() >= 0 and later.max() <= 1
    spatial = latents
    if name == "flux":
        spatial = F.pixel_shuffle(latents.movedim(1, 2).unflatten(2, (2, 2)), 2)
    z = spatial.flip(0) * 0.9 / 0.5 + (0.1 if name in ("sd3", "flux") else 0.0)
    assert linear.decoder is not None
    torch.testing.assert_close(later, (linear.decoder(z) / 2 + 0.5).clamp(0, 1), **CLOSER)
    with torch.no_grad():  # and the map is the one fitted to what the full decoder makes
        first = spatial / 0.5 + (0.1 if name in ("sd3", "flux") else 0.0)
        equations = NormalEquations()
        equations.add(first, pipe.vae.decode(first).sample)
    torch.testing.assert_close(linear.decoder.weight, equations.solve().weight, atol=1e-4, rtol=0)


# In steering


@pytest.mark.few(4)
@pytest.mark.parametrize("option", ["linear", "tiny"])
@pytest.mark.parametrize("name", IMAGES)
def test_only_previews_change(name: str, option: str) -> None:
    pipe, shown = cached_pipe(name), []
    own = {"num_particles": COUNT, "lam": 0.0, "output_type": "pt", **own_kwargs(name, 9)}
    if name == "img2img":
        own["image"] = call_kwargs(name, COUNT)["image"]
    plain = FKSteeringPipeline(pipe, redness)(generator=seeded(), **own)
    chosen = tiny() if option == "tiny" else option
    other = FKSteeringPipeline(pipe, redness)(
        generator=seeded(), preview=chosen, on_step=lambda report: shown.append(report.previews), **own
    )
    assert torch.equal(other.images, plain.images) and torch.equal(other.latents, plain.latents)
    assert torch.equal(other.rewards, plain.rewards)
    changed = [not torch.equal(a.rewards, b.rewards) for a, b in zip(other.history, plain.history, strict=True)]
    assert changed == [option == "tiny" or place > 0 for place in range(len(changed))] and len(changed) > 1
    read = COUNT * len(changed)
    full = {"tiny": 0, "linear": COUNT}[option]
    assert (plain.cost.decodes, plain.cost.other_decodes) == (read + COUNT, 0)
    assert (other.cost.decodes, other.cost.other_decodes) == (full + COUNT, read - full)
    assert sum(images is not None for images in shown) == len(changed)


@pytest.mark.parametrize("option", ["linear", "tiny"])
@pytest.mark.parametrize("method", [FKSteeringPipeline, SelectionPipeline])
def test_finished_images_are_the_full_decoders(method: Any, option: str) -> None:
    pipe = cached_pipe("sd")
    chosen = tiny() if option == "tiny" else option
    own = own_kwargs("sd", 6) | {"num_particles": 4, "generator": seeded(), "output_type": "pt"}
    out = method(pipe, Soft(lambda images, prompts: 100 * redness(images, prompts)))(preview=chosen, **own)
    assert any(not torch.equal(a, torch.arange(4)[None]) for a in out.ancestors)  # it was steered
    torch.testing.assert_close(out.images, Preview(pipe, call_kwargs("sd", 4))(out.latents), **CLOSER)
    torch.testing.assert_close(out.rewards[0], 100 * redness(out.images, []), atol=1e-4, rtol=0)


def test_gradients_are_those_of_the_decoder() -> None:
    pipe, decoder = differentiable(in_precision(cached_pipe("sd"), torch.float64), one_call=True), tiny().double()
    call = call_kwargs("sd", COUNT)
    latents = torch.randn(COUNT, 4, 4, 4, generator=seeded(), dtype=torch.float64)
    linear = LinearPreview(pipe, call)
    linear(latents)
    assert linear.decoder is not None
    scaled = {"tiny": 0.7, "linear": 0.5}
    decode = {"tiny": lambda z: decoder.decode(z).sample, "linear": linear.decoder}
    for name, preview in {"tiny": Preview(pipe, call, 8, decoder), "linear": linear}.items():
        x = latents.clone().requires_grad_(True)
        with torch.enable_grad():
            (actual,) = torch.autograd.grad(likeness(preview(x), ["a"] * COUNT).sum(), x)
            images = (decode[name](x / scaled[name]) / 2 + 0.5).clamp(0, 1)
            (expected,) = torch.autograd.grad(likeness(images, ["a"] * COUNT).sum(), x)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("option", ["linear", "tiny"])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_guided_runs_go_through_cheap_previews(name: str, option: str) -> None:
    pipe, reward = cached_pipe(name), Soft(likeness)
    own = own_kwargs(name, 5) | {"num_particles": 2, "lam": 5.0, "output_type": "pt"}

    def rewards(guidance: float) -> Tensor:
        chosen = tiny() if option == "tiny" else option
        options = {"reward_guidance": guidance, "eta": 1.0, "ess_threshold": 0.01, "preview": chosen}
        out = FKSteeringPipeline(pipe, reward)(generator=seeded(), **own, **options)
        full = {"tiny": 0, "linear": 2}[option]
        read = 2 * len(out.history)
        assert (out.cost.decodes, out.cost.other_decodes) == (full + 2, read - full) and read > full
        assert out.cost.gradients == read
        return out.rewards

    assert not torch.equal(rewards(1.0), rewards(1e-6)) and rewards(1.0).isfinite().all()


# What is refused


def test_videos_and_pixel_pipelines_are_refused_before_the_run() -> None:
    wan, calls = copy.copy(cached_pipe("wan")), []
    handle = wan.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        for option in ("linear", tiny()):
            with pytest.raises(InputError, match="decodes video"):
                FKSteeringPipeline(wan, redness)(preview=option, num_particles=2, **own_kwargs("wan", 5))
            with pytest.raises(InputError, match="has no VAE"):
                FKSteeringPipeline(GaussianPipeline(), redness)("x", preview=option, num_particles=2)
    finally:
        handle.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("liner", "did you mean linear"),
        ("tiny", "unknown preview 'tiny'"),  # a word of the command line, where a model is known
        (3, "got one of type int"),
        (UNet2DModel, "got one of type"),
        (tiny(latents=16), "takes latents with 16 channels, .* have 4"),
    ],
)
def test_what_is_no_decoder_is_refused(option: Any, says: str) -> None:
    for method in (FKSteeringPipeline, SelectionPipeline):
        with pytest.raises(InputError, match=says) as error:
            method(cached_pipe("sd"), redness)(preview=option, num_particles=2, **own_kwargs("sd", 5))
        assert "\n" not in str(error.value)


def test_the_table_holds_what_the_page_names() -> None:
    assert set(PREVIEWS) == {"full", "linear"} and previews.PREVIEWS["full"] is Preview
