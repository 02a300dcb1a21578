"""A target reward ends searches: against closed forms, beside other rows, killed and resumed, met at once or never."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import GaussianPipeline
from soft_rewards import Soft, likeness, seeded
from test_reno_run import run, same_traces
from test_search_file import Enough, killed_at, same

from steer import NoiseSearchPipeline, ReNOPipeline, SteeringOutput
from steer.errors import InputError
from steer.noise import Nesterov, Search

SEARCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "reno": (ReNOPipeline, {"regularisation": 0.01}),
    "neighbours": (NoiseSearchPipeline, {"neighbours": 3}),
}


def climb(target: float | None, iterations: int = 12, **options: Any) -> SteeringOutput:
    """r = the sum of three pixels, each mean + gain · ε: one step of plain ascent adds a known amount."""
    pipe = GaussianPipeline()
    reward = Soft(lambda images, prompts: images.sum((1, 2, 3)))
    call = {
        "regularisation": 0.0,
        "optimiser": Nesterov(0.5, momentum=0.0),
        "max_grad_norm": 1e9,
        "target_reward": target,
    }
    steps = {"num_inference_steps": 10, "output_type": "pt", "iterations": iterations, "generator": seeded(1)}
    return ReNOPipeline(pipe, reward)(**call | steps | options)


def test_the_climb_ends_at_the_iteration_that_arithmetic_says() -> None:
    """∇_ε r = gain in each of three places, so that an iteration adds lr · 3 gain²."""
    gain = math.prod(slope for slope, _, _ in GaussianPipeline().transitions(10, 0.0))
    start = climb(None, iterations=1).rewards.item()
    rise = 0.5 * 3 * gain**2
    for number in (0, 1, 4, 7):
        out = climb(start + (number - 0.5) * rise)
        assert len(out.trace) == number + 1 and out.stopped is None
        assert out.rewards.item() == pytest.approx(start + number * rise, rel=1e-4)
        again = climb(None, iterations=number + 1)
        assert torch.equal(out.images, again.images) and out.cost.nfe == again.cost.nfe
    assert len(climb(start + 100 * rise).trace) == 12


@pytest.mark.parametrize("search", SEARCHES)
def test_without_a_target_and_with_one_never_met_nothing_changes(search: str) -> None:
    method, options = SEARCHES[search]
    plain = run(method=method, **options)
    assert same(run(method=method, target_reward=None, **options), plain)
    assert same(run(method=method, target_reward=1e6, **options), plain)


@pytest.mark.parametrize("search", SEARCHES)
def test_met_at_the_first_iteration_it_is_the_pipelines_own_image(search: str) -> None:
    method, options = SEARCHES[search]
    out = run(method=method, target_reward=-1e6, **options)
    first = run(method=method, iterations=1, **options)
    assert len(out.trace) == 1 and torch.equal(out.images, first.images) and torch.equal(out.rewards, first.rewards)


@pytest.mark.parametrize("search", SEARCHES)
def test_rows_of_a_batch_stop_as_they_would_alone(search: str) -> None:
    """A row returns its best at the first iteration that meets the target, whichever rows continue."""
    method, options = SEARCHES[search]
    free = run(method=method, iterations=8, num_particles=3, **options)
    best = torch.stack([one.best[0] for one in free.trace])  # (iterations, rows), rising
    target = best[3].max().item()  # the fastest row meets it at 3 at the latest
    out = run(method=method, iterations=8, num_particles=3, target_reward=target, **options)
    met = best >= target
    ends = [int(met[:, row].float().argmax()) if met[:, row].any() else 7 for row in range(3)]
    assert min(ends) < max(ends)  # they part
    assert len(out.trace) == max(ends) + 1
    expected = torch.stack([best[end, row] for row, end in enumerate(ends)])
    torch.testing.assert_close(out.trace[-1].best[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.in_slot_order().rewards[0], expected, rtol=1e-4, atol=1e-4)
    for row, end in enumerate(ends):  # a finished row is repeated as it was, while others continue
        rest = torch.stack([one.norms[0, row] for one in out.trace[end + 1 :]]) if end < max(ends) else torch.empty(0)
        assert len(rest.unique()) <= 1


@pytest.mark.few(1)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, search: str) -> None:
    method, options = SEARCHES[search]
    best = [one.best for one in run(method=method, iterations=8, **options).trace]
    target = best[2].max().item()
    call = {"method": method, "iterations": 8, "target_reward": target} | options
    whole, file = run(**call), tmp_path / "state"
    for number in (0, 2):
        with pytest.raises(Enough):
            run(state_file=file, on_iteration=killed_at(number), **call)
    observed: list[int] = []
    assert same(run(state_file=file, on_iteration=lambda one: observed.append(one.number), **call), whole)
    assert observed == list(range(3, len(whole.trace)))
    ended = run(state_file=file, on_iteration=lambda one: observed.append(-1), **call)
    assert same(ended, whole) and -1 not in observed


@pytest.mark.parametrize("search", SEARCHES)
def test_another_target_is_another_run(tmp_path: Path, search: str) -> None:
    method, options = SEARCHES[search]
    run(method=method, state_file=tmp_path / "with", iterations=1, target_reward=1e6, **options)
    run(method=method, state_file=tmp_path / "without", iterations=1, **options)
    for file, target in (("with", 2e6), ("with", None), ("without", 1e6)):
        with pytest.raises(InputError, match="belongs to another run"):
            run(method=method, state_file=tmp_path / file, target_reward=target, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("target", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_no_number_is_refused(search: str, target: float) -> None:
    method, _ = SEARCHES[search]
    with pytest.raises(InputError, match="target_reward must be a finite number, got"):
        run(method=method, target_reward=target)


def test_a_search_at_its_target_moves_no_more() -> None:
    search = Search.start(torch.tensor([[1.0], [2.0]]), rule := Nesterov(0.5)).record(torch.tensor([3.0, 1.0]))
    assert search.finish_at_target(None) is search and not search.finish_at_target(3.01).finished.any()
    search = search.finish_at_target(3.0)
    assert search.finished.tolist() == [True, False]
    moved = search.ascend(torch.ones(2, 1), rule).noise
    assert moved[0] == 1.0 and moved[1] > 2.0


def test_patience_and_a_target_end_searches_side_by_side() -> None:
    free = run(Soft(likeness), iterations=8, num_particles=3, patience=1, restarts=1)
    out = run(Soft(likeness), iterations=8, num_particles=3, patience=1, restarts=1, target_reward=1e6)
    assert same_traces(out.trace, free.trace)
