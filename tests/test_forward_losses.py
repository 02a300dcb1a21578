"""Losses of the forward process: values by hand, gradients by their written derivatives, what they do to a Gaussian."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.errors import InputError
from steer.training.losses.forward import AWM, NFT, RAM, DiffusionDPO, ForwardLoss, NoisyPredictions


def scalar(new: float, old: float | None = None, reference: float | None = None, **other: Any) -> NoisyPredictions:
    """One sample of one element whose x0 is 0 and whose output is x̂0 itself."""
    values = [None if one is None else torch.tensor([[one]], dtype=torch.float64) for one in (new, old, reference)]
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return NoisyPredictions(zero, zero, other.get("a", 0.0), other.get("b", 1.0), other.get("noise", 0.5), *values)


def value(loss: ForwardLoss, predictions: NoisyPredictions, *signal: float) -> float:
    return loss(predictions, torch.tensor(signal, dtype=torch.float64))[0].mean().item()


def test_nft_by_hand() -> None:
    """o⁺ = 1.5 and o⁻ = .5, of weights 1.5 and .5: 5 [.75 · 1.5 + .25 · .5] / .5."""
    assert value(NFT(beta=0.5), scalar(2.0, 1.0), 2.5) == pytest.approx(12.5)
    assert value(NFT(beta=0.5), scalar(2.0, 1.0), 99.0) == pytest.approx(15.0), "r is 1 at most"
    assert value(NFT(beta=0.5), scalar(2.0), 0.0) == pytest.approx(20.0), "the present weights drew the sample"


@pytest.mark.parametrize(
    ("weighting", "ratio"),
    [
        ("uniform", math.exp(-3)),
        ("noise", math.exp(-1.5)),
        ("noise-squared", math.exp(-0.75)),
        ("huber", math.exp(-0.5)),  # ½ (2 − 1)
    ],
)
def test_awm_by_hand(weighting: Any, ratio: float) -> None:
    """Errors 4 and 1 at t = ½: a worse fit of a good sample is not clipped, that of a bad sample is."""
    loss = AWM(clip=0.2, weighting=weighting)
    assert value(loss, scalar(2.0, 1.0), 1.0) == pytest.approx(-ratio)
    assert value(loss, scalar(2.0, 1.0), -1.0) == pytest.approx(0.8)
    assert value(loss, scalar(2.0), 3.0) == pytest.approx(-3.0), "the ratio is 1 where the present weights drew it"


def test_ram_by_hand() -> None:
    """R = .5 · 2 and a residual of −2 about the reference's 1: (2 + 1)²."""
    assert value(RAM(scale=0.5), scalar(2.0, None, 1.0), 2.0) == pytest.approx(9.0)


def pair(new: tuple[float, float], reference: tuple[float, float]) -> NoisyPredictions:
    two = [torch.tensor(one, dtype=torch.float64)[:, None] for one in (new, reference)]
    return NoisyPredictions(torch.zeros_like(two[0]), torch.zeros_like(two[0]), 0.0, 1.0, 0.5, two[0], None, two[1])


def test_diffusion_dpo_by_hand() -> None:
    """Excess errors −3 and 3, β = .1: z = .3."""
    log_sigmoid = [-math.log1p(math.exp(-z)) for z in (0.3, -0.3)]
    assert value(DiffusionDPO(beta=0.1), pair((1, 2), (2, 1)), 1.0, 0.0) == pytest.approx(-log_sigmoid[0])
    soft = -0.8 * log_sigmoid[0] - 0.2 * log_sigmoid[1]
    assert value(DiffusionDPO(beta=0.1), pair((1, 2), (2, 1)), 0.8, 0.2) == pytest.approx(soft)
    start, metrics = DiffusionDPO()(pair((1, 2), (1, 2)), torch.tensor([1.0, 0.0]))
    assert start.mean().item() == pytest.approx(math.log(2)) and metrics["accuracy"].mean() == 0.5


def random_case(seed: int = 0) -> tuple[NoisyPredictions, Tensor]:
    """Four samples of six elements under a flow's weights at t = .3; the old policy is the present one."""
    generator = torch.Generator().manual_seed(seed)
    x0, x_t, new, reference = torch.randn(4, 4, 2, 3, generator=generator, dtype=torch.float64)
    signal = torch.randn(4, generator=generator, dtype=torch.float64)
    leaf = new.requires_grad_(True)
    return NoisyPredictions(x0, x_t, 1.0, -0.3, 0.3, leaf, new.detach().clone(), reference), signal


def derivatives(one: NoisyPredictions, signal: Tensor) -> dict[ForwardLoss, Tensor]:
    """∂/∂o_θ of the sum of each loss where θ is the old policy, as derived from its equation."""
    wide, size = signal[:, None, None], one.new[0].numel()
    clean, target = one.clean(one.new).detach(), (one.x0 - one.x_t) / -0.3
    weight = (clean - one.x0).abs().mean((1, 2), keepdim=True)
    residual = one.new.detach() - target
    goal = one.reference - 0.5 * wide * residual  # type: ignore[operator]
    excess = (residual**2).mean((1, 2)) - ((one.reference - target) ** 2).mean((1, 2))
    z = -0.05 * (excess[::2] - excess[1::2])
    choice = signal.sigmoid()[::2]
    slope = (-0.1 * (z.sigmoid() - choice) * 2).repeat_interleave(2)  # both rows have the pair's loss
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    return {
        NFT(beta=0.3, advantage_clip=2.0): 2 * wide.clamp(-2, 2) * (clean - one.x0) / weight * -0.3 / size,
        AWM(weighting="noise"): wide * 0.3 * 2 * residual / size,
        AWM(weighting="huber"): wide * 0.3 * residual / size / (residual**2).mean((1, 2), keepdim=True).sqrt(),
        RAM(scale=0.5): 2 * (one.new.detach() - goal) / size,
        DiffusionDPO(beta=0.1): (slope * sign)[:, None, None] * residual / size,
    }


@pytest.mark.parametrize("place", range(5))
def test_gradients_are_those_of_the_written_formulas(place: int) -> None:
    one, signal = random_case()
    loss, truth = list(derivatives(one, signal).items())[place]
    if isinstance(loss, DiffusionDPO):
        choice = signal.sigmoid()
        signal = torch.stack([choice[::2], 1 - choice[::2]], 1).flatten()
    loss(one, signal)[0].sum().backward()
    torch.testing.assert_close(one.new.grad, truth, atol=1e-10, rtol=1e-8)


GRID = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(512, dtype=torch.float64) + 0.5) / 512)
GRID = GRID / GRID.square().mean().sqrt()


def gaussian(theta: Tensor, samples: Tensor, reference: float = 0.0) -> NoisyPredictions:
    """At pure noise the output is one number, the mean of x0; the samples are N(θ, 1)."""
    x0, new = samples[:, None], theta.expand(len(samples), 1)
    return NoisyPredictions(x0, torch.zeros_like(x0), 0.0, 1.0, 1.0, new, new.detach(), torch.full_like(x0, reference))


def descend(loss: ForwardLoss, steps: int, scale: float = 1.0) -> float:
    """Learn the mean of N(θ, 1) from θ = .2 on its own samples, with the reward r(x) = scale · x as the advantage."""
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        samples = theta.detach() + GRID
        (gradient,) = torch.autograd.grad(loss(gaussian(theta, samples), scale * GRID)[0].mean(), theta)
        theta = (theta - 0.1 * gradient).detach().requires_grad_(True)
    return theta.item()


def test_ram_learns_the_reference_tilted_by_the_reward() -> None:
    """N(0, 1) tilted by exp(λ x) is N(λ, 1); the loss's own fixed point is that one, from 0.2 too."""
    assert descend(RAM(advantage_clip=math.inf), 200, scale=0.7) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("loss", [NFT(), NFT(beta=0.1), AWM()])
def test_nft_and_awm_go_uphill(loss: ForwardLoss) -> None:
    """Along the reward, by the first step's expectation, and against it where its sign is turned."""
    up, down = descend(loss, 1) - 0.2, descend(loss, 1, scale=-1.0) - 0.2
    assert up > 1e-3 and down == pytest.approx(-up, rel=1e-6)
    one_over_w = (1 / GRID.abs().clamp(min=1e-5)).numpy()
    truth = {
        NFT: 0.1 * 2 * GRID.square().numpy() @ one_over_w / len(GRID),  # 2 E[A (x − θ)/w], no A beyond 5
        AWM: 0.1 * 2.0,  # 2 E[A (x − θ)]
    }[type(loss)]
    assert up == pytest.approx(float(truth), rel=1e-6)


def test_dpo_moves_from_the_rejected_gaussian_to_the_preferred_one() -> None:
    """N(1, .1²) preferred to N(−1, .1²): accuracy becomes 1, and the mean goes towards the preferred one."""
    theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    samples = torch.stack([1 + 0.1 * GRID, -1 + 0.1 * GRID.flip(0)], 1).flatten()
    signal, accuracies = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(GRID)), []
    for _ in range(20):
        losses, metrics = DiffusionDPO(beta=1.0)(gaussian(theta, samples), signal)
        accuracies.append(metrics["accuracy"].mean().item())
        (gradient,) = torch.autograd.grad(losses.mean(), theta)
        theta = (theta - 0.1 * gradient).detach().requires_grad_(True)
    assert accuracies[0] == 0.5 and accuracies[-1] == 1.0 and theta.item() > 0.5


def test_the_gradient_of_diffusion_dpo_in_a_denoiser_of_one_layer() -> None:
    """o = W x_t: ∂L/∂W = (β/D) σ(−z) [(W x_a − o*_a) x_aᵀ − (W x_b − o*_b) x_bᵀ], with the excess errors in z."""
    generator = torch.Generator().manual_seed(0)
    x_t, x0 = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    weights, before = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    leaf = weights.clone().requires_grad_(True)
    one = NoisyPredictions(x0, x_t, 1.0, -0.3, 0.3, x_t @ leaf.T, None, x_t @ before.T)
    DiffusionDPO(beta=0.7)(one, torch.tensor([1.0, 0.0], dtype=torch.float64))[0].mean().backward()
    target = (x0 - x_t) / -0.3
    residual, base = x_t @ weights.T - target, x_t @ before.T - target
    excess = (residual**2 - base**2).mean(1)
    z = -0.35 * (excess[0] - excess[1])
    slope = 0.7 / 3 * torch.sigmoid(-z)
    truth = slope * (torch.outer(residual[0], x_t[0]) - torch.outer(residual[1], x_t[1]))
    torch.testing.assert_close(leaf.grad, truth)


def test_shuffled_preferences_teach_dpo_nothing() -> None:
    """The same pairs with labels of a coin: the mean stays within 3 standard errors of the reference's."""
    samples = torch.stack([1 + 0.1 * GRID, -1 + 0.1 * GRID.flip(0)], 1).flatten()
    coins = torch.rand(len(GRID), generator=torch.Generator().manual_seed(0)).round().double()
    ends = {}
    for name, labels in (("shuffled", coins), ("true", torch.ones_like(coins))):
        theta, signal = torch.tensor(0.0, dtype=torch.float64), torch.stack([labels, 1 - labels], 1).flatten()
        for _ in range(200):
            theta.requires_grad_(True)
            losses = DiffusionDPO(beta=1.0)(gaussian(theta, samples), signal)[0].mean()
            theta = (theta - 0.1 * torch.autograd.grad(losses, theta)[0]).detach()
        ends[name] = theta.item()
    # The errors of a pair differ by 4 θ: z = 2 θ, and σ(2 θ) is the share of heads, whose standard error is 1/(2 √n).
    share = coins.mean().item()
    assert ends["shuffled"] == pytest.approx(math.log(share / (1 - share)) / 2, abs=0.01)
    assert abs(ends["shuffled"]) < 3 / len(GRID) ** 0.5 < 0.15 and ends["true"] > 1


def test_what_a_loss_cannot_do_is_one_line() -> None:
    one, signal = random_case()
    with pytest.raises(InputError, match="compares with the reference"):
        RAM()(replace(one, reference=None), signal)
    with pytest.raises(InputError, match="do not depend on the denoiser"):
        replace(one, b=0.0)
    with pytest.raises(InputError, match="beta must be above 0"):
        NFT(beta=0.0)
