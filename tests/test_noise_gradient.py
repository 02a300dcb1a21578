"""The two gradients of the reward: estimated against exact ones, and exact ones in half precision."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import cached_pipe, call_kwargs
from gaussian import GaussianPipeline
from soft_rewards import Function, Soft, images_of, in_precision, likeness, own_kwargs, redness, seeded
from torch import Tensor

from steer import ReNOPipeline
from steer.diffusion.differentiable import LOSS_SCALES
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.reno import Backprop, Estimate, NoiseToImage, ZeroOrder
from steer.rewards.parser import load_reward

ROWS, STEPS = 400, 3
HALF = [torch.bfloat16, torch.float16]


def chain_of(pipe: Any, reward: Any, size: int, **call: Any) -> NoiseToImage:
    return NoiseToImage(ParticleBatch(pipe, load_reward(reward), call.pop("prompt", None), size, call, "", ROWS))


def gaussian_chain(function: Function, start: Tensor | None = None, mean: float = 0.5) -> NoiseToImage:
    """ROWS searches from one place: as many estimates of one gradient."""
    start = 0.5 * torch.randn(3, 1, 1, generator=seeded(2)) if start is None else start
    latents = start.expand(ROWS, 3, 1, 1).clone()
    pipe = GaussianPipeline(mean=mean, std=0.2)
    return chain_of(pipe, Soft(function), ROWS, latents=latents, generator=seeded(), num_inference_steps=STEPS)


def linear(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1) @ images.new_tensor([1.0, -2.0, 0.5])


def quadratic(images: Tensor, prompts: Sequence[str]) -> Tensor:
    x = images.flatten(1)
    return 5 * x[:, 0] * x[:, 1] - 3 * x[:, 2] ** 2 + x[:, 0]


@pytest.mark.parametrize("function", [linear, quadratic])
def test_the_exact_gradient_is_the_chain_rule_by_hand(function: Function) -> None:
    """Images are an affine map of the noise, whose slope is known."""
    chain = gaussian_chain(function)
    slope = 1.0
    for gain, _, _ in GaussianPipeline(std=0.2).transitions(STEPS, eta=0.0):
        slope *= gain
    result = Backprop()(chain, chain.start, 0)
    assert result.images.min() > 0 and result.images.max() < 1
    x = result.images.flatten(1)
    by_hand = {
        linear: torch.tensor([1.0, -2.0, 0.5]).expand(ROWS, 3),
        quadratic: torch.stack([5 * x[:, 1] + 1, 5 * x[:, 0], -6 * x[:, 2]], dim=1),
    }[function]
    torch.testing.assert_close(result.gradient.flatten(1), slope * by_hand, rtol=1e-4, atol=1e-5)


def test_what_a_reward_cannot_see_has_no_slope() -> None:
    """It is shown images in [0, 1]."""
    chain = gaussian_chain(linear, torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1), mean=1.0)
    result = Backprop()(chain, chain.start, 0)
    assert (result.images[:, [0, 2]] > 1).all() and (result.images[:, 1] < 1).all()
    assert (result.gradient[:, [0, 2]] == 0).all() and (result.gradient[:, 1] < 0).all()
    torch.testing.assert_close(result.rewards[0], linear(result.images.clamp(0, 1), []))


@pytest.mark.few(2)
@pytest.mark.parametrize("distance", [0.01, 0.2])
@pytest.mark.parametrize("function", [linear, quadratic])
def test_the_estimate_is_unbiased(function: Function, distance: float) -> None:
    """Central differences are exact for these, and E[u uᵀ] = I."""
    chain, estimator = gaussian_chain(function), ZeroOrder(directions=6, distance=distance)
    exact = Backprop()(chain, chain.start, 0)
    estimates = torch.stack([estimator(chain, chain.start, number).gradient for number in range(3)])
    pooled = estimates.double().flatten(0, 1).flatten(1)
    error = pooled.mean(0) - exact.gradient[0].flatten()
    assert (error.abs() <= 4 * pooled.std(0) / len(pooled) ** 0.5 + 1e-6).all()
    truth = exact.gradient[0].flatten().double()  # Var of (g·u) u is |g|² + g_i², of a mean of six a sixth of it
    spread = ((truth.pow(2).sum() + truth**2) / 6).sqrt()
    torch.testing.assert_close(pooled.std(0), spread, rtol=0.15, atol=1e-3)
    rows = (estimates - exact.gradient).flatten(2)  # directions are new in every iteration, and in every row
    assert abs(torch.corrcoef(torch.stack([rows[0].flatten(), rows[1].flatten()]))[0, 1]) < 0.12
    assert abs(torch.corrcoef(torch.stack([rows[0].flatten(), rows[0].roll(1, 0).flatten()]))[0, 1]) < 0.12


def test_the_estimate_tells_images_and_rewards_of_the_noise_itself() -> None:
    chain, far = gaussian_chain(linear), ZeroOrder(directions=2, distance=0.5)
    exact, estimate = Backprop()(chain, chain.start, 0), far(chain, chain.start, 0)
    assert torch.equal(estimate.images, exact.images) and torch.equal(estimate.rewards, exact.rewards)
    assert torch.equal(far(chain, chain.start, 0).gradient, estimate.gradient)


def test_zero_order_raises_a_black_box() -> None:
    def coarse(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (
            torch.from_numpy((images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))).numpy()).mul(1000).round() / 1000
        )

    out = ReNOPipeline(GaussianPipeline(std=0.2), coarse)(
        num_particles=4, iterations=15, gradient="zero-order", generator=seeded(), num_inference_steps=STEPS, lr=2.0
    )
    assert (out.trace[-1].best > out.trace[0].best + 0.04).all() and out.stopped is None
    assert (out.rewards == out.trace[-1].best.sort(descending=True).values).all()


def test_zero_order_costs_what_it_says() -> None:
    cost = ReNOPipeline(cached_pipe("sd3"), redness)(
        num_particles=2, iterations=3, gradient=ZeroOrder(directions=4), **own_kwargs("sd3", steps=2)
    ).cost
    images = 2 * (2 * (2 * 4 + 1) + 1 + 1)  # the last iteration takes no step, and the result is made once more
    assert (cost.nfe, cost.decodes, cost.reward_calls, cost.gradients) == (2 * images + 2, images, images, 0)


# ---- half precision


def latents_of(name: str) -> Tensor:
    shape = {"flux": (2, 4, 16), "wan": (2, 4, 2, 8, 8)}.get(name, (2, 4, 4, 4))
    return torch.randn(shape, generator=seeded(1)).half().float()


def estimates(name: str, dtype: torch.dtype, function: Function) -> tuple[Estimate, Estimate, NoiseToImage]:
    """At the same noise in a precision and in fp32, and the chain of the first."""
    results = []
    for precision in (torch.float32, dtype):
        pipe = in_precision(cached_pipe(name), precision)
        latents = latents_of(name).to(precision)
        chain = chain_of(pipe, Soft(function), 2, **own_kwargs(name), latents=latents, generator=seeded())
        results.append(Backprop()(chain, chain.start, 0))
    return results[1], results[0], chain


def times(factor: float) -> Function:
    return lambda images, prompts: factor * likeness(images, prompts)


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_gradients_in_half_precision_are_those_of_fp32(name: str, dtype: torch.dtype) -> None:
    half, single, _ = estimates(name, dtype, likeness)
    assert half.gradient.dtype == torch.float32 and half.images.dtype != torch.float64
    difference = (half.gradient - single.gradient).flatten(1).norm(dim=1) / single.gradient.flatten(1).norm(dim=1)
    assert difference.max() < (0.02 if dtype == torch.float16 else 0.2)


def scaled_gradient(chain: NoiseToImage, scale: float) -> Tensor:
    leaf = chain.start.clone().requires_grad_()
    with torch.enable_grad():
        rewards, _ = chain.particle_batch.score(chain.differentiable_images(leaf, True))
    return torch.autograd.grad(rewards.sum() * scale, leaf)[0]


@pytest.mark.few(2)
@pytest.mark.parametrize("factor", [1e-7, 1e4])
@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_gradients_too_small_or_too_large_for_fp16_are_right(name: str, factor: float) -> None:
    half, single, chain = estimates(name, torch.float16, times(factor))
    torch.testing.assert_close(half.gradient / factor, single.gradient / factor, rtol=0.05, atol=2e-3)
    if factor < 1:
        assert (scaled_gradient(chain, 1.0) == 0).float().mean() > 0.5
    else:
        assert not scaled_gradient(chain, LOSS_SCALES[0]).isfinite().all()


def test_a_scale_that_is_too_large_costs_no_second_image() -> None:
    """The same graph is differentiated again with a smaller scale; no image is decoded or scored again."""
    asked: list[int] = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append(len(images))
        return 1e4 * likeness(images, prompts)

    half, _, chain = estimates("flux", torch.float16, counted)
    assert half.gradient.isfinite().all() and not scaled_gradient(chain, LOSS_SCALES[0]).isfinite().all()
    assert asked == [2] * 3  # fp32, fp16, and the line above


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_half_precision_pipelines_run_and_are_reproduced(name: str, dtype: torch.dtype) -> None:
    pipe = in_precision(cached_pipe(name), dtype)
    out = ReNOPipeline(pipe, Soft(likeness))(
        num_particles=2, iterations=4, generator=seeded(1), output_type="pt", **own_kwargs(name)
    )
    assert out.start is not None and out.start.noise.dtype == dtype and out.trace[0].norms.dtype == torch.float32
    assert (out.trace[-1].best > out.trace[0].best).all() and out.stopped is None
    assert torch.equal(images_of(pipe, **call_kwargs(name, 2, 1), **out.start.arguments()), out.images)
    assert {pipe.vae.dtype, next(pipe.vae.parameters()).dtype} == {dtype} and pipe.vae.config.force_upcast


def test_a_vae_that_needs_fp32_decodes_in_it_and_keeps_its_dtype() -> None:
    pipe = in_precision(cached_pipe("sdxl"), torch.float16)
    result: list[torch.dtype] = []
    note: Callable[..., None] = lambda module, given: result.append(given[0].dtype)  # noqa: E731
    pipe.vae.post_quant_conv.register_forward_pre_hook(note)
    chain = chain_of(pipe, Soft(likeness), 2, **own_kwargs("sdxl"), generator=seeded())
    before = {name: (value.data_ptr(), value.dtype) for name, value in pipe.vae.state_dict().items()}
    assert Backprop()(chain, chain.start, 0).gradient.abs().sum() > 0
    assert result and set(result) == {torch.float32}
    assert {name: (value.data_ptr(), value.dtype) for name, value in pipe.vae.state_dict().items()} == before
