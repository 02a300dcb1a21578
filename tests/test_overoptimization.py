"""Reward curves over √KL, and the sign of a hacked run, against planted values and closed forms."""

import math

import pytest
import torch
from rollouts import MOVED, TWO_PROMPTS, call_of, fresh_pipe, move
from torch import Generator

from steer.errors import InputError
from steer.pipelines.training.evaluation import EvalResult, policy_divergence
from steer.pipelines.training.tracking import scalars
from steer.training.overoptimization import (
    RewardCurve,
    best_of_n_kl,
    chi_square_estimate,
    find_hacking,
    fit_reward_curve,
    guaranteed_gain,
    held_out_bound,
    point_of_usefulness,
)
from steer.training.rollout import Sampler, log_probs
from steer.training.trainable import LoRA


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
    assert find_hacking([uncorrelated, HACKED]) is None  # the proxy never predicted the truth
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


def tilted(step: int, shift: float, rho: float, samples: int = 4000) -> EvalResult:
    """N(0, 1) tilted by exp(λ x) is N(λ, 1): samples of one proxy x, a truth that correlates with it by ρ, log w."""
    x, other = torch.randn(2, 50, samples, generator=Generator().manual_seed(step), dtype=torch.float64)
    proxy = x + shift
    truth = 3.0 * (rho * proxy + math.sqrt(1 - rho**2) * other)
    prompts = torch.linspace(-5, 5, 50, dtype=torch.float64)[:, None]  # means by prompt, which cancel
    logs = (shift * proxy - shift**2 / 2).flatten()
    rewards = {"proxy": 2.0 * proxy + prompts, "truth": truth - prompts}
    return EvalResult(step, ("a",), rewards, 0.0, None, kl=logs.mean().item(), log_ratios=logs)


@pytest.mark.parametrize(("shift", "rho"), [(0.3, 0.9), (0.7, 0.97), (0.5, 0.3)])
def test_a_tilted_gaussian_meets_the_bound_in_closed_form(shift: float, rho: float) -> None:
    base, now = tilted(0, 0.0, rho), tilted(1, shift, rho)
    logs, n = now.log_ratios, 200_000
    assert logs is not None and now.kl == pytest.approx(shift**2 / 2, abs=3 * shift / n**0.5)
    chi_square, ess = chi_square_estimate(logs)
    error = (logs.exp().std() / n**0.5).item()
    assert chi_square == pytest.approx(math.exp(shift**2) - 1, abs=3 * error)
    assert ess == pytest.approx(n * math.exp(-(shift**2)), rel=0.05)
    gain = guaranteed_gain([base.record(), now.record()])
    assert gain is not None and gain.bound is not None and gain.correlation == pytest.approx(rho, abs=0.01)
    exact = 3.0 * (shift - math.sqrt((1 - rho**2) * (math.exp(shift**2) - 1))) / rho
    assert gain.bound == pytest.approx(exact, abs=0.15)
    assert gain.bound <= 3.0 * rho * shift + 0.03, "the true gain is not below it"
    assert ("no guarantee" in str(gain)) == (rho == 0.3) and f"r = {rho:.2f}" in str(gain)


def test_the_bound_by_hand_and_where_it_is_not_estimated() -> None:
    assert held_out_bound(1.0, 0.8, 1.0) == pytest.approx(0.5) and held_out_bound(0.5, 1.0, 9.0) == 0.5
    base, far = tilted(0, 0.0, 0.9, 2).record(), tilted(1, 3.0, 0.9, 2).record()
    gain = guaranteed_gain([base, far])
    assert gain is not None and gain.bound is None and "eval/chi_square" not in far and gain.ess < 10
    assert "not estimated, the effective sample size of χ² is " in str(gain)
    assert guaranteed_gain([BASE, HACKED]) is None and guaranteed_gain([base]) is None, "nothing was measured"


def test_the_log_ratios_of_an_evaluation_are_those_of_its_trajectories() -> None:
    """The densities that the rollout stored, against those of a replay without the adapter."""
    pipe = fresh_pipe("sd")
    lora = LoRA(pipe, rank=2)
    move(lora, MOVED["sd"])
    sampler = Sampler(pipe, call_of("sd"), 1.0)
    kl, ratios = policy_divergence(sampler, TWO_PROMPTS, lora.reference)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    with lora.reference():
        truth = (stored.log_probs - log_probs(sampler, stored)).sum(1)
    torch.testing.assert_close(ratios, truth.double(), atol=1e-3, rtol=1e-3)
    assert ratios.abs().min() > 0.01 and kl.min() > 0
