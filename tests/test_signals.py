"""Signals of losses from several rewards, against values by hand and closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Normal

from steer.errors import InputError
from steer.training.constraints import Bound, Constraints, read_bounds
from steer.training.losses import DDPO, GRPO, LogProbs, group_advantages
from steer.training.signals import (
    filter_reliability,
    kept_samples,
    normalized_sum,
    pareto_advantages,
    pareto_front,
    within_prompt_correlation,
)


def test_components_are_standardised_before_their_sum() -> None:
    """By hand: (1, 3) and (30, 10) are (−1, 1) and (1, −1) in standard deviations, whatever their units."""
    components = {"a": torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "b": torch.tensor([[30.0, 10.0], [0.0, 4.0]])}
    total = normalized_sum(components, {"a": 2.0, "b": 1.0})
    torch.testing.assert_close(total, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]), rtol=1e-4, atol=1e-4)
    scaled = normalized_sum(components | {"b": 1000 * components["b"]}, {"a": 2.0, "b": 1.0})
    torch.testing.assert_close(scaled, total, rtol=1e-4, atol=1e-4)
    plain = group_advantages(2 * components["a"] + 1000 * components["b"], True)
    assert plain[0, 0] > 0 > total[0, 0]  # the sum of raw rewards is b alone


# Eight samples by two rewards; 5 equals 0, 6 ties with 1 in the first and is worse in the second.
POINTS = torch.tensor([[1, 9], [4, 7], [6, 5], [9, 1], [3, 3], [1, 9], [4, 6], [0, 10]], dtype=torch.float64)


def test_the_front_of_eight_points() -> None:
    expected = torch.tensor([True, True, True, True, False, True, False, True])
    assert torch.equal(pareto_front(POINTS[None])[0], expected)
    warped = torch.stack([POINTS[:, 0].exp(), POINTS[:, 1] ** 3], 1)
    assert torch.equal(pareto_front(warped[None])[0], expected)  # any monotone transform of one reward
    one = torch.tensor([[[1.0], [3.0], [3.0]]])
    assert torch.equal(pareto_front(one), torch.tensor([[False, True, True]]))  # one reward: the arg max set


def test_dominated_samples_have_no_advantage() -> None:
    advantages = pareto_advantages(POINTS[None])[0]
    assert not advantages[[4, 6]].any()
    z = (POINTS - POINTS.mean(0)) / POINTS.std(0, correction=0)
    torch.testing.assert_close(advantages[[0, 1, 2, 3, 5, 7]], z.sum(1)[[0, 1, 2, 3, 5, 7]], rtol=1e-5, atol=1e-5)


def test_filters_keep_the_ends_of_the_ranking() -> None:
    rewards = torch.tensor([[3.0, 1.0, 6.0, 2.0, 5.0, 4.0]])
    assert kept_samples(rewards, "none", 3, 0).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert kept_samples(rewards, "best", 3, 0).tolist() == [[2, 4, 5]]
    assert kept_samples(rewards, "best-worst", 3, 0).tolist() == [[1, 2, 4]]
    assert kept_samples(rewards, "best-worst", 4, 0).tolist() == [[1, 2, 3, 4]]
    drawn = [kept_samples(rewards, "best-random", 3, seed)[0].tolist() for seed in range(40)]
    assert all(len(set(some)) == 3 and {2, 4} <= set(some) for some in drawn)
    assert {n for some in drawn for n in some} == set(range(6))
    with pytest.raises(InputError, match="filter_keep must be from 1 to num_generations = 6, got 7"):
        kept_samples(rewards, "best", 7, 0)


@pytest.mark.parametrize("kind", ["best", "best-random", "best-worst"])
def test_kept_samples_have_the_coefficients_of_the_whole_group(kind: Any) -> None:
    """Up to the mean over m in place of K samples: the advantages are those of all samples."""
    generator = Generator().manual_seed(0)
    old, rewards = torch.randn(3, 6, 2, generator=generator).double(), torch.randn(3, 6, generator=generator).double()

    def coefficients(loss: Any, values: Tensor, signal: Tensor) -> Tensor:
        leaf = values.clone().requires_grad_(True)
        loss(LogProbs(leaf, values, values, 4), signal)[0].backward()
        return leaf.grad

    kept = kept_samples(rewards, kind, 4, 1)
    rows = torch.arange(3)[:, None]
    whole = coefficients(GRPO(), old, rewards)
    some = coefficients(DDPO(advantage_clip=math.inf), old[rows, kept], group_advantages(rewards, True)[rows, kept])
    torch.testing.assert_close(some * 4 / 6, whole[rows, kept])


@pytest.mark.parametrize("middle", [True, False])
def test_the_more_reliable_filter_is_recognised(middle: bool) -> None:
    """Noise in the middle ranks favours best-worst, noise at the ends favours no filter."""
    generator = Generator().manual_seed(0)
    truth = torch.randn(400, 16, generator=generator).double()
    noisy = truth.abs() < 0.8 if middle else truth.abs() > 0.8
    proxy = truth + torch.where(noisy, 0.9, 0.0) * torch.randn(400, 16, generator=generator).double()
    r2 = filter_reliability(proxy, truth, 8)
    ends = [r2["best-worst"], r2["best-random"], r2["best"]]
    assert ends == sorted(ends, reverse=True)
    assert (r2["best-worst"] > r2["none"] + 0.02) == middle or not middle
    assert r2["none"] > 0.3


def test_correlation_within_prompts_ignores_the_prompts() -> None:
    first = torch.tensor([[0.0, 1.0], [100.0, 101.0]])
    assert math.isclose(within_prompt_correlation(first, -first + torch.tensor([[0.0], [500.0]])), -1, rel_tol=1e-9)
    assert math.isnan(within_prompt_correlation(first, torch.zeros(2, 2)))


def test_bounds_are_read_and_refused() -> None:
    assert read_bounds({"a": "<= 0.3", "b": ">=-1e-2", "c": " = 2 "}) == (
        Bound("a", "<=", 0.3), Bound("b", ">=", -0.01), Bound("c", "=", 2.0),
    )  # fmt: skip
    for text in ("0.3", "< 0.3", "<= x", "<= nan", ">= inf"):
        with pytest.raises(InputError, match=r'constraints: a must be like "<= 0.3"'):
            read_bounds({"a": text})


def test_multipliers_move_by_the_slack_in_base_deviations() -> None:
    bounds = read_bounds({"a": ">= 2", "b": "<= 1", "c": "= 0"})
    first = {"a": torch.tensor([[0.0, 2.0]]), "b": torch.tensor([[1.0, 5.0]]), "c": torch.tensor([[-1.0, 3.0]])}
    trained = torch.tensor([[0.0, 6.0]])
    state = Constraints(bounds, rate=0.1).after(trained, first)
    assert state.scales == (3.0, 1.0, 2.0, 2.0)
    assert state.multipliers == pytest.approx((0.1, 0.1, -0.05))  # (2−1)/1, (3−1)/2, (0−1)/2
    mixed = (trained + 0.1 * 3 * first["a"] - 0.1 * 1.5 * first["b"] - 0.05 * 1.5 * first["c"]) / 1.25
    torch.testing.assert_close(state.signal(trained, first), mixed)
    slack = {"a": first["a"] + 50, "b": first["b"] - 50, "c": first["c"] - 50}
    later = state.after(trained, slack)
    assert later.multipliers[:2] == (0.0, 0.0) and later.multipliers[2] > 1  # 0 where nothing binds
    assert later.metrics()["multiplier/a"] == 0.0
    assert Constraints(bounds, rate=0.1).load_state(state.state()) == state
    with pytest.raises(InputError, match="one value of reward 'b'"):
        Constraints(bounds).after(trained, first | {"b": torch.ones(1, 2)})


def test_a_constrained_policy_ends_at_its_bound() -> None:
    """N(m, τ²), r_0 = x, E[−(x − a)²] ≥ −b: m* = a + √(b − τ²), μ* = 1/(2(m* − a)) in the units of the rewards."""
    tau, a, b = 0.3, 0.2, 1.0
    best = a + math.sqrt(b - tau**2)
    m = torch.tensor(0.0, requires_grad=True)
    constraints = Constraints(read_bounds({"near": f">= {-b}"}), rate=0.02)
    loss, generator, trail = GRPO(clip=math.inf, scale=False), Generator().manual_seed(0), []
    for _ in range(3000):
        x = m.detach() + tau * torch.randn(8, 16, generator=generator)
        log_prob = Normal(m, tau).log_prob(x)[..., None].double()
        bounded = {"near": -((x - a) ** 2)}
        constraints = constraints.after(x, bounded)
        old = log_prob.detach()
        (gradient,) = torch.autograd.grad(
            loss(LogProbs(log_prob, old, old, 1), constraints.signal(x, bounded).double())[0], m
        )
        with torch.no_grad():
            m -= 0.05 * gradient
        in_units = constraints.multipliers[0] * constraints.scales[0] / constraints.scales[1]
        trail.append((m.item(), in_units))
    means = torch.tensor(trail[1500:]).mean(0).tolist()
    assert math.isclose(means[0], best, rel_tol=0.02)
    assert math.isclose(means[1], 1 / (2 * (best - a)), rel_tol=0.1)
