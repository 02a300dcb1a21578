"""Log-ratios and KL of half-precision pipelines against float32, and of float32 against float64."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_scenes, large_denoiser
from diffusers import DDIMScheduler
from pairwise import hard_but
from rollouts import call_of, fresh_pipe
from soft_rewards import Soft
from torch import Tensor

from steer import TEXT_MODELS, MaskedDiffusionPipeline, TrainingConfig
from steer.diffusion.precision import in_float32
from steer.diffusion.schedules import Gaussian
from steer.diffusion.step_hooks import SolverStep
from steer.errors import InputError
from steer.pipelines.training.ddpo_grpo import GRPOConfig, GRPOTrainer
from steer.pipelines.training.method import half_precision, num_training_steps_of
from steer.training.guards import check_rounding, kl
from steer.training.rollout import Rows, Sampler, Trajectories
from steer.training.trainable import LoRA

STEPS, ROWS = 6, Rows(("a star",), (1,), (3,))


def built(name: str, dtype: torch.dtype) -> tuple[Any, LoRA, dict[str, Any]]:
    """A pipeline in a dtype with a small LoRA that has moved, B ~ 1e-4; latents of D >= 65,536 but for scenes."""
    pipe = fresh_scenes() if name == "scenes" else large_denoiser(name)
    trained = LoRA(pipe, 4)
    pipe.to(dtype)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in trained.parameters.items():
        parameter.data = parameter.data.float()
        if "lora_B" in key:
            parameter.data = 1e-4 * torch.randn(parameter.shape, generator=generator)
    call = {} if name == "scenes" else call_of(name)
    size = {} if name == "scenes" else {"height": 256, "width": 256}
    return pipe, trained, call | size | {"num_inference_steps": STEPS, "guidance_scale": 1.0}


def divergence(sampler: Sampler, trained: LoRA, stored: Trajectories, steps: range) -> float:
    """KL of the LoRA from its reference over some steps."""
    kernels: list[list[Gaussian]] = [[], []]
    sampler.replay(stored, lambda t, kernel, x_s: kernels[0].append(kernel), steps)
    with trained.reference():
        sampler.replay(stored, lambda t, kernel, x_s: kernels[1].append(kernel), steps)
    return sum(kl(p, q).sum().item() for p, q in zip(*kernels, strict=True))


@pytest.mark.hard
@pytest.mark.parametrize("name", hard_but(["scenes", "sdxl", "sd3", "flux"], "scenes"))
def test_the_kl_of_a_small_lora_is_that_of_float32(name: str) -> None:
    pipe, trained, call = built(name, torch.float32)
    sampler = Sampler(pipe, call)
    stored, _ = sampler.rollout(ROWS)
    assert name == "scenes" or stored.elements >= 65_536
    for dtype in (torch.float16, torch.bfloat16):
        other, small, _ = built(name, dtype)
        half = half_precision(small.denoiser, TrainingConfig())
        steps = range(num_training_steps_of(len(stored.stochastic), TrainingConfig(), half is not None))
        assert half == dtype and len(steps) == len(stored.stochastic) - 2
        same = replace(stored, latents=stored.latents.to(dtype))
        truth = divergence(sampler, trained, stored, steps)
        actual = divergence(Sampler(other, call, storage=dtype), small, same, steps)
        assert truth > 0 and actual == pytest.approx(truth, rel=0.2)


@pytest.mark.hard
@pytest.mark.parametrize("dtype", hard_but([torch.float16, torch.bfloat16], torch.float16))
def test_a_precision_that_measures_rounding_is_refused(dtype: torch.dtype) -> None:
    pipe, trained, call = built("scenes", dtype)
    exact, rough = Sampler(pipe, call), Sampler(pipe, call, precision="model")
    stored, _ = rough.rollout(ROWS)
    before = {name: parameter.clone() for name, parameter in trained.parameters.items()}
    assert check_rounding(exact, exact, trained.parameters, stored, range(3)) == 0
    with pytest.raises(InputError, match=r"rounding is .* set log_prob_precision float32"):
        check_rounding(rough, exact, trained.parameters, stored, range(3))
    assert all(torch.equal(before[name], parameter) for name, parameter in trained.parameters.items())


@pytest.mark.parametrize(("total", "share"), [(10, 0.876), (20, 0.755), (50, 0.533)])
def test_the_last_two_steps_hold_most_of_the_kl_of_ddim(total: int, share: float) -> None:
    """KL of two policies whose ε differ by one: |Δμ|²/2σ² of diffusers' own step."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    scheduler = DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(total)
    zero, nats = torch.zeros(1, dtype=torch.float64), []
    for t in scheduler.timesteps:
        means = [scheduler.step(eps, t, zero, eta=1, variance_noise=zero).prev_sample for eps in (zero, zero + 1)]
        nats.append(float((means[1] - means[0]) ** 2 / 2 / scheduler._get_variance(t, t - 1000 // total)))
    assert sum(nats[-2:]) / sum(nats) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("skip", "default", "window"), [(None, False, 10), (None, True, 8), (0, True, 10), (3, False, 7), (3, True, 7)]
)
def test_the_window(skip: int | None, default: bool, window: int) -> None:
    settings = TrainingConfig(skip_low_noise_steps=skip)
    assert num_training_steps_of(10, settings, default) == window
    assert num_training_steps_of(2, TrainingConfig(), True) == 1


def test_who_leaves_out_the_last_steps() -> None:
    def learned(pipe: Any, **options: Any) -> int:
        reward = Soft(lambda images, prompts: images.mean((1, 2, 3)))
        return GRPOTrainer(pipe, reward, GRPOConfig(**options), train_prompts=["a"]).num_learned_steps(10)

    assert learned(fresh_scenes()) == 8
    assert learned(fresh_scenes(), skip_low_noise_steps=0) == 10
    assert learned(fresh_scenes(), window="first", window_size=3) == 10  # they are all within the window
    assert learned(fresh_pipe("sd3"), dynamics="flow-sde") == 8
    assert learned(MaskedDiffusionPipeline.from_pretrained(TEXT_MODELS["scenes-text"])) == 10


def test_a_window_without_steps_is_refused() -> None:
    with pytest.raises(InputError, match="skip_low_noise_steps must be below the number of steps with noise, 4, got"):
        num_training_steps_of(4, TrainingConfig(skip_low_noise_steps=4), False)
    with pytest.raises(InputError, match="skip_low_noise_steps must be from 0 to num_inference_steps - 1, got 20"):
        TrainingConfig(skip_low_noise_steps=20, num_inference_steps=20)


def test_a_log_ratio_of_many_elements() -> None:
    """Root mean square error below 1e-4 nats at D = 262,144, against the equations of DDIM in fp64."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    t, shape, errors = scheduler.timesteps[15], (1, 16, 128, 128), []
    for seed in range(8):
        x, output, noise, other = torch.randn((4, *shape), generator=torch.Generator().manual_seed(seed)).unbind()
        moved = output + 1e-4 * other
        steps = [SolverStep(0, t, x, scheduler, -1, one).exact_kernel(1.0) for one in (output, moved)]
        x_s = (steps[0].mean + steps[0].std * noise).float()
        before, after = (scheduler.alphas_cumprod[int(at)].double() for at in (t, t - 50))
        variance = (1 - after) / (1 - before) * (1 - before / after)

        def by_hand(epsilon: Tensor, before=before, after=after, variance=variance, x=x, x_s=x_s) -> Tensor:  # type: ignore[no-untyped-def]
            x0 = (x.double() - (1 - before).sqrt() * epsilon.double()) / before.sqrt()
            mean = after.sqrt() * x0 + (1 - after - variance).sqrt() * epsilon.double()
            return -(((x_s.double() - mean) ** 2).sum()) / 2 / variance

        truth = by_hand(moved) - by_hand(output)
        errors.append((steps[1].log_prob(x_s) - steps[0].log_prob(x_s)).item() - truth.item())
    assert torch.tensor(errors).square().mean().sqrt() < 1e-4


@pytest.fixture
def tf32() -> Iterator[tuple[Any, ...]]:
    """The operations that can use TF32, whose settings are restored after the test."""
    backends = torch.backends
    settings = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [one.fp32_precision for one in settings]
    yield settings[1:]
    backends.cuda.matmul.allow_tf32 = before[1] == "tf32"
    for one, value in zip(settings, before, strict=True):
        one.fp32_precision = value


@pytest.mark.parametrize("interface", ["new", "old"])
def test_tf32_is_off_inside_and_as_before_outside(interface: str, tf32: tuple[Any, ...]) -> None:
    """After `fp32_precision` PyTorch raises for `allow_tf32`; where that was used, both agree inside and outside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if interface == "new":
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    with pytest.raises(ZeroDivisionError), in_float32([])():
        assert [one.fp32_precision for one in tf32] == ["ieee"] * 3
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        raise ZeroDivisionError
    assert [one.fp32_precision for one in tf32] == ["tf32"] * 3
    assert matmul.allow_tf32 and cudnn.allow_tf32


@pytest.mark.hard
def test_rewards_in_the_background_have_one_precision(tf32: tuple[Any, ...], tmp_path: Path) -> None:
    """While the sampler switches TF32 off and on: two micro-batches of an update, of which one is scored meanwhile."""
    torch.backends.cuda.matmul.allow_tf32 = True
    precisions = set()

    def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
        for _ in range(20):
            precisions.add(tf32[0].fp32_precision)
            time.sleep(0.002)
        return images[:, 0].mean((1, 2))

    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, train_batch_size=2, num_generations=2, num_inference_steps=3,
        lora_rank=2, micro_batch=2, lora_target_modules=("to_q",), asynchronous_rewards=True,
    )  # fmt: skip
    GRPOTrainer(fresh_pipe("sd"), Soft(slow), config, train_prompts=["a star", "a circle"]).train()
    assert precisions == {"ieee"} and torch.backends.cuda.matmul.allow_tf32
