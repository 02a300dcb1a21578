"""Searches of noise without any model: against autograd, scipy's χ and torch's own optimisers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi
from soft_rewards import seeded
from torch import Tensor, nn

from steer.errors import InputError
from steer.noise import OPTIMISERS, Adam, Nesterov, Optimiser, Search, clipped, neighbour, norms, prior_gradient

SHAPE = (3, 2, 5, 4)
D = 40
RULES: dict[str, tuple[Optimiser, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (Nesterov(0.7), lambda leaves: torch.optim.SGD(leaves, lr=0.7, momentum=0.9, nesterov=True)),
    "other momentum": (Nesterov(2.0, 0.5), lambda leaves: torch.optim.SGD(leaves, 2.0, momentum=0.5, nesterov=True)),
    "adam": (Adam(0.1), lambda leaves: torch.optim.Adam(leaves, lr=0.1)),
    "other betas": (
        Adam(0.3, (0.5, 0.7), 1e-3),
        lambda leaves: torch.optim.Adam(leaves, lr=0.3, betas=(0.5, 0.7), eps=1e-3),
    ),
}


def noise(seed: int = 0, scale: float = 1.0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return scale * torch.randn(shape, generator=seeded(seed))


def uphill(where: Tensor) -> Tensor:
    """The gradient of some function of each row."""
    return torch.sin(where) + 0.1 * where.flatten(1).sum(1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_the_prior_is_the_chi_density_of_the_norm(scale: float) -> None:
    start = noise(scale=scale)
    leaf = start.double().requires_grad_()
    length = leaf.flatten(1).norm(dim=1)
    by_autograd = torch.autograd.grad(((D - 1) * length.log() - length**2 / 2).sum(), leaf)[0]
    gradient = prior_gradient(start)
    torch.testing.assert_close(gradient, by_autograd.float(), rtol=1e-5, atol=1e-6)
    radial = (gradient * start).flatten(1).sum(1).double() / length.detach()
    slope = [(chi.logpdf(r + 1e-4, D) - chi.logpdf(r - 1e-4, D)) / 2e-4 for r in length.tolist()]
    torch.testing.assert_close(radial, torch.tensor(slope, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_prior_vanishes_at_its_mode_in_fp32(dtype: torch.dtype) -> None:
    wide = noise(shape=(2, 4, 64, 64)).to(dtype)
    flat = wide.double().flatten(1)
    assert norms(wide).dtype == prior_gradient(wide).dtype == torch.float32
    torch.testing.assert_close(norms(wide).double(), flat.norm(dim=1) / 128, rtol=1e-5, atol=0)
    factor = (16384 - 1) / flat.pow(2).sum(1, keepdim=True) - 1
    torch.testing.assert_close(prior_gradient(wide).flatten(1).double(), factor * flat, rtol=1e-3, atol=1e-5)
    start = noise()
    at_mode = start * (D - 1) ** 0.5 / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert prior_gradient(at_mode).abs().max() < 1e-6
    assert (prior_gradient(0.9 * at_mode) * at_mode).sum() > 0 > (prior_gradient(1.1 * at_mode) * at_mode).sum()


def test_each_row_is_clipped_as_torch_clips_it_alone() -> None:
    gradient = noise(1) * torch.tensor([0.001, 1.0, 100.0]).view(-1, 1, 1, 1)
    expected = []
    for row in gradient:
        leaf = nn.Parameter(torch.zeros_like(row))
        leaf.grad = row.clone()
        nn.utils.clip_grad_norm_([leaf], 0.1)
        expected.append(leaf.grad)
    assert torch.equal(clipped(gradient, 0.1)[0], gradient[0])
    torch.testing.assert_close(clipped(gradient, 0.1), torch.stack(expected), rtol=1e-6, atol=0)
    assert clipped(gradient, 1.0)[2].norm() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_torch_also_after_a_restart(rule: str) -> None:
    ours, theirs = RULES[rule]
    search = Search.start(noise(), ours)
    leaves = [nn.Parameter(row.clone()) for row in search.noise]
    optimisers = [theirs([leaf]) for leaf in leaves]
    for number in range(9):
        if number == 4:  # the middle row restarts
            search = search.restart(torch.tensor([False, True, False]), noise(7))
            leaves[1] = nn.Parameter(noise(7)[1].clone())
            optimisers[1] = theirs([leaves[1]])
        search = search.ascend(uphill(search.noise), ours)
        for leaf, optimiser in zip(leaves, optimisers, strict=True):
            leaf.grad = -uphill(leaf.detach()[None])[0]
            optimiser.step()
        torch.testing.assert_close(search.noise, torch.stack([leaf.detach() for leaf in leaves]), rtol=1e-5, atol=1e-5)


def test_the_rules_by_name_are_the_published_ones() -> None:
    assert {"sgd": Nesterov(5.0, 0.9), "adam": Adam(0.05, (0.9, 0.999), 1e-8)} == OPTIMISERS


def rows_of(search: Search, row: int) -> Search:
    components = {name: value[row : row + 1] for name, value in search.tensors().items()}
    return Search.from_tensors(components, torch.device("cpu"))


EVENTS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=3, max_size=3),
        st.lists(st.sampled_from(["", "", "", "restart", "retire"]), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


def run_events(search: Search, rule: Optimiser, events: list[tuple[Tensor, Tensor, Tensor]], rows: slice) -> Search:
    for number, (rewards, retired, again) in enumerate(events):
        search = search.record(rewards[rows]).retire(retired[rows])
        search = search.ascend(uphill(search.noise), rule)
        search = search.restart(again[rows], noise(100 + number)[rows])
    return search


def events_of(history: list[tuple[list[float], list[str]]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            torch.tensor(rewards),
            torch.tensor([a == "retire" for a in acts]),
            torch.tensor([a == "restart" for a in acts]),
        )
        for rewards, acts in history
    ]


@given(history=EVENTS, rule=st.sampled_from(["sgd", "adam"]))
def test_rows_of_a_batch_are_searches_of_their_own(history: list[tuple[list[float], list[str]]], rule: str) -> None:
    ours, events = RULES[rule][0], events_of(history)
    together = run_events(Search.start(noise(), ours), ours, events, slice(None))
    for row in range(3):
        alone = run_events(Search.start(noise()[row : row + 1], ours), ours, events, slice(row, row + 1))
        expected = rows_of(together, row).tensors()
        assert all(torch.equal(value, expected[name]) for name, value in alone.tensors().items())


@given(history=EVENTS)
def test_the_best_is_kept_over_all_starts_and_staleness_is_counted_in_each(
    history: list[tuple[list[float], list[str]]],
) -> None:
    rule, events = RULES["sgd"][0], events_of(history)
    search = Search.start(noise(), rule)
    for row in range(3):
        alone, candidates, present, starts = rows_of(search, row), [], [], 1
        for number, (rewards, retired, again) in enumerate(events):
            reward = float(rewards[row])
            candidates.append((reward, -number, alone.noise))
            present.append(reward)
            alone = alone.record(rewards[row : row + 1])
            best, _, where = max(candidates, key=lambda one: one[:2])  # the first of equals
            assert alone.best_rewards == best and torch.equal(alone.best_noise, where)
            assert alone.peak == max(present)
            assert alone.stale == len(present) - 1 - present.index(max(present))
            alone = alone.retire(retired[row : row + 1]).ascend(uphill(alone.noise), rule)
            if again[row]:
                fresh = noise(50 + number)[row : row + 1]
                alone, present, starts = alone.restart(torch.tensor([True]), fresh), [], starts + 1
                assert torch.equal(alone.noise, fresh) and alone.peak == -torch.inf and alone.stale == 0
                assert all(not slot.any() for slot in alone.state.values())
            assert alone.starts == starts


def test_what_is_finished_stays_where_it_is() -> None:
    rule = Nesterov()
    search = Search.start(noise(), rule).retire(torch.tensor([True, False, False]))
    moved = search.ascend(uphill(search.noise), rule)
    assert torch.equal(moved.noise[0], search.noise[0]) and (moved.noise[1:] != search.noise[1:]).any()
    assert moved.retire(torch.tensor([False, True, False])).finished.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_searches_of_half_precision_noise_stand_in_fp32(dtype: torch.dtype) -> None:
    start = noise().to(dtype).requires_grad_()
    search = Search.start(start, Adam())
    assert search.noise.dtype == search.state["first"].dtype == torch.float32 and not search.noise.requires_grad
    little = search.ascend(torch.full(SHAPE, 1e-3), Adam(1e-5))
    assert (little.noise > search.noise).all()  # by less than half precision could tell


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_what_is_saved_is_what_is_read(rule: str) -> None:
    ours = RULES[rule][0]
    search = run_events(
        Search.start(noise(), ours), ours, events_of([([1.0, 2.0, 3.0], ["", "restart", "retire"])]), slice(None)
    )
    saved = search.tensors()
    read = Search.from_tensors(saved, torch.device("cpu"))
    assert all(torch.equal(value, saved[name]) for name, value in read.tensors().items()) and len(read.state)
    del saved["best_noise"]
    with pytest.raises(InputError, match="the saved search has no best_noise"):
        Search.from_tensors(saved, torch.device("cpu"))


def test_a_search_is_never_changed() -> None:
    rule = Adam()
    search = Search.start(noise(), rule)
    before = {name: value.clone() for name, value in search.tensors().items()}
    everyone = torch.ones(3, dtype=torch.bool)
    search.record(torch.ones(3)).ascend(uphill(search.noise), rule).retire(everyone).restart(everyone, noise(1))
    assert all(torch.equal(value, before[name]) for name, value in search.tensors().items())


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.0])
def test_a_neighbour_is_as_long_and_so_far_away(distance: float) -> None:
    start, u = noise(0, shape=(2, 100_000)), noise(1, shape=(2, 100_000))
    beside = neighbour(start, u, distance)
    assert torch.allclose(norms(beside), torch.ones(2), atol=0.02)
    correlation = (beside * start).mean(1)
    assert torch.allclose(correlation, torch.full((2,), (1 - distance**2) ** 0.5), atol=0.02)
