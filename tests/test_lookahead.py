"""Look-ahead: predicted clean latents by a few more solver steps, against the runs that they predict."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, cached_pipe, call_kwargs, with_scheduler
from diffusers import DDIMScheduler
from gaussian import LAM, TOTAL, GaussianPipeline, check_tilted, steered_gaussians
from peft import LoraConfig, get_peft_model_state_dict
from schedulers import DIFFUSION, FLOW
from soft_rewards import redness, seeded
from torch import Tensor
from zoo.build import cached, call_of

from steer import BestOfNPipeline, FKSteeringPipeline, SelectionPipeline, StepReport
from steer.apps.recipes import read_metadata
from steer.arguments import IMAGES_PER_PROMPT
from steer.diffusion.batching import micro_batched
from steer.diffusion.preview import Preview
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.errors import InputError
from steer.smc.particles import FeynmanKac, Particles
from steer.smc.potentials import maximum

K = 2
WHOLE = 99  # more steps than any run here has left: a look-ahead is then the rest of the run
STEPS = 5


def steer_kwargs(name: str) -> dict[str, Any]:
    """A cheap call of STEPS solver steps, without the count of images."""
    steps = 2 * STEPS if name == "img2img" else STEPS  # half of them are run
    return {key: value for key, value in call_kwargs(name, K, steps).items() if key not in IMAGES_PER_PROMPT}


def watched(pipe: Any, name: str, method: Any = BestOfNPipeline, **options: Any) -> tuple[Any, dict[int, Tensor]]:
    """The output of two particles in slot order, and the previews of each evaluated step."""
    previews_at: dict[int, Tensor] = {}

    def on_step(report: StepReport) -> None:
        if report.previews is not None:
            previews_at[report.step] = report.previews

    call = steer_kwargs(name) | {"generator": seeded(), "output_type": "pt"}
    out = method(pipe, redness)(num_particles=K, on_step=on_step, **call | options)
    return out.in_slot_order(), previews_at


CASES = {
    "sd": ("sd", lambda: DDIMScheduler.from_config(cached_pipe("sd").scheduler.config, clip_sample=False)),
    "sdxl": ("sdxl", DIFFUSION["EulerDiscrete"]),
    "controlnet": ("controlnet", DIFFUSION["DDIM"]),
    "img2img": ("img2img", DIFFUSION["EulerDiscrete"]),
    "sd3": ("sd3", FLOW["FlowMatchEulerDiscrete"]),
    "flux": ("flux", FLOW["FlowMatchEulerDiscrete"]),
    "wan": ("wan", FLOW["FlowMatchEulerDiscrete"]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES)
def test_a_look_ahead_over_all_steps_is_the_rest_of_a_deterministic_run(case: str) -> None:
    name, scheduler = CASES[case]
    pipe = with_scheduler(cached_pipe(name), scheduler())
    out, previews_at = watched(pipe, name, preview_steps=[0, 1, 2], lookahead=WHOLE)
    plain, blurry = watched(pipe, name, preview_steps=[0, 1, 2])
    assert len(previews_at) == 3 and torch.equal(out.images, plain.images)  # the run itself is unchanged
    for step, previews in previews_at.items():
        torch.testing.assert_close(previews, out.images, atol=2e-5, rtol=0)
        assert (blurry[step] - out.images).abs().max() > 1e-3  # which x̂0 is not


def test_a_look_ahead_reads_the_prompts_of_the_run() -> None:
    """Z-Image writes its chat template into a list of prompts: the next call must get the user's own."""
    received: list[Tensor] = []

    def on_step(report: StepReport) -> None:
        received.extend([] if report.previews is None else [report.previews])

    prompts = ["a red star", "a blue circle"]
    call = call_of("ZImage") | {"prompt": prompts, "negative_prompt": None, "generator": seeded(), "output_type": "pt"}
    steps = {"preview_steps": [1], "lookahead": WHOLE, "on_step": on_step}
    out = BestOfNPipeline(cached("ZImage"), redness)(num_particles=K, **call, **steps)
    torch.testing.assert_close(received[0], out.in_slot_order().images, atol=2e-5, rtol=0)
    assert prompts == ["a red star", "a blue circle"]


@pytest.mark.few(1)
@pytest.mark.parametrize("scheduler", ["PNDM", "HeunDiscrete", "KDPM2Discrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_a_look_ahead_of_solvers_of_higher_order_ends_near_their_run(scheduler: str) -> None:
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION[scheduler]())
    options = {"preview_steps": [1], "num_inference_steps": 12}
    out, previews_at = watched(pipe, "sd", lookahead=WHOLE, **options)
    _, blurry = watched(pipe, "sd", **options)
    far, near = ((one[1] - out.images).square().mean().sqrt() for one in (blurry, previews_at))
    assert near < far / 3  # steps of first order against those of second order


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_value_is_that_of_ddim_on_the_coarse_grid(m: int) -> None:
    pipe = GaussianPipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    start = torch.randn(4, 3, 1, 1, generator=seeded())
    received: list[Tensor] = []
    steer = BestOfNPipeline(pipe, TOTAL)
    steer(
        num_particles=4,
        reward_prompt="",
        latents=start,
        eta=0.0,
        num_inference_steps=6,
        preview_steps=[0],
        lookahead=m,
        on_step=lambda report: received.append(report.previews) if report.previews is not None else None,
    )
    x, grid = start.double(), [999, *[999 - round(1000 * k / 6) for k in {1: [], 2: [3], 3: [2, 4]}[m]], -1]
    for timestep, after in itertools.pairwise(grid):
        (alpha, sigma), (alpha_s, sigma_s) = pipe.level(timestep), pipe.level(after)
        gain, shift = pipe.posterior_mean(timestep)
        x0 = gain * x + shift
        x = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma
    torch.testing.assert_close(received[0].double(), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["fk", "selection"])
def test_a_look_ahead_of_one_step_is_no_look_ahead(method: str) -> None:
    kind, own = {
        "fk": (FKSteeringPipeline, {"lam": 300.0, "resample_steps": [1, 2]}),
        "selection": (SelectionPipeline, {"beams": 1}),
    }[method]
    outs = [
        watched(cached_pipe("sd"), "sd", kind, **own, **extra)[0] for extra in ({}, {"lookahead": 1}, {"lookahead": 2})
    ]
    assert torch.equal(outs[0].images, outs[1].images) and outs[0].cost.nfe == outs[1].cost.nfe
    assert not torch.equal(outs[0].history[0].rewards, outs[2].history[0].rewards)


def test_at_strength_0_the_images_are_those_of_the_plain_batch() -> None:
    pipe = cached_pipe("sd")
    out, _ = watched(pipe, "sd", FKSteeringPipeline, lam=0.0, lookahead=3, resample_steps=[1, 2])
    plain, _ = watched(pipe, "sd")
    assert torch.equal(out.images, plain.images)


def test_evaluations_are_counted() -> None:
    calls: list[int] = []
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION["DDIM"]())
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        out, _ = watched(pipe, "sd", FKSteeringPipeline, lam=0.0, lookahead=3, resample_steps=[0, 2])
    finally:
        hook.remove()
    assert out.cost.nfe == 2 * (STEPS + 2 + 2)
    assert sum(calls) == 2 * out.cost.nfe  # guidance asks for every row twice


def test_fewer_particles_look_ahead_alone() -> None:
    options = {"lam": 0.0, "lookahead": 2, "resample_steps": [2], "particle_schedule": {1: 1}}
    out, _ = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, **options)
    assert out.cost.nfe == 2 * 2 + 3 + 2 + 1  # two steps of two, three of one, and look-aheads of two and of one


def test_a_look_ahead_reaches_the_target_of_a_search() -> None:
    """The particle whose look-ahead is best continues alone, from the first evaluation that reaches the target."""
    pipe, own = cached_pipe("sd"), {"lam": 0.0, "lookahead": 3, "resample_steps": [1, 2]}
    plain, _ = watched(pipe, "sd", FKSteeringPipeline, **own)
    first, second = (one.rewards[0] for one in plain.history)
    out, _ = watched(pipe, "sd", FKSteeringPipeline, target_reward=first.max().item(), **own)
    assert len(out.history) == 1 and len(out.images) == 1
    torch.testing.assert_close(out.images[0], plain.images[int(first.argmax())], atol=1e-4, rtol=0)
    assert out.cost.nfe == 2 * (2 + 2) + (STEPS - 2)  # two steps of two with one look-ahead, then one alone
    never, _ = watched(
        pipe, "sd", FKSteeringPipeline, target_reward=first.max().item() + second.max().item() + 1, **own
    )
    assert len(never.history) == 2 and torch.equal(never.images, plain.images)


def test_micro_batches_bound_the_rows_of_a_look_ahead() -> None:
    """The denoiser gets one row at a time, in the run and in the look-ahead."""
    rows: list[int] = []
    pipe = with_scheduler(cached_pipe("sd"), DIFFUSION["DDIM"]())
    own = {"lam": 0.0, "lookahead": 3, "resample_steps": [1]}
    whole, before = watched(pipe, "sd", FKSteeringPipeline, **own)

    def count(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["sample"]))

    hook = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with micro_batched(pipe, 1) as view:
            out, previews_at = watched(view, "sd", FKSteeringPipeline, **own)
    finally:
        hook.remove()
    assert max(rows) == 1 and sum(rows) == 2 * out.cost.nfe == 2 * whole.cost.nfe  # guidance asks for every row twice
    torch.testing.assert_close(previews_at[1], before[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("potential", ["difference", "max"])
def test_the_law_is_exact_whatever_the_look_ahead(potential: str, m: int) -> None:
    pipe = GaussianPipeline(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    outs = list(steered_gaussians(pipe, 4, lookahead=m, potential=potential, resample_steps=[3, 6]))
    check_tilted(outs, *pipe.distribution(10, 1.0))


def test_observers_get_previews_from_the_first_steps_on() -> None:
    own = {"lam": 300.0, "resample_steps": [2]}
    plain, before = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, **own)
    out, previews_at = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, preview_steps=[0], **own)
    assert set(before) == {2} and set(previews_at) == {0, 2}
    assert torch.equal(out.images, plain.images)
    assert out.cost.nfe == plain.cost.nfe + 2 * 2  # a look-ahead of three steps, the first of which is free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 0}, "lookahead must be at least 1"),
        ({"lookahead": "three"}, "lookahead must be a number of steps, or lora:PATH, got 'three'"),
        ({"lookahead": "lora:"}, "lookahead must be"),
        ({"lookahead": 2, "reward_guidance": 1.0}, "reward_guidance and lookahead exclude each other"),
        ({"lookahead": 2, "asynchronous_rewards": True}, "asynchronous_rewards and lookahead exclude"),
        ({"lam": "strong"}, "lam"),
        ({"lam": "auto", "tempering": "ess"}, "both choose λ"),
        ({"preview_steps": [5]}, "preview_steps: 5 is not from 0 to 4, in a run of 5 steps"),
        ({"preview_steps": [-1, 2]}, "preview_steps: -1 is not from 0 to 4"),
        ({"lookahead": "auto"}, "lookahead must be a number of steps, or lora:PATH, got 'auto'"),
        ({"lookahead": "lora:no-such-folder"}, "lookahead: there is no no-such-folder"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        watched(cached_pipe("sd"), "sd", FKSteeringPipeline, **options)


# ---- an adapter


def test_an_adapter_gives_its_own_prediction_and_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = copy.copy(with_scheduler(cached_pipe("sd"), DIFFUSION["DDIM"]()))
    pipe.unet = copy.deepcopy(pipe.unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = copy.deepcopy(pipe.unet)
        adapted.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    type(pipe).save_lora_weights(tmp_path, get_peft_model_state_dict(adapted))
    own = {"lam": 0.0, "resample_steps": [1], "guidance_scale": 1.0}
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain, blurry = watched(pipe, "sd", FKSteeringPipeline, **own)
    out, previews_at = watched(pipe, "sd", FKSteeringPipeline, lookahead=f"lora:{tmp_path}", **own)
    assert torch.equal(out.images, plain.images) and not torch.equal(previews_at[1], blurry[1])
    assert out.cost.nfe == plain.cost.nfe + K
    assert pipe.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())

    latents: list[Tensor] = []  # the same by hand: the adapted denoiser at the same latents
    x0: list[Tensor] = []

    def record(step: SolverStep) -> None:
        latents.append(step.x)

    def at_latents(step: SolverStep) -> tuple[None, Tensor] | None:
        x0.append(step.x0())
        return (None, latents[1]) if step.k == 0 else None

    adapted_pipe = copy.copy(pipe)
    adapted_pipe.unet = adapted
    call = call_kwargs("sd", K, STEPS) | {"guidance_scale": 1.0, "output_type": "latent"}
    for one, on_step in ((pipe, record), (adapted_pipe, at_latents)):
        with hook_steps(one, on_step) as view:
            view(**call, generator=seeded())
    torch.testing.assert_close(previews_at[1], Preview(pipe, call)(x0[1]), atol=1e-5, rtol=0)


# ---- lam="auto"


def test_auto_leaves_half_of_the_particles() -> None:
    """Four rewards 0, 0, 1, 1 have weights 1 and w: ESS = (2 + 2w)² / (2 + 2w²) = 2 only as w → ∞; a closed form
    exists for 0, 0, 0, 1: (3 + w)² / (3 + w²) = 2 at w = 3 + √12."""
    particles = Particles.start(1, 4)
    chosen = FeynmanKac().at_half_ess(particles, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 0.5)
    assert chosen.lam == pytest.approx(math.log(3 + math.sqrt(12)), rel=1e-4)
    scaled = FeynmanKac().at_half_ess(particles, torch.tensor([[5.0, 5.0, 5.0, 5.01]]), 0.5)
    assert scaled.lam == pytest.approx(100 * chosen.lam, rel=1e-2)  # whatever the unit of the reward
    assert FeynmanKac().at_half_ess(particles, torch.ones(1, 4), 0.5).lam == 0


def chosen_by_auto(*rewards: list[float]) -> float:
    scored = torch.tensor(rewards, dtype=torch.float32)
    return FeynmanKac().at_half_ess(Particles.start(*scored.shape), scored, 0.4).lam


LAM_1_OF_4 = math.log(3 + math.sqrt(12))  # as above


@pytest.mark.parametrize(
    ("rewards", "lam"),
    [
        # n of K rewards are 1, the others 0: (n w + K − n)² = (n w² + K − n) max(K/2, n + 1/2), λ = log w.
        ([[0, 1]], math.log(2 + math.sqrt(3))),
        ([[0, 0, 1, 1]], math.log(4 + math.sqrt(15))),
        ([[0, 1, 1, 1]], math.log(2 + math.sqrt(21) / 3)),
        ([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], LAM_1_OF_4),  # ties of all particles have no say
        ([[0, 1, 1, 1], [1, 1, 1, 1]], math.log(2 + math.sqrt(21) / 3)),
        ([[0, 0, 0, 1], [0.5, 0.5, 0.5, 0.505]], LAM_1_OF_4),  # near ties of a prompt beside one that differs
        ([[0, 1, 1, 1.001]], math.log(2 + math.sqrt(21) / 3)),  # near ties of the best
        ([[0.7, 0.7, 0.7, 0.7 + 1e-7]], 0.0),  # rounding alone
        ([[0.3]], 0.0),
    ],
)
def test_auto_of_ties_by_hand(rewards: list[list[float]], lam: float) -> None:
    assert chosen_by_auto(*rewards) == pytest.approx(lam, rel=2e-3)


@pytest.mark.parametrize("size", [3, 4, 7])
def test_auto_of_several_prompts_has_the_mean_of_their_targets(size: int) -> None:
    """Without ties it is half of the particles; with n of them at the top, n + 1/2 for that prompt."""

    def mean_ess(rewards: Tensor, lam: float) -> float:
        weights = (lam * rewards.double()).exp()
        return float((weights.sum(1) ** 2 / (weights**2).sum(1)).mean())

    apart = torch.rand(3, size, generator=seeded(3))
    assert mean_ess(apart, chosen_by_auto(*apart.tolist())) == pytest.approx(size / 2, rel=1e-4)
    tied = apart.clone()
    tied[1, 1:] = 1.0
    targets = (size / 2, size - 0.5, size / 2)
    assert mean_ess(tied, chosen_by_auto(*tied.tolist())) == pytest.approx(sum(targets) / 3, rel=1e-4)


def test_auto_waits_for_an_evaluation_that_depends_on_it() -> None:
    """λ_0 is 0 under geometric tempering, and the maximum may stem from an earlier evaluation of equal rewards."""
    own = {"resample_steps": [0, 2], "tempering": "geometric", "ess_threshold": 1e-9}
    auto, _ = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, **own)
    assert auto.lam is not None and auto.history[0].ess.item() == pytest.approx(K)
    assert auto.history[1].ess.item() == pytest.approx(1.5, abs=1e-3)
    algorithm = FeynmanKac(potential=maximum)
    particles = algorithm.reweight(Particles.start(1, 4), torch.full((1, 4), 0.5), 0.2)
    assert algorithm.at_half_ess(particles, torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 0.4).lam == 0
    assert algorithm.at_half_ess(particles, torch.tensor([[0.5, 0.5, 0.5, 1.5]]), 0.4).lam == pytest.approx(LAM_1_OF_4)


def test_auto_is_the_same_as_its_number() -> None:
    own = {"resample_steps": [1, 2], "ess_threshold": 1.0}
    auto, _ = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, lam="auto", **own)
    assert auto.lam is not None and auto.lam > 0
    assert auto.history[0].ess.mean().item() == pytest.approx(1.5, abs=1e-3)
    number, _ = watched(cached_pipe("sd"), "sd", FKSteeringPipeline, lam=auto.lam, **own)
    assert torch.equal(auto.images, number.images) and torch.equal(auto.log_weights, number.log_weights)
    assert number.lam == auto.lam


def test_auto_keeps_the_weights_of_the_law() -> None:
    """The final log-weights of particles that are never resampled are λ r(x0), for the λ that is reported."""
    out = next(steered_gaussians(GaussianPipeline(), 4, lam="auto", resample_steps=[6], ess_threshold=1e-9))
    assert out.lam != LAM
    torch.testing.assert_close(out.log_weights, out.lam * out.rewards, atol=1e-3, rtol=1e-4)


def test_the_command_takes_both_and_reports_the_strength(steer: Steer, tmp_path: Path) -> None:
    options = ["--steps", 5, "--particles", 2, "--lam", "auto", "--lookahead", 2, "--resample-steps", 2, "--no-compare"]
    code, _, error = steer("sample", "a red star", *options, "--out", tmp_path / "out")
    assert code == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (entry,) = report["prompts"]
    assert report["settings"]["lam"] == "auto" and report["settings"]["lookahead"] == 2 and entry["lam"] >= 0
    assert entry["cost"]["nfe"] == 2 * (5 + 1)
    recipe = read_metadata(tmp_path / "out" / entry["images"][0])
    assert recipe.lam == entry["lam"] and recipe.settings.options.lam == "auto"
    assert recipe.settings.options.lookahead == 2


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="is an adapter of another model"):
        watched(cached_pipe("sd3"), "sd3", FKSteeringPipeline, lookahead="lora:scenes-lcm", resample_steps=[1])
