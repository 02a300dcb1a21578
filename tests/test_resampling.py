"""Resampling schemes against the properties that define them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steer.errors import InputError
from steer.particles import ess
from steer.resampling import RESAMPLERS

LOW_NOISE = ("systematic", "residual", "ssp")  # offspring within one of K·w
weights = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
).filter(lambda w: (w.sum(1) > 0).all())


def draw(scheme: str, log_weights: torch.Tensor, seed: int) -> torch.Tensor:
    return RESAMPLERS[scheme](log_weights, torch.Generator().manual_seed(seed))


def offspring(ancestors: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(row, minlength=ancestors.shape[1]) for row in ancestors])


@pytest.mark.parametrize("scheme", RESAMPLERS)
@given(w=weights, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_ancestors_are_particles_that_have_weight(scheme: str, w: np.ndarray, seed: int) -> None:
    ancestors = draw(scheme, torch.tensor(w).log(), seed)
    assert ancestors.shape == w.shape and ancestors.dtype == torch.int64
    assert ((ancestors >= 0) & (ancestors < w.shape[1])).all()
    assert (torch.tensor(w).gather(1, ancestors) > 0).all()


@pytest.mark.parametrize("scheme", LOW_NOISE)
@given(w=weights, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_offspring_lie_within_one_of_their_expectation(scheme: str, w: np.ndarray, seed: int) -> None:
    expected = torch.tensor(w / w.sum(1, keepdims=True)) * w.shape[1]
    counts = offspring(draw(scheme, torch.tensor(w).log(), seed))
    assert (counts >= (expected - 1e-9).floor()).all()
    if scheme != "residual":  # residual bounds from below only
        assert (counts <= (expected + 1e-9).ceil()).all()


@pytest.mark.parametrize("scheme", RESAMPLERS)
@given(w=weights, shift=st.floats(-300, 300), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_constant_added_to_the_log_weights_changes_nothing(
    scheme: str, w: np.ndarray, shift: float, seed: int
) -> None:
    log_w = (torch.tensor(w).log() * 8).round() / 8  # so that the shift is exact in float64
    exact = round(shift * 8) / 8
    assert torch.equal(draw(scheme, log_w, seed), draw(scheme, log_w + exact, seed))


@pytest.mark.parametrize("scheme", RESAMPLERS)
def test_expected_offspring_are_k_times_the_weight(scheme: str) -> None:
    w = torch.tensor([0.5, 0.03, 0.2, 0.07, 0.2])
    repeats = 4000
    counts = offspring(draw(scheme, w.log().expand(repeats, 5), 7)).double()
    error = counts.std(0) / repeats**0.5
    assert ((counts.mean(0) - 5 * w).abs() <= 4 * error + 1e-9).all()


@pytest.mark.parametrize("scheme", RESAMPLERS)
def test_groups_never_mix_and_one_heavy_particle_takes_its_group(scheme: str) -> None:
    log_w = torch.tensor([[0.0, 200.0, 0.0], [500.0, 0.0, 0.0]])
    assert draw(scheme, log_w, 0).tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("scheme", ["systematic", "residual", "ssp"])
def test_equal_weights_keep_every_particle(scheme: str) -> None:
    assert draw(scheme, torch.zeros(2, 7), 3).tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("scheme", RESAMPLERS)
def test_many_particles_in_float32_stay_in_range(scheme: str) -> None:
    log_w = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    log_w[:, -1000:] = -torch.inf  # a cumulative sum in float32 would end below 1 here
    assert draw(scheme, log_w, 1).max() < 99_000


@pytest.mark.parametrize("bad", [[-torch.inf, -torch.inf], [0.0, torch.nan], [torch.inf, 0.0]])
def test_a_group_without_finite_weight_is_refused(bad: list[float]) -> None:
    with pytest.raises(InputError, match="no finite weight"):
        draw("systematic", torch.tensor([bad]), 0)


def test_ess_between_one_and_k() -> None:
    assert ess(torch.zeros(1, 8)).item() == pytest.approx(8)
    assert ess(torch.tensor([[1000.0, 0.0, 0.0]])).item() == pytest.approx(1)
    assert ess(torch.tensor([0.5, 0.25, 0.25]).log()[None]).item() == pytest.approx(1 / 0.375)
