"""Reward curves over √KL, and the sign of a hacked run, against planted values and closed forms."""

import math

import pytest
import torch
from torch import Generator

from steer.errors import InputError
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.tracking import scalars
from steer.training.overoptimization import (
    RewardCurve,
    best_of_n_kl,
    find_hacking,
    fit_reward_curve,
    point_of_usefulness,
)


@pytest.mark.parametrize("law", ["finetuning", "best-of-n"])
def test_a_planted_curve_is_recovered(law: str) -> None:
    truth = RewardCurve(law, 1.3, 0.4, (0, 0), (0, 0))
    kl = torch.linspace(0.1, 30, 60).double()
    clean = torch.tensor([truth(math.sqrt(one)) for one in kl.tolist()]).double()
    exact = fit_reward_curve(kl, clean, law)
    assert exact.alpha == pytest.approx(1.3, rel=1e-5) and exact.beta == pytest.approx(0.4, rel=1e-5)
    noisy = clean + 0.1 * torch.randn(60, generator=Generator().manual_seed(0)).double()
    curve = fit_reward_curve(kl, noisy, law)
    for value, (low, high), planted in (
        (curve.alpha, curve.alpha_interval, 1.3),
        (curve.beta, curve.beta_interval, 0.4),
    ):
        assert low < value < high and abs(value - planted) < 2 * (high - low) / 3.9
    assert curve.peak == pytest.approx(truth.peak, rel=0.1)
    near = [truth(truth.peak * factor) for factor in (0.98, 1.0, 1.02)]
    assert near[1] == max(near)  # by hand: dR/dd = 0 at exp(α/β − 1), or α/2β


def test_a_curve_that_never_falls_has_no_peak() -> None:
    assert RewardCurve("finetuning", 1.0, 0.0, (0, 0), (0, 0)).peak == math.inf
    with pytest.raises(InputError, match="three points with KL above 0"):
        fit_reward_curve(torch.tensor([0.0, 1.0, 2.0]), torch.ones(3))


def test_kl_of_best_of_n() -> None:
    """The density ratio of the best of n is n u^(n−1) over ranks u: its KL by quadrature."""
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    ratio = 8 * u**7
    assert best_of_n_kl(8) == pytest.approx((ratio * ratio.log()).mean().item(), rel=1e-4)


def evaluation(step: int, trained: list[list[float]], held_out: list[list[float]]) -> dict[str, object]:
    rewards = {"trained": torch.tensor(trained).float(), "truth": torch.tensor(held_out).float()}
    return EvalResult(step, ("a", "b"), rewards, 0.0, torch.zeros(4, 3, 1, 1)).record()


BASE = evaluation(0, [[0.0, 1.0], [2.0, 4.0]], [[0.0, 2.0], [1.0, 2.0]])
HACKED = evaluation(10, [[5.0, 6.0], [7.0, 8.0]], [[1.0, -1.0], [0.5, 0.0]])


def test_records_have_correlations_and_deviations() -> None:
    """By hand: centred (∓.5, ∓1) and (∓1, ∓.5): r = (2·.5 + 2·.5)/√(2.5 · 2.5) = .8."""
    assert BASE["eval/correlation/truth"] == pytest.approx(0.8)
    assert HACKED["eval/correlation/truth"] < 0
    assert BASE["eval/deviation/trained"] == pytest.approx(torch.tensor([0.0, 1, 2, 4]).std(correction=0).item())
    single = EvalResult(0, ("a",), {"t": torch.ones(1, 1), "h": torch.ones(1, 1)}, 0.0, torch.zeros(1, 3, 1, 1))
    assert "eval/correlation/h" not in single.record()


def test_a_hacked_run_is_named() -> None:
    hacking = find_hacking([BASE, HACKED])
    assert hacking is not None and hacking.before == pytest.approx(1.25) and hacking.after == pytest.approx(0.125)
    assert "the held-out reward truth fell from 1.25 to 0.125" in str(hacking)
    assert "(r = 0.80, now -0.86)" in str(hacking)  # −1.25 / √2.125
    assert find_hacking([BASE, evaluation(10, [[5, 6], [7, 8]], [[1, 3], [1, 2]])]) is None  # it rose
    uncorrelated = evaluation(0, [[1.0, 0.0], [4.0, 2.0]], [[0.0, 2.0], [1.0, 2.0]])
    assert find_hacking([uncorrelated, HACKED]) is None  # the proxy never promised anything
    assert find_hacking([BASE]) is None and find_hacking([]) is None
    assert find_hacking([BASE, HACKED], step=0) is None  # the exported weights are the base model's


def test_a_fall_within_the_noise_of_the_prompts_is_no_hacking() -> None:
    """Paired by prompt: −1.0 and +0.75 have a mean below 0 and an interval around it; −1.0 and −0.1 do not."""
    one, other = (evaluation(10, [[5.0, 6.0], [7.0, 8.0]], [[1.0, -1.0], [1.5 + d, 1.5 + d]]) for d in (0.75, -0.1))
    assert one["eval/by_prompt"] == {"truth": [0.0, 2.25]} and one["eval/truth"][0] < BASE["eval/truth"][0]
    assert find_hacking([BASE, one]) is None
    assert find_hacking([BASE, other]) is not None
    assert "eval/by_prompt" not in scalars(one) and scalars(one)["eval/truth"] == 1.125


def test_the_point_of_usefulness_by_hand() -> None:
    """The best of 2 of 4 has ranks 2, 3, 4 with probabilities 1/6, 2/6, 3/6; of 3, ranks 3 and 4 with 1/4 and 3/4."""
    proxy, truth = torch.tensor([[3.0, 1.0, 4.0, 2.0]]), torch.tensor([[4.0, 0.0, 1.0, 5.0]])
    point = point_of_usefulness(proxy, truth)
    assert (point.n, point.rising) == (2, False)
    assert point.proxy == pytest.approx((2 + 2 * 3 + 3 * 4) / 6) and point.interval == (point.proxy, point.proxy)
    assert point.gain == pytest.approx((5 + 2 * 4 + 3 * 1) / 6 - 10 / 4)
    assert point_of_usefulness(proxy, proxy).rising
    with pytest.raises(InputError, match="must both be"):
        point_of_usefulness(proxy, truth[:, :3])


def test_the_point_of_usefulness_of_a_planted_peak() -> None:
    """r = x and truth x − x²/2 of x ~ N(0, 1): the best of n with E x_(n) − E x_(n)²/2 highest, by numeric moments."""
    x = torch.randn(400, 8, generator=Generator().manual_seed(0)).double()
    point = point_of_usefulness(x, x - x**2 / 2 + 0.1 * torch.randn(400, 8, generator=Generator().manual_seed(1)))
    grid = torch.linspace(-8, 8, 4001).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    moments = []
    for n in range(1, 9):
        density = n * normal.cdf(grid) ** (n - 1) * normal.log_prob(grid).exp() * (grid[1] - grid[0])
        moments.append([(density * grid).sum(), (density * grid**2).sum()])
    first, second = torch.tensor(moments).T
    best = int((first - second / 2).argmax())
    assert point.n == best + 1 and point.interval[0] < first[best] < point.interval[1]
