"""Rewards of rewards: aggregates, sums, products, other scales. By hand, by their laws, by finite differences."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer.reward import Composite, Reward, RewardError, score, score_components
from steer.rewards.colour import Brightness, ColourMatch
from steer.rewards.compose import (
    AGGREGATES,
    Aggregate,
    Calibration,
    CombinedReward,
    Constraint,
    LogSigmoidReward,
    ProductReward,
    RewardStatistics,
    StandardisedReward,
    WeightedReward,
    aggregate,
    mean,
    mean_minus_std,
    quantile,
    read_calibration,
    reward_statistics,
    robust,
    total,
    worst,
)
from steer.rewards.jpeg import JpegCompressibility
from steer.rewards.parser import combine

IMAGES = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["p", "p", "q", "q"]


class Column:
    """Image n's pixels are its scores: this reward is channel c of its first pixel."""

    differentiable = True

    def __init__(self, channel: int, name: str | None = None) -> None:
        self.name, self._channel = name or "abc"[channel], channel

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, self._channel, 0, 0]


A, B, C = (Column(channel) for channel in range(3))


def showing(scores: Sequence[Sequence[float]]) -> Tensor:
    """Images, to which A, B, C give these scores (M, N)."""
    rows = torch.tensor(scores, dtype=torch.float32).T
    images = torch.zeros(len(rows), 3, 1, 1)
    images[:, : rows.shape[1], 0, 0] = rows
    return images


def scored(reward: Reward, scores: Sequence[Sequence[float]]) -> list[float]:
    images = showing(scores)
    return score(reward, images, [""] * len(images)).tolist()


SCORES = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mean", {}, [3, 1]),
        ("sum", {}, [9, 3]),
        ("min", {}, [1, 0]),
        ("mean-std", {}, [3 - math.sqrt(14 / 3), 1 - math.sqrt(2)]),
        ("mean-std", {"lam": 0.5}, [3 - math.sqrt(14 / 3) / 2, 1 - math.sqrt(2) / 2]),
        ("mean-std", {"lam": -1}, [3 + math.sqrt(14 / 3), 1 + math.sqrt(2)]),
        ("quantile", {}, [1.5, 0]),
        ("quantile", {"q": 0}, [1, 0]),
        ("quantile", {"q": 0.75}, [4, 1.5]),
        ("quantile", {"q": 1}, [6, 3]),
        ("robust", {}, [0.6 * 3 + 0.4 * 1, 0.6]),
        ("robust", {"gamma": 1}, [3, 1]),
        ("robust", {"gamma": 0}, [1, 0]),
        ("robust", {"gamma": 0.25}, [1.5, 0.25]),
    ],
)
def test_aggregates_by_hand(name: str, options: dict[str, float], expected: list[float]) -> None:
    assert aggregate(name, options, "here")(SCORES).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min", {"q": 0.5}, "here: min takes no options, not 'q'"),
        ("quantile", {"lam": 1}, "here: quantile takes q, not 'lam'"),
        ("quantile", {"q": 1.5}, "here: q must be a number from 0 to 1"),
        ("quantile", {"q": "half"}, "here: q must be a number from 0 to 1"),
        ("robust", {"gamma": -0.1}, "here: gamma must be a number from 0 to 1"),
        ("robust", {"lam": 1}, "here: robust takes gamma, not 'lam'"),
        ("mean-std", {"lam": math.inf}, "here: lam must be a finite number"),
        ("mean-std", {"lam": math.nan}, "here: lam must be a finite number"),
        ("mean-std", {"lam": True}, "here: lam must be a finite number"),
        ("mean-std", {"lam": 10**400}, "here: lam must be a finite number"),
    ],
)
def test_options_of_aggregates_that_cannot_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError) as raised:
        aggregate(name, options, "here")
    assert str(raised.value) == message


columns = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(-100, 100, width=32), min_size=n, max_size=n), min_size=1, max_size=5)
)


@given(rows=columns, q=st.floats(0, 1), lam=st.floats(-2, 2), order=st.randoms(use_true_random=False))
def test_the_laws_of_aggregates(rows: list[list[float]], q: float, lam: float, order: Any) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    low, high, middle = scores.amin(0), scores.amax(0), scores.mean(0)
    near = 1e-9
    assert torch.equal(worst(scores), low)
    assert (quantile(scores, q) >= low - near).all() and (quantile(scores, q) <= high + near).all()
    assert torch.equal(quantile(scores, 0.0), low) and torch.equal(quantile(scores, 1.0), high)
    assert (worst(scores) <= mean(scores) + near).all()
    assert torch.equal(mean_minus_std(scores, 0.0), middle)
    assert torch.allclose(total(scores), len(rows) * middle)
    assert ((mean_minus_std(scores, lam) - middle) * lam <= 0).all()
    order.shuffle(rows)
    for chosen in AGGREGATES.values():
        assert chosen(scores).shape == middle.shape
        assert torch.allclose(chosen(torch.tensor(rows, dtype=torch.float64)), chosen(scores), atol=1e-5)


@pytest.mark.parametrize("chosen", AGGREGATES.values(), ids=AGGREGATES)
def test_slopes_of_aggregates_are_those_of_finite_differences(chosen: Aggregate) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(chosen, (scores,))
    alike = torch.ones(4, 3, requires_grad=True)
    chosen(alike).sum().backward()
    assert alike.grad is not None and alike.grad.isfinite().all()


def test_the_slope_of_a_robust_aggregate_by_hand() -> None:
    """γ/M for every reward, and 1 − γ more for the lowest."""
    scores = SCORES.clone().requires_grad_()
    robust(scores, 0.4)[0].backward()
    assert scores.grad is not None
    assert scores.grad[:, 0].tolist() == pytest.approx([0.4 / 3 + 0.6, 0.4 / 3, 0.4 / 3])


def test_a_robust_pick_lies_between_those_of_mean_and_minimum() -> None:
    """Best of 256 by mean, robust and minimum of four noisy members: gold reward and worst member of the picks."""
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(400, 256, generator=generator)
    members = gold + torch.randn(4, 400, 256, generator=generator)

    def picked(chosen: Aggregate) -> tuple[float, float]:
        rows = chosen(members).argmax(1, keepdim=True)
        return members.mean(0).gather(1, rows).mean().item(), members.amin(0).gather(1, rows).mean().item()

    (mean_of_mean, least_of_mean), (mean_of_both, least_of_both), (mean_of_least, least_of_least) = map(
        picked, (mean, robust, worst)
    )
    assert mean_of_least < mean_of_both < mean_of_mean and least_of_mean < least_of_both < least_of_least


def test_sums_products_and_scales_by_hand() -> None:
    scores = [[1.0, -1.0], [0.5, 0.25], [0.0, 4.0]]
    assert scored(combine([A, B, C]), scores) == [1.5, 3.25]
    assert scored(combine({A: 2, B: -4, C: 0.5}), scores) == [0.0, -1.0]
    assert scored(combine({A: 2, B: -4}, worst), scores) == [-2.0, -2.0]
    product = ProductReward([Constraint(A, ">", 0.0, 1.0), Constraint(B, "<", 0.25, 0.5)])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert scored(product, scores) == pytest.approx([sigmoid(1) * sigmoid(-0.5), sigmoid(-1) / 2])
    assert scored(StandardisedReward(A, RewardStatistics(0.5, 0.25, 9, {})), scores) == [2.0, -6.0]
    assert scored(LogSigmoidReward(A, 0.5, 2.0), scores) == pytest.approx(
        [math.log(sigmoid(0.25)), math.log(sigmoid(-0.75))]
    )


def test_a_reference_may_be_each_prompts_own() -> None:
    reward = LogSigmoidReward(A, {"p": 1.0, "q": -1.0})
    images = showing([[2.0, 2.0, 0.0]])
    expected = [math.log(1 / (1 + math.exp(-x))) for x in (1, 3, 1)]
    assert score(reward, images, ["p", "q", "q"]).tolist() == pytest.approx(expected)
    with pytest.raises(RewardError, match=r"logsigmoid\(a\): no reference for the prompt 'r': calibrate with it, or"):
        score(reward, images, ["p", "r", "q"])


def test_a_sum_of_log_sigmoids_prefers_what_is_good_on_all() -> None:
    """arXiv 2402.00742: one reward cannot be bought back with another.

    Above their references: image 0 by (1, 1), image 1 by (4, −1). Plain sums are 2 and 3. Of log-sigmoids:
    2 log σ(1) = −0.6265 and log σ(4) + log σ(−1) = −0.0181 − 1.3133.
    """
    scores = [[1.0, 4.0], [1.0, -1.0]]
    plain = scored(combine([A, B]), scores)
    both = scored(combine([LogSigmoidReward(A, 0.0), LogSigmoidReward(B, 0.0)]), scores)
    assert plain == [2.0, 3.0]
    assert both == pytest.approx([-0.62652, -1.33141], abs=1e-5)
    # exp of it is the probability that both hold, were they independent.
    assert math.exp(both[0]) == pytest.approx((1 / (1 + math.exp(-1))) ** 2)


numbers = st.floats(-20, 20, width=32)


@given(
    scores=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6),
    weights=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
    factor=st.floats(-5, 5),
)
def test_a_sum_is_linear_in_its_weights(
    scores: list[tuple[float, float]], weights: tuple[float, float], factor: float
) -> None:
    rows = list(zip(*scores, strict=True))
    one, other = weights
    result = scored(combine({A: one, B: other}), rows)
    assert result == pytest.approx([one * a + other * b for a, b in scores], abs=1e-4)
    scaled = scored(combine({A: factor * one, B: factor * other}), rows)
    assert scaled == pytest.approx([factor * value for value in result], abs=1e-3)


@given(a=numbers, b=numbers, more=st.floats(0, 10, width=32), bound=st.floats(-3, 3), temperature=st.floats(0.5, 5))
def test_a_product_is_a_share_that_grows_with_every_margin(
    a: float, b: float, more: float, bound: float, temperature: float
) -> None:
    product = ProductReward([Constraint(A, ">", bound, temperature), Constraint(B, "<", bound, temperature)])
    here, better_a, better_b = scored(product, [[a, a + more, a], [b, b, b - more]])
    assert 0 <= here <= 1 and 0 < max(better_a, here) <= 1
    assert better_a >= here and better_b >= here


@given(values=st.lists(numbers, min_size=2, max_size=9), temperature=st.floats(0.1, 10), reference=numbers)
def test_log_sigmoids_are_below_0_and_keep_the_order(values: list[float], temperature: float, reference: float) -> None:
    result = scored(LogSigmoidReward(A, reference, temperature), [values])
    assert all(value <= 0 for value in result)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(result[low] <= result[high] + 1e-6 for low, high in pairwise(order))


@given(values=st.lists(numbers, min_size=2, max_size=9))
def test_a_standardised_reward_has_mean_0_and_spread_1_on_what_it_was_measured_on(values: list[float]) -> None:
    scores = torch.tensor(values)
    if scores.double().std() < 1e-3:
        return
    prompts = ["pq"[k % 2] for k in range(len(values))]
    scale = reward_statistics(scores, prompts)
    result = torch.tensor(scored(StandardisedReward(A, scale), [values]), dtype=torch.float64)
    assert result.mean().item() == pytest.approx(0, abs=1e-2) and result.std().item() == pytest.approx(1, rel=1e-2)
    assert scale.prompts == pytest.approx({"p": scores[::2].mean().item(), "q": scores[1::2].mean().item()}, abs=1e-4)
    assert scale.count == len(values)


@pytest.mark.parametrize("values", [[], [1.0], [0.1, 0.1, 0.1], [1e5] * 7])
def test_scores_that_are_all_the_same_cannot_be_measured(values: list[float]) -> None:
    with pytest.raises(RewardError, match="every sample the same score cannot be calibrated"):
        reward_statistics(torch.tensor(values), ["p"] * len(values))


def nested(inner: Reward) -> list[Reward]:
    """Compositions of `inner` and of two rewards with gradients."""
    bright, red = Brightness(), ColourMatch("red")
    scale = RewardStatistics(0.3, 0.2, 9, {"p": 0.2, "q": 0.3})
    return [
        combine({inner: 2.0, bright: -0.5}),
        CombinedReward([WeightedReward(inner, 0.3), WeightedReward(red), WeightedReward(bright)], mean_minus_std),
        CombinedReward(
            [
                WeightedReward(inner),
                WeightedReward(
                    CombinedReward([WeightedReward(red), WeightedReward(StandardisedReward(bright, scale), 0.1)], worst)
                ),
            ]
        ),
        ProductReward([Constraint(inner, ">", 0.4, 0.3), Constraint(combine([red, bright]), "<", 1.1, 0.2)]),
        LogSigmoidReward(ProductReward([Constraint(inner, ">", 0.4, 0.3)]), scale.prompts, 0.2),
    ]


@pytest.mark.parametrize("place", range(5))
def test_gradients_flow_where_every_part_has_one(place: int) -> None:
    reward = nested(ColourMatch("navy"))[place]
    assert reward.differentiable
    images = IMAGES.clone().requires_grad_()
    score(reward, images, PROMPTS).sum().backward()
    assert images.grad is not None
    direction = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(2))
    step = 2e-3 * direction
    with torch.no_grad():
        slope = (score(reward, IMAGES + step, PROMPTS) - score(reward, IMAGES - step, PROMPTS)).sum().item() / 4e-3
    assert slope == pytest.approx((images.grad * direction).sum().item(), rel=0.02, abs=2e-3)
    assert not nested(JpegCompressibility())[place].differentiable


@pytest.mark.parametrize("place", range(5))
def test_what_is_made_of_scores_has_exact_slopes(place: int) -> None:
    """In fp64, of the components; through images everything is fp32."""
    reward = nested(A)[place]
    assert isinstance(reward, Composite)
    names = list(reward.components(IMAGES, PROMPTS))
    values = tuple(
        torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(k), requires_grad=True)
        for k in range(len(names))
    )
    assert torch.autograd.gradcheck(lambda *given: reward.total(dict(zip(names, given, strict=True)), PROMPTS), values)


@pytest.mark.parametrize("place", range(5))
def test_images_are_scored_one_by_one(place: int) -> None:
    reward = nested(JpegCompressibility())[place]
    order = [2, 0, 3, 1]
    result = score(reward, IMAGES, PROMPTS)
    assert torch.allclose(score(reward, IMAGES[order], [PROMPTS[k] for k in order]), result[order], atol=1e-6)
    alone = [score(reward, IMAGES[k : k + 1], PROMPTS[k : k + 1]) for k in range(4)]
    assert torch.allclose(torch.cat(alone), result, atol=1e-6)


def test_every_component_of_nested_compositions_is_reported() -> None:
    scale = RewardStatistics(0.0, 1.0, 2, {})
    inner = CombinedReward([WeightedReward(A), WeightedReward(StandardisedReward(B, scale), 3)], worst, "inner")
    reward = CombinedReward(
        [WeightedReward(inner, 2), WeightedReward(C, -1), WeightedReward(ProductReward([Constraint(inner, ">", 0.0)]))]
    )
    images = showing([[1.0, 2.0], [0.5, 0.1], [7.0, 8.0]])
    result, components = score_components(reward, images, ["", ""])
    assert reward.name == "inner:2 + c:-1 + product(inner > 0)"
    values_by_name = {name: values.tolist() for name, values in components.items()}
    least = [1.0, pytest.approx(0.3)]
    half, b = [pytest.approx(1), pytest.approx(1 / (1 + math.exp(-6)))], [0.5, pytest.approx(0.1)]
    assert values_by_name == {
        "inner": least,
        "inner/a": [1.0, 2.0],
        "inner/z(b)": b,
        "inner/z(b)/b": b,
        "c": [7.0, 8.0],
        "product(inner > 0)": half,
        "product(inner > 0)/inner": least,
        "product(inner > 0)/inner/a": [1.0, 2.0],
        "product(inner > 0)/inner/z(b)": b,
        "product(inner > 0)/inner/z(b)/b": b,
    }
    assert torch.equal(result, score(reward, images, ["", ""]))


def test_rewards_with_the_same_name_are_numbered() -> None:
    twice = combine([Column(0, "x"), Column(1, "x"), Column(2)])
    result, components = score_components(twice, showing([[1.0], [2.0], [4.0]]), [""])
    assert {name: values.item() for name, values in components.items()} == {"x#0": 1.0, "x#1": 2.0, "c": 4.0}
    assert result.item() == 7.0
    inner = combine([A, A])
    _, components = score_components(
        combine({inner: 1.0, CombinedReward([WeightedReward(A), WeightedReward(A)]): 1.0}), showing([[1.0]]), [""]
    )
    assert list(components) == [f"a + a#{k}{part}" for k in range(2) for part in ("", "/a#0", "/a#1")]
    both = ProductReward([Constraint(A, ">", 0.0), Constraint(A, "<", 1.0)])
    assert list(both.components(showing([[1.0]]), [""])) == ["a#0", "a#1"]


@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan, "2", None, True, 10**400])
def test_a_weight_is_a_finite_number(weight: Any) -> None:
    with pytest.raises(RewardError, match="the weight of reward 'a' must be a finite number"):
        combine({A: weight})


def test_numbers_of_numpy_are_weights() -> None:
    import numpy as np

    assert scored(combine({A: np.float32(2), B: np.int64(3)}), [[1.0], [1.0]]) == [5.0]


@pytest.mark.parametrize(
    ("sign", "bound", "temperature"),
    [(">=", 0.0, 1.0), (">", math.nan, 1.0), ("<", math.inf, 1.0), (">", 0.0, 0.0), (">", 0.0, -1), (">", 0, math.nan)],
)
def test_a_constraint_that_cannot_be_is_refused(sign: str, bound: float, temperature: float) -> None:
    with pytest.raises(RewardError, match=r"constraint a .*: write > or <, a finite bound, a temperature above 0"):
        Constraint(A, sign, bound, temperature)


def test_empty_compositions_are_refused() -> None:
    with pytest.raises(RewardError, match="a combination needs at least one reward"):
        combine([])
    with pytest.raises(RewardError, match="a product needs at least one constraint"):
        ProductReward([])
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RewardError, match=r"logsigmoid\(a\): the temperature must be a number above 0"):
            LogSigmoidReward(A, 0.0, temperature)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    scales = {"a": RewardStatistics(0.5, 0.25, 4, {"p": 0.25, "a\nb ½": 0.75}), "b": RewardStatistics(-1.0, 3.0, 2, {})}
    path = tmp_path / "deep" / "calibration.json"
    Calibration(scales, {"images": "base", "count": 4}).save(path)
    result = read_calibration(path)
    assert result == Calibration(scales, {"images": "base", "count": 4})
    assert result.scale("b") is result.scales["b"]
    with pytest.raises(RewardError, match=r"reward 'c' is not in this calibration \(a, b\): `steer rewards calibrate`"):
        result.scale("c")


SOUND = {"mean": 0.5, "std": 1.0, "count": 2, "prompts": {"p": 0.5}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not a calibration"),
        ("[]", "not a calibration"),
        ("3", "not a calibration"),
        ("{}", "not a calibration"),
        ('{"scales": []}', "not a calibration"),
        ('{"scales": {"a": 3}}', "not a calibration"),
        ('{"scales": {"a": {"mean": 1}}}', "not a calibration"),
        ('{"scales": {}, "source": []}', "not a calibration"),
        ('{"scales": {}, "source": null}', "not a calibration"),
        ("[" * 100_000, "not a calibration"),
        (b"\xff\xfe", "not a calibration"),
        (SOUND | {"more": 1}, "not a calibration"),
        (SOUND | {"mean": "1"}, "not a calibration"),
        (SOUND | {"mean": 10**400}, "not a calibration"),
        (SOUND | {"prompts": 3}, "not a calibration"),
        (SOUND | {"prompts": ["p"]}, "not a calibration"),
        (SOUND | {"prompts": {"p": None}}, "not a calibration"),
        (SOUND | {"mean": math.nan}, "not finite, or no spread"),
        (SOUND | {"std": math.inf}, "not finite, or no spread"),
        (SOUND | {"std": 0}, "not finite, or no spread"),
        (SOUND | {"std": -1}, "not finite, or no spread"),
        (SOUND | {"prompts": {"p": math.inf}}, "not finite, or no spread"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_calibration_is_refused(
    tmp_path: Path, record: str | bytes | Mapping[str, Any], message: str
) -> None:
    path = tmp_path / "c.json"
    text = json.dumps({"scales": {"a": record}}) if isinstance(record, dict) else record
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RewardError) as raised:
        read_calibration(path)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RewardError, match=r"gone\.json: cannot read the calibration \(No such file"):
        read_calibration(tmp_path / "gone.json")
