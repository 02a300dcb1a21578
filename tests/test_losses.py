"""Losses against numbers derived by hand, their symmetries, and the optima of the papers."""

import json
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from soft_rewards import seeded
from torch import Tensor

from steer.errors import InputError
from steer.training.losses import (
    D3PO,
    DDPO,
    DNO,
    GRPO,
    PRDP,
    BRAIn,
    D3POTrajectory,
    Filtered,
    LogProbs,
    Loss,
    PerPromptStatTracker,
)

SEEDS = st.integers(0, 10_000)
COMPARING = [D3PO(1.0), D3POTrajectory(1.0), PRDP(1.0, 0.5), GRPO(0.1), DNO(1.0)]
COMPARING += [BRAIn(0.5, clip=0.5), BRAIn(0.5, "sigmoid", 0.5, "nat")]
ALL: list[Loss] = [*COMPARING, GRPO(0.1, "nat", scale=False), DDPO(0.1, "nat"), Filtered(0.5)]
ids = repr


def steps(new: Any, old: Any = None, reference: Any = None, elements: int = 1) -> LogProbs:
    """Log-probabilities of one prompt from nested lists (K, T); what is not given is 0."""
    leaf = torch.tensor([new], requires_grad=True)
    old, reference = (torch.zeros_like(leaf) if x is None else torch.tensor([x]) for x in (old, reference))
    return LogProbs(leaf, old, reference, elements)


def some(seed: int, prompts: int = 2, samples: int = 4, steps: int = 3, elements: int = 2) -> tuple[LogProbs, Tensor]:
    """Log-probabilities (eighths: sums and shifts of them are exact) and rewards that all differ."""
    generator = seeded(seed)
    new, old, reference = (torch.randint(-16, 17, (3, prompts, samples, steps), generator=generator) / 8).unbind()
    ranks = torch.rand(prompts, samples, generator=generator).argsort(1)
    return LogProbs(new.requires_grad_(), old, reference, elements), ranks / 4


def solved(loss: Loss, log_probs: LogProbs, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `new`."""
    value, _ = loss(log_probs, rewards)
    return value.detach(), torch.autograd.grad(value, log_probs.new)[0]


def close(value: Tensor | float, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(value), torch.tensor(expected), rtol=1e-5, atol=1e-6)


# -- numbers by hand -------------------------------------------------------------------------------------------------

REFERENCE = [[-1.0, -2.0], [-3.0, 0.5]]
PREFERRED = [[3.0, -2.0], [-3.0, 2.5]]  # r̂ = (4, 0) and (0, 2) nats; over 2 elements (2, 0) and (0, 1)


def test_d3po_by_hand() -> None:
    # The first wins. Logits β(r̂_t^w − r̂_t^l), β = 1: 2 and −1.
    # loss = (softplus(−2) + softplus(1))/2 = (0.126928 + 1.313262)/2 = 0.720095
    # ∂/∂new_t^w = −β/(T·D)·sigmoid(−logit) = −¼·(0.119203, 0.731059); the loser's is the opposite.
    log_probs, rewards = steps(PREFERRED, reference=REFERENCE, elements=2), torch.tensor([[7.0, 5.0]])
    value, gradient = solved(D3PO(1.0), log_probs, rewards)
    close(value, 0.720095)
    close(gradient[0], [[-0.0298007, -0.1827646], [0.0298007, 0.1827646]])
    # In nats over the sum of the steps the winner is 4 + 0 − 0 − 2 = 2 ahead.
    assert D3PO(1.0)(log_probs, rewards)[1] == {"accuracy": 1.0, "margin": 2.0, "pairs": 1.0}
    assert D3PO(1.0)(log_probs, rewards.flip(1))[1] == {"accuracy": 0.0, "margin": -2.0, "pairs": 1.0}
    # With β = ½ and in nats the logits are ½·(4, −2), the same, and D is gone from the gradient.
    value, gradient = solved(D3PO(0.5, "nat"), log_probs, rewards)
    close(value, 0.720095)
    close(gradient[0, 0], [-0.0298007, -0.1827646])


def test_d3po_of_trajectories_by_hand() -> None:
    # One logit, 2 − 1 = 1: loss = softplus(−1) = 0.313262; ∂/∂new_t^w = −β/D·sigmoid(−1) = −½·0.268941 at every step.
    log_probs, rewards = steps(PREFERRED, reference=REFERENCE, elements=2), torch.tensor([[7.0, 5.0]])
    value, gradient = solved(D3POTrajectory(1.0), log_probs, rewards)
    close(value, 0.313262)
    close(gradient[0], [[-0.1344707] * 2, [0.1344707] * 2])
    assert D3POTrajectory(1.0)(log_probs, rewards)[1] == {"accuracy": 1.0, "margin": 2.0, "pairs": 1.0}


def test_d3po_is_a_mean_over_pairs() -> None:
    # r̂ = (2, 0, −1), rewards (2, 1, 1): pairs 1≻2 (logit 2) and 1≻3 (logit 3); 2 and 3 tie.
    # loss = (0.126928 + 0.048587)/2; gradients ½·(−0.119203 − 0.047426, 0.119203, 0.047426)
    for loss in (D3PO(1.0), D3POTrajectory(1.0)):
        log_probs, rewards = steps([[2.0], [0.0], [-1.0]]), torch.tensor([[2.0, 1.0, 1.0]])
        value, gradient = solved(loss, log_probs, rewards)
        close(value, 0.0877577)
        close(gradient.flatten(), [-0.0833143, 0.0596015, 0.0237130])
        assert loss(log_probs, rewards)[1] == {"accuracy": 1.0, "margin": 2.5, "pairs": 2.0}


def test_prdp_by_hand() -> None:
    # r̂ = (0.8, 0.05) and (0, −0.2), (r^a − r^b)/β = 2: e = 0.85 + 0.2 − 2 = −0.95, l = 0.9025.
    # r̂old = (0.5, 0) and (0, 0), ε = 0.1: clipped to (0.6, 0.05) and (0, −0.1): e = 0.65 + 0.1 − 2 = −1.25, l = 1.5625,
    # the larger. Its gradient is 2e = −2.5 for a's second step, 2.5 for b's first; the clipped steps have none.
    old = [[-0.5, -2.0], [-3.0, 0.5]]
    log_probs = steps([[-0.2, -1.95], [-3.0, 0.3]], old, REFERENCE, elements=7)
    rewards = torch.tensor([[1.0, 0.0]])
    value, gradient = solved(PRDP(0.5, 0.1), log_probs, rewards)
    close(value, 1.5625)
    close(gradient[0], [[0.0, -2.5], [2.5, 0.0]])
    metrics = PRDP(0.5, 0.1)(log_probs, rewards)[1]
    assert metrics == {"accuracy": 1.0, "clipped": 0.5, "error": pytest.approx(0.95, abs=1e-6)}
    # Without the clip: 2e = −1.9 everywhere.
    value, gradient = solved(PRDP(0.5, math.inf), log_probs, rewards)
    close(value, 0.9025)
    close(gradient[0], [[-1.9, -1.9], [1.9, 1.9]])


def test_prdp_lets_a_step_that_went_astray_come_back() -> None:
    # r̂ = (−0.3, 0) and 0: e = −0.3 − 2, l = 5.29; clipped at −0.1: 2.1² = 4.41, the smaller. Gradient 2·(−2.3).
    log_probs = steps([[-0.3, 0.0], [0.0, 0.0]])
    value, gradient = solved(PRDP(0.5, 0.1), log_probs, torch.tensor([[1.0, 0.0]]))
    close(value, 5.29)
    close(gradient[0], [[-4.6, -4.6], [4.6, 4.6]])


def test_prdp_is_a_mean_over_the_pairs_of_all_prompts() -> None:
    # New = reference, β = 1. Prompt 1, rewards (1, 0, 0): e = −1, −1, 0. Prompt 2, rewards equal: 0, 0, 0.
    # loss = 2/6; ∂/∂r̂^1 = 2·(−1 − 1)/6, the other two 2/6 each.
    new = torch.zeros(2, 3, 2, requires_grad=True)
    log_probs = LogProbs(new, torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), 5)
    rewards = torch.tensor([[1.0, 0, 0], [3.0, 3, 3]])
    value, gradient = solved(PRDP(1.0), log_probs, rewards)
    close(value, 1 / 3)
    close(gradient, [[[-2 / 3] * 2, [1 / 3] * 2, [1 / 3] * 2], [[0.0, 0.0]] * 3])
    metrics = PRDP(1.0)(log_probs, rewards)[1]  # nobody is ranked yet: two ties
    assert metrics == {"accuracy": 0.5, "clipped": 0.0, "error": pytest.approx(math.sqrt(1 / 3))}


# (new − old)/D with D = 2: ratios (1.5, 1) and (1.5, 0.8)
MOVED = [[2 * math.log(1.5), 0.0], [2 * math.log(1.5), 2 * math.log(0.8)]]


def test_ddpo_by_hand() -> None:
    # A = (1, −1), ε = 0.1. max(−Aρ, −A clip ρ): −1.1 (clipped, no gradient), −1, 1.5 (the ratio, which must come down),
    # 0.9 (clipped). loss = 0.3/4. Gradient −Aρ/(4D) where not clipped: −1/8 and 1.5/8.
    log_probs, advantages = steps(MOVED, elements=2), torch.tensor([[1.0, -1.0]])
    value, gradient = solved(DDPO(0.1), log_probs, advantages)
    close(value, 0.075)
    close(gradient[0], [[0.0, -0.125], [0.1875, 0.0]])
    metrics = DDPO(0.1)(log_probs, advantages)[1]
    assert metrics == {"clipped": 0.75, "ratio": pytest.approx(0.5)}
    # Advantages beyond ±5 count as ±5; with advantage_clip=2, beyond ±2 as ±2.
    close(solved(DDPO(0.1), log_probs, 100 * advantages)[0], 5 * 0.075)
    close(solved(DDPO(0.1, advantage_clip=2.0), log_probs, 100 * advantages)[0], 2 * 0.075)
    # In nats the same ratios come from half the differences.
    halved = steps([[x / 2 for x in row] for row in MOVED], elements=2)
    close(solved(DDPO(0.1, "nat"), halved, advantages)[1][0], [[0.0, -0.25], [0.375, 0.0]])


def test_grpo_by_hand() -> None:
    # Rewards (5, 1): mean 3, deviation over K 2: A = (1, −1), DDPO's numbers above. Unscaled A = (2, −2): twice those.
    log_probs, rewards = steps(MOVED, elements=2), torch.tensor([[5.0, 1.0]])
    value, gradient = solved(GRPO(0.1), log_probs, rewards)
    close(value, 0.075)
    close(gradient[0], [[0.0, -0.125], [0.1875, 0.0]])
    value, gradient = solved(GRPO(0.1, scale=False), log_probs, rewards)
    close(value, 0.15)
    close(gradient[0], [[0.0, -0.25], [0.375, 0.0]])


@pytest.mark.parametrize("scale", [True, False])
@given(st.floats(-1000, 1000, width=32), st.integers(2, 9))
def test_a_group_without_spread_teaches_grpo_nothing(scale: bool, reward: float, samples: int) -> None:
    log_probs, _ = some(0, prompts=1, samples=samples)
    value, gradient = solved(GRPO(0.1, scale=scale), log_probs, torch.full((1, samples), reward))
    assert value == 0
    assert not gradient.any()


def test_filtered_by_hand() -> None:
    # Rewards (1, 3, 3, 2), D = 2. The best two are 2 and 3: loss = −(−4 − 2 + 1 − 3)/(4·2) = 1, gradient −1/(4·2).
    # The best one is the first of equals, 2: loss = −(−4 − 2)/(2·2) = 1.5, gradient −1/(2·2).
    new = [[9.0, 9.0], [-4.0, -2.0], [1.0, -3.0], [9.0, 9.0]]
    log_probs, rewards = steps(new, elements=2), torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    value, gradient = solved(Filtered(0.5), log_probs, rewards)
    close(value, 1.0)
    close(gradient[0], [[0.0, 0.0], [-0.125, -0.125], [-0.125, -0.125], [0.0, 0.0]])
    assert Filtered(0.5)(log_probs, rewards)[1] == {"kept": 2.0, "lift": 0.75}
    for keep in (0.25, 0.01):
        value, gradient = solved(Filtered(keep), log_probs, rewards)
        close(value, 1.5)
        close(gradient[0], [[0.0, 0.0], [-0.25, -0.25], [0.0, 0.0], [0.0, 0.0]])
    close(solved(Filtered(1.0), log_probs, rewards)[0], -(36 - 8) / 16)


def test_filtered_keeps_the_pareto_front_of_several_rewards() -> None:
    """By hand: (3, 0), (1, 1) and (0, 3) are not dominated, (0, 1) is; of the second prompt (1, 1) alone is not."""
    rewards = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0]], [[0, 0], [1, 1], [1, 0], [0, 1]]])
    new = torch.tensor([[[-2.0], [9.0], [-6.0], [2.0]], [[9.0], [-4.0], [9.0], [9.0]]])
    log_probs = LogProbs(new.requires_grad_(True), new.detach(), None, elements=2)
    value, gradient = solved(Filtered(0.5), log_probs, rewards)
    close(value, (1.0 + 2.0) / 2)  # −(−2 − 6 + 2)/(3·2) = 1 and 4/2 = 2: each prompt counts alike
    close(gradient[..., 0], [[-1 / 12, 0.0, -1 / 12, -1 / 12], [0.0, -0.25, 0.0, 0.0]])
    # Sums (3, 1, 2, 3) and (0, 2, 1, 1): kept means 8/3 and 2, means of all 9/4 and 1.
    metrics = Filtered(0.5)(log_probs, rewards)[1]
    assert metrics["kept"] == 2.0
    close(metrics["lift"], (8 / 3 + 2) / 2 - 13 / 8)


def test_dno_by_hand() -> None:
    # Win rates 1 and 0: the label is sigmoid(1) = 0.731059. At π = π_t the logit is 0, and ∂/∂z = ½ − 0.731059.
    rates = torch.tensor([[1.0, 0.0]])
    value, gradient = solved(DNO(0.5), steps([[0.0, 0.0], [0.0, 0.0]], elements=2), rates)
    close(value, math.log(2))
    close(gradient[0], [[-0.0577646, -0.0577646], [0.0577646, 0.0577646]])  # 0.231059 β/D
    # Where log π/π_t is (2, −2) nats over 2 elements, β = ½ times its difference is 1 nat: the optimum.
    value, gradient = solved(DNO(0.5), steps([[1.0, 2.0], [0.0, -1.0]], [[0.0, 1.0], [1.0, 0.0]], elements=2), rates)
    close(value, 0.731059 * 0.313262 + 0.268941 * 1.313262)
    close(gradient, torch.zeros(1, 2, 2).tolist())
    sharp, pairs = DNO(0.5, temperature=1e-3, unit="nat"), D3POTrajectory(0.5, "nat")
    given = steps([[0.3], [-0.2]])  # about π_t = p_ref, winners and losers are DPO's
    torch.testing.assert_close(solved(sharp, given, rates), solved(pairs, given, rates))
    assert sharp(given, rates)[1] == {"accuracy": 1.0, "labels": 1.0}


def test_brain_by_hand() -> None:
    rewards, reference = torch.tensor([[0.0, 2.0]]), [[-1.0], [-3.0]]
    # log p_ref/π_old + r is (−1, −1), so α = (½, ½); β = (¾, ¼).
    value, gradient = solved(
        BRAIn(1.0, clip=math.inf, unit="nat"), steps([[math.log(3)], [0.0]], None, reference), rewards
    )
    close(value, -(math.log(0.75) + math.log(0.25)) / 2)
    close(gradient[0], [[0.25], [-0.25]])  # β − α
    # Over two elements (−½, ½), so α = (0.268941, 0.731059); β = √3/(1 + √3) = (0.633975, 0.366025).
    given = steps([[math.log(3)], [0.0]], None, reference, elements=2)
    value, gradient = solved(BRAIn(1.0, clip=math.inf), given, rewards)
    close(value, 0.857322)
    close(gradient[0], [[0.182517], [-0.182517]])
    assert BRAIn(1.0)(given, rewards)[1] == pytest.approx({"ess": 1 / (0.268941**2 + 0.731059**2) / 2, "clipped": 0.5})
    # log sigmoid(1) − log sigmoid(−1) = 1: α = (0.268941, 0.731059) about the mean of 1.
    value, gradient = solved(BRAIn(1.0, "sigmoid", unit="nat"), steps([[0.0], [0.0]]), rewards)
    close(gradient[0], [[0.5 - 0.268941], [0.5 - 0.731059]])


@given(SEEDS)
def test_brain_of_the_best_of_two_is_dpo(seed: int) -> None:
    log_probs, rewards = some(seed, samples=2)
    from_reference = LogProbs(log_probs.new, log_probs.reference, log_probs.reference, 2)
    for before, after in zip(
        solved(BRAIn(1e-3, clip=math.inf, unit="nat"), from_reference, rewards),
        solved(D3POTrajectory(1.0, "nat"), from_reference, rewards),
        strict=True,
    ):
        torch.testing.assert_close(before, after)


def test_brain_stops_at_its_clip_and_comes_back() -> None:
    rewards, loss = torch.tensor([[2.0, 0.0]]), BRAIn(1.0, clip=0.5, unit="nat")
    assert not solved(loss, steps([[0.7], [-0.7]]), rewards)[1].any()
    assert solved(loss, steps([[-0.7], [0.7]]), rewards)[1].any()


# -- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [D3PO(1.0), D3POTrajectory(1.0)], ids=ids)
def test_pareto_dominance(loss: Loss) -> None:
    # 2 (2, 1) and 3 (1, 2) cannot be compared, 1 and 5 are equal (2, 2), 4 is (1, 1). Pairs: 1≻2 1≻3 1≻4, 2≻4, 3≻4,
    # 5≻2 5≻3 5≻4. All log-probabilities but that of 4 are equal.
    rewards = torch.tensor([[[2.0, 2], [2, 1], [1, 2], [1, 1], [2, 2]]])
    log_probs = steps([[0.0], [0.0], [0.0], [-1.0], [0.0]])
    value, gradient = solved(loss, log_probs, rewards)
    # Four pairs of 8 have the logit 1, four 0: loss = (0.313262 + 0.693147)/2. 4 loses to four: ∂ = 4·0.268941/8.
    close(value, 0.5032044)
    # 2: loses twice at ½, wins once at 0.268941: (1 − 0.268941)/8. 1: wins twice at ½, once at 0.268941.
    close(gradient.flatten(), [-0.1586177, 0.0913823, 0.0913823, 0.1344707, -0.1586177])
    assert loss(log_probs, rewards)[1] == {"accuracy": 0.75, "margin": 0.5, "pairs": 8.0}


@pytest.mark.parametrize("loss", [D3PO(), D3POTrajectory()], ids=ids)
@pytest.mark.parametrize("rewards", [[[1.0, 1.0]], [[[1.0, 2.0], [2.0, 1.0]]]], ids=["tie", "no dominance"])
def test_no_pair_no_gradient(loss: Loss, rewards: Any) -> None:
    log_probs = steps(PREFERRED)
    value, gradient = solved(loss, log_probs, torch.tensor(rewards))
    assert value == 0
    assert not gradient.any()
    metrics = loss(log_probs, torch.tensor(rewards))[1]
    assert metrics["pairs"] == 0
    assert math.isnan(metrics["accuracy"])
    assert math.isnan(metrics["margin"])


def test_d3po_moves_where_the_reference_code_is_stuck() -> None:
    # Their clamp of π/π_ref to 1 ± 0.1 keeps the loss within [0.683, 0.703] at β = 0.1.
    rewards = torch.tensor([[1.0, 0.0]])
    for loss in (D3PO(), D3POTrajectory()):
        value, gradient = solved(loss, steps([[10.0], [0.0]]), rewards)
        close(value, 0.313262)  # softplus(−0.1·10)
        close(gradient.flatten(), [-0.0268941, 0.0268941])
        close(solved(loss, steps([[-10.0], [0.0]]), rewards)[0], 1.313262)


# -- symmetries ------------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("loss", ALL, ids=ids)
@given(SEEDS)
def test_the_order_of_samples_means_nothing(loss: Loss, seed: int) -> None:
    log_probs, rewards = some(seed)
    order = torch.randperm(4, generator=seeded(seed + 1))
    shuffled = LogProbs(
        log_probs.new.detach()[:, order].requires_grad_(), log_probs.old[:, order], log_probs.reference[:, order], 2
    )
    value, gradient = solved(loss, log_probs, rewards)
    value_shuffled, gradient_shuffled = solved(loss, shuffled, rewards[:, order])
    torch.testing.assert_close(value_shuffled, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_shuffled, gradient[:, order], rtol=1e-5, atol=1e-6)
    metrics, metrics_shuffled = loss(log_probs, rewards)[1], loss(shuffled, rewards[:, order])[1]
    assert metrics_shuffled == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize("loss", COMPARING, ids=ids)
@given(SEEDS)
def test_a_prompt_that_scores_higher_means_nothing(loss: Loss, seed: int) -> None:
    log_probs, rewards = some(seed)
    handicaps = torch.randint(-8, 9, (2, 1), generator=seeded(seed + 1)) / 4
    for before, after in zip(
        solved(loss, log_probs, rewards), solved(loss, log_probs, rewards + handicaps), strict=True
    ):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.few(2)
@pytest.mark.parametrize("loss", [D3PO(1.0), D3POTrajectory(1.0), PRDP(1.0, 0.5), DNO(1.0), BRAIn(0.5)], ids=ids)
@given(SEEDS)
def test_only_ratios_to_the_reference_count(loss: Loss, seed: int) -> None:
    log_probs, rewards = some(seed)
    shift = torch.randint(-80, 81, (2, 4, 3), generator=seeded(seed + 1)) / 8
    moved = LogProbs(
        (log_probs.new + shift).detach().requires_grad_(), log_probs.old + shift, log_probs.reference + shift, 2
    )
    for before, after in zip(solved(loss, log_probs, rewards), solved(loss, moved, rewards), strict=True):
        assert torch.equal(after, before)


@given(SEEDS, st.floats(0.125, 8))
def test_the_unit_of_a_reward_means_nothing_to_grpo(seed: int, unit: float) -> None:
    log_probs, rewards = some(seed)
    torch.testing.assert_close(
        solved(GRPO(), log_probs, unit * rewards), solved(GRPO(), log_probs, rewards), rtol=1e-4, atol=1e-5
    )


@given(SEEDS)
def test_a_clip_does_nothing_right_after_sampling(seed: int) -> None:
    log_probs, rewards = some(seed)
    fresh = LogProbs(log_probs.old.clone().requires_grad_(), log_probs.old, log_probs.reference, 2)
    pairs: list[tuple[Loss, Loss]] = [
        (PRDP(1.0, 1e-6), PRDP(1.0, math.inf)),
        (DDPO(1e-6), DDPO(math.inf)),
        (GRPO(1e-6), GRPO(math.inf)),
    ]
    for tight, loose in pairs:
        torch.testing.assert_close(solved(tight, fresh, rewards), solved(loose, fresh, rewards), rtol=0, atol=0)
        assert tight(fresh, rewards)[1]["clipped"] == 0
    # ∂/∂new_t = −A/(B·K·T·D): plain policy gradient
    gradient = solved(DDPO(), fresh, rewards)[1]
    torch.testing.assert_close(gradient, (-rewards / 48)[..., None].expand(-1, -1, 3), rtol=1e-5, atol=1e-7)


@given(SEEDS)
def test_prdp_without_a_clip_is_least_squares(seed: int) -> None:
    """∂/∂r̂_t^a = 2·Σ_b e_ab over the number of pairs: K(r̂^a − r^a/β) less the sum over the prompt."""
    log_probs, rewards = some(seed)
    residual = (log_probs.new - log_probs.reference).sum(-1).detach() - rewards / 0.5
    expected = 2 * (4 * residual - residual.sum(1, keepdim=True)) / 12
    gradient = solved(PRDP(0.5, math.inf), log_probs, rewards)[1]
    torch.testing.assert_close(gradient, expected[..., None].expand(-1, -1, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=ids)
def test_only_the_new_policy_learns(loss: Loss) -> None:
    (log_probs, rewards), leaves = some(3), []
    for name in ("new", "old", "reference"):
        leaves.append(getattr(log_probs, name).detach().clone().requires_grad_())
    rewards.requires_grad_()
    value, metrics = loss(LogProbs(*leaves, elements=2), rewards)
    value.backward()
    assert leaves[0].grad is not None
    assert (leaves[1].grad, leaves[2].grad, rewards.grad) == (None, None, None)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert all(isinstance(metric, float) for metric in metrics.values())


@pytest.mark.parametrize("loss", ALL, ids=ids)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(loss: Loss, seed: int) -> None:
    _, rewards = some(seed)
    tensors = torch.randn(3, 2, 4, 3, generator=seeded(seed), dtype=torch.float64)

    def value(new: Tensor) -> Tensor:
        return loss(LogProbs(new, tensors[1], tensors[2], 2), rewards)[0]

    assert torch.autograd.gradcheck(value, tensors[0].clone().requires_grad_())


# -- optima: a chain of T choices among A, every state has a softmax of its own --------------------------------------

A, T = 2, 3
TRAJECTORIES = torch.tensor(list(product(range(A), repeat=T)))  # (A^T, T)
PREFIXES = [torch.arange(A**T) // A ** (T - t) for t in range(T)]  # which prefix of t choices a trajectory has


class Chain:
    """Policies over all trajectories of B prompts: logits of every prefix."""

    def __init__(self, prompts: int, seed: int) -> None:
        generator = seeded(seed)
        self.tables = [torch.randn(prompts, A**t, A, generator=generator) for t in range(T)]

    def log_probs(self) -> Tensor:
        """(B, A^T, T) of every step of every trajectory."""
        rows = zip(self.tables, PREFIXES, TRAJECTORIES.T, strict=True)
        return torch.stack([table.log_softmax(-1)[:, state, action] for table, state, action in rows], -1)

    def learn(self, loss_of: Callable[[Tensor], Tensor], rollouts: int, updates: int, lr: float) -> None:
        """Gradient descent from the present weights; each rollout takes their log-probabilities as the old ones."""
        for table in self.tables:
            table.requires_grad_()
        optimiser = torch.optim.SGD(self.tables, lr)
        for _ in range(rollouts):
            old = self.log_probs().detach()
            for _ in range(updates):
                optimiser.zero_grad()
                loss_of(old).backward()
                optimiser.step()


def tilted(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π_ref(τ) exp(r(τ)/β)/Z (B, A^T) from step log-probabilities (B, A^T, T)."""
    return (reference.sum(-1) + rewards / beta).softmax(-1)


def test_a_chain_is_a_distribution() -> None:
    torch.testing.assert_close(Chain(2, 0).log_probs().sum(-1).exp().sum(-1), torch.ones(2))


def test_the_optimum_of_prdp_is_the_tilted_reference() -> None:
    chain, loss, clipped = Chain(2, 0), PRDP(beta=0.5, clip=0.1), []
    reference, rewards = chain.log_probs(), torch.randn(2, A**T, generator=seeded(1))

    def loss_of(old: Tensor) -> Tensor:
        value, metrics = loss(LogProbs(chain.log_probs(), old, reference, 9), rewards)
        clipped.append(metrics["clipped"])
        return value

    chain.learn(loss_of, rollouts=100, updates=10, lr=0.1)
    log_probs = LogProbs(chain.log_probs(), chain.log_probs(), reference, 9)
    torch.testing.assert_close(log_probs.new.sum(-1).exp(), tilted(reference, rewards, 0.5), rtol=0, atol=1e-3)
    value, metrics = loss(log_probs, rewards)
    assert value < 1e-4
    assert metrics["accuracy"] == 1
    assert max(clipped) > 0.3  # the clip took part


@pytest.mark.hard
def test_the_optimum_of_brain_is_the_reference_conditioned_on_being_good() -> None:
    chain, loss, clipped = Chain(2, 0), BRAIn(gamma=0.5, clip=0.1, unit="nat"), []
    reference, rewards = chain.log_probs(), torch.randn(2, A**T, generator=seeded(1))

    def loss_of(old: Tensor) -> Tensor:
        value, metrics = loss(LogProbs(chain.log_probs(), old, reference, 9), rewards)
        clipped.append(metrics["clipped"])
        return value

    chain.learn(loss_of, rollouts=300, updates=10, lr=0.3)
    torch.testing.assert_close(chain.log_probs().sum(-1).exp(), tilted(reference, rewards, 0.5), rtol=0, atol=1e-3)
    assert max(clipped) > 0.3  # the clip took part


def test_brain_learns_the_tilted_gaussian_chain_from_its_own_samples() -> None:
    """x_s = a x_t + δ + τ z from x_T = 1, r = x_0: tilted by exp(r/γ), δ_t = τ_t² G_s/γ, G_s the gain from x_s to x_0.

    There the gradient is 0 for any samples, not only on average.
    """
    gains, taus, gamma = torch.tensor([0.8, 0.9, 0.7]).double(), torch.tensor([0.6, 0.5, 0.3]).double(), 0.5
    after = torch.stack([gains[step + 1 :].prod() for step in range(3)])  # G_s
    best, shifts = taus**2 * after / gamma, torch.zeros(3).double()
    generator, loss = seeded(0), BRAIn(gamma, clip=math.inf, unit="nat")

    def gradient(shifts: Tensor) -> Tensor:
        leaf, x, parts = shifts.clone().requires_grad_(), torch.ones(16, 8).double(), []
        for step in range(3):
            mean = gains[step] * x
            x = mean + shifts[step] + taus[step] * torch.randn(x.shape, generator=generator).double()
            parts.append([(-0.5 * ((x - mean - one) / taus[step]) ** 2) for one in (leaf[step], shifts[step], 0.0)])
        new, old, reference = (torch.stack([part[place] for part in parts], -1) for place in range(3))
        return torch.autograd.grad(loss(LogProbs(new, old, reference, 1), x)[0], leaf)[0]

    assert gradient(best).abs().max() < 1e-12
    for _ in range(400):
        shifts = shifts - 0.05 * gradient(shifts)
    torch.testing.assert_close(shifts, best, rtol=0, atol=0.01)


def bradley_terry(weights: Tensor) -> tuple[Tensor, Tensor]:
    """All comparisons of integer weights w = exp r in their exact proportions: (a, b) and its rewards, (R, 2) each.

    a wins w_a times against b's w_b, so that P(a ≻ b) = sigmoid(r_a − r_b).
    """
    rows = []
    for a, b in product(range(len(weights)), repeat=2):
        rows += [([a, b], [1.0, 0.0])] * int(weights[a])
    pairs, rewards = zip(*((pair, reward) for pair, reward in rows if pair[0] != pair[1]), strict=True)
    return torch.tensor(pairs), torch.tensor(rewards)


def learned_from_preferences(loss: Loss, weights: Tensor, lr: float, flat: bool = False) -> tuple[Tensor, Tensor]:
    """Where a chain ends, and the tilted reference, for β = 2; a flat reference has equal chances after one step."""
    chain = Chain(1, 2)
    if flat:
        chain.tables[1:] = [torch.zeros_like(table) for table in chain.tables[1:]]
    reference = chain.log_probs()
    pairs, rewards = bradley_terry(weights)

    def loss_of(old: Tensor) -> Tensor:
        new, before, ref = (x[0][pairs] for x in (chain.log_probs(), old, reference))
        return loss(LogProbs(new, before, ref, 1), rewards)[0]

    chain.learn(loss_of, rollouts=1, updates=1500, lr=lr)
    return chain.log_probs().sum(-1).exp(), tilted(reference, weights.log()[None], 2.0)


def test_the_optimum_of_d3po_over_trajectories_is_the_tilted_reference() -> None:
    weights = torch.tensor([1, 5, 2, 3, 4, 1, 3, 6])
    learned, expected = learned_from_preferences(D3POTrajectory(2.0, "nat"), weights, lr=1.0)
    torch.testing.assert_close(learned, expected, rtol=0, atol=1e-3)


@pytest.mark.hard
def test_the_optimum_of_d3po_per_step_where_one_step_decides() -> None:
    # The first choice decides, 4 to 1. Later choices see no difference on average, and start without one.
    weights = torch.tensor([4, 4, 4, 4, 1, 1, 1, 1])
    learned, expected = learned_from_preferences(D3PO(2.0, "nat"), weights, lr=1.0, flat=True)
    torch.testing.assert_close(learned, expected, rtol=0, atol=1e-3)


# -- DDPO's advantages -----------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    # Until a prompt has 3 rewards the batch counts. "a" (0, 2), "b" (4, 6): mean 3, deviation √5.
    normaliser = PerPromptStatTracker(size=4, min_count=3)
    first = normaliser(["a", "b"], torch.tensor([[0.0, 2.0], [4.0, 6.0]]))
    close(first, [[-3 / 5**0.5, -1 / 5**0.5], [1 / 5**0.5, 3 / 5**0.5]])
    # Now "a" has (0, 2, 4, 6): mean 3, deviation √5. "c" has two only: the batch (4, 6, 0, 0), mean 2.5, √6.75.
    second = normaliser(["a", "c"], torch.tensor([[4.0, 6.0], [0.0, 0.0]]))
    close(second, [[1 / 5**0.5, 3 / 5**0.5], [-2.5 / 6.75**0.5] * 2])
    # The last four of "a" are (4, 6, 6, 8): mean 6, deviation √2.
    close(normaliser(["a"], torch.tensor([[6.0, 8.0]])), [[0.0, 2**0.5]])
    # One prompt in several rows is one prompt: (6, 8, 0, 2), mean 4, √10.
    close(normaliser(["a", "a"], torch.tensor([[0.0], [2.0]])), [[-4 / 10**0.5], [-2 / 10**0.5]])


def test_the_published_sixteen() -> None:
    normaliser, batches = PerPromptStatTracker(), torch.randn(3, 1, 8, generator=seeded(0))
    normaliser(["a"], batches[0])
    for i in (1, 2):
        rewards = batches[i - 1 : i + 1].flatten().double()
        expected = (batches[i].double() - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        torch.testing.assert_close(normaliser(["a"], batches[i]), expected.float(), rtol=1e-6, atol=1e-6)


@given(st.floats(-1e4, 1e4, width=32), st.integers(2, 9))
def test_rewards_without_spread_have_no_advantage(reward: float, samples: int) -> None:
    normaliser = PerPromptStatTracker(4, 2)
    for _ in range(2):
        assert not normaliser(["a"], torch.full((1, samples), reward)).any()


@given(SEEDS)
def test_a_saved_normaliser_resumes_bit_for_bit(seed: int) -> None:
    batches = torch.randn(3, 2, 3, generator=seeded(seed))
    one, other = PerPromptStatTracker(5, 4), PerPromptStatTracker(5, 4)
    for batch in batches[:2]:
        one(["a", "b"], batch)
    other.load(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert torch.equal(other(["b", "c"], batches[2]), one(["b", "c"], batches[2]))


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_ones() -> None:
    assert D3PO() == D3PO(beta=0.1, unit="element")
    assert D3POTrajectory() == D3POTrajectory(beta=0.1, unit="element")
    assert PRDP() == PRDP(beta=0.1, clip=0.1)
    assert DDPO() == DDPO(clip=1e-4, unit="element", advantage_clip=5.0)
    assert GRPO() == GRPO(clip=1e-4, unit="element", scale=True)
    assert Filtered() == Filtered(keep=0.25)
    losses: list[type[Loss]] = [D3PO, D3POTrajectory, PRDP, DDPO, GRPO, Filtered, DNO, BRAIn]
    assert [loss for loss in losses if loss.whole_trajectory] == [D3POTrajectory, PRDP, DNO, BRAIn]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D3PO(beta=0), "beta must be above 0.*, got 0"),
        (lambda: D3PO(unit="bit"), "unknown unit 'bit': did you mean"),
        (lambda: D3POTrajectory(beta=math.inf), "beta must be above 0 and finite, got inf"),
        (lambda: D3POTrajectory(unit="bit"), "unknown unit 'bit': did you mean"),
        (lambda: PRDP(beta=-1), "beta must be above 0.*, got -1"),
        (lambda: PRDP(clip=0), "clip must be above 0.*, got 0"),
        (lambda: DDPO(clip=math.nan), "clip must be above 0.*, got nan"),
        (lambda: DDPO(advantage_clip=0), "advantage_clip must be above 0.*, got 0"),
        (lambda: DDPO(unit="bit"), "unknown unit 'bit': did you mean"),
        (lambda: GRPO(clip=-1), "clip must be above 0.*, got -1"),
        (lambda: GRPO(unit="bit"), "unknown unit 'bit': did you mean"),
        (lambda: DNO(temperature=0), "temperature must be above 0.*, got 0"),
        (lambda: BRAIn(gamma=0), "gamma must be above 0.*, got 0"),
        (lambda: BRAIn(form="log"), "unknown form 'log'"),
        (lambda: Filtered(keep=0), "keep must be above 0 and at most 1, got 0"),
        (lambda: Filtered(keep=1.5), "keep must be above 0 and at most 1, got 1.5"),
        (lambda: PerPromptStatTracker(size=1), "min_count must be from 2 to size, got 16 and 1"),
        (lambda: PerPromptStatTracker(size=8), "min_count must be from 2 to size, got 16 and 8"),
        (lambda: PerPromptStatTracker().load({}), "has no rewards"),
        (lambda: PerPromptStatTracker()(["a"], torch.zeros(2, 2)), "must be \\(1 prompts, samples\\)"),
        (lambda: PerPromptStatTracker()(["a"], torch.tensor([[math.inf]])), "rewards must be finite"),
        (lambda: steps([[0.0]], [[0.0, 1.0]]), "must all be one \\(prompts, samples, steps\\)"),
        (lambda: steps([[]]), "must all be one \\(prompts, samples, steps\\)"),
        (lambda: steps([[0.0]], elements=0), "elements must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("loss", COMPARING, ids=ids)
def test_one_sample_cannot_be_compared(loss: Loss) -> None:
    with pytest.raises(InputError, match="num_generations 1 must be at least 2"):
        loss(steps([[0.0]]), torch.zeros(1, 1))


@pytest.mark.parametrize("loss", ALL, ids=ids)
def test_rewards_that_do_not_fit_are_refused(loss: Loss) -> None:
    for broken in (math.nan, math.inf):
        with pytest.raises(InputError, match="rewards must be finite, 1 of 2"):
            loss(steps(PREFERRED), torch.tensor([[0.0, broken]]))
    wrong = [torch.zeros(2), torch.zeros(1, 3), torch.zeros(1, 2, 1, 1)]
    wrong += [] if isinstance(loss, D3PO | D3POTrajectory | Filtered) else [torch.zeros(1, 2, 1)]
    for rewards in wrong:
        with pytest.raises(InputError, match="must be \\(prompts, samples\\) = \\(1, 2\\)"):
            loss(steps(PREFERRED), rewards)


@pytest.mark.parametrize("loss", [DDPO(), Filtered()], ids=ids)
def test_one_sample_is_enough_where_none_are_compared(loss: Loss) -> None:
    assert loss(steps([[1.0]]), torch.ones(1, 1))[0].isfinite()
