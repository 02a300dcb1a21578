"""The Triton kernel in Triton's interpreter: pytest of a process with TRITON_INTERPRET=1, started by test_kernels."""

import math
import os
from typing import Any

import pytest
import torch
from conftest import PROMPT, cached_pipe, with_scheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollouts import TWO_PROMPTS, call_of
from schedulers import DIFFUSION, FLOW
from soft_rewards import in_precision
from torch import Generator, Tensor

from steer import FKSteeringPipeline
from steer.diffusion import kernels
from steer.diffusion.schedules import X0_WEIGHTS, Gaussian, Level, LinearStep, plain_pass, weighted_step
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.diffusion.triton_kernels import BLOCK, triton_pass
from steer.pipelines.base import SteeringOutput
from steer.training.rollout import Sampler, Trajectories, log_probs

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (3, 5), (2, 4, 3, 3), (2, 6, 16), (1, 3, 2, 4, 4), (2, BLOCK), (2, BLOCK + 1), (1, 3 * BLOCK - 7)]
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed)).to(dtype)


def level(alpha: Any) -> Level:
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    return Level(alpha, (1 - alpha**2).sqrt())


def a_step(kind: str = "epsilon", eta: float = 0.7, limit: float = math.inf) -> LinearStep:
    return step_of(kind, level(0.4), level(0.6), eta, limit)


def step_of(kind: str, before: Level, after: Level, eta: float, limit: float = math.inf) -> LinearStep:
    return weighted_step(X0_WEIGHTS[kind](*before), before, after, eta, limit)


def assert_same(ours: Tensor, twin: Tensor) -> None:
    size = max(1.0, float(twin.abs().max()))
    torch.testing.assert_close(ours / size, twin / size, rtol=0, atol=1e-6)


@few
@given(
    shape=st.sampled_from(SHAPES),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    kind=st.sampled_from(sorted(X0_WEIGHTS)),
    alphas=st.lists(st.floats(0.05, 0.999), min_size=2, max_size=2, unique=True).map(sorted),
    eta=st.floats(0.05, 1),
    limit=st.sampled_from([math.inf, 1.0]),
    seed=st.integers(0, 1000),
)
def test_kernel_and_twin_agree(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    kind: str,
    alphas: list[float],
    eta: float,
    limit: float,
    seed: int,
) -> None:
    step = step_of(kind, *map(level, alphas), eta, limit)
    x, output, noise = (normal(seed + i, shape, dtype) for i, dtype in enumerate(dtypes))
    for z in (noise, None):
        assert_same(triton_pass(step, x, output, z), plain_pass(step, x, output, z))


def layouts(shape: tuple[int, ...]) -> dict[str, Any]:
    batch, channels = shape[:2]
    wide = (batch, 2 * channels, *shape[2:])
    return {
        "channels-last": lambda seed: normal(seed, shape).to(memory_format=torch.channels_last),
        "half of the channels": lambda seed: normal(seed, wide)[:, :channels],
        "every other element": lambda seed: normal(seed, (*shape[:3], 2 * shape[3]))[..., ::2],
        "every other row": lambda seed: normal(seed, (2 * batch, *shape[1:]))[::2],
        "one row for all": lambda seed: normal(seed, (1, *shape[1:])).expand(shape),
        "transposed": lambda seed: normal(seed, (*shape[:2], shape[3], shape[2])).transpose(2, 3),
    }


@pytest.mark.parametrize("layout", layouts((2, 4, 3, 5)))
def test_any_layout(layout: str) -> None:
    x, output, noise = map(layouts((2, 4, 3, 5))[layout], (0, 1, 2))
    assert not x.is_contiguous()
    twin = plain_pass(a_step(), x.contiguous(), output.contiguous(), noise.contiguous())
    assert_same(triton_pass(a_step(), x, output, noise), twin)
    for mixed in ((x.contiguous(), output, noise), (x, output.contiguous(), noise), (x, output, noise.contiguous())):
        assert_same(triton_pass(a_step(), *mixed), twin)


def test_every_row_may_have_weights_of_its_own() -> None:
    before, after = level([0.2, 0.4, 0.5]), level([0.3, 0.6, 0.9])
    x, output, noise = (normal(seed, (3, 4, 3, 3)) for seed in range(3))
    whole = triton_pass(step_of("v_prediction", before, after, 0.8), x, output, noise)
    for row in range(3):
        alone = step_of("v_prediction", *(Level(*(values[row] for values in each)) for each in (before, after)), 0.8)
        one = slice(row, row + 1)
        assert_same(whole[one], plain_pass(alone, x[one], output[one], noise[one]))


def test_a_sample_without_noise_is_the_mean() -> None:
    x, output, noise = (normal(seed, (2, 5)) for seed in range(3))
    still = a_step(eta=0.0)
    assert torch.equal(triton_pass(still, x, output, noise), triton_pass(still, x, output))


def test_what_is_not_a_number_stays_so() -> None:
    x, output = normal(0, (2, 5)), normal(1, (2, 5))
    output[1, 2] = math.nan
    assert triton_pass(a_step(limit=1.0), x, output).isnan().nonzero().tolist() == [[1, 2]]


def test_no_rows_are_none() -> None:
    nothing = torch.zeros(0, 4, 3, 3)
    assert triton_pass(a_step(), nothing, nothing, nothing).shape == nothing.shape


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step hooks use the kernel on the CPU too."""
    for module in ("steer.diffusion.kernels", "steer.diffusion.step_hooks"):
        monkeypatch.setattr(f"{module}.has_kernel", lambda *tensors: not any(t.requires_grad for t in tensors))


RUNS = [
    ("sd", "DDIM"),
    ("sd", "DDIM-clipped"),
    ("sd", "EulerAncestralDiscrete"),
    ("pixart", "UniPCMultistep"),
    ("sd3", "FlowMatchEulerDiscrete"),
    ("flux", "FlowMatchEulerDiscrete"),
    ("wan", "FlowMatchEulerDiscrete"),
]


@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
@pytest.mark.parametrize(("family", "scheduler"), RUNS)
def test_rollouts_and_replays_pass_by_the_kernel(
    family: str, scheduler: str, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shifting = {"use_dynamic_shifting": True} if family == "flux" else {}
    pipe = with_scheduler(cached_pipe(family), (DIFFUSION | FLOW)[scheduler](**shifting))
    sampler = Sampler(pipe, call_of(family), storage=storage)
    plain, images = sampler.rollout(TWO_PROMPTS)
    replayed = log_probs(sampler, plain)
    request.getfixturevalue("everywhere")
    # The densities of finetuning are taken in fp64, outside the kernel.
    monkeypatch.setattr(kernels, "one_pass", lambda *given: pytest.fail("a rollout went through the kernel"))
    fused, same = sampler.rollout(TWO_PROMPTS)
    assert_near(fused, plain, 1e-5 if storage == torch.float32 else 2e-3)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-4 if storage == torch.float32 else 5e-3)
    assert torch.equal(log_probs(sampler, fused), fused.log_probs)
    torch.testing.assert_close(log_probs(sampler, plain), replayed, rtol=1e-4, atol=1e-3)


def assert_near(fused: Trajectories, plain: Trajectories, close: float) -> None:
    assert fused.stochastic == plain.stochastic
    size = plain.latents.float().abs().max()
    torch.testing.assert_close(fused.latents / size, plain.latents / size, rtol=0, atol=close)


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete"])
def test_steering_through_the_kernel(scheduler: str, request: pytest.FixtureRequest) -> None:
    """Every step redrawn, copies parted; the same random numbers, the same ancestors."""
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION[scheduler]())

    def steer() -> SteeringOutput:
        call = call_of("sd", 6) | {"generator": Generator().manual_seed(0), "output_type": "pt"}
        return FKSteeringPipeline(pipe, "brightness")(PROMPT, num_particles=4, lam=300.0, eta=0.7, **call)

    plain = steer()
    request.getfixturevalue("everywhere")
    fused = steer()
    ancestors = [evaluation.ancestors for evaluation in plain.history]
    assert any((rows != torch.arange(4)).any() for rows in ancestors)
    assert all(torch.equal(ours.ancestors, rows) for ours, rows in zip(fused.history, ancestors, strict=True))
    torch.testing.assert_close(fused.images, plain.images, rtol=0, atol=1e-4)


def test_thresholding_takes_the_plain_way(everywhere: None) -> None:
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION["DDIM"](thresholding=True))
    kinds: list[type] = []

    def look(event: SolverStep) -> None:
        kinds.append(type(event.kernel(1.0, torch.tensor([0, 0]))))

    for one in (pipe, cached_pipe("sd")):
        with hook_steps(one, look) as view:
            view(**call_of("sd", 2), prompt=[PROMPT] * 2, output_type="latent")
    assert kinds == [Gaussian, Gaussian, kernels.FusedGaussian, kernels.FusedGaussian]


def test_a_pipeline_in_bf16_goes_through_the_kernel(everywhere: None) -> None:
    sampler = Sampler(in_precision(cached_pipe("sd"), torch.bfloat16), call_of("sd"), storage=torch.bfloat16)
    stored, _ = sampler.rollout(TWO_PROMPTS)
    assert stored.latents.dtype == torch.bfloat16 and stored.log_probs.isfinite().all()
    assert torch.equal(log_probs(sampler, stored), stored.log_probs)
