"""Resampling schemes against the properties that define them."""

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steer.errors import InputError
from steer.smc import resampling
from steer.smc.particles import Particles, ess
from steer.smc.resampling import RESAMPLERS

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


# Log-weights of every size that fp32 holds, in a group of which at least one counts.
extreme = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 12)),
    elements=st.sampled_from([-np.inf, -3e38, -745.2, -103.3, -1e-38, 0.0, 1e-3, 88.8, 3e38])
    | st.floats(-90, 90, width=32),
).filter(lambda w: (w > -np.inf).any(1).all())


@pytest.mark.parametrize("scheme", RESAMPLERS)
@given(log_w=extreme, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_no_weight_is_too_large_or_too_small(scheme: str, log_w: np.ndarray, seed: int) -> None:
    given_weights = torch.tensor(log_w)
    ancestors = draw(scheme, given_weights, seed)
    assert ancestors.shape == log_w.shape and ((ancestors >= 0) & (ancestors < log_w.shape[1])).all()
    drawn = given_weights.gather(1, ancestors).double()
    assert (drawn - given_weights.double().amax(1, keepdim=True) > -746).all(), "exp(−746) is 0 in float64"
    assert torch.equal(ancestors, draw(scheme, given_weights.double(), seed)), "fp32 is held as it is"


@pytest.mark.few(5)
@pytest.mark.parametrize("scheme", RESAMPLERS)
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@given(w=weights)
@settings(max_examples=60, deadline=None)
def test_the_ends_of_the_uniform_reach_no_particle_without_weight(scheme: str, uniform: float, w: np.ndarray) -> None:
    """Random numbers of [0, 1) at its ends, which a seed seldom gives: the first tooth and the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "_uniform", lambda shape, generator: torch.full(shape, uniform, dtype=torch.float64))
        ancestors = draw(scheme, torch.tensor(w).log(), 0)
    assert ((ancestors >= 0) & (ancestors < w.shape[1])).all()
    assert (torch.tensor(w).gather(1, ancestors) > 0).all()
    if scheme in ("systematic", "ssp"):
        apart = offspring(ancestors) - torch.tensor(w / w.sum(1, keepdims=True)) * w.shape[1]
        assert (apart.abs() < 1 + 1e-9).all()


@pytest.mark.hard
@given(
    log_w=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-30, 3, width=32)), seed=st.integers(0, 999)
)
@settings(max_examples=40, deadline=None)
def test_systematic_is_the_comb_in_exact_arithmetic(log_w: np.ndarray, seed: int) -> None:
    """Its slow twin in rational numbers: teeth (k + u)/K, each taking the first particle whose cumulative weight it is
    below. They may differ where a tooth is at an edge, to the last bits of float64."""
    exact = [Fraction(one) for one in torch.tensor(log_w).double().softmax(-1).tolist()]
    uniform = torch.rand((1, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
    edges = [Fraction(edge, sum(exact)) for edge in accumulate(exact)]
    for k, ancestor in enumerate(draw("systematic", torch.tensor(log_w)[None], seed)[0].tolist()):
        tooth = (k + Fraction(uniform)) / len(exact)
        expected = next(place for place, edge in enumerate(edges) if tooth < edge)
        assert ancestor == expected or abs(tooth - edges[min(ancestor, expected)]) < Fraction(1, 10**13)


@given(log_w=extreme, shift=st.floats(-50, 50), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_the_laws_of_the_effective_sample_size(log_w: np.ndarray, shift: float, seed: int) -> None:
    log_weights = torch.tensor(log_w)
    sizes, size = ess(log_weights), log_w.shape[1]
    assert ((sizes >= 1 - 1e-5) & (sizes <= size * (1 + 1e-5))).all()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(ess(log_weights[:, order]), sizes, rtol=1e-4)
    by_hand = log_weights.double().softmax(-1).square().sum(-1).reciprocal()
    assert torch.allclose(sizes.double(), by_hand, rtol=1e-4)
    small = log_weights.clamp(-90, 90)  # beyond, a sum with the shift is another weight in fp32
    assert torch.allclose(ess(small + shift), ess(small), rtol=1e-3)


@given(
    log_w=hnp.arrays(np.float32, (2, 5), elements=st.floats(-30, 30, width=32)),
    shift=st.floats(-30, 30, width=32),
    scheme=st.sampled_from([*RESAMPLERS]),
    groups=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=100, deadline=None)
def test_resampling_keeps_the_evidence_and_a_constant_moves_it_by_itself(
    log_w: np.ndarray, shift: float, scheme: str, groups: tuple[bool, bool]
) -> None:
    before = Particles.start(2, 5).reweight(torch.tensor(log_w))
    mean = torch.tensor(log_w).double().exp().mean(1).log()
    assert torch.allclose(before.log_evidence.double(), mean, atol=1e-4)
    moved = before.reweight(torch.full((2, 5), shift))
    assert torch.allclose(moved.log_evidence, before.log_evidence + shift, atol=1e-4)
    chosen = torch.tensor(groups)
    ancestors = torch.where(chosen[:, None], draw(scheme, before.log_weights, 3), torch.arange(5))
    after = before.resample(ancestors, chosen)
    assert torch.allclose(after.log_evidence, before.log_evidence, atol=1e-4)
    assert (after.log_weights[chosen] == 0).all()
    assert torch.equal(after.log_weights[~chosen], before.log_weights[~chosen])
    assert torch.equal(after.log_potentials, before.log_potentials.gather(1, ancestors))
