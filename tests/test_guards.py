"""Penalties against torch.distributions and sums by hand, controls against tables, checks against broken pipelines."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import cached_pipe
from hypothesis import given
from hypothesis import strategies as st
from rollouts import TWO_PROMPTS, call_of, fresh_pipe, move
from soft_rewards import in_precision, seeded
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from steer.diffusion.schedules import Gaussian
from steer.errors import InputError
from steer.training.guards import EarlyStopping, KLControl, check_replay, check_spread, chi_square, kl
from steer.training.rollout import Sampler
from steer.training.trainable import LoRA

SHAPE = (3, 4, 2, 2)


def two_steps(deviation: float = 0.7, apart: float = 0.2) -> tuple[Gaussian, Gaussian]:
    first = torch.randn(SHAPE, generator=seeded(1))
    second = first + apart * torch.randn(SHAPE, generator=seeded(2))
    return Gaussian(first, torch.tensor(deviation)), Gaussian(second, torch.tensor(deviation))


@pytest.mark.parametrize("deviation", [0.05, 0.7, 3.0])
def test_kl_is_that_of_torch(deviation: float) -> None:
    p, q = two_steps(deviation)
    truth = kl_divergence(Normal(p.mean.double(), deviation), Normal(q.mean.double(), deviation)).flatten(1).sum(1)
    torch.testing.assert_close(kl(p, q), truth, rtol=1e-5, atol=0)
    assert kl(p, q).shape == (3,) and not kl(p, p).any()


def test_chi_square_is_its_integral() -> None:
    """∫ p²/q − 1 of one element, on a grid in fp64."""
    tau, means = 0.7, (0.3, -0.1)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = (torch.exp(Normal(torch.tensor(mean).double(), tau).log_prob(x)) for mean in means)
    integral = torch.trapezoid(p**2 / q, x) - 1
    step = [Gaussian(torch.full((1, 1), mean), torch.tensor(tau)) for mean in means]
    assert chi_square(*step).item() == pytest.approx(integral.item(), rel=1e-5)
    assert integral > 0.1


def test_chi_square_of_several_elements_is_their_product() -> None:
    """1 + χ² of independent elements is the product of theirs."""
    p, q = two_steps()
    each = torch.exp((p.mean - q.mean).double() ** 2 / 0.7**2)  # 1 + χ² of each
    torch.testing.assert_close(chi_square(p, q).double(), each.flatten(1).prod(1) - 1, rtol=1e-5, atol=0)
    assert not chi_square(p, p).any()


def test_small_deviations_are_not_lost_to_rounding() -> None:
    p, q = two_steps(1.0, apart=1e-5)
    torch.testing.assert_close(chi_square(p, q), 2 * kl(p, q), rtol=1e-4, atol=0)
    assert chi_square(p, q).min() > 0


def test_chi_square_is_continued_by_its_tangent() -> None:
    """With u = m²: e^u − 1 and 2m e^u below u = 10, e¹⁰ (u − 9) − 1 and 2m e¹⁰ beyond; no jump of either at 10."""
    root, tenth = math.sqrt(10), 1e-9
    places = [3.1, root - tenth, root + tenth, 3.2, 40.0]
    mean = torch.tensor(places, dtype=torch.float64)[:, None].requires_grad_()
    divergences = chi_square(Gaussian(mean, torch.tensor(1.0)), Gaussian(torch.zeros(5, 1), torch.tensor(1.0)))
    divergences.sum().backward()
    steep, e10 = [min(m * m, 10) for m in places], math.exp(10)
    values = [math.exp(m * m) - 1 if m * m < 10 else e10 * (m * m - 9) - 1 for m in places]
    assert divergences.tolist() == pytest.approx(values, rel=1e-9)
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == pytest.approx(
        [2 * m * math.exp(u) for m, u in zip(places, steep, strict=True)], rel=1e-9
    )
    assert divergences[1].item() == pytest.approx(divergences[2].item(), rel=1e-6)
    assert mean.grad[1].item() == pytest.approx(mean.grad[2].item(), rel=1e-6)


def test_penalties_pull_to_the_reference_but_do_not_move_it() -> None:
    p, q = two_steps()
    mean = p.mean.clone().requires_grad_()
    kl(Gaussian(mean, p.std), q).sum().backward()
    torch.testing.assert_close(mean.grad, (p.mean - q.mean) / 0.7**2)


@pytest.mark.parametrize(
    ("kl", "weight"),
    [
        (5.0, 2.0),  # on target
        (10.0, 2.0 * 2**0.4),  # twice as much: log β moves by the rate times log 2
        (2.5, 2.0 / 2**0.4),
        (500.0, 2.0 * 100**0.4),
        (1e9, 2.0 * 100**0.4),  # at most a hundredfold counts
        (math.inf, 2.0 * 100**0.4),
        (1e-9, 2.0 / 3**0.4),
        (0.0, 2.0),  # before the first step
        (-0.1, 2.0),  # an estimate
        (math.nan, 2.0),
    ],
)
def test_a_weight_that_follows_its_target(kl: float, weight: float) -> None:
    after = KLControl(2.0, target=5.0, budget=50.0, highest=5.0, stalled=1).after(kl)
    assert after.weight == pytest.approx(weight)
    assert (after.target, after.budget, after.rate) == (5.0, 50.0, 0.4)


def test_another_rate() -> None:
    assert KLControl(2.0, target=5.0, rate=0.5).after(20.0).weight == pytest.approx(2.0 * 2)


@given(st.floats(0.001, 1e3), st.floats(0.01, 1e3), st.floats(0, 1e6))
def test_a_weight_moves_by_the_log_and_never_below_zero(weight: float, target: float, kl: float) -> None:
    after = KLControl(weight, target, highest=kl, stalled=1).after(kl).weight
    assert weight / 6.4 <= after <= weight * 6.4
    assert kl == 0 or (after > weight) == (kl > target) or after == pytest.approx(weight)


@pytest.mark.parametrize(("start", "updates"), [(1e4, 70), (1e-4, 20)])
@pytest.mark.parametrize(("power", "memory"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.5), (0.7, 0.3)])
def test_a_weight_is_raised_to_its_target_sooner_than_lowered(
    start: float, updates: int, power: float, memory: float
) -> None:
    """KL = target · β^−power, so that β = 1 is right; with memory, log KL also depends on that of the update before."""
    control, log_kl = KLControl(start, target=4.0), math.log(4.0 * start**-power)
    for _ in range(updates):
        control = control.after(math.exp(log_kl))
        log_kl = memory * log_kl + (1 - memory) * math.log(4.0 * control.weight**-power)
    assert math.exp(log_kl) == pytest.approx(4.0, rel=0.1)
    assert control.weight == pytest.approx(1.0, rel=0.2)


def test_a_weight_is_not_lowered_while_the_kl_of_a_new_run_grows() -> None:
    """A policy that drifts by 1 an update against β x: KL = x²/2 passes 20 nats at update 7."""

    def run(control: KLControl, in_each_update: bool) -> list[tuple[float, float]]:
        x, path = 0.0, []
        for _ in range(100):
            x = (x + 1) / (1 + control.weight)
            control = control.after(x**2 / 2)
            control = replace(control, stalled=9, highest=math.inf) if in_each_update else control
            path.append((x**2 / 2, control.weight))
        return path

    held, lowered = (run(KLControl(0.1, target=20.0), in_each_update) for in_each_update in (False, True))
    assert max(nats for nats, _ in held) < 30 and min(weight for _, weight in held) > 0.08
    assert max(nats for nats, _ in lowered) > 50 and min(weight for _, weight in lowered) < 0.02
    assert held[-1][0] == pytest.approx(20, rel=0.05)


def test_a_weight_is_lowered_where_the_kl_does_not_grow() -> None:
    control = KLControl(2.0, target=5.0, highest=1.0, stalled=1)
    assert control.after(1.3).weight == 2.0 and control.after(1.3).highest == 1.3
    assert control.after(1.1).weight < 2.0 and control.after(0.5).highest == 1.0
    grown = control.after(1.3)
    weights = [(grown := grown.after(1.0)).weight for _ in range(2)]
    assert weights[0] == 2.0 and weights[1] < 2.0


def test_a_weight_without_a_target_stays() -> None:
    control = KLControl(2.0)
    assert control.after(1000.0) is control and not control.is_exhausted(1e9)


def test_a_budget() -> None:
    control = KLControl(budget=3.0)
    assert [control.is_exhausted(kl) for kl in (0.0, 2.99, 3.0, 4.0)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "kl_weight must be at least 0, got -0.1"),
        ({"weight": math.nan}, "kl_weight must be at least 0"),
        ({"weight": 1.0, "target": 0.0}, "kl_target_nats must be above 0 nats, got 0.0"),
        ({"weight": 1.0, "target": -1.0}, "kl_target_nats must be above 0 nats, got -1.0"),
        ({"weight": 1.0, "target": math.nan}, "kl_target_nats must be above 0 nats"),
        ({"budget": 0.0}, "kl_budget_nats must be above 0 nats, got 0.0"),
        ({"budget": -2.0}, "kl_budget_nats must be above 0 nats"),
        ({"target": 4.0}, "kl_target_nats adapts kl_weight, which is 0: set a kl_weight above 0"),
    ],
)
def test_what_is_no_control(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KLControl(**options)


# (trained, held out) of each evaluation; patience; after which evaluation it stops; the step of the best held out.
SCENARIOS: dict[str, tuple[list[tuple[float, float]], int, int | None, int]] = {
    "both rise": ([(1, 1), (2, 2), (3, 3), (4, 4)], 1, None, 3),
    "the trained one alone": ([(1, 1), (2, 0.9), (3, 0.8), (4, 0.7)], 2, 2, 0),
    "at once": ([(1, 1), (2, 0.9)], 1, 1, 0),
    "not in a row": ([(1, 1), (2, 0.9), (0.5, 0.9), (3, 0.8), (4, 1.0)], 2, None, 0),
    "a better one in between": ([(1, 1), (2, 0.9), (3, 1.1), (4, 1.0), (5, 1.0)], 2, 4, 2),
    "both fall": ([(1, 1), (0.9, 0.9), (0.8, 0.8), (0.7, 0.7)], 1, None, 0),
    "the held-out one stays": ([(1, 1), (2, 1), (3, 1), (4, 1)], 1, None, 0),
    "the trained one stays": ([(1, 1), (1, 0.9), (1, 0.8)], 1, None, 0),
    "better than before, not than at the best": ([(3, 1), (1, 0.9), (2, 0.8), (2.5, 0.7)], 1, None, 0),
    "negative rewards": ([(-5, -5), (-4, -4), (-3, -6), (-2, -7)], 2, 3, 1),
    "never": ([(1, 1), (2, 0.9), (3, 0.8), (4, 0.7)], 0, None, 0),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_watch_over_held_out_rewards(name: str) -> None:
    evaluations, patience, stops, best = SCENARIOS[name]
    watch, stopped = EarlyStopping(patience), None
    assert not watch.stop()
    for number, (proxy, held_out) in enumerate(evaluations):
        watch = watch.after(10 * number, proxy, held_out)
        if stopped is None and watch.stop():
            stopped = number
        assert EarlyStopping(patience).load_state(watch.state()) == watch  # as when a run is resumed here
    assert stopped == stops and watch.best_step == 10 * best and watch.best == evaluations[best]


def test_the_state_of_a_watch_is_plain() -> None:
    import json

    watch = EarlyStopping(3).after(0, 1.0, 0.3).after(10, 2.0, 0.1)
    assert watch.state() == {"best_step": 0, "best": [1.0, 0.3], "num_overoptimized": 1}
    assert EarlyStopping(3).load_state(json.loads(json.dumps(watch.state()))) == watch
    assert EarlyStopping(2).load_state(EarlyStopping().state()) == EarlyStopping(2)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_a_replay_of_a_good_pipeline(name: str) -> None:
    sampler = Sampler(cached_pipe(name), call_of(name))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    assert check_replay(sampler, stored, torch.float32) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_replay_in_another_precision(dtype: torch.dtype) -> None:
    sampler = Sampler(in_precision(cached_pipe("sd"), dtype), call_of("sd"), storage=dtype)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    assert check_replay(sampler, stored, dtype) <= (1e-4 if dtype == torch.float64 else 1e-2)


def test_the_bounds_of_a_replay() -> None:
    """A ratio that is 1.001 off passes in half precision alone."""
    sampler = Sampler(cached_pipe("sd"), call_of("sd"))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    for sign in (1, -1):
        stored.log_probs[1, 2] += sign * 0.001
        for dtype in (torch.bfloat16, torch.float16):
            assert check_replay(sampler, stored, dtype) == pytest.approx(0.001, rel=0.05)
        with pytest.raises(InputError, match=r"ratio off by 0.001, at most 0.0001 in float32"):
            check_replay(sampler, stored, torch.float32)
        stored.log_probs[1, 2] -= sign * 0.001


@pytest.mark.parametrize("part", ["a dropout that is on", "changed weights", "a solver that is edited", "not a number"])
def test_a_replay_that_finds_other_densities(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fresh_pipe("sd")
    trained = LoRA(pipe, 2)
    sampler = Sampler(pipe, call_of("sd"))
    if part == "a dropout that is on":
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
                module.train()
    stored, _ = sampler.rollout(TWO_PROMPTS)
    if part == "changed weights":
        move(trained, 0.1)
    if part == "a solver that is edited":
        sampler = Sampler(pipe, call_of("sd") | {"guidance_scale": 3.1})
    if part == "not a number":
        stored.log_probs[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"a replay of the first samples has other log-probabilities.*dropout is on"):
        check_replay(sampler, stored, torch.float32)


def rewards(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("values", [rewards([1.0, 1.0], [2.0, 2.5]), rewards([1.0], [1.0]), rewards([0.0, 1.0])])
def test_rewards_that_tell_samples_apart(values: Tensor) -> None:
    check_spread(values, "mine")


@pytest.mark.parametrize("values", [rewards([0.25, 0.25, 0.25], [2.0, 2.0, 2.0]), rewards([0.25, 0.25, 0.25])])
def test_rewards_that_do_not(values: Tensor) -> None:
    message = "reward 'mine' gave all 3 samples of every prompt the same score .0.25 for the first.*finer reward"
    with pytest.raises(InputError, match=message):
        check_spread(values, "mine")
