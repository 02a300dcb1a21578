"""Asynchronous rewards: the same as synchronous ones, and used one step later."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import pytest
import torch
from conftest import PIPELINES
from gaussian import GaussianPipeline, check_tilted, steered_gaussians
from soft_rewards import redness, seeded
from test_particle_schedule import K, ModularGaussian, steer_kwargs
from torch import Tensor

from steer import FKSteeringPipeline, StepReport
from steer.errors import InputError
from steer.pipelines.fk_steering import AsynchronousRun
from steer.reward import RewardError, Submit, ThreadContext, run_in_background, with_timeout
from steer.smc.potentials import POTENTIALS

CPU = torch.device("cpu")
Background = Callable[[torch.device], AbstractContextManager[Submit]]
T = TypeVar("T")


@contextmanager
def run_synchronously(device: torch.device) -> Iterator[Submit]:
    """The slow twin of `run_in_background`: work is done when it is submitted."""

    def submit(work: Callable[[], T]) -> Callable[[], T]:
        result = work()
        return lambda: result

    yield submit


# The background


@pytest.mark.parametrize("background", [run_in_background, run_synchronously])
def test_work_is_done_in_turn_and_its_errors_are_raised_where_it_is_waited_for(background: Background) -> None:
    done: list[int] = []
    with background(CPU) as begin:
        waits = [begin(lambda number=number: done.append(number) or number) for number in range(5)]
        assert [wait() for wait in waits] == list(range(5)) == done
    with run_in_background(CPU) as begin:
        wait = begin(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wait()


def test_at_the_end_of_the_block_everything_is_done() -> None:
    done, may = [], threading.Event()
    with run_in_background(CPU) as begin:
        begin(lambda: may.wait(10) and done.append(1))
        may.set()
    assert done == [1]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("casts", [False, True])
def test_a_thread_computes_under_its_callers_modes(gradients: bool, inference: bool, casts: bool) -> None:
    def modes() -> tuple[Any, ...]:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast

    images, recorded_modes = torch.zeros(1, 3, 2, 2), []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        recorded_modes.append(modes())
        return torch.zeros(1)

    reward.name, reward.differentiable = "modes", False  # type: ignore[attr-defined]
    with torch.inference_mode(inference), torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=casts):
        with run_in_background(CPU) as begin:
            result = begin(modes)()
        with_timeout(reward, 10)(images, [""])  # type: ignore[arg-type]
        assert result == modes() == recorded_modes[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_work_has_a_stream_and_comes_after_what_it_needs() -> None:
    device = torch.device("cuda")
    large = torch.randn(4096, 4096, device=device)
    with run_in_background(device) as begin:
        product = large @ large
        wait = begin(lambda: (torch.cuda.current_stream(device), product.sum()))
        stream, total = wait()
        assert stream != torch.cuda.current_stream(device) and ThreadContext(
            device
        ).stream == torch.cuda.current_stream(device)
        torch.testing.assert_close(total * 2, (large @ large).sum() * 2)


# The distribution


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_gaussian_steered_a_step_later_is_the_tilted_gaussian(potential: str) -> None:
    pipe, steps = GaussianPipeline(mean=0.5, std=0.1), 8
    options = {
        "potential": potential,
        "resample_steps": [2, 4, 5],
        "num_inference_steps": steps,
        "asynchronous_rewards": True,
    }
    check_tilted(list(steered_gaussians(pipe, 4, **options)), *pipe.distribution(steps, eta=1.0))


def test_with_a_particle_schedule() -> None:
    pipe, steps = ModularGaussian(), 8
    options = {
        "particle_schedule": {3: 5, 4: 2},
        "resample_steps": [2],
        "num_inference_steps": steps,
        "asynchronous_rewards": True,
    }
    outs = list(steered_gaussians(pipe, 8, **options))
    assert [one.ancestors.shape[1] for one in outs[0].history] == [8, 5, 2]
    check_tilted(outs, *pipe.distribution(steps, eta=1.0))


# The pipeline


@pytest.mark.few(4)
@pytest.mark.parametrize("name", PIPELINES)
def test_beside_is_as_in_turn_to_the_bit(
    pipe_of: Callable[[str], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, observed = pipe_of(name), []
    options = {
        "num_particles": K,
        "lam": 3000.0,
        "resample_steps": [0, 1, 3],
        "ess_threshold": 1.0,
        "asynchronous_rewards": True,
    }
    call = steer_kwargs(name) | options | {"output_type": "pt"}
    out = FKSteeringPipeline(pipe, redness)(generator=seeded(3), on_step=observed.append, **call)
    monkeypatch.setattr(AsynchronousRun, "background", staticmethod(run_synchronously))
    turn = FKSteeringPipeline(pipe, redness)(generator=seeded(3), **call)
    assert torch.equal(out.images, turn.images) and torch.equal(out.log_weights, turn.log_weights)
    assert all(map(torch.equal, out.ancestors, turn.ancestors))
    assert any((ancestors != torch.arange(K)).any() for ancestors in out.ancestors)
    frames = out.images if out.images.dim() == 4 else out.images[:, 0]
    assert all(not torch.equal(frames[i], frames[j]) for i in range(K) for j in range(i))  # copies have parted
    assert [one.step for one in out.history] == [0, 1, 3]
    reports: list[StepReport] = observed
    assert [report.step for report in reports if report.evaluation] == [1, 2, 4]
    assert [report.step for report in reports] == list(range(reports[0].total))


def test_without_resampling_the_bytes_are_the_pipelines_own(pipe_of: Callable[[str], Any]) -> None:
    call = steer_kwargs("sd")
    plain = pipe_of("sd")(**call, num_images_per_prompt=K, generator=seeded(), output_type="pt").images
    options = {"num_particles": K, "lam": 0.0, "asynchronous_rewards": True, "output_type": "pt"}
    out = FKSteeringPipeline(pipe_of("sd"), redness)(**options, generator=seeded(), **call)
    assert [one.step for one in out.history] == [2, 3] and torch.equal(out.in_slot_order().images, plain)


def test_a_reward_is_that_of_the_step_before_and_the_weights_are_that_of_a_run_in_turn(
    pipe_of: Callable[[str], Any],
) -> None:
    """Until the first resampling nothing differs: the same x̂0, rewards and weights, and so the same ancestors."""
    call = steer_kwargs("sd") | {"num_particles": K, "lam": 300.0, "resample_steps": [2], "ess_threshold": 1.0}
    now, later = (
        FKSteeringPipeline(pipe_of("sd"), redness)(
            asynchronous_rewards=asynchronous_rewards, generator=seeded(), **call
        )
        for asynchronous_rewards in (False, True)
    )
    assert torch.equal(now.history[0].rewards, later.history[0].rewards)
    assert torch.equal(now.history[0].ancestors, later.history[0].ancestors)
    assert now.cost.nfe == later.cost.nfe and now.cost.decodes == later.cost.decodes


def test_consecutive_evaluations_are_of_the_resampled_particles(pipe_of: Callable[[str], Any]) -> None:
    """Copies that were made in between have one x̂0, that of their parent, which nobody has steered yet."""
    steer, call = FKSteeringPipeline(pipe_of("sd"), redness), steer_kwargs("sd") | {"resample_steps": [1, 2]}
    free, resampled = (
        steer(num_particles=K, lam=lam, asynchronous_rewards=True, generator=seeded(), **call) for lam in (0.0, 1e6)
    )
    (parent,) = set(resampled.ancestors[0][0].tolist())
    assert parent == free.history[0].rewards.argmax() != 0
    torch.testing.assert_close(resampled.history[1].rewards, free.history[1].rewards[:, parent].expand(1, K))


def test_the_denoiser_runs_while_a_reward_is_computed(pipe_of: Callable[[str], Any]) -> None:
    """Each reward waits for a later denoiser call: computed synchronously, it would wait forever."""
    pipe, calls, before, met = pipe_of("sd"), [], [], []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        until = time.monotonic() + 30
        while threading.current_thread() is not threading.main_thread() and time.monotonic() < until:
            if len(calls) > before[-1]:
                met.append(before[-1])
                break
            time.sleep(0.001)
        return redness(images, prompts)

    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    options = {"num_particles": 2, "asynchronous_rewards": True, "on_step": lambda report: before.append(len(calls))}
    try:
        FKSteeringPipeline(pipe, reward)(**options, generator=seeded(), **steer_kwargs("sd"))
    finally:
        hook.remove()
    assert len(met) == 2


def test_a_target_reward_ends_the_evaluations(pipe_of: Callable[[str], Any]) -> None:
    out = FKSteeringPipeline(pipe_of("sd"), redness)(
        num_particles=K,
        asynchronous_rewards=True,
        target_reward=-1e6,
        resample_steps=[1, 3],
        generator=seeded(),
        **steer_kwargs("sd"),
    )
    assert [one.step for one in out.history] == [1] and out.cost.nfe == 3 * K + 3 and len(out.images) == 1


def test_a_reward_that_breaks_its_contract_is_refused(pipe_of: Callable[[str], Any]) -> None:
    with pytest.raises(RewardError, match="must be finite"):
        FKSteeringPipeline(pipe_of("sd"), lambda images, prompts: images.mean((1, 2, 3)) / 0)(
            num_particles=2, asynchronous_rewards=True, **steer_kwargs("sd")
        )


def test_parts_that_take_turns_cannot_work_together(tmp_path: Any, pipe_of: Callable[[str], Any]) -> None:
    pipe_of("sd").save_pretrained(tmp_path)
    pipe = type(pipe_of("sd")).from_pretrained(tmp_path)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(InputError, match=r"asynchronous_rewards: .*unet.* are offloaded"):
        FKSteeringPipeline(pipe, redness)(num_particles=2, asynchronous_rewards=True, **steer_kwargs("sd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_guidance": 1.0}, "asynchronous_rewards: reward_guidance needs the gradient in the step"),
        ({"resample_steps": [4]}, "resample_steps: 4 is not from 0 to 3, in a run of 6 steps"),
    ],
)
def test_what_cannot_be(pipe_of: Callable[[str], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FKSteeringPipeline(pipe_of("sd"), redness)(
            num_particles=2, asynchronous_rewards=True, **steer_kwargs("sd") | options
        )
