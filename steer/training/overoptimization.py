"""Measures of over-optimisation: reward curves over √KL with fits, hacked runs, and a bound of the held-out gain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steer.errors import InputError

Law = Literal["finetuning", "best-of-n"]
RESAMPLES = 10_000  # of an interval
MIN_ESS = 10.0  # effective sample size from which χ² is estimated


def interval(values: Tensor) -> list[float]:
    """Return the mean of values (N,) and its 95 % bootstrap interval over them: [mean, low, high]."""
    rows = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [values.mean().item(), low, high]


def best_of_n_kl(n: int) -> float:
    """Return log n − (n − 1)/n nats, an upper bound of KL(best of n ‖ one sample), exact for distinct rewards."""
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Tensor, value: Tensor, n: int) -> Tensor:
    """Return for each prompt (P,) E[value of the sample with the highest proxy among n], over n-subsets of K samples.

    The k-th of K samples, worst first, is the best of a random n-subset with probability C(k−1, n−1) / C(K, n): an
    unbiased estimate from one sample of K (arXiv 2112.09332, appendix I). proxy, value: (P, K).
    """
    total = proxy.shape[1]
    chance = [math.comb(k - 1, n - 1) / math.comb(total, n) for k in range(1, total + 1)]
    order = proxy.argsort(dim=1, stable=True)
    return (value.double().gather(1, order) * torch.tensor(chance, dtype=torch.float64)).sum(1)


@dataclass(frozen=True)
class Usefulness:
    """The point up to which a proxy is useful: best-of-n by the proxy has its highest held-out reward there.

    n         number of samples at this point
    proxy     mean of the proxy there: the value for the bound of a constraint
    interval  95 % bootstrap interval of `proxy` over the prompts
    gain      gain of the held-out reward there, over one sample
    rising    whether the peak is at the last n, so that the point lies beyond these samples
    """

    n: int
    proxy: float
    interval: tuple[float, float]
    gain: float
    rising: bool


def point_of_usefulness(proxy: Tensor, held_out: Tensor, resamples: int = 2000) -> Usefulness:
    """Return the point of usefulness (after arXiv 2310.04373, sec. 4) of a proxy, from samples alone.

    proxy, held_out  (P, K), K ≥ 2 samples of each prompt. Raises InputError for other shapes.
    """
    if proxy.dim() != 2 or proxy.shape != held_out.shape or proxy.shape[1] < 2:
        raise InputError(
            f"proxy and held-out scores must both be (prompts, samples) with 2 samples or more, got "
            f"{tuple(proxy.shape)} and {tuple(held_out.shape)}"
        )
    counts = range(1, proxy.shape[1] + 1)
    curves = [torch.stack([expected_best(proxy, one, n) for n in counts], 1) for one in (proxy, held_out)]  # (P, K)
    generator = torch.Generator().manual_seed(0)
    prompts = proxy.shape[0]
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    shares = torch.zeros(resamples, prompts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.full(drawn.shape, 1 / prompts, dtype=torch.float64)
    )
    proxies, truths = (shares @ curve for curve in curves)  # (resamples, K)
    peaks = proxies.gather(1, truths.argmax(1, keepdim=True)).flatten()
    low, high = peaks.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    mean_proxy, mean_truth = (curve.mean(0) for curve in curves)
    place = int(mean_truth.argmax())
    gain = (mean_truth[place] - mean_truth[0]).item()
    return Usefulness(place + 1, mean_proxy[place].item(), (low, high), gain, place + 1 == proxy.shape[1])


@dataclass(frozen=True)
class RewardCurve:
    """R(d) over d = √KL: d(α − β log d) for finetuning, d(α − β d) for best-of-n (arXiv 2210.10760, sec. 3.2).

    alpha, beta                  in the unit of R per √nat
    alpha_interval, beta_interval  95 % bootstrap intervals over the points
    """

    law: Law
    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]

    @property
    def peak(self) -> float:
        """The d with the highest R: exp(α/β − 1), or α/(2β); infinite where R never falls (β ≤ 0)."""
        if self.beta <= 0:
            return math.inf
        exponent = self.alpha / self.beta - 1
        if self.law == "best-of-n":
            return self.alpha / (2 * self.beta)
        return math.exp(exponent) if exponent < 700 else math.inf

    def __call__(self, distance: float) -> float:
        """Return R at d > 0."""
        bend = math.log(distance) if self.law == "finetuning" else distance
        return distance * (self.alpha - self.beta * bend)


def fit_reward_curve(kl: Tensor, gain: Tensor, law: Law = "finetuning", resamples: int = 2000) -> RewardCurve:
    """Fit R(√KL) to gains (N,) over the base model by least squares; R is linear in α and β.

    kl  (N,) nats; points without KL > 0 are left out. Raises InputError where fewer than three are left.
    """
    used = kl > 0
    distance, values = kl[used].double().sqrt(), gain[used].double()
    if len(distance) < 3 or len(distance.unique()) < 2:
        raise InputError(f"a curve needs three points with KL above 0 and two different ones, got {len(distance)}")
    bend = distance.log() if law == "finetuning" else distance
    design = torch.stack([distance, -distance * bend], 1)

    alpha, beta = (torch.linalg.pinv(design) @ values).tolist()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (resamples, len(values)), generator=generator)
    drawn = (torch.linalg.pinv(design[rows]) @ values[rows][..., None])[..., 0]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    return RewardCurve(law, alpha, beta, (low[0], high[0]), (low[1], high[1]))


@dataclass(frozen=True)
class Hacking:
    """A run whose held-out reward fell below the base model's though both rewards agreed on the base model's samples.

    (Definition 4.2 of arXiv 2403.03185.) correlation, correlation_now: within prompts, at the first and the last
    evaluation
    """

    held_out: str
    before: float
    after: float
    correlation: float
    correlation_now: float

    def __str__(self) -> str:
        return (
            f"Reward hacking: the held-out reward {self.held_out} fell from {self.before:.4g} to {self.after:.4g}, "
            f"below the base model's, while it correlated with the trained one on the base model's samples (r = "
            f"{self.correlation:.2f}, now {self.correlation_now:.2f})."
        )


def find_hacking(evaluations: Sequence[Mapping[str, Any]], step: int | None = None) -> Hacking | None:
    """Return the hacking of the first held-out reward that shows it; None without any, or with one sample per prompt.

    A reward has fallen where the 95 % bootstrap interval of its difference, paired by prompt, is below 0.

    evaluations  records of the evaluations, the base model's first
    step         the update whose weights are judged; None: the last
    """
    by_step = {one["step"]: one for one in evaluations}
    if len(by_step) < 2:
        return None
    base, now = evaluations[0], by_step.get(step, evaluations[-1])
    for name in (key.removeprefix("eval/correlation/") for key in base if key.startswith("eval/correlation/")):
        before, after = (record[f"eval/{name}"][0] for record in (base, now))
        first, last = (record.get(f"eval/correlation/{name}", math.nan) for record in (base, now))
        then, here = (torch.tensor(record.get("eval/by_prompt", {}).get(name, [])) for record in (base, now))
        if first > 0 and len(then) and len(then) == len(here) and interval(here - then)[2] < 0:
            return Hacking(name, before, after, first, last)
    return None


def chi_square_estimate(log_ratios: Tensor) -> tuple[float, float]:
    """Return χ²(π ‖ π₀) = E_π[w] − 1, w = π/π₀, from log w (N,) of samples of π, and its ESS (Σ w)² / Σ w²."""
    logs = log_ratios.double()
    total = logs.logsumexp(0)
    return (total - math.log(len(logs))).exp().item() - 1, (2 * total - (2 * logs).logsumexp(0)).exp().item()


def held_out_bound(proxy_gain: float, correlation: float, chi_square: float) -> float:
    """Return a lower bound of the held-out gain: r⁻¹ (Δ − √((1 − r²) χ²)) (theorem 5.1 of arXiv 2403.03185).

    proxy_gain   Δ, gain of the trained reward over the base model, in its deviations on samples of the base model; the
                 bound is in those of the held-out reward
    correlation  r > 0 of the two rewards on samples of the base model
    chi_square   χ² of the policy from the base model
    """
    return (proxy_gain - math.sqrt(max((1 - correlation**2) * chi_square, 0.0))) / correlation


@dataclass(frozen=True)
class Guarantee:
    """The gain of a held-out reward that its correlation with the trained one guarantees (`held_out_bound`).

    bound       in the unit of the held-out reward; None where χ² is not estimated
    chi_square  χ² of trajectories from the base model; None where its effective sample size `ess` is below MIN_ESS
    """

    held_out: str
    bound: float | None
    correlation: float
    chi_square: float | None
    ess: float

    def __str__(self) -> str:
        start = f"Guaranteed gain of the held-out reward {self.held_out} (theorem 5.1 of arXiv 2403.03185):"
        if self.bound is None:
            return f"{start} not estimated, the effective sample size of χ² is {self.ess:.2g}, below {MIN_ESS:g}."
        given = f"r = {self.correlation:.2f}, χ² = {self.chi_square:.3g} of effective sample size {self.ess:.3g}"
        return f"{start} {'no guarantee' if self.bound <= 0 else f'at least {self.bound:.3g}'} ({given})."


def guaranteed_gain(evaluations: Sequence[Mapping[str, Any]], step: int | None = None) -> Guarantee | None:
    """Return the guarantee for the first held-out reward that correlates with the trained one on the base model.

    evaluations  records of the evaluations, the base model's first, with several samples per prompt and `eval_kl`
    step         the update whose weights are judged; None: the last
    Gains, deviations and r are within prompts, where the theorem holds too: E_π[w | prompt] = 1 cancels prompts' means.
    """
    by_step = {one["step"]: one for one in evaluations}
    if len(by_step) < 2 or "eval/chi_square_ess" not in (now := by_step.get(step, evaluations[-1])):
        return None
    base, ess = evaluations[0], now["eval/chi_square_ess"]
    trained = next(key.removeprefix("eval/") for key, value in base.items() if isinstance(value, list))
    for name in (key.removeprefix("eval/correlation/") for key in base if key.startswith("eval/correlation/")):
        r, units = base[f"eval/correlation/{name}"], [base[f"eval/within/{one}"] for one in (trained, name)]
        if r > 0:
            gain = (now[f"eval/{trained}"][0] - base[f"eval/{trained}"][0]) / units[0]
            chi_square = now.get("eval/chi_square")
            bound = None if chi_square is None else units[1] * held_out_bound(gain, r, chi_square)
            return Guarantee(name, bound, r, chi_square, ess)
    return None
