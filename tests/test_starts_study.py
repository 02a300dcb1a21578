"""The starts study: what it concludes from results by hand."""

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from steer.apps.scenes.evaluate import Cost, Point, PromptResults
from steer.apps.scenes.noise_studies import (
    PLAIN,
    SCREENED,
    ScreenedNoise,
    between,
    contenders,
    correlation,
    foretold,
    ranks,
    screened_best,
)


def results(seed: int, steps: int, prompts: int = 3, images: int = 6) -> PromptResults:
    generator = Generator().manual_seed(seed)
    proxy = torch.rand(prompts, images, generator=generator)
    exact = torch.randint(0, 4, (prompts, images), generator=generator) / 3
    return PromptResults(proxy, exact, Cost(float(images * steps), float(images), images * steps / 100))


def test_correlations_are_scipys() -> None:
    a, b = results(0, 2).proxy, results(1, 20).exact
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert correlation(ranks(a), ranks(b)).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [stats.pearsonr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert correlation(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert len(correlation(torch.ones(1, 4), torch.rand(1, 4))) == 0


def test_a_short_run_that_ranks_as_the_whole_one_foretells_it_all() -> None:
    whole = results(1, 20)
    short = PromptResults(whole.proxy**3, whole.exact, whole.spent)
    told = foretold(4, short, whole)
    assert told["spearman"] == pytest.approx([1, 1, 1]) and told["pairs"] == 1
    assert told["pairs_exact"] == told["pairs_exact_of_the_whole_run"]


def test_screened_best_of_k_is_picked_and_paid_by_hand() -> None:
    short, whole = results(0, 4), results(1, 20)
    for keep in (1, 2, 6):
        point = screened_best(short, whole, 4, keep)
        for row in range(3):
            kept = sorted(range(6), key=lambda c: -short.proxy[row, c].item())[:keep]
            pick = max(kept, key=lambda c: whole.proxy[row, c].item())
            assert (point.proxy[row], point.met[row]) == (whole.proxy[row, pick], whole.exact[row, pick])
            assert point.right[row] == (whole.exact[row, pick] == 1)
        spent = point.spent
        assert (spent.evaluations, spent.decodes) == pytest.approx((6 * 4 + keep * 20, 6 + keep))


def test_between_two_points_is_on_the_line() -> None:
    def at(size: int, value: Tensor) -> Point:
        return Point(size, value, value, value, None, Cost(20.0 * size, 5.0 * size, 0.1 * size))

    points = [at(4, torch.tensor([0.0, 1.0])), at(8, torch.tensor([1.0, 1.0])), at(12, torch.tensor([3.0, 0.0]))]
    middle = between(points, 100.0, "evaluations")
    assert middle is not None and middle.size == 5 and middle.met.tolist() == [0.25, 1.0]
    middle = between(points, 1.0, "seconds")
    assert middle is not None and middle.size == pytest.approx(10)
    assert middle.proxy.tolist() == pytest.approx([2.0, 0.5])
    assert between(points, 79.0, "evaluations") is None and between(points, 241.0, "evaluations") is None


def test_what_is_compared_has_names_of_its_own() -> None:
    lengths, plain, screened = contenders()
    everything = [*lengths, *plain, *screened]
    assert len({one.key for one in everything}) == len(everything) == 4 + len(PLAIN) + len(SCREENED)
    assert all(isinstance(one, ScreenedNoise) and one.candidates > one.size for one in screened)
    assert {"candidates", "steps"} <= screened[0].about().keys()
