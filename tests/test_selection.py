"""Per-step selection and beam search: by hand, against the exact kernel of a Gaussian pipeline, on real pipelines."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, call_kwargs, with_scheduler
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler
from gaussian import GaussianPipeline
from soft_rewards import redness, seeded
from torch import Tensor

from steer import BestOfNPipeline, SelectionPipeline, StepReport
from steer.errors import InputError
from steer.pipelines.base import SteeringOutput
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT
from steer.pipelines.selection import Selection

K, STEPS = 4, 8


def steer_kwargs(name: str, steps: int = 5) -> dict[str, Any]:
    return {key: value for key, value in call_kwargs(name, K, steps).items() if key not in IMAGES_PER_PROMPT}


def bright_or_dark(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Bright images for the prompt "up", dark ones for any other."""
    return images.mean((1, 2, 3)) * torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts])


def observed_run(pipe: GaussianPipeline, groups: int, **options: Any) -> tuple[SteeringOutput, list[StepReport]]:
    """A run in which every second prompt asks for bright images, and its step reports."""
    reports: list[StepReport] = []
    out = SelectionPipeline(pipe, bright_or_dark)(
        reward_prompt=["up", "down"] * (groups // 2),
        **{"num_particles": K, "num_inference_steps": STEPS, "chunk_size": 400, "output_type": "pt"} | options,
        on_step=reports.append,
        generator=seeded(),
    )
    return out, reports


def test_the_best_are_kept_in_slot_order_and_the_first_of_equals() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.2, 0.8], [-5.0, -1.0, -2.0, -9.0, -4.0, -3.0]])
    for beams, expected in (
        (1, [[1], [1]]),
        (2, [[1, 3], [1, 2]]),
        (3, [[1, 3, 5], [1, 2, 5]]),
        (6, [[*range(6)]] * 2),
    ):
        assert Selection(beams).keep(rewards, seeded()).tolist() == expected


@pytest.mark.parametrize("beams", [1, 2])
def test_a_finite_strength_draws_in_proportion_to_exp_without_replacement(beams: int) -> None:
    lam, draws, rewards = 2.0, 40_000, torch.tensor([0.3, 1.2, -0.4, 0.9])
    weights = (lam * rewards).double().exp()
    kept = Selection(beams, lam).keep(rewards.expand(draws, 4), seeded())
    for some in itertools.combinations(range(4), beams):
        chance = 0.0
        for order in itertools.permutations(some):  # one after the other, each from those that are left
            left, this = weights.sum(), 1.0
            for one in order:
                this, left = this * (weights[one] / left).item(), left - weights[one]
            chance += this
        share = (kept == torch.tensor(some)).all(1).double().mean().item()
        assert abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / draws), (some, share, chance)


def test_every_candidate_is_a_draw_from_the_exact_kernel_of_the_best_one_before_it() -> None:
    """x̂0 = a x + b of the closed form gives x back; z of x_s = mean(x of the best) + τ z must be standard normal."""
    pipe, groups = GaussianPipeline(), 300
    out, reports = observed_run(pipe, groups)
    ways, timesteps = pipe.transitions(STEPS, eta=1.0), pipe.scheduler.timesteps.tolist()
    sign = torch.tensor([1.0, -1.0]).repeat(groups // 2)[:, None]
    before: Tensor | None = None
    for report in reports[: STEPS - 1]:
        assert report.evaluation is not None and report.previews is not None
        gain, shift = pipe.posterior_mean(timesteps[report.step])
        x = (report.previews - shift).view(groups, K, 3) / gain
        if before is not None:
            slope, offset, tau = ways[report.step - 1]
            z = (x - (slope * before[:, None] + offset)) / tau
            assert abs(z.mean()) <= 4 / z.numel() ** 0.5
            assert abs(z.var() - 1) <= 4 * (2 / z.numel()) ** 0.5
            others = (z[:, 0] * z[:, 1:].transpose(0, 1)).mean()  # siblings have nothing in common
            assert abs(others) <= 4 / (groups * (K - 1) * 3) ** 0.5
        predicted = sign * report.previews.clamp(0, 1).view(groups, K, 3).mean(2)
        assert torch.allclose(report.evaluation.rewards, predicted, atol=1e-6)
        best = predicted.argmax(1, keepdim=True)
        assert torch.equal(report.evaluation.ancestors, best.expand(groups, K))
        before = x.gather(1, best[:, :, None].expand(-1, 1, 3))[:, 0]
    assert [evaluation.step for evaluation in out.history] == [*range(STEPS - 1)]
    assert reports[-1].evaluation is None


def test_a_finite_strength_chooses_by_the_softmax_in_a_run_too() -> None:
    groups, lam = 1200, 40.0
    out, _ = observed_run(GaussianPipeline(), groups, lam=lam, select_steps=[4])
    (evaluation,) = out.history
    chosen = evaluation.ancestors[:, :1]
    assert torch.equal(evaluation.ancestors, chosen.expand(groups, K))
    gap = evaluation.rewards.gather(1, chosen)[:, 0] - (evaluation.rewards * (lam * evaluation.rewards).softmax(1)).sum(
        1
    )
    assert abs(gap.mean()) <= 4 * gap.std() / groups**0.5
    rank = evaluation.rewards.argsort(1, descending=True)
    picked = (rank == chosen).double().mean(0)  # of the best, the second, …
    expected = (lam * evaluation.rewards).softmax(1).gather(1, rank).double().mean(0)
    assert ((picked - expected).abs() <= 4 * (expected * (1 - expected) / groups).sqrt()).all()
    assert expected[0] < 0.8 and expected[1] > 0.1  # neither the best alone, nor all alike


def test_beams_are_the_best_of_each_prompt_with_equally_many_children() -> None:
    groups = 6
    out, _ = observed_run(GaussianPipeline(), groups, num_particles=6, beams=3)
    assert len(out.history) == STEPS - 1
    for evaluation in out.history:
        for rewards, ancestors in zip(evaluation.rewards.tolist(), evaluation.ancestors.tolist(), strict=True):
            best = sorted(sorted(range(6), key=lambda slot: -rewards[slot])[:3])
            assert ancestors == [best[0], best[0], best[1], best[1], best[2], best[2]]
    assert out.images[0].mean() > 0.5 > out.images[6].mean()  # "up" and "down" in turn
    assert len({round(value, 6) for value in out.rewards.flatten().tolist()}) == 6 * groups


def test_without_a_choice_it_is_the_pipelines_own_noisy_batch(pipe_of: Callable[[str], Any]) -> None:
    options = {"num_particles": K, "generator": seeded(1), "output_type": "pt"}
    sd, call = pipe_of("sd"), steer_kwargs("sd")
    all_kept = SelectionPipeline(sd, redness)(beams=K, **options, **call).in_slot_order()
    plain = sd(**call, num_images_per_prompt=K, eta=1.0, generator=seeded(1), output_type="pt").images
    assert torch.equal(all_kept.images, plain)
    assert len(all_kept.history) == 4 and all((one == torch.arange(K)).all() for one in all_kept.ancestors)
    flux, call = pipe_of("flux"), steer_kwargs("flux")
    kept = SelectionPipeline(flux, redness)(beams=K, **options | {"generator": seeded(1)}, **call)
    batch = BestOfNPipeline(flux, redness)(eta=1.0, **options | {"generator": seeded(1)}, **call)
    assert torch.equal(kept.images, batch.images)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
@pytest.mark.parametrize("beams", [1, 2])
def test_every_family_is_searched_each_prompt_by_itself(pipe_of: Callable[[str], Any], name: str, beams: int) -> None:
    scored_prompts: list[list[str]] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scored_prompts.append(list(prompts))
        return redness(images, prompts)

    call = steer_kwargs(name) | {"prompt": ["a red circle", "a blue star"], "output_type": "pt", "chunk_size": 2 * K}
    run = SelectionPipeline(pipe_of(name), reward)
    out, again = (run(num_particles=K, beams=beams, generator=seeded(3), **call) for _ in range(2))
    assert torch.equal(out.images, again.images) and all(map(torch.equal, out.ancestors, again.ancestors))
    assert all(prompts == ["a red circle"] * K + ["a blue star"] * K for prompts in scored_prompts)
    assert [evaluation.step for evaluation in out.history] == [0, 1, 2, 3]
    for evaluation in out.history:
        best = evaluation.rewards.topk(beams, 1).indices.sort(1).values
        assert torch.equal(evaluation.ancestors, best.repeat_interleave(K // beams, 1))
    frames = out.images if out.images.dim() == 4 else out.images[:, 0]
    assert all(not torch.equal(frames[i], frames[j]) for i in range(2 * K) for j in range(i))
    assert (out.rewards.diff(dim=1) <= 0).all() and out.rewards.shape == (2, K)
    assert torch.equal(out.log_weights, torch.zeros(2, K)) and torch.equal(out.log_normaliser, torch.zeros(2))
    assert all((ess == K).all() for ess in out.ess)


def test_cost_counts_k_evaluations_a_step_and_the_candidates_that_were_read(pipe_of: Callable[[str], Any]) -> None:
    run, call = SelectionPipeline(pipe_of("sd"), redness), steer_kwargs("sd")
    every = run(num_particles=K, generator=seeded(), **call).cost
    assert (every.nfe, every.decodes, every.reward_calls) == (5 * K, 5 * K, 5 * K)  # four steps and the end
    some = run(num_particles=K, select_steps=[1, 3], generator=seeded(), **call).cost
    assert (some.nfe, some.decodes, some.reward_calls) == (5 * K, 3 * K, 3 * K)


def test_the_solvers_own_way_is_kept_where_it_is_asked_for(pipe_of: Callable[[str], Any]) -> None:
    """With eta=None or 0 and a deterministic solver, the first child continues as without selection."""
    pipe = with_scheduler(pipe_of("sd"), EulerDiscreteScheduler.from_config(pipe_of("sd").scheduler.config))
    call = steer_kwargs("sd")
    plain = pipe(**call, num_images_per_prompt=K, generator=seeded(), output_type="latent").images
    run = SelectionPipeline(pipe, redness)
    options = {"num_particles": K, "select_steps": [2], "output_type": "pt"} | call
    for eta, same in ((None, True), (0.0, True), (1.0, False)):
        out = run(eta=eta, generator=seeded(), **options).in_slot_order()
        parent = out.ancestors[0][0, 0]
        assert torch.allclose(out.latents[0], plain[parent], rtol=1e-3, atol=1e-3) is same, eta
        assert all(not torch.equal(out.latents[i], out.latents[j]) for i in range(K) for j in range(i))


@pytest.mark.parametrize("eta", [None, 1.0])
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, LCMScheduler])
def test_candidates_differ_under_solvers_of_several_calls_and_consistency_models(
    pipe_of: Callable[[str], Any], scheduler: type, eta: float | None
) -> None:
    pipe = with_scheduler(pipe_of("sd"), scheduler.from_config(pipe_of("sd").scheduler.config))
    run = SelectionPipeline(pipe, redness)
    out = run(num_particles=K, eta=eta, generator=seeded(), output_type="pt", **steer_kwargs("sd"))
    assert out.history and all(not torch.equal(out.images[i], out.images[j]) for i in range(K) for j in range(i))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"beams": 3}, "beams must divide num_particles, got 3 of 4"),
        ({"num_particles": 2, "beams": 4}, "beams must divide num_particles, got 4 of 2"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"lam": math.nan}, "lam must be a finite number, or inf, got nan"),
        ({"lam": -math.inf}, "lam must be a finite number"),
        ({"eta": 1.5}, "eta must be from 0 to 1"),
        ({"select_steps": [4]}, "select_steps: 4 is not from 0 to 3, in a run of 5 steps"),
        ({"num_inference_steps": 1}, "a run of 1 steps has none"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"stepz": 3}, "takes no argument 'stepz'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    pipe_of: Callable[[str], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SelectionPipeline(pipe_of("sd"), redness)(**(steer_kwargs("sd") | options))


@pytest.mark.hard
def test_the_command_runs_and_resumes_both_methods(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--steps", "4", "--particles", "4", "--no-compare"]
    for name, options, kept, lam in (
        ("svdd", [], 1, None),
        ("svdd", ["--lam", "30"], 1, 30.0),
        ("beam", [], 2, None),
    ):
        out = tmp_path / "-".join((name, *options))
        assert steer(*words, "--method", name, *options, "--out", out)[0] == 0
        report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
        (entry,) = report["prompts"]
        own = {"svdd": {"lam": lam}, "beam": {"beams": 2}}[name]  # options of a method are recorded for it alone
        assert {key: report["settings"].get(key) for key in own} == own and len(
            {"lam", "beams"} - report["settings"].keys()
        ) == 1
        assert entry["steps"] == [0, 1, 2] and all(len(set(row)) == kept for row in entry["ancestors"])
        if not options:  # the best, or the two best
            for rewards, row in zip(entry["step_rewards"], entry["ancestors"], strict=True):
                assert set(row) == set(sorted(range(4), key=lambda slot: -rewards[slot])[:kept])
        image = out / entry["images"][0]
        before = image.stat().st_mtime_ns
        assert steer(*words, "--method", name, *options, "--out", out)[0] == 0
        assert image.stat().st_mtime_ns == before
    code, _, err = steer(*words, "--method", "svdd", "--lam", "30", "--out", tmp_path / "svdd")
    assert code == 2 and "holds a run with lam None, not 30.0" in err


def test_a_report_of_a_version_without_beams_resumes(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--steps", "4", "--particles", "2", "--no-compare", "--out", tmp_path]
    words += ["--method", "beam"]
    assert steer(*words)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    del report["settings"]["beams"], report["sha256"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert steer(*words)[0] == 0
    code, _, err = steer(*words, "--beams", "1")
    assert code == 2 and "beams 2, not 1" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "beam", "--beams", "3"], "--beams must divide --particles, got 3 of 4"),
        (["--method", "beam", "--beams", "0"], "--beams must be at least 1"),
        (["--lam", "nan", "--method", "svdd"], "--lam must be a finite number"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    steer: Steer, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = steer("sample", "a star", "--model", "none-such", *words, "--out", tmp_path / "o")
    assert code == 2 and message in err and not (tmp_path / "o").exists()
