"""Particle schedules: dead rows cost nothing, and the others draw from the same distribution."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import PIPELINES, call_kwargs
from diffusers import DDIMScheduler
from gaussian import BATCH, GaussianPipeline, check_tilted, steered_gaussians
from pairwise import hard_but
from soft_rewards import Soft, redness, seeded
from torch import Tensor, nn

from steer import FKSteeringPipeline, StepReport
from steer.diffusion.batching import ActiveRows
from steer.diffusion.preview import first_output
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT
from steer.smc.potentials import POTENTIALS
from steer.smc.resampling import RESAMPLERS, subsample, systematic

K = 4


def steer_kwargs(name: str, steps: int = 6) -> dict[str, Any]:
    steps = 2 * steps if name == "img2img" else steps  # half of them are run
    return {key: value for key, value in call_kwargs(name, K, steps).items() if key not in IMAGES_PER_PROMPT}


@contextmanager
def record_rows(module: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of a module has."""
    recorded: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.append(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield recorded
    finally:
        hook.remove()


# Dead rows


@pytest.mark.parametrize("name", PIPELINES)
def test_the_living_are_as_if_the_dead_were_computed_too(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe, live, call = pipe_of(name), ActiveRows(), call_kwargs(name, 5, 4)
    call |= {"output_type": "pt"}
    whole = first_output(pipe(**call, generator=seeded()))
    own, alive = dict(vars(pipe)), torch.tensor([1, 4])
    denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def die(event: SolverStep) -> None:
        if event.k == 0:
            live.keep(alive, 5)

    with record_rows(denoiser) as recorded, hook_steps(live.view(pipe), die, rows=5) as view:
        left = live.of(first_output(view(**call, generator=seeded())))
    torch.testing.assert_close(left, whole[alive], rtol=0, atol=1e-5)
    blocks = recorded[0] // 5
    assert recorded[0] in (5, 10) and recorded[-1] == 2 * blocks and sum(recorded) < len(recorded) * 5 * blocks
    assert vars(pipe) == own


def test_a_decoder_and_a_controlnet_leave_the_dead_out_too(pipe_of: Callable[[str], Any]) -> None:
    pipe, live = pipe_of("controlnet"), ActiveRows()
    live.keep(torch.tensor([0, 2]), 3)
    with record_rows(pipe.controlnet) as control, record_rows(pipe.vae.post_quant_conv) as decoded:
        images = live.view(pipe)(**call_kwargs("controlnet", 3, 2), generator=seeded(), output_type="pt").images
    assert control == [4, 4] and decoded == [2]
    assert len(images) == 3 and (images[1] == images[1, 0, 0, 0]).all() and not torch.equal(images[0], images[2])


def test_gradients_reach_the_living_and_nobody_else(pipe_of: Callable[[str], Any]) -> None:
    live = ActiveRows()
    unet = live.view(pipe_of("sd")).unet
    live.keep(torch.tensor([2]), 3)
    x = torch.randn(6, 4, 8, 8, generator=seeded()).requires_grad_()
    text = torch.zeros(6, 4, pipe_of("sd").unet.config.cross_attention_dim)
    unet(x, 5, encoder_hidden_states=text, return_dict=False)[0].square().sum().backward(inputs=[x])
    assert x.grad is not None and [bool(row.any()) for row in x.grad] == [False, False, True] * 2


def test_a_batch_that_is_no_multiple_is_refused(pipe_of: Callable[[str], Any]) -> None:
    live = ActiveRows()
    unet = live.view(pipe_of("sd")).unet
    live.keep(torch.tensor([0]), 4)
    with pytest.raises(InputError, match="6 rows, no multiple of 4"):
        unet(torch.zeros(6, 4, 8, 8), 5, encoder_hidden_states=torch.zeros(6, 4, 8))


def test_latents_in_several_tensors_are_refused_in_one_line(pipe_of: Callable[[str], Any]) -> None:
    live = ActiveRows()
    unet = live.view(pipe_of("sd")).unet
    live.keep(torch.tensor([0]), 2)
    with pytest.raises(InputError, match="UNet2DConditionModel takes no single tensor of latents"):
        unet([torch.zeros(4, 8, 8)] * 2, 5, encoder_hidden_states=torch.zeros(2, 4, 8))


# Survivors


@pytest.mark.few(1)
@pytest.mark.parametrize("scheme", RESAMPLERS)
@pytest.mark.parametrize("count", hard_but([1, 3, 4, 7], 3))
def test_fewer_offspring_are_unbiased(scheme: str, count: int) -> None:
    """count · w on average; by hand, of weights that are no multiples of anything."""
    weights = torch.tensor([0.05, 0.4, 0.0, 0.15, 0.1, 0.02, 0.28, 0.0])
    tries = 20_000
    ancestors = RESAMPLERS[scheme](weights.log().expand(tries, 8), rng := seeded(1))
    fewer = subsample(ancestors, count, rng)
    assert fewer.shape == (tries, count)
    offspring = torch.nn.functional.one_hot(fewer, 8).sum(1).double()
    error = offspring.std(0) / tries**0.5
    assert ((offspring.mean(0) - count * weights).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_of_a_systematic_draw_a_systematic_one_is_left(count: int) -> None:
    weights = torch.rand(500, 8, generator=seeded(2)).softmax(1)
    fewer = subsample(systematic(weights.log(), rng := seeded(3)), count, rng)
    offspring = torch.nn.functional.one_hot(fewer, 8).sum(1)
    expected = count * weights
    assert ((offspring >= (expected - 1e-6).floor()) & (offspring <= (expected + 1e-6).ceil())).all()


class Exact(nn.Module):
    """The exact denoiser of a Gaussian, as a module that rows can be left out of."""

    def __init__(self, pipe: GaussianPipeline) -> None:
        super().__init__()
        self.says = pipe.epsilon

    def forward(self, sample: Tensor, timestep: int) -> tuple[Tensor]:
        return (self.says(sample, timestep),)


class ModularGaussian(GaussianPipeline):
    """Its denoiser is called `unet`."""

    def __init__(self, scheduler: DDIMScheduler | None = None, mean: float = 0.5, std: float = 0.1) -> None:
        super().__init__(scheduler, mean, std)
        plain = GaussianPipeline(mean=mean, std=std)
        plain.scheduler = self.scheduler
        self.unet = Exact(plain)

    def epsilon(self, x: Tensor, timestep: int) -> Tensor:
        return self.unet(x, timestep)[0]


@pytest.mark.few(3)
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_with_a_particle_schedule_a_gaussian_is_the_tilted_gaussian(potential: str, guidance: float) -> None:
    pipe, steps = ModularGaussian(), 8
    options = {"potential": potential, "reward_guidance": guidance, "num_inference_steps": steps}
    outs = list(steered_gaussians(pipe, 8, particle_schedule={3: 5, 5: 2}, resample_steps=[3, 4], **options))
    for out in outs:
        assert out.rewards.shape == (BATCH, 2) and len(out.images) == 2 * BATCH
        assert [tuple(one.ancestors.shape) for one in out.history] == [(BATCH, 5), (BATCH, 5), (BATCH, 2)]
    check_tilted(outs, *pipe.distribution(steps, eta=1.0))


# The pipeline


@pytest.mark.few(3)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_takes_a_particle_schedule(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe, call, observed = pipe_of(name), steer_kwargs(name), []
    options = {
        "num_particles": K,
        "lam": 300.0,
        "particle_schedule": {1: 3, 3: 2},
        "resample_steps": [2],
        "on_step": observed.append,
    }
    out = FKSteeringPipeline(pipe, redness)(**options, generator=seeded(3), output_type="pt", **call)
    again = FKSteeringPipeline(pipe, redness)(**options, generator=seeded(3), output_type="pt", **call)
    assert torch.equal(out.images, again.images) and all(map(torch.equal, out.ancestors, again.ancestors))
    assert [tuple(one.rewards.shape) for one in out.history] == [(1, 4), (1, 3), (1, 3)]
    assert [one.shape[1] for one in out.ancestors] == [3, 3, 2]
    assert out.rewards.shape == out.order.shape == (1, 2) and len(out.images) == len(out.latents) == 2
    reports: list[StepReport] = [report for report in observed if report.evaluation]
    assert [len(report.previews) for report in reports[:3] if report.previews is not None] == [4, 3, 3]
    steps = reports[0].total
    calls = out.cost.nfe // (2 * 4 + 2 * 3 + 2 * (steps - 4))
    assert calls >= 1 and out.cost.nfe == calls * (2 * 4 + 2 * 3 + 2 * (steps - 4))
    frames = out.images if out.images.dim() == 4 else out.images.flatten(0, 1)
    count = len(frames) // 2
    assert out.cost.decodes == out.cost.reward_calls / count == 4 + 3 + 3 + 2
    mean = redness(frames.clamp(0, 1), []).view(2, count).mean(1)
    torch.testing.assert_close(mean, out.rewards[0], rtol=0, atol=1e-5)


def test_the_only_survivor_follows_the_solver(pipe_of: Callable[[str], Any]) -> None:
    """The first child of a particle takes the solver's own steps: its image is one of the plain batch."""
    pipe, call = pipe_of("sd"), steer_kwargs("sd")
    plain = pipe(**call, num_images_per_prompt=K, generator=seeded(), output_type="pt").images
    out = FKSteeringPipeline(pipe, redness)(
        num_particles=K, particle_schedule={2: 1}, resample_steps=[], generator=seeded(), output_type="pt", **call
    )
    torch.testing.assert_close(out.images[0], plain[out.ancestors[0][0, 0]], rtol=0, atol=1e-5)


def test_each_prompt_has_its_own_survivors(pipe_of: Callable[[str], Any]) -> None:
    call = steer_kwargs("sd") | {"prompt": ["a red circle", "a blue star"]}
    recorded: list[list[str]] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        recorded.append(list(prompts))
        return redness(images, prompts)

    out = FKSteeringPipeline(pipe_of("sd"), reward)(
        num_particles=4, particle_schedule={2: 2}, resample_steps=[3], generator=seeded(), output_type="pt", **call
    )
    assert recorded == [["a red circle"] * n + ["a blue star"] * n for n in (4, 2, 2)]
    assert out.rewards.shape == (2, 2) and torch.allclose(redness(out.images, []).view(2, 2), out.rewards, atol=1e-6)


def test_top_k_keeps_the_best(pipe_of: Callable[[str], Any]) -> None:
    steer, call = (
        FKSteeringPipeline(pipe_of("sd"), redness),
        steer_kwargs("sd") | {"prompt": ["a red circle", "a star"]},
    )
    out = steer(
        num_particles=4,
        particle_schedule={2: 2, 4: 1},
        particle_schedule_rule="top_k",
        resample_steps=[],
        generator=seeded(),
        **call,
    )
    first, second = out.history
    assert first.ancestors.tolist() == [sorted(row.topk(2).indices.tolist()) for row in first.rewards]
    assert second.ancestors.flatten().tolist() == second.rewards.argmax(1).tolist()
    assert not out.log_weights.any() and not out.log_normaliser.any() and out.rewards.shape == (2, 1)


# The target


def test_a_particle_that_meets_the_target_reward_survives_alone(pipe_of: Callable[[str], Any]) -> None:
    pipe, call = pipe_of("sd"), steer_kwargs("sd")
    steer, options = FKSteeringPipeline(pipe, redness), {"num_particles": K, "resample_steps": [1, 3], "lam": 0.0}
    free = steer(**options, generator=seeded(), **call)
    first, second = (one.rewards for one in free.history)
    target = (second.max() - 1e-6).item()
    assert target > first.max()  # else the next line would tell nothing
    out = steer(**options, target_reward=target, generator=seeded(), output_type="pt", **call)
    assert [one.step for one in out.history] == [1, 3] and out.ancestors[1].tolist() == [[second.argmax().item()]]
    assert len(out.images) == 1 and out.cost.nfe == 4 * K + 2
    assert out.log_weights.tolist() == [[0.0]] and out.log_normaliser.tolist() == [0.0]
    plain = pipe(**call, num_images_per_prompt=K, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(out.images[0], plain[second.argmax()], rtol=0, atol=1e-5)
    early = steer(**options, target_reward=first.max().item(), generator=seeded(), **call)
    assert [one.step for one in early.history] == [1] and early.cost.nfe == 2 * K + 4


def test_a_target_that_is_never_reached_changes_nothing(pipe_of: Callable[[str], Any]) -> None:
    steer, call = FKSteeringPipeline(pipe_of("sd"), redness), steer_kwargs("sd")
    outs = [
        steer(num_particles=K, lam=300.0, target_reward=target, generator=seeded(), output_type="pt", **call)
        for target in (None, 1e6)
    ]
    assert torch.equal(outs[0].images, outs[1].images) and torch.equal(outs[0].log_weights, outs[1].log_weights)
    assert outs[0].cost.nfe == outs[1].cost.nfe


def test_a_guided_run_that_is_settled_asks_for_no_more_gradients(pipe_of: Callable[[str], Any]) -> None:
    out = FKSteeringPipeline(pipe_of("sd"), Soft(redness))(
        num_particles=3, reward_guidance=1.0, target_reward=-1e6, generator=seeded(), **steer_kwargs("sd")
    )
    assert len(out.history) == 1 and out.cost.gradients == 3 and len(out.images) == 1


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"particle_schedule": {2: 4}},
            "particle_schedule: 4 particles from step 2 on, of 4: they must be fewer and fewer",
        ),
        ({"particle_schedule": {1: 2, 3: 3}}, "particle_schedule: 3 particles from step 3 on, of 2"),
        ({"particle_schedule": {2: 0}}, "particle_schedule: 0 particles from step 2 on"),
        ({"particle_schedule": {5: 1}}, "particle_schedule: 5 is not from 0 to 4, in a run of 6 steps"),
        ({"particle_schedule_rule": "top"}, "unknown particle_schedule_rule 'top': did you mean top_k"),
        ({"target_reward": math.nan}, "target_reward must be a finite number"),
        ({"target_reward": 1.0, "prompt": ["a", "b"]}, "target_reward: several prompts"),
    ],
)
def test_plans_that_cannot_be(pipe_of: Callable[[str], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FKSteeringPipeline(pipe_of("sd"), redness)(num_particles=K, **steer_kwargs("sd") | options)


def test_a_pipeline_without_a_denoiser_to_spare_says_so() -> None:
    with pytest.raises(InputError, match="GaussianPipeline has none of unet"):
        FKSteeringPipeline(GaussianPipeline(), redness)(num_particles=4, particle_schedule={3: 2}, reward_prompt="")
