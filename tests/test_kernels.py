"""The fused step in PyTorch against diffusers, `Gaussian` and torch.distributions; the Triton kernel against it."""

import inspect
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import BETAS, DIFFUSION, FLOW, build
from torch import Generator, Tensor
from torch.distributions import Independent, Normal

from steer.diffusion.kernels import FusedGaussian, fused_gaussian, has_kernel, one_pass
from steer.diffusion.schedules import (
    X0_WEIGHTS,
    Gaussian,
    Level,
    LinearStep,
    clip_limit,
    gaussian_transition,
    level,
    plain_pass,
    predict_x0,
    prediction_type,
    step_levels,
    weighted_step,
)
from steer.errors import InputError

SHAPE = (2, 4, 3, 3)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed here")
ONE_CALL = {
    name: make for name, make in (DIFFUSION | FLOW).items() if make().order == 1 and not name.startswith("PNDM")
}


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def flat_level(alpha: float | list[float]) -> Level:
    wide = torch.tensor(alpha, dtype=torch.float64)
    return Level(wide, (1 - wide**2).sqrt())


def a_step(eta: float = 0.7) -> LinearStep:
    return step_of("epsilon", flat_level(0.4), flat_level(0.6), eta)


def step_of(kind: str, before: Level, after: Level, eta: float, limit: float = math.inf) -> LinearStep:
    return weighted_step(X0_WEIGHTS[kind](*before), before, after, eta, limit)


def assert_near(ours: Tensor, truth: Tensor, close: float = 1e-6) -> None:
    size = max(1.0, float(truth.abs().max()))
    torch.testing.assert_close(ours / size, truth / size, rtol=0, atol=close)


@needs_triton
@pytest.mark.hard
def test_the_kernel_in_the_interpreter() -> None:
    """In a new process: TRITON_INTERPRET must be set before triton is imported."""
    tests = Path(__file__).parent
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests / "kernels_interpreted.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]


@pytest.mark.few(2)
@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("draws", [True, False])
def test_the_kernel_compiles_for_a_gpu_without_one(
    dtype: str, draws: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from steer.diffusion.triton_kernels import step_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("x", "output", "noise"), f"*{dtype}") | {"limit": "fp32"}
    types |= dict.fromkeys(("table", "result"), "*fp32")
    types |= dict.fromkeys(("elements", "x_row", "output_row", "noise_row", "table_row"), "i32")
    fixed = {"CLIPS": True, "DRAWS": draws, "BLOCK": 1024}
    signature = {name: types.get(name, "constexpr") for name in inspect.signature(step_kernel.fn).parameters}
    # As Triton's launcher specialises: PyTorch's memory and the rows of latents begin at multiples of 16 bytes.
    even = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=step_kernel, signature=signature, constexprs=fixed, attrs=even)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    code = made.asm["ptx"]
    assert "ld.global.v4" in code or "ld.global.v2" in code  # several elements at a time
    assert "fma" not in code  # rounded as in plain PyTorch


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_diffusers_own_ddim_step(eta: float, kind: str, clip: bool) -> None:
    scheduler = build("DDIM", **BETAS, clip_sample=clip, prediction_type=kind)
    scheduler.set_timesteps(7)
    for t in scheduler.timesteps:
        x, output, z = (normal(int(t) + i) for i in range(3))
        own = scheduler.step(output, t, x, eta, use_clipped_model_output=True, variance_noise=z)
        step = step_of(kind, *step_levels(scheduler, t, -1), eta, clip_limit(scheduler))
        torch.testing.assert_close(one_pass(step, x, output, z), own.prev_sample, **CLOSE)


@pytest.mark.parametrize("name", ["EulerDiscrete", "FlowMatchEulerDiscrete"])
def test_diffusers_own_euler_step_is_the_mean_without_noise(name: str) -> None:
    scheduler = (DIFFUSION | FLOW)[name]()
    scheduler.set_timesteps(7)
    for k, t in enumerate(scheduler.timesteps):
        x, output = 3 * normal(k), normal(k + 50)
        scheduler.is_scale_input_called = True
        own = scheduler.step(output, t, x).prev_sample
        step = step_of(prediction_type(scheduler), *step_levels(scheduler, t, k), 0.0)
        assert_near(one_pass(step, x, output), own, 1e-5)


@pytest.mark.parametrize("name", ONE_CALL)
def test_the_fused_step_of_every_scheduler_equals_its_gaussian_transition(name: str) -> None:
    scheduler = ONE_CALL[name]()
    scheduler.set_timesteps(6)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        x, output = normal(3 * k), normal(3 * k + 1)
        levels = step_levels(scheduler, t, k)
        x0 = predict_x0(scheduler, output, t, x, k)
        kernel, fused = gaussian_transition(x, x0, *levels, 0.8), fused_gaussian(scheduler, x, output, *levels, 0.8)
        assert_near(fused.mean, kernel.mean)
        torch.testing.assert_close(fused.std, kernel.std)
        assert_near(fused.sample(Generator().manual_seed(k)), kernel.sample(Generator().manual_seed(k)))


def test_a_fused_gaussian_has_the_interface_of_a_gaussian() -> None:
    x, output = normal(0), normal(1)
    fused = FusedGaussian(a_step(), x, output)
    plain = Gaussian(one_pass(a_step(), x, output), a_step().std.float())
    assert torch.equal(fused.noise(Generator().manual_seed(3)), plain.noise(Generator().manual_seed(3)))
    ours, theirs = (each.sample(Generator().manual_seed(3)) for each in (fused, plain))
    torch.testing.assert_close(ours, theirs)
    other = Gaussian(normal(2), plain.std)
    assert torch.equal(fused.kl(other), plain.kl(other)) and torch.equal(other.kl(fused), other.kl(plain))


def test_a_learned_variance_is_ignored() -> None:
    scheduler = build("DDIM", **BETAS, clip_sample=False)
    scheduler.set_timesteps(4)
    t, x, output = scheduler.timesteps[0], normal(0), normal(1, (2, 8, 3, 3))
    levels = step_levels(scheduler, t, -1)
    kernel = gaussian_transition(x, predict_x0(scheduler, output, t, x, -1), *levels, 0.5)
    assert_near(fused_gaussian(scheduler, x, output, *levels, 0.5).mean, kernel.mean)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(X0_WEIGHTS)),
    alphas=st.lists(st.floats(0.05, 0.99), min_size=2, max_size=2, unique=True).map(sorted),
    eta=st.floats(0.05, 1),
    shape=st.sampled_from([(1, 1), (2, 7), (2, 3, 2, 4), (2, 3, 2, 2, 4)]),
    seed=st.integers(0, 10**6),
)
def test_densities_are_those_of_independent_normals(
    kind: str, alphas: list[float], eta: float, shape: tuple[int, ...], seed: int
) -> None:
    x, output, z = (normal(seed + i, shape) for i in range(3))
    kernel = FusedGaussian(step_of(kind, *map(flat_level, alphas), eta), x, output)
    x_s, log_prob = kernel.draw(z, torch.float32, torch.float32)
    truth = Independent(Normal(kernel.mean.double(), kernel.std.double()), len(shape) - 1)
    torch.testing.assert_close(log_prob, truth.log_prob(x_s.double()), rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(x_s, kernel.mean + kernel.std * z)


def test_gradients_of_the_pytorch_version_are_those_of_the_gaussian() -> None:
    scheduler = build("DDIM", **BETAS, clip_sample=True)
    scheduler.set_timesteps(5)
    t, x, x_s = scheduler.timesteps[2], normal(0), normal(1)
    levels = step_levels(scheduler, t, -1)
    step = step_of("epsilon", *levels, 0.9, clip_limit(scheduler))
    ours, theirs = (normal(2).requires_grad_() for _ in range(2))
    assert 0 < (predict_x0(scheduler, theirs, t, x, -1).abs() == 1).sum() < x.numel()  # some are clipped
    (one_pass(step, x, ours) * x_s).sum().backward()
    (gaussian_transition(x, predict_x0(scheduler, theirs, t, x, -1), *levels, 0.9).mean * x_s).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert_near(ours.grad, theirs.grad, 1e-5)


def test_rows_have_their_own_noise_levels() -> None:
    scheduler = build("DDIM", **BETAS, clip_sample=False)
    times = [100, 500, 900]
    before, after = (
        Level(*(torch.stack(one) for one in zip(*(level(scheduler, t - back, -1) for t in times), strict=True)))
        for back in (0, 50)
    )
    x, output, z = (normal(seed, (3, 4, 3, 3)) for seed in range(3))
    together = one_pass(step_of("epsilon", before, after, 1.0), x, output, z)
    for row, t in enumerate(times):
        one = slice(row, row + 1)
        kernel = gaussian_transition(
            x[one], predict_x0(scheduler, output[one], t, x[one], -1), level(scheduler, t, -1),
            level(scheduler, t - 50, -1), 1.0,
        )  # fmt: skip
        assert_near(together[one], kernel.mean + kernel.std * z[one])


def wrong(**changed: Any) -> dict[str, Any]:
    right = {"step": a_step(), "x": normal(0), "output": normal(1), "noise": normal(2)}
    return right | changed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            wrong(output=normal(0, (2, 8, 3, 3))),
            r"output has shape \(2, 8, 3, 3\), but must have that of x, \(2, 4, 3, 3\)",
        ),
        (wrong(noise=normal(0, (1, 4, 3, 3))), "noise has shape .* but must have that of x"),
        (wrong(step=step_of("epsilon", *(flat_level([a] * 3) for a in (0.4, 0.6)), 1.0)), "for 3 rows and x has 2"),
    ],
    ids=["output", "noise", "rows"],
)
def test_mismatched_arguments_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        one_pass(**call)


def test_cpu_tensors_and_autograd_use_the_pytorch_version() -> None:
    assert not has_kernel(normal(0))
    x, output, z = normal(0), normal(1), normal(2)
    for noise in (None, z):
        assert torch.equal(one_pass(a_step(), x, output, noise), plain_pass(a_step(), x, output, noise))
