"""The two-pass gradient against one graph over all steps, and against Stable Diffusion's sampling by hand."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import MOVED, TWO_PROMPTS, call_of, counted, cut, fresh_pipe, move
from torch import Generator, Tensor
from torch.distributions import Normal, kl_divergence

from steer.diffusion.schedules import Gaussian
from steer.errors import InputError
from steer.training.gradient import Batch, Penalty, Reference, reference_of, two_pass_gradient
from steer.training.guards import LARGEST_EXPONENT, chi_square, kl
from steer.training.losses import D3PO, DDPO, GRPO, PRDP, D3POTrajectory, Filtered, LogProbs, Loss, Metrics
from steer.training.rollout import Sampler, Trajectories, log_probs
from steer.training.trainable import LoRA

FAMILIES = ["sd", "img2img", "controlnet", "sdxl", "sd3", "flux", "pixart", "wan"]
PENALTIES: dict[Penalty, float] = {kl: 0.3, chi_square: 0.1}
REWARDS = torch.tensor([[0.2, 0.9], [0.5, -0.4]])
ALL = (0, 1, 2)
# Error of a gradient in fp32: its coefficients are small differences of large log-probabilities.
ROUNDING = 5e-4
Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Trajectories sampled with one LoRA, and another one to train on them."""

    sampler: Sampler
    trained: LoRA
    stored: Trajectories
    reference: Reference

    def batch(self, sizes: Sequence[int] = (4,), steps: Sequence[int] = ALL) -> Batch:
        chunks = cut(self.stored, sizes)
        with self.trained.reference():
            references = [reference_of(self.sampler, chunk, steps) for chunk in chunks]
        return Batch(chunks, references, steps, REWARDS)

    def collected(self, run: Callable[[], Any]) -> tuple[Any, Gradient]:
        """Return value of `run`, and the gradients that it adds."""
        for parameter in self.trained.parameters.values():
            parameter.grad = None
        answer = run()
        return answer, {name: p.grad.clone() for name, p in self.trained.parameters.items() if p.grad is not None}

    def two_pass(
        self, loss: Loss, batch: Batch | None = None, **options: Any
    ) -> tuple[tuple[float, Metrics], Gradient]:
        batch = batch or self.batch()
        return self.collected(lambda: two_pass_gradient(self.sampler, batch, loss, **options))


@functools.cache
def case(name: str) -> Case:
    pipe = fresh_pipe(name)
    trained = LoRA(pipe, 2)
    move(trained, MOVED[name], seed=1)
    sampler = Sampler(pipe, call_of(name))
    stored, _ = sampler.rollout(TWO_PROMPTS)
    move(trained, MOVED[name], seed=2)
    with trained.reference():
        reference = reference_of(sampler, stored, range(stored.log_probs.shape[1]))
    return Case(sampler, trained, stored, reference)


def one_graph(case: Case, loss: Loss, steps: Sequence[int], penalties: Mapping[Penalty, float]) -> Tensor:
    """Loss and penalties, with one autograd graph over all steps."""
    kernels: dict[int, Gaussian] = {}
    log_probs_at: dict[int, Tensor] = {}
    drawn: dict[int, Tensor] = {}

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        kernels[t], log_probs_at[t], drawn[t] = kernel, kernel.log_prob(x_s), x_s

    case.sampler.replay(case.stored, keep, grad=True)
    new = torch.stack([log_probs_at[t] for t in steps], 1)
    matrices = [new, case.stored.log_probs[:, steps], case.reference.log_probs[:, steps]]
    total, _ = loss(LogProbs(*(matrix.view(2, 2, -1) for matrix in matrices), case.stored.elements), REWARDS)
    for penalty, weight in penalties.items():
        terms = torch.stack([penalty(kernels[t], case.reference.kernel(t, kernels[t], drawn[t])) for t in steps], 1)
        total = total + weight * terms.mean() * case.stored.log_probs.shape[1]  # the mean of a sum over all T
    total.backward()
    return total


def error(actual: Gradient, truth: Gradient) -> float:
    """The largest relative error of any parameter's gradient."""
    assert actual.keys() == truth.keys() and all(value.norm() > 0 for value in truth.values())
    return max(((actual[name] - value).norm() / value.norm()).item() for name, value in truth.items())


LOSSES: dict[str, Loss] = {
    "prdp": PRDP(beta=0.5, clip=0.1),
    "trajectory": D3POTrajectory(beta=0.5, unit="nat"),
    "grpo": GRPO(clip=0.1, unit="nat"),
    "ddpo": DDPO(clip=1e-3),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_passes_are_backpropagation_through_all_steps(name: str, kind: str) -> None:
    one, loss = case(name), LOSSES[kind]
    steps = range(one.stored.log_probs.shape[1])
    (value, metrics), gradient = one.two_pass(loss, one.batch(steps=steps), penalties=PENALTIES)
    total, truth = one.collected(lambda: one_graph(one, loss, steps, PENALTIES))
    assert error(gradient, truth) <= 1e-5
    assert metrics.get("clipped", 0.5) > 0  # some steps are out of range and counted
    assert metrics["kl"] > 0.02 and total > value + 0.005  # and the penalties are not 0


def test_no_exponent_here_is_clamped() -> None:
    """A clamped χ² has no gradient, and the tests above would not test it."""
    for name in FAMILIES:
        one = case(name)
        divergences: list[Tensor] = []

        def keep(t: int, kernel: Gaussian, x_s: Tensor, one: Case = one, kls: list[Tensor] = divergences) -> None:
            kls.append(2 * kernel.kl(one.reference.kernel(t, kernel, x_s)))

        one.sampler.replay(one.stored, keep)
        assert 0.05 < torch.stack(divergences).max() < LARGEST_EXPONENT


def sampling_by_hand(pipe: Any, stored: Trajectories) -> list[tuple[Normal, Tensor]]:
    """p(x_s | x_t) and x_s of every step of DDIM with η = 1 (arXiv 2010.02502, eq. 12 and 16) under guidance 3."""
    text, empty = pipe.encode_prompt(list(stored.rows.prompts), "cpu", 1, True)
    starts = [torch.randn(4, 4, 4, generator=Generator().manual_seed(seed)) for seed in stored.rows.starts]
    x, path = torch.stack(starts).to(text), []
    for k, (t, s) in enumerate([(751, 501), (501, 251), (251, 1)]):
        unconditional, conditional = pipe.unet(torch.cat([x, x]), t, torch.cat([empty, text]).detach()).sample.chunk(2)
        epsilon = unconditional + 3.0 * (conditional - unconditional)
        before, after = pipe.scheduler.alphas_cumprod[[t, s]].to(text)
        x0 = (x - (1 - before).sqrt() * epsilon) / before.sqrt()
        variance = (1 - after) / (1 - before) * (1 - before / after)
        kernel = Normal(after.sqrt() * x0 + (1 - after - variance).sqrt() * epsilon, variance.sqrt())
        x = stored.latents[:, k].to(text)
        path.append((kernel, x))
    return path


def summed(elements: Sequence[Tensor]) -> Tensor:
    """Sum over the elements of (N, …) at every step, as (B, K, T)."""
    return torch.stack([values.flatten(1).sum(1) for values in elements], 1).view(2, 2, -1)


def exact_lora(seed: int | None) -> LoRA:
    """A LoRA in fp64 with the weights of the case above, or those of the reference for None."""
    trained = LoRA(fresh_pipe("sd"), 2)
    if seed is not None:
        move(trained, MOVED["sd"], seed)
    trained.pipe.to(torch.float64)
    return trained


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["prdp", "trajectory", "grpo"])
def test_stable_diffusion_written_out_by_hand(kind: str) -> None:
    """The expected gradient uses no step hooks: the UNet itself in fp64, and another pipeline as reference."""
    one, loss, exact = case("sd"), LOSSES[kind], exact_lora(seed=2)
    with torch.no_grad():
        base = sampling_by_hand(exact_lora(None).pipe, one.stored)
        drew = sampling_by_hand(exact_lora(seed=1).pipe, one.stored)
    old, reference = (summed([kernel.log_prob(x) for kernel, x in steps]) for steps in (drew, base))
    steps = sampling_by_hand(exact.pipe, one.stored)
    new = summed([kernel.log_prob(x) for kernel, x in steps])
    truth, _ = loss(LogProbs(new, old, reference, 64), REWARDS)
    apart = summed([kl_divergence(p, q) for (p, _), (q, _) in zip(steps, base, strict=True)])
    total = truth + 0.3 * apart.sum(-1).mean() + 0.1 * (torch.exp(2 * apart) - 1).sum(-1).mean()
    total.backward()
    (value, metrics), gradient = one.two_pass(loss, penalties=PENALTIES)
    assert error(gradient, {name: p.grad for name, p in exact.parameters.items()}) <= ROUNDING
    assert value == pytest.approx(truth.item(), rel=1e-3)
    assert metrics["kl"] == pytest.approx(apart.sum(-1).mean().item(), rel=1e-4)
    assert metrics["kl_per_step"] == pytest.approx(apart.mean().item(), rel=1e-4)
    assert metrics["chi_square"] == pytest.approx((torch.exp(2 * apart) - 1).sum(-1).mean().item(), rel=1e-3)
    torch.testing.assert_close(one.stored.log_probs.double(), old.flatten(0, 1), rtol=0, atol=5e-4)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("steps", [(0, 2), (1,)])
def test_a_subset_of_the_steps(kind: str, steps: tuple[int, ...]) -> None:
    """Loss of these columns, and penalties scaled to all steps; the others cost no denoiser call."""
    one, loss = case("sd"), LOSSES[kind]
    _, truth = one.collected(lambda: one_graph(one, loss, steps, PENALTIES))
    with counted(one.trained.denoiser) as calls:
        batch = one.batch(steps=steps)
        assert len(calls) == len(steps)
        calls.clear()
        (_, metrics), gradient = one.two_pass(loss, batch, penalties=PENALTIES)
        assert len(calls) == (1 if loss.stepwise else 2) * len(steps)
    assert error(gradient, truth) <= 1e-5
    columns = torch.stack([kl_of(one)[t] for t in steps])
    assert metrics["kl"] == pytest.approx(columns.mean().item() * 3, rel=1e-4)


def kl_of(one: Case) -> dict[int, Tensor]:
    """KL of each step (N,) by torch.distributions."""
    divergences: dict[int, Tensor] = {}

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        other = one.reference.kernel(t, kernel, x_s)
        apart = kl_divergence(Normal(kernel.mean, kernel.std), Normal(other.mean, other.std))
        divergences[t] = apart.flatten(1).sum(1)

    one.sampler.replay(one.stored, keep)
    return divergences


def test_steps_that_are_not_trained_on_cost_no_controlnet_call() -> None:
    one = case("controlnet")
    with counted(one.trained.pipe.controlnet) as calls:
        one.two_pass(LOSSES["grpo"], one.batch(steps=(1,)))
    assert len(calls) == 2  # the reference, and one pass: the loss is a sum over steps


OTHER_CHUNKS = [("sd", "grpo"), ("flux", "prdp")]


@pytest.mark.hard
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd", "prdp"), ("flux", "grpo"), *(pytest.param(*one, marks=pytest.mark.hard) for one in OTHER_CHUNKS)],
)
def test_the_gradient_does_not_depend_on_the_chunk_size(name: str, kind: str) -> None:
    """Up to the rounding of ℓ, which depends on batch shape and number of threads."""
    one, loss = case(name), LOSSES[kind]
    (value, metrics), whole = one.two_pass(loss, penalties=PENALTIES)
    log_probabilities = torch.cat([log_probs(one.sampler, chunk) for chunk in one.batch().chunks])
    for sizes in ((1, 3), (2, 2), (3, 1), (1, 1, 1, 1)):
        batch = one.batch(sizes)
        (same_value, same_metrics), components = one.two_pass(loss, batch, penalties=PENALTIES)
        moved = torch.cat([log_probs(one.sampler, chunk) for chunk in batch.chunks]) - log_probabilities
        assert moved.abs().max() <= 4e-6 * log_probabilities.abs().max()
        assert error(components, whole) <= ROUNDING
        assert same_value == pytest.approx(value, rel=1e-4, abs=2 * moved.abs().max().item() + 1e-6)  # Σ |∂L/∂ℓ| < 2
        assert same_metrics["kl"] == pytest.approx(metrics["kl"], rel=1e-4)


@pytest.mark.hard
def test_the_order_of_prompts_does_not_matter() -> None:
    one = case("sd")
    batch = one.batch((2, 2))
    turned = Batch(batch.chunks[::-1], batch.references[::-1], batch.steps, batch.rewards.flip(0))
    for loss in (LOSSES["prdp"], LOSSES["grpo"]):
        _, there = one.two_pass(loss, batch, penalties=PENALTIES)
        _, back = one.two_pass(loss, turned, penalties=PENALTIES)
        assert error(back, there) <= 1e-5
    mismatched = Batch(batch.chunks[::-1], batch.references[::-1], batch.steps, batch.rewards)
    assert error(one.two_pass(PRDP(), mismatched)[1], one.two_pass(PRDP(), batch)[1]) > 0.1


def test_gradients_accumulate() -> None:
    one = case("sd")
    _, once = one.two_pass(LOSSES["prdp"])

    def twice() -> None:
        for _ in range(2):
            two_pass_gradient(one.sampler, one.batch(), LOSSES["prdp"])

    _, both = one.collected(twice)
    assert error({name: value / 2 for name, value in both.items()}, once) <= 1e-6


STEPWISE: dict[str, Loss] = {
    "d3po": D3PO(beta=0.5, unit="nat"),
    "grpo": LOSSES["grpo"],
    "ddpo": LOSSES["ddpo"],
    "filtered": Filtered(),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("kind", STEPWISE)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_loss_that_is_a_sum_over_steps_needs_no_first_pass(name: str, kind: str, steps: tuple[int, ...]) -> None:
    one, loss = case(name), STEPWISE[kind]

    class AskedFirst(type(loss)):  # type: ignore[misc]
        stepwise = False

    slow, batch = AskedFirst(**vars(loss)), one.batch((2, 2), steps)
    with counted(one.trained.denoiser) as calls:
        (value, metrics), actual = one.two_pass(loss, batch, penalties=PENALTIES)
        fast = len(calls)
        (truth, same_metrics), gradient = one.two_pass(slow, batch, penalties=PENALTIES)
    assert loss.stepwise and fast == 2 * len(steps) and len(calls) == 3 * fast
    assert error(actual, gradient) <= 1e-6
    assert value == pytest.approx(truth, rel=1e-6) and metrics == pytest.approx(same_metrics, rel=1e-5, nan_ok=True)


def test_a_prompt_in_two_chunks_needs_the_first_pass() -> None:
    one = case("sd")
    batch = one.batch((1, 3))
    with counted(one.trained.denoiser) as calls:
        _, components = one.two_pass(STEPWISE["d3po"], batch)
    assert len(calls) == 2 * 2 * 3
    assert error(components, one.two_pass(STEPWISE["d3po"], one.batch((2, 2)))[1]) <= ROUNDING


@pytest.mark.parametrize("kind", LOSSES)
def test_unchanged_weights_need_no_first_pass(kind: str) -> None:
    one, loss = case("sd"), LOSSES[kind]
    move(one.trained, MOVED["sd"], seed=1)  # the weights that sampled
    try:
        batch, results = one.batch(), []
        for on_policy, calls_needed in ((False, 3 if loss.stepwise else 6), (True, 3)):
            with counted(one.trained.denoiser) as calls:
                results.append(one.two_pass(loss, batch, penalties=PENALTIES, on_policy=on_policy))
            assert len(calls) == calls_needed
    finally:
        move(one.trained, MOVED["sd"], seed=2)
    (first, gradient), (second, same_gradient) = results
    assert first == second
    assert all(torch.equal(gradient[name], same_gradient[name]) for name in gradient)


def test_one_backward_per_step_and_chunk_through_the_callers_scaler() -> None:
    one = case("sd")
    _, plain = one.two_pass(LOSSES["prdp"])
    scalars: list[Tensor] = []
    chunks: list[int] = []

    def scaled(total: Tensor) -> None:
        scalars.append(total.detach())
        (8 * total).backward()

    options: dict[str, Any] = {"backward": scaled, "on_chunk": lambda: chunks.append(len(scalars))}
    _, eightfold = one.two_pass(LOSSES["prdp"], one.batch((2, 2)), **options)
    assert error({name: value / 8 for name, value in eightfold.items()}, plain) <= 1e-5
    assert len(scalars) == 6 and all(total.shape == () for total in scalars)
    assert chunks == [0, 0, 0, 3]  # both chunks of pass 1, then each of pass 2


@pytest.mark.parametrize("name", ["sd", "flux", "controlnet"])
def test_activations_of_one_step_at_most_are_kept_for_the_backward_pass(name: str) -> None:
    one = case(name)
    alive: list[Any] = []
    before_back: list[int] = []
    after_back: list[int] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.append(None)

        def __del__(self) -> None:
            alive.pop()

    def back(total: Tensor) -> None:
        before_back.append(len(alive))
        total.backward()
        after_back.append(len(alive))

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        one.two_pass(LOSSES["prdp"], penalties=PENALTIES, backward=back)
    assert len(before_back) == 3 and before_back[0] > 100
    assert before_back == before_back[:1] * 3
    assert max(after_back) < 0.02 * before_back[0]


def test_nothing_but_the_trained_weights_gets_a_gradient() -> None:
    one = case("sd")
    one.two_pass(LOSSES["prdp"], penalties=PENALTIES)
    names = [name for name, p in one.trained.denoiser.named_parameters() if p.grad is not None]
    assert sorted(names) == sorted(one.trained.parameters)
    others = (one.trained.pipe.vae, one.trained.pipe.text_encoder)
    assert all(p.grad is None and not p.requires_grad for model in others for p in model.parameters())


def test_the_reference_equals_the_weights_without_the_lora() -> None:
    """Means, standard deviations and log-probabilities, in columns of the chosen steps."""
    one = case("sd")
    with torch.no_grad():
        base = sampling_by_hand(exact_lora(None).pipe, one.stored)
    for steps in (ALL, (0, 2), (1,)):
        (recorded,) = one.batch(steps=steps).references
        for column, t in enumerate(steps):
            kernel, x = base[t]
            drawn = Gaussian(kernel.mean, kernel.scale)
            ours = recorded.kernel(column, drawn, one.stored.latents[:, one.stored.stochastic[t]])
            torch.testing.assert_close(ours.mean.double(), kernel.mean, rtol=0, atol=1e-5)
            assert ours.std.item() == pytest.approx(kernel.scale.mean().item(), rel=1e-5)
            by_hand = kernel.log_prob(x).flatten(1).sum(1)
            torch.testing.assert_close(recorded.log_probs[:, column].double(), by_hand, rtol=0, atol=5e-4)


PEAK = """
import sys
import torch
from diffusers import StableDiffusionPipeline
from steer.assets import MODELS
from steer.training.gradient import Batch, reference_of
from steer.training.gradient import two_pass_gradient
from steer.training.guards import kl
from steer.training.losses import PRDP
from steer.training.trainable import LoRA
from steer.training.rollout import Rows, Sampler


def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
trained = LoRA(pipe, 4)
for steps in (2, *map(int, sys.argv[1:])):
    sampler = Sampler(pipe, {"num_inference_steps": steps, "guidance_scale": 3.0})
    stored, _ = sampler.rollout(Rows(("a star",) * 2, (1, 2), (3, 4)))
    columns = range(stored.log_probs.shape[1])
    with trained.reference():
        reference = reference_of(sampler, stored, columns)
    batch = Batch([stored], [reference], columns, torch.tensor([[0.0, 1.0]]))
    before = kilobytes("VmRSS")
    two_pass_gradient(sampler, batch, PRDP(), penalties={kl: 0.1})
    print(len(columns), kilobytes("VmHWM") - before)
"""


@pytest.mark.hard
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak that Linux tells")
def test_the_memory_of_fifty_steps_is_that_of_ten() -> None:
    """Peak memory of a whole-trajectory gradient on the embedded model, without weights and stored latents."""
    exact = {"MALLOC_MMAP_THRESHOLD_": "8192", "OMP_NUM_THREADS": "1"}  # freed tensors go back to the system
    command = [sys.executable, "-c", PEAK, "10", "50"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | exact, check=True)
    _, (ten, little), (fifty, much) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert (ten, fifty) == (10, 50) and little > 4000
    assert much <= 1.05 * little + 512  # kilobytes of noise


def test_losses_and_penalties_that_need_the_reference_are_refused_without_it() -> None:
    """The others have the same gradient without it, and log no KL."""
    one = case("sd")
    bare = replace(one.batch(), references=())
    (_, metrics), gradient = one.two_pass(GRPO(), bare)
    (_, with_kl), truth = one.two_pass(GRPO(), one.batch())
    assert error(gradient, truth) <= 1e-6
    assert with_kl.keys() - metrics.keys() == {"kl", "kl_per_step"}
    with pytest.raises(InputError, match="penalties compare with the reference"):
        one.two_pass(GRPO(), bare, penalties={kl: 1.0})
    with pytest.raises(InputError, match="this loss compares with the reference policy"):
        one.two_pass(D3PO(), bare)
