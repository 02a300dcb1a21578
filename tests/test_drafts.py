"""Drafts and draft-and-renoise: best-of-N where they are it, costs by hand, and Gaussian data in closed form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, call_kwargs, with_scheduler
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from gaussian import GaussianPipeline
from soft_rewards import redness, seeded
from torch import Tensor

from steer import BestOfNPipeline, DraftsPipeline, InputError, RenoisePipeline
from steer.diffusion.short_schedule import starting_at
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT

T, M, S = 6, 5, 2
OPTIONS = {"drafts": M, "draft_steps": S, "output_type": "pt"}


def own_kwargs(name: str, steps: int = T) -> dict[str, Any]:
    call = {key: value for key, value in call_kwargs(name, 1, steps).items() if key not in IMAGES_PER_PROMPT}
    return call | {"generator": seeded(2)}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_as_many_drafts_as_images_are_best_of_n_byte_for_byte(pipe_of: Callable[[str], Any], name: str) -> None:
    call = own_kwargs(name) | {"num_particles": 3, "output_type": "pt"}
    made = DraftsPipeline(pipe_of(name), redness)(drafts=3, draft_steps=S, **call)
    best = BestOfNPipeline(pipe_of(name), redness)(**call | {"generator": seeded(2)})
    assert torch.equal(made.images, best.images) and torch.equal(made.rewards, best.rewards)


def test_unfinished_drafts_are_the_best_of_a_short_run(pipe_of: Callable[[str], Any]) -> None:
    made = DraftsPipeline(pipe_of("sd"), redness)(num_particles=2, finish=False, **own_kwargs("sd"), **OPTIONS)
    short = BestOfNPipeline(pipe_of("sd"), redness)(num_particles=M, output_type="pt", **own_kwargs("sd", S))
    assert torch.equal(made.images, short.images[:2]) and torch.equal(made.rewards, short.rewards[:, :2])
    assert torch.equal(made.order, short.order[:, :2]) and len(made.latents) == 2
    assert (made.cost.nfe, made.cost.decodes, made.cost.reward_calls) == (M * S, M, M)


def test_embedded_prompts_have_generators_of_their_own(pipe_of: Callable[[str], Any]) -> None:
    pipe, texts = pipe_of("sd"), ["a red circle", "a blue star"]
    embeds = pipe.encode_prompt(texts, "cpu", 1, False)[0]
    own = {"num_particles": 2, "num_inference_steps": T, "height": 8, "width": 8, "guidance_scale": 1.0}
    shared: dict[str, Any] = own | OPTIONS | {"drafts": 4, "finish": False}
    run = DraftsPipeline(pipe, redness)
    plain = run(texts, generator=[seeded(n) for n in range(4)], **shared)
    made = run(prompt_embeds=embeds, reward_prompt=texts, generator=[seeded(n) for n in range(4)], **shared)
    assert torch.equal(made.rewards, plain.rewards) and made.rewards.shape == (2, 2)


def test_finished_drafts_are_full_runs_of_the_best_starts(pipe_of: Callable[[str], Any]) -> None:
    made = DraftsPipeline(pipe_of("sd"), redness)(num_particles=2, **own_kwargs("sd"), **OPTIONS)
    assert (made.cost.nfe, made.cost.reward_calls) == (M * S + 2 * T, M + 2)
    assert len(made.images) == 2 and (made.rewards.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_renoised_copies_of_each_prompt_differ_and_are_counted(pipe_of: Callable[[str], Any], name: str) -> None:
    call = own_kwargs(name) | {"prompt": ["a red circle", "a blue star"]}
    run = RenoisePipeline(pipe_of(name), redness)
    out, again = (
        run(num_particles=4, parents=2, restart_step=3, **call | {"generator": seeded(2)}, **OPTIONS) for _ in range(2)
    )
    assert torch.equal(out.images, again.images) and out.rewards.shape == (2, 4)
    assert out.cost.nfe == 2 * (M * S + 4 * (T - 3)) and out.cost.decodes == 2 * (M + 4)
    assert all(not torch.equal(out.images[i], out.images[j]) for i in range(8) for j in range(i))


def test_renoised_gaussians_have_the_mean_and_variance_of_the_rest_of_the_run() -> None:
    """x_τ = α_τ x0* + σ_τ ε through the affine steps that are left."""
    pipe, copies, first, steps = GaussianPipeline(), 4000, 6, 10

    def brightness(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    given = {"reward_prompt": "", "num_inference_steps": steps, "chunk_size": copies, "output_type": "pt"}
    drafts = BestOfNPipeline(pipe, brightness)(
        **given | {"num_particles": M, "num_inference_steps": S, "generator": seeded(3)}
    )
    out = RenoisePipeline(pipe, brightness)(
        num_particles=copies, restart_step=first, drafts=M, draft_steps=S, generator=seeded(3), **given
    )
    pipe.scheduler.set_timesteps(steps)
    alpha, sigma = pipe.level(int(pipe.scheduler.timesteps[first]))
    mean, std = alpha * drafts.images[0].flatten().double(), sigma
    for gain, shift, _ in pipe.transitions(steps, 0.0)[first:]:
        mean, std = gain * mean + shift, gain * std
    values = out.images.flatten(1).double()
    assert ((values.mean(0) - mean).abs() <= 4 * std / copies**0.5).all()
    assert ((values.var(0) / std**2 - 1).abs() <= 4 * (2 / copies) ** 0.5).all()
    assert out.cost.nfe == M * S + copies * (steps - first)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_run_that_starts_later_resumes_the_whole_one(pipe_of: Callable[[str], Any], scheduler: type) -> None:
    pipe = with_scheduler(pipe_of("sd"), scheduler.from_config(pipe_of("sd").scheduler.config))  # type: ignore[attr-defined]
    call, first, latents_at = own_kwargs("sd") | {"output_type": "latent"}, 2, dict[int, Tensor]()

    def keep(solver_step: SolverStep) -> None:
        latents_at[solver_step.k] = solver_step.x

    with hook_steps(pipe, keep) as view:
        whole = view(**call).images
    later = with_scheduler(pipe, starting_at(pipe.scheduler, first))
    later.scheduler.set_timesteps(T)
    scale = later.scheduler.init_noise_sigma
    resumed = later(**call | {"latents": latents_at[first] / scale}).images
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-4)
    assert type(later.scheduler).__name__ == scheduler.__name__ and isinstance(later.scheduler, scheduler)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler])
def test_solvers_with_memory_start_later_too(pipe_of: Callable[[str], Any], scheduler: Any) -> None:
    pipe = with_scheduler(pipe_of("sd"), scheduler.from_config(pipe_of("sd").scheduler.config))
    out = RenoisePipeline(pipe, redness)(num_particles=2, restart_step=4, **own_kwargs("sd"), **OPTIONS)
    assert out.images.isfinite().all() and not torch.equal(out.images[0], out.images[1])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DraftsPipeline, {"drafts": 1}, "drafts must be at least num_particles, 2, got 1"),
        (DraftsPipeline, {"latents": torch.zeros(2, 4, 8, 8)}, "latents and drafts exclude each other"),
        (RenoisePipeline, {"parents": 3}, "parents must divide num_particles, got 3 of 2"),
        (RenoisePipeline, {"drafts": 1, "parents": 2}, "drafts must be at least parents, 2, got 1"),
        (RenoisePipeline, {"restart_step": 6}, "restart_step: 6 is not from 0 to 5, in a run of 6 steps"),
        (RenoisePipeline, {"draft_steps": 0}, "draft_steps must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    pipe_of: Callable[[str], Any], kind: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kind(pipe_of("sd"), redness)(**own_kwargs("sd") | OPTIONS | {"num_particles": 2} | options)


@pytest.mark.parametrize(("method", "own"), [("drafts", ["--no-finish"]), ("renoise", ["--restart-step", "2"])])
def test_the_command_knows_both(steer: Steer, tmp_path: Path, method: str, own: list[str]) -> None:
    words = ["sample", "a red circle", "--steps", "4", "--particles", "2", "--no-compare", "--method", method]
    words += ["--drafts", "4", "--draft-steps", "2", *own, "--out", tmp_path]
    assert steer(*words)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["prompts"][0]["images"]) == 2 and report["settings"]["drafts"] == 4
    assert report["cost"]["nfe"] == 4 * 2 + (0 if method == "drafts" else 2 * 2)
