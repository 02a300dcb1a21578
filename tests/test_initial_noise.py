"""Noise optimised in pipelines that pack, scale or mix it with an image: the first image is the plain pipeline's."""

import functools
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT, cached_pipe, t5_encoder, t5_tokenizer, with_scheduler
from diffusers import (
    AutoencoderKLLTXVideo,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    ImagePipelineOutput,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from gaussian import GaussianPipeline
from PIL import Image
from soft_rewards import Soft, images_of, likeness, own_kwargs, seeded
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from steer import NoiseSearchPipeline, ReNOPipeline
from steer.diffusion.draws import recorded_draws, replaced_draw
from steer.errors import UnsupportedPipelineError
from steer.pipelines.initial_noise import screen_initial_noise
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.reno import Backprop, NoiseToImage

REWARD = Soft(likeness)
STEPS = 4


def picture(side: int) -> Image.Image:
    ramp = np.linspace(0, 255, side * side * 3).reshape(side, side, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def same_parts(cls: Any, name: str, scheduler: Any = None, **options: Any) -> Any:
    """Another pipeline on the models of a tiny one."""
    pipe = cached_pipe(name)
    components = pipe.components | ({} if scheduler is None else {"scheduler": scheduler})
    taken = inspect.signature(cls.__init__).parameters
    other = cls(**{key: part for key, part in components.items() if key in taken}, **options)
    other.set_progress_bar_config(disable=True)
    return other


def ltx(cls: Any) -> Any:
    fours, fives = 4, 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * fours,
            decoder_block_out_channels=(8,) * fours,
            layers_per_block=(1,) * fives,
            decoder_layers_per_block=(1,) * fives,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * fives,
            upsample_residual=(False,) * fours,
            upsample_factor=(1,) * fours,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
        ).eval()
        transformer = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        ).eval()
        encoder = t5_encoder(T5EncoderModel, T5Config)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    pipe = cls(FlowMatchEulerDiscreteScheduler(), vae, encoder, t5_tokenizer(), transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4
        ).eval()
    pipe = DiTPipeline(transformer, cached_pipe("sd").vae, cached_pipe("sd").scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(name: str, **options: Any) -> dict[str, Any]:
    return own_kwargs(name, STEPS) | options


VIDEO = {"prompt": PROMPT, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
EULER = EulerDiscreteScheduler(beta_schedule="scaled_linear")  # its init_noise_sigma is 14.6
FROM_IMAGE: dict[str, Any] = {"image": picture(8), "strength": 0.8}

Case = tuple[Callable[[], Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "sd": (lambda: cached_pipe("sd"), text("sd")),
    "sdxl": (lambda: cached_pipe("sdxl"), text("sdxl")),
    "sd3": (lambda: cached_pipe("sd3"), text("sd3")),
    "flux": (lambda: cached_pipe("flux"), text("flux")),
    "sd img2img": (
        lambda: cached_pipe("img2img"),
        text("img2img", image=picture(8)),
    ),
    "sdxl img2img": (
        lambda: same_parts(StableDiffusionXLImg2ImgPipeline, "sdxl", EULER, add_watermarker=False),
        {"prompt": PROMPT, "num_inference_steps": STEPS, **FROM_IMAGE},
    ),
    "sdxl inpaint": (
        lambda: same_parts(StableDiffusionXLInpaintPipeline, "sdxl", EULER, add_watermarker=False),
        text("sdxl", image=picture(8), mask_image=Image.new("L", (8, 8), 255), strength=0.7),
    ),
    "flux img2img": (lambda: same_parts(FluxImg2ImgPipeline, "flux"), text("flux", **FROM_IMAGE)),
    "ltx": (functools.partial(ltx, LTXPipeline), VIDEO | {"num_inference_steps": 2}),
    "ltx i2v": (
        functools.partial(ltx, LTXImageToVideoPipeline),
        VIDEO | {"num_inference_steps": 2, "image": picture(32)},
    ),
    "wan v2v": (
        lambda: same_parts(WanVideoToVideoPipeline, "wan"),
        {"prompt": PROMPT, "height": 16, "width": 16, "num_inference_steps": STEPS, "max_sequence_length": 10}
        | {"video": [picture(16)] * 3, "strength": 0.8},
    ),
    "dit": (dit, {"class_labels": [3], "num_inference_steps": STEPS, "guidance_scale": 1.0}),
}


@functools.cache
def built(name: str) -> Any:
    return CASES[name][0]()


def chain_of(name: str, seed: int = 1, size: int = 1) -> NoiseToImage:
    call = CASES[name][1] | {"generator": seeded(seed)}
    prompt = call.pop("prompt", None)
    return NoiseToImage(ParticleBatch(built(name), REWARD, prompt, size, call, "" if prompt is None else None))


def plain(name: str, seed: int = 1) -> Tensor:
    return images_of(built(name), **CASES[name][1], generator=seeded(seed))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CASES)
def test_the_first_image_is_the_plain_pipelines(name: str) -> None:
    chain = chain_of(name)
    for images in (chain(chain.start), chain.fast_images(chain.start)):
        assert torch.equal(images, plain(name))
    other = chain.fast_images(chain.start.flip(-1))
    assert other.shape == plain(name).shape and not torch.allclose(other, plain(name), atol=1e-4)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_a_finite_difference(name: str) -> None:
    chain = chain_of(name)
    result = Backprop(checkpointing=False)(chain, chain.start, 0)
    assert result.gradient is not None and torch.allclose(result.images, plain(name), atol=1e-4)
    u = result.gradient / result.gradient.norm()  # along it the slope is its length, the largest there is
    with torch.no_grad():
        ahead, behind = (
            chain.particle_batch.score(chain.fast_images(chain.start + side * 2e-2 * u))[0].item() for side in (1, -1)
        )
    assert (ahead - behind) / 4e-2 == pytest.approx(result.gradient.norm().item(), rel=0.05)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CASES)
def test_the_noise_makes_the_image_again(name: str) -> None:
    pipe, call = built(name), CASES[name][1]
    out = ReNOPipeline(pipe, REWARD)(**call | {"iterations": 3}, generator=seeded(2), num_particles=1, output_type="pt")
    assert out.start is not None and len(out.trace) == 3
    with out.start.applied():
        again = images_of(pipe, **call | {"guidance_scale": call.get("guidance_scale", 0.0)}, **out.start.arguments())
    assert torch.equal(again, out.images)


@pytest.mark.parametrize("name", ["sd img2img", "flux img2img", "sdxl img2img"])
def test_images_that_share_a_generator_begin_as_the_plain_ones(name: str) -> None:
    """The autoencoder draws its sample of the image from it, too."""
    chain = chain_of(name, size=2)
    call = CASES[name][1] | {"num_images_per_prompt": 2, "generator": seeded(1)}
    assert torch.equal(chain(chain.start), images_of(built(name), **call))


@pytest.mark.parametrize("name", ["sd", "img2img"])
def test_what_a_stochastic_solver_draws_stays_the_same(name: str) -> None:
    own = cached_pipe(name)
    pipe = with_scheduler(own, EulerAncestralDiscreteScheduler.from_config(own.scheduler.config))
    call = own_kwargs(name, STEPS) | ({"image": picture(8)} if name == "img2img" else {})
    first: list[Tensor] = []
    NoiseSearchPipeline(pipe, REWARD)(
        **call,
        iterations=1,
        num_particles=1,
        generator=seeded(3),
        on_iteration=lambda iteration: first.append(iteration.images),
    )
    assert torch.equal(first[0], images_of(pipe, **call, generator=seeded(3)))


class ArrayPipeline(GaussianPipeline):
    """Its images are arrays, whatever is asked for."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 10,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "np",
    ) -> Any:
        images = super().__call__(batch_size, num_inference_steps, generator, 0.0, latents).images
        return ImagePipelineOutput(images=images.permute(0, 2, 3, 1).numpy())


def test_pipelines_whose_images_are_arrays_take_a_black_box_gradient() -> None:
    pipe, call = ArrayPipeline(), {"iterations": 2, "num_particles": 1, "reward_prompt": ""}
    with pytest.raises(UnsupportedPipelineError, match=r"ArrayPipeline lets no gradients through.*zero-order"):
        ReNOPipeline(pipe, REWARD)(**call, generator=seeded())
    out = ReNOPipeline(pipe, REWARD)(**call, generator=seeded(), gradient="zero-order", output_type="pt")
    assert len(out.trace) == 2


def test_noise_that_torch_does_not_draw_is_refused() -> None:
    pipe = with_scheduler(cached_pipe("img2img"), cached_pipe("img2img").scheduler)

    def prepare(image: Any, timestep: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32))

    vars(pipe)["prepare_latents"] = prepare
    with pytest.raises(UnsupportedPipelineError, match="Img2ImgPipeline does not start from a normal draw"):
        ReNOPipeline(pipe, REWARD)(**text("img2img", image=picture(8)), iterations=1, num_particles=1)


def test_a_control_image_that_is_sampled_from_the_global_numbers_hides_no_start() -> None:
    """As that of Stable Diffusion 3's ControlNet, whose autoencoder draws without the call's generator."""
    pipe = with_scheduler(cached_pipe("controlnet"), cached_pipe("controlnet").scheduler)
    prepare = pipe.prepare_image

    def sampled(*args: Any, **kwargs: Any) -> Tensor:
        image = prepare(*args, **kwargs)
        return image + 1e-3 * DiagonalGaussianDistribution(torch.zeros(1, 6, *image.shape[2:])).sample()

    vars(pipe)["prepare_image"] = sampled
    before = torch.get_rng_state()
    run = ReNOPipeline(pipe, REWARD)(**own_kwargs("controlnet", 1), iterations=1, num_particles=1, generator=seeded())
    assert len(run.trace) == 1
    torch.set_rng_state(before)


def test_only_the_numbered_draw_of_this_thread_is_replaced() -> None:
    noise = torch.full((2, 3), 7.0, requires_grad=True)
    g, h = seeded(4), seeded(4)
    expected = [torch.randn(2, 3, generator=g) for _ in range(3)]
    with replaced_draw(noise, 1), ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda k: [torch.randn(2, 3, generator=k) for _ in range(2)], seeded(4)).result()
        drawn = [torch.randn(2, 3, generator=h) for _ in range(2)] + [torch.empty(2, 3).normal_(generator=h)]
    assert torch.equal(drawn[0], expected[0]) and torch.equal(drawn[1], noise) and torch.equal(drawn[2], expected[2])
    assert all(map(torch.equal, other, expected[:2])) and torch.equal(g.get_state(), h.get_state())
    assert torch.equal(torch.autograd.grad(drawn[1].sum(), noise)[0], torch.ones(2, 3))
    with pytest.raises(KeyError), replaced_draw(noise, 0):
        raise KeyError
    assert torch.equal(torch.randn(2, 3, generator=seeded(4)), expected[0])
    with recorded_draws() as draws, replaced_draw(noise, 0):  # rows with generators of their own
        rows = [torch.randn((1, 3), generator=seeded(row)) for row in range(3)]
    assert [row.mean().item() == 7 for row in rows] == [True, True, False] and len(draws) == 3


def test_two_threads_optimise_at_once() -> None:
    def best(seed: int) -> Tensor:
        pipe, call = built("sdxl img2img"), CASES["sdxl img2img"][1]
        out = ReNOPipeline(pipe, REWARD)(
            **call, iterations=3, num_particles=1, generator=seeded(seed), output_type="pt"
        )
        images: Tensor = out.images
        return images

    alone = [best(1), best(2)]
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(best, [1, 2]), alone))


def test_screening_refuses_latents_that_are_not_the_noise() -> None:
    """The first frame is the image's, and the solver steps the other ones alone."""
    call = CASES["ltx i2v"][1] | {"num_frames": 17}
    with pytest.raises(UnsupportedPipelineError, match="LTXImageToVideoPipeline does not take its own starting noise"):
        screen_initial_noise(built("ltx i2v"), REWARD, keep=1, candidates=2, steps=1, **call, generator=seeded())
    call = CASES["ltx"][1] | {"generator": seeded()}
    assert screen_initial_noise(built("ltx"), REWARD, keep=1, candidates=2, steps=1, **call).noise.shape[0] == 1
