"""Losses and metrics of learned rewards against closed forms, plain loops and expected minimisers."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Generator, Tensor
from torch.nn import functional as F

from steer.rewards.analysis import BINS, preference_metrics
from steer.rewards.objectives import (
    OBJECTIVES,
    Objective,
    PreferenceLabels,
    bradley_terry,
    center_rewards_penalty,
    contrastive,
    mixed_texts,
    noisy_difference,
    regression,
    scaled_bradley_terry,
    slope_penalty,
    smooth_labels,
)

DELTA = [-2.0, -0.5, 0.0, 1.0, 3.0]
CHOICE = [1.0, 0.0, 0.5, 0.75, 1.0]
STRENGTH = [1.0, 2.0, 0.5, 0.0, 3.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def choices(choice: list[float], strength: list[float] | None = None) -> PreferenceLabels:
    return PreferenceLabels(
        torch.tensor(choice, dtype=torch.float64), torch.tensor(strength or [1.0] * len(choice), dtype=torch.float64)
    )


def loss_and_slope(objective: Objective, of: PreferenceLabels, delta: list[float]) -> tuple[float, list[float]]:
    """The loss, and its gradient by each Δ times their number (losses are means)."""
    difference = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    loss = objective(difference, of)
    (slope,) = torch.autograd.grad(loss, difference)
    return loss.item(), (slope * len(delta)).tolist()


def by_hand(delta: float, choice: float) -> float:
    return -(choice * math.log(sigmoid(delta)) + (1 - choice) * math.log(sigmoid(-delta)))


def test_bradley_terry_in_closed_form() -> None:
    loss, slope = loss_and_slope(bradley_terry, choices(CHOICE, STRENGTH), DELTA)
    pairs = list(zip(DELTA, CHOICE, strict=True))
    assert loss == pytest.approx(sum(by_hand(d, c) for d, c in pairs) / 5)
    assert slope == pytest.approx([-(c - sigmoid(d)) for d, c in pairs])
    assert loss_and_slope(bradley_terry, choices([1.0]), [0.0])[0] == pytest.approx(math.log(2))
    assert loss_and_slope(bradley_terry, choices([1.0]), [math.log(3)])[0] == pytest.approx(math.log(4 / 3))


def test_scaled_bradley_terry_weights_each_pair_by_its_strength() -> None:
    loss, slope = loss_and_slope(scaled_bradley_terry, choices(CHOICE, STRENGTH), DELTA)
    rows = list(zip(DELTA, CHOICE, STRENGTH, strict=True))
    assert loss == pytest.approx(sum(s * by_hand(d, c) for d, c, s in rows) / 5)
    assert slope == pytest.approx([-s * (c - sigmoid(d)) for d, c, s in rows])
    plain = choices(CHOICE)
    (loss, slope), (expected, expected_slope) = (
        loss_and_slope(objective, plain, DELTA) for objective in (scaled_bradley_terry, bradley_terry)
    )
    assert loss == pytest.approx(expected) and slope == pytest.approx(expected_slope)


def test_regression_is_of_the_signed_strength() -> None:
    loss, slope = loss_and_slope(regression, choices(CHOICE, STRENGTH), DELTA)
    # Targets s (2c − 1): 1, −2, 0, 0, 3.
    off = [-3.0, 1.5, 0.0, 1.0, 0.0]
    assert loss == pytest.approx(sum(x * x for x in off) / 5)
    assert slope == pytest.approx([2 * x for x in off])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_it_does_not_matter_which_image_is_a(objective: Objective) -> None:
    loss, slope = loss_and_slope(objective, choices(CHOICE, STRENGTH), DELTA)
    turned = choices([1 - c for c in CHOICE], STRENGTH)
    other, other_slope = loss_and_slope(objective, turned, [-d for d in DELTA])
    assert loss == pytest.approx(other) and slope == pytest.approx([-s for s in other_slope])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("far", [30.0, 90.0, 1e4])
def test_losses_are_finite_for_any_difference(objective: Objective, far: float) -> None:
    difference = torch.tensor([far, -far], requires_grad=True)
    loss = objective(noisy_difference(difference, 0.1), PreferenceLabels(torch.tensor([0.0, 1.0]), torch.ones(2)))
    (slope,) = torch.autograd.grad(loss, difference)
    assert loss.isfinite() and slope.isfinite().all()


def minimiser(loss: Callable[[Tensor], Tensor]) -> float:
    """By bisection on the slope of a convex, or at least one-valleyed, loss of one number."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = torch.tensor([(low + high) / 2], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(middle), middle)
        low, high = (low, middle.item()) if slope.item() > 0 else (middle.item(), high)
    return (low + high) / 2


@given(share=st.floats(0, 0.49))
def test_smoothing_is_the_mean_over_labels_of_which_a_share_is_turned(share: float) -> None:
    result = smooth_labels(choices(CHOICE, STRENGTH), share)
    assert result.choice.tolist() == pytest.approx([(1 - share) * c + share * (1 - c) for c in CHOICE])
    assert result.strength.tolist() == STRENGTH
    loss, _ = loss_and_slope(bradley_terry, result, DELTA)
    plain, _ = loss_and_slope(bradley_terry, choices(CHOICE), DELTA)
    turned, _ = loss_and_slope(bradley_terry, choices([1 - c for c in CHOICE]), DELTA)
    assert loss == pytest.approx((1 - share) * plain + share * turned)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_smoothing_bounds_the_difference(share: float) -> None:
    """For a certain choice, −[(1−ε) log σ(Δ) + ε log σ(−Δ)] is least at Δ = log((1−ε)/ε)."""
    result = minimiser(lambda difference: bradley_terry(difference, smooth_labels(choices([1.0]), share)))
    assert result == pytest.approx(math.log((1 - share) / share), abs=1e-6)


@given(delta=st.floats(-8, 8), share=st.floats(1e-3, 0.49))
def test_flipping_is_what_wrong_labels_do_to_a_probability(delta: float, share: float) -> None:
    difference = torch.tensor([delta, -delta], dtype=torch.float64)
    observed = torch.sigmoid(noisy_difference(difference, share))
    assert observed[0].item() == pytest.approx((1 - share) * sigmoid(delta) + share * sigmoid(-delta))
    assert observed.sum().item() == pytest.approx(1)
    assert torch.equal(noisy_difference(difference, 0.0), difference)
    assert torch.autograd.gradcheck(lambda x: noisy_difference(x, share), (difference.requires_grad_(),))


def test_flipping_saturates_at_the_share_and_keeps_single_precision() -> None:
    for share in (1e-9, 1e-3, 0.2):
        difference = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0], requires_grad=True)
        observed = noisy_difference(difference, share)
        bound = math.log((1 - share) / share)
        assert observed[-1].item() == pytest.approx(bound, rel=1e-5) == -observed[0].item()
        exact = noisy_difference(difference.detach().double(), share)
        assert torch.allclose(observed.double(), exact, rtol=1e-5)
        (slope,) = torch.autograd.grad(observed.sum(), difference)
        assert slope.isfinite().all() and (slope >= 0).all()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("clean", [-2.0, -0.3, 0.0, 1.5])
def test_trained_through_flips_the_difference_stays_the_clean_one(share: float, clean: float) -> None:
    """Labels have probability σ(clean), a share ε of them is flipped: the expected loss is least at Δ = clean.

    Without the correction it is least at the log-odds of the noisy labels, nearer 0.
    """
    noisy = (1 - share) * sigmoid(clean) + share * sigmoid(-clean)
    observed = choices([noisy])  # the loss is linear in the choice: its mean over labels is the loss at their mean
    corrected = minimiser(lambda difference: bradley_terry(noisy_difference(difference, share), observed))
    assert corrected == pytest.approx(clean, abs=1e-6)
    plain = minimiser(lambda difference: bradley_terry(difference, observed))
    assert plain == pytest.approx(math.log(noisy / (1 - noisy)), abs=1e-6)
    assert abs(plain) < abs(clean) or clean == 0


def features(count: int, seed: int) -> Tensor:
    sampled = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(sampled, dim=1)


def plain_contrastive(images: Tensor, texts: Tensor, scale: float, prompts: list[str]) -> float:
    """The definition, row by row."""
    loss = 0.0
    for k, prompt in enumerate(prompts):
        rivals = [k, *(j for j, other in enumerate(prompts) if other != prompt)]
        by_text = [math.exp(scale * float(images[k] @ texts[j])) for j in rivals]
        by_image = [math.exp(scale * float(images[j] @ texts[k])) for j in rivals]
        loss -= math.log(by_text[0] / sum(by_text)) + math.log(by_image[0] / sum(by_image))
    return loss / (2 * len(prompts))


@pytest.mark.parametrize("prompts", ["abcdef", "aabcca", "aaaaab", "a"])
def test_the_contrastive_loss_is_the_plain_double_loop(prompts: str) -> None:
    images, texts = features(len(prompts), 0), features(len(prompts), 1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    result = contrastive(images, texts, scale, list(prompts))
    assert result.item() == pytest.approx(plain_contrastive(images, texts, 3.0, list(prompts)))
    assert contrastive(texts, images, scale, list(prompts)).item() == pytest.approx(result.item())
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(2)).tolist()
    turned = contrastive(images[order], texts[order], scale, [prompts[k] for k in order])
    assert turned.item() == pytest.approx(result.item())


def test_equal_prompts_are_no_rivals() -> None:
    images, scale = features(3, 0), torch.tensor(10.0, dtype=torch.float64)
    assert contrastive(images, features(3, 1), scale, ["a"] * 3).item() == pytest.approx(0)
    # The same image and text twice: with the mask no worse than alone, without it at least log 2 of loss.
    twice = torch.cat([images[:1], images[:1]])
    assert contrastive(twice, twice, scale, ["a", "a"]).item() == pytest.approx(0)
    assert contrastive(twice, twice, scale, ["a", "b"]).item() == pytest.approx(math.log(2))


def test_slopes_of_the_contrastive_loss_pass_the_mask() -> None:
    prompts = list("aabca")
    given_features = (features(5, 0).requires_grad_(), features(5, 1).requires_grad_())
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda image, text, factor: contrastive(image, text, factor, prompts), (*given_features, scale)
    )


def test_the_judgement_by_hand() -> None:
    # Δ: 2, −1, 0, 0, 0.5, −3; chosen: a right, a wrong, a tied, b tied, a tie that counts for nothing, b right.
    a = torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    choice = [1.0, 1.0, 1.0, 0.0, 0.5, 0.0]
    result = preference_metrics([a, b], choices(choice))
    assert result.accuracy == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    deltas = [2.0, -1.0, 0.0, 0.0, 0.5, -3.0]
    assert result.log_loss == pytest.approx(sum(by_hand(d, c) for d, c in zip(deltas, choice, strict=True)) / 6)
    # σ: .881 .269 .5 .5 .622 .047, in the bins 8, 2, 5, 5, 6, 0.
    expected = [
        (sigmoid(-3), 0.0, 1),
        (sigmoid(-1), 1.0, 1),
        (0.5, 0.5, 2),
        (sigmoid(0.5), 0.5, 1),
        (sigmoid(2), 1.0, 1),
    ]
    assert result.bins == tuple(pytest.approx(row) for row in expected)
    assert result.ece == pytest.approx(sum(n * abs(p - o) for p, o, n in expected) / 6)
    assert result.summary == f"accuracy 0.600, log loss {result.log_loss:.3f}, calibration error {result.ece:.3f}"


@pytest.mark.parametrize("chosen", [0.0, 1.0])
def test_equal_rewards_are_half_right_whichever_is_chosen(chosen: float) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    result = preference_metrics([ones, ones], choices([chosen] * 3))
    assert result.accuracy == 0.5 and result.log_loss == pytest.approx(math.log(2))
    assert preference_metrics([ones, ones], choices([0.5] * 3)).accuracy == 0.5
    assert preference_metrics([ones, ones], choices([0.5] * 3)).ece == 0


def test_what_is_sure_falls_in_the_last_bin() -> None:
    result = preference_metrics(
        [torch.tensor([500.0, -500.0]), torch.zeros(2)], PreferenceLabels(torch.tensor([1.0, 0.0]), torch.ones(2))
    )
    assert result.bins == ((0.0, 0.0, 1), (1.0, 1.0, 1)) and result.ece == 0 and result.accuracy == 1


def test_calibration_error_tells_the_honest_from_the_overconfident() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = 2 * torch.randn(50_000, dtype=torch.float64, generator=generator)
    chosen = (torch.rand(len(delta), dtype=torch.float64, generator=generator) < torch.sigmoid(delta)).double()
    sampled = PreferenceLabels(chosen, torch.ones_like(chosen))
    zero = torch.zeros_like(delta)
    honest, bold, shy = (preference_metrics([factor * delta, zero], sampled) for factor in (1, 3, 1 / 3))
    assert honest.ece < 0.01 < 0.08 < min(bold.ece, shy.ece)
    assert honest.log_loss < min(bold.log_loss, shy.log_loss)
    assert honest.accuracy == bold.accuracy == shy.accuracy  # the order is the same
    assert sum(count for _, _, count in honest.bins) == len(delta) and len(honest.bins) == BINS
    # Over the pairs, what is right with probability σ(|Δ|):
    assert honest.accuracy == pytest.approx(torch.sigmoid(delta.abs()).mean().item(), abs=0.01)


def test_centring_minds_the_shift_and_not_the_difference() -> None:
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    assert center_rewards_penalty(a, b).item() == pytest.approx((16 + 0) / 2)
    middle = (a + b) / 2
    assert center_rewards_penalty(a - middle, b - middle).item() == 0


def test_the_slope_penalty_of_a_linear_reward_is_its_closed_form() -> None:
    """r(x) = w·x has the slope ‖w‖ everywhere: (‖w‖ − k)², with the gradient 2 (‖w‖ − k) w/‖w‖; 0 below k."""
    weight = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    norm = weight.detach().norm()
    penalty = slope_penalty(lambda x: (x * weight).sum((1, 2, 3)), images, 2.0)
    torch.testing.assert_close(penalty, (norm - 2) ** 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * (norm - 2) * weight.detach() / norm)
    assert slope_penalty(lambda x: (x * weight).sum((1, 2, 3)), images, 2 * norm.item()) == 0


def test_a_mixed_prompt_goes_to_its_nearest_by_a_share_of_the_folded_arcsine_law() -> None:
    texts = torch.eye(4)[[0, 1, 2]] + torch.tensor([[0.0], [0.5], [0.0]]) * torch.eye(4)[[0, 0, 2]]
    shares = []
    for seed in range(2000):
        mixed = mixed_texts(texts, 1.0, Generator().manual_seed(seed))
        toward = torch.stack([texts[1], texts[0], mixed[2] * 0])  # the first two are alike, the third is like nothing
        share = (mixed - toward)[:2].norm(dim=1) / (texts - toward)[:2].norm(dim=1)
        torch.testing.assert_close(mixed[:2], torch.lerp(toward, texts, share.new_tensor([[*share, 0]]).T)[:2])
        shares += share.tolist()
    assert stats.kstest(shares, lambda x: 2 * stats.beta(0.5, 0.5).cdf(x) - 1).pvalue > 1e-3


def test_a_share_of_the_prompts_is_mixed_and_equal_prompts_are_no_neighbours() -> None:
    texts = torch.randn(4000, 3, generator=Generator().manual_seed(0))
    changed = (mixed_texts(texts, 0.3, Generator().manual_seed(1)) != texts).any(1)
    assert abs(changed.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.equal(mixed_texts(texts[:1].expand(5, 3), 1.0, Generator().manual_seed(1)), texts[:1].expand(5, 3))
