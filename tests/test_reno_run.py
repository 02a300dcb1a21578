"""How a run of ReNO is refused, ends and is watched."""

import copy
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from gaussian import GaussianPipeline
from soft_rewards import Function, Soft, Sum, images_of, likeness, own_kwargs, redness, seeded
from torch import Tensor, nn

from steer import Iteration, NoiseSearchPipeline, ReNOPipeline, SteeringOutput
from steer.errors import InputError, UnsupportedPipelineError
from steer.noise import Adam, Search
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.reno import Backprop, IterationResult, NoiseRun, NoiseToImage, ZeroOrder
from steer.reward import RewardError

REWARD = Soft(likeness)


def run(reward: Any = REWARD, name: str = "sd3", method: Any = ReNOPipeline, **options: Any) -> SteeringOutput:
    call = own_kwargs(name) | {"num_particles": 2, "iterations": 5, "generator": seeded(1), "output_type": "pt"}
    return method(cached_pipe(name), reward)(**call | options)


def from_call(number: int, then: Function, first: Function = likeness) -> Function:
    """One function, and from its call `number` on another."""
    calls: list[int] = []

    def function(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(calls))
        return (first if calls[-1] < number else then)(images, prompts)

    return function


def nowhere(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return likeness(images, prompts) * math.nan


def failing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise RuntimeError("out of words")


def with_a_root_of_zero(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Finite, its gradient is not: √ has no slope at 0, though no value is taken there."""
    zero = 0 * images.sum((1, 2, 3))
    return likeness(images, prompts) + torch.where(zero > 0, zero.sqrt(), zero)


def same_traces(left: Sequence[Iteration], right: Sequence[Iteration]) -> bool:
    names = ("rewards", "norms", "best")
    assert [(one.number, one.total, one.components.keys()) for one in left] == [
        (one.number, one.total, one.components.keys()) for one in right
    ]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in names]
    pairs += [
        (a.components[name], b.components[name]) for a, b in zip(left, right, strict=True) for name in a.components
    ]
    return all(torch.equal(a, b) for a, b in pairs)


class Head(nn.Module):
    """Weights that ask for gradients, on images that give none."""

    differentiable, name = True, "head"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return likeness(images.detach(), prompts) * self.weight


@pytest.mark.parametrize(
    "reward",
    [redness, Soft(lambda images, prompts: likeness(images, prompts).detach()), Head()],
    ids=["says so", "detached", "of weights alone"],
)
def test_rewards_without_gradients_are_refused_by_the_name_of_the_remedy(reward: Any) -> None:
    with pytest.raises(
        InputError, match=r"is not differentiable: use the zero-order estimator .*--gradient zero-order"
    ):
        run(reward)
    assert run(reward, gradient="zero-order", iterations=1).trace


@pytest.mark.parametrize("function", [nowhere, failing])
def test_a_reward_that_fails_at_once_raises(function: Function) -> None:
    with pytest.raises(RewardError, match="reward 'soft'"):
        run(Soft(function))


def test_pipelines_without_latents_are_optimised_too() -> None:
    out = run(name="img2img", num_inference_steps=4, iterations=4)
    assert (out.trace[-1].best > out.trace[0].best).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"lr": math.inf}, "lr must be above 0"),
        ({"optimiser": Adam(-1.0)}, "lr must be above 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be above 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"restarts": -1}, "restarts must be at least 0"),
        ({"restarts": 1}, "need a patience"),
        ({"regularisation": -0.1}, "regularisation must be at least 0"),
        ({"regularisation": math.nan}, "regularisation must be at least 0"),
        ({"regularisation": math.inf}, "regularisation must be at least 0"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"optimiser": "adma"}, "unknown optimiser 'adma': did you mean adam"),
        ({"gradient": "backprob"}, "unknown gradient 'backprob': did you mean backprop"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"num_images_per_prompt": 2}, "are the same: give one of them"),
        ({"stepz": 3}, "takes no argument 'stepz'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    def never(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise AssertionError("nothing is scored before")

    with pytest.raises(InputError, match=message):
        run(Soft(never), **options)


@pytest.mark.parametrize("options", [{"directions": 0}, {"distance": 0.0}, {"distance": math.nan}])
def test_zero_order_numbers_that_do_not_fit_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="directions must be at least 1 and distance above 0"):
        ZeroOrder(**options)


@pytest.mark.parametrize(
    ("then", "message", "recorded"),
    [
        (nowhere, r"reward 'sum/like' returned nan .*\(iteration 3\)", 3),
        (failing, r"reward 'sum' failed: RuntimeError: out of words \(iteration 3\)", 3),
        (with_a_root_of_zero, "the gradient of reward 'sum' is not finite at iteration 3", 4),
    ],
)
def test_a_later_failure_ends_with_the_best_so_far(then: Function, message: str, recorded: int) -> None:
    def falling(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -likeness(images, prompts).detach() + likeness(images, prompts) * 1e-3

    good, observed = run(Sum(like=falling, red=redness)), []
    reward = Sum(like=from_call(3, then, falling), red=redness)
    out = run(reward, on_iteration=observed.append)
    assert out.stopped is not None and re.search(message, out.stopped) and len(out.trace) == recorded
    assert good.stopped is None and same_traces(out.trace[:3], good.trace[:3]) and len(observed) == 3
    out = out.in_slot_order()
    torch.testing.assert_close(out.rewards, torch.stack([one.rewards for one in out.trace]).amax(0))
    asked = [own_kwargs("sd3")["prompt"]] * 2
    if recorded == 3:
        for name, function in {"like": falling, "red": redness}.items():
            torch.testing.assert_close(out.components[name][0], function(out.images, asked), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.components["like"] + out.components["red"], out.rewards)
    again = images_of(cached_pipe("sd3"), **own_kwargs("sd3"), num_images_per_prompt=2, **out.start.arguments())
    assert torch.equal(again, out.images)


def test_a_search_of_neighbours_that_fails_tells_the_parts_of_its_best() -> None:
    reward = Sum(like=from_call(9, failing), red=redness)
    out = run(reward, method=NoiseSearchPipeline, neighbours=4, generator=seeded(4))
    assert out.stopped is not None and len(out.trace) == 3
    asked = [own_kwargs("sd3")["prompt"]] * 2
    torch.testing.assert_close(out.rewards[0], likeness(out.images, asked) + redness(out.images, asked))
    torch.testing.assert_close(out.components["red"][0], redness(out.images, asked))


def test_a_search_that_fails_after_a_rejected_image_tells_the_parts_of_its_best() -> None:
    """Rewards 1, 7 and 2, 3 of two searches; the 7 is rejected, and then the reward fails."""

    class Scripted:
        target = None

        def __call__(self, chain: NoiseToImage, search: Search, number: int) -> IterationResult:
            if number == 2:
                raise RewardError("out of words")
            raw = torch.tensor([[1.0, 2.0], [7.0, 3.0]][number])
            recorded = search.record(raw.masked_fill(raw == 7, -torch.inf))
            images = torch.zeros(2, 3, 8, 8)
            return IterationResult(images, raw[None], {"raw": raw[None] + 10}, search.noise, recorded)

    chain = chain_of("sd3")
    out = NoiseRun(chain, Scripted(), Search.start(chain.start), 5).output("pt").in_slot_order()
    assert out.rewards.tolist() == [[1, 3]] and out.components["raw"].tolist() == [[11, 13]]

    class Elites(Scripted):
        def __call__(self, chain: NoiseToImage, search: Search, number: int) -> IterationResult:
            """The best ones are of other rows, as in MAP-Elites: their components are not known."""
            result = super().__call__(chain, search, number)
            return replace(result, search=replace(result.search, best_rewards=result.rewards[0].flip(0)))

    assert NoiseRun(chain, Elites(), Search.start(chain.start), 5).output("pt").components == {}


@pytest.mark.parametrize("restarts", [0, 2])
def test_patience_ends_or_restarts_a_search(restarts: int) -> None:
    pipe = GaussianPipeline()
    heights = [1.0, 3.0, 2.0, 3.0, 0.0, 0.5, 0.5, 0.0, 4.0, 0.0, 0.0, 9.0]  # twice none better: 3, 7, 10

    def scripted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        height = heights[len(recorded)]
        recorded.append(images.detach())
        return 0 * images.sum((1, 2, 3)) + height

    recorded: list[Tensor] = []
    options = {"patience": 2, "restarts": restarts, "regularisation": 0.0}  # nothing moves it but new noise
    out = ReNOPipeline(pipe, Soft(scripted))(
        iterations=15, generator=seeded(3), num_inference_steps=5, output_type="pt", **options
    )
    assert len(out.trace) == [4, None, 11][restarts]
    assert out.trace[-1].best.item() == [3.0, None, 4.0][restarts]
    torch.testing.assert_close(out.images, recorded[[1, None, 8][restarts]])
    jumps = [place for place, (a, b) in enumerate(pairwise(recorded[: len(out.trace)])) if not torch.equal(a, b)]
    assert jumps == [[], None, [3, 7]][restarts]


def test_the_observer_sees_every_iteration_and_can_end_the_run() -> None:
    recorded: list[Iteration] = []

    def observer(iteration: Iteration) -> bool:
        recorded.append(iteration)
        return iteration.number == 2

    reward = Sum(like=likeness, red=redness)
    out = run(reward, on_iteration=observer)
    assert [(one.number, one.total) for one in recorded] == [(0, 5), (1, 5), (2, 5)] and out.stopped is None
    assert same_traces(recorded, out.trace) and all(one.images is None for one in out.trace)
    asked = [own_kwargs("sd3")["prompt"]] * 2
    for one in recorded:
        assert one.images is not None and one.images.shape == (2, 3, 8, 8) and one.norms.shape == (1, 2)
        torch.testing.assert_close(one.components["red"][0], redness(one.images, asked))
        torch.testing.assert_close(one.rewards[0], likeness(one.images, asked) + redness(one.images, asked))
    assert same_traces(out.trace, [replace(one, total=5) for one in run(reward, iterations=3).trace])


def chain_of(name: str, **options: Any) -> NoiseToImage:
    call = own_kwargs(name) | {"generator": seeded()} | options
    return NoiseToImage(ParticleBatch(cached_pipe(name), REWARD, call.pop("prompt"), 2, call))


def test_a_negative_prompt_is_not_taken_for_the_prompt() -> None:
    """Flux encodes it in a call of its own."""
    chain = chain_of("flux", negative_prompt="blue", true_cfg_scale=4.0)
    assert torch.equal(chain(chain.start), chain.fast_images(chain.start))


def test_a_pipeline_that_lets_no_gradients_through_is_named() -> None:
    plain = type(pipe := copy.copy(cached_pipe("sd")))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain.__call__(self, *args, **kwargs)

    call.__signature__ = inspect.signature(plain.__call__)  # type: ignore[attr-defined]
    pipe.__class__ = type("Deaf", (plain,), {"__call__": call})
    with pytest.raises(UnsupportedPipelineError, match=r"Deaf lets no gradients through.*zero-order"):
        ReNOPipeline(pipe, REWARD)(iterations=1, generator=seeded(), **own_kwargs("sd"))


def test_fewer_iterations_than_a_file_holds_are_refused(tmp_path: Path) -> None:
    call = own_kwargs("sd") | {"state_file": tmp_path / "state", "output_type": "pt"}
    ReNOPipeline(cached_pipe("sd"), REWARD)(iterations=3, generator=seeded(), **call)
    with pytest.raises(InputError, match="holds 3 iterations, more than the 2"):
        ReNOPipeline(cached_pipe("sd"), REWARD)(iterations=2, generator=seeded(), **call)


def test_nothing_of_a_graph_outlives_its_iteration() -> None:
    chain = chain_of("sd")
    Backprop()(chain, chain.start, 0)
    assert chain.particle_batch.latents.grad_fn is None
