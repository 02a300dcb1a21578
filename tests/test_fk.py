"""FKSteeringPipeline and BestOfNPipeline on tiny real pipelines of every family, and on one whose answer is known."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PIPELINES, call_kwargs, with_scheduler
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from gaussian import GaussianPipeline, check_tilted, steered_gaussians
from soft_rewards import redness, seeded
from torch import Tensor

from steer import BestOfNPipeline, FKSteeringPipeline, StepReport
from steer.errors import InputError, UnsupportedPipelineError
from steer.pipelines.base import SteeringOutput
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT
from steer.reward import RewardError
from steer.smc.potentials import POTENTIALS
from steer.smc.resampling import RESAMPLERS

K = 3


def steer_kwargs(name: str, steps: int = 5) -> dict[str, Any]:
    """A cheap call without the count of images, which num_particles replaces."""
    return {key: value for key, value in call_kwargs(name, K, steps).items() if key not in IMAGES_PER_PROMPT}


def plain_images(pipe: Any, name: str, seed: int = 0) -> Tensor:
    output = pipe(**call_kwargs(name, K, 5), generator=seeded(seed), output_type="pt")
    return output.frames if name == "wan" else output.images


def in_slots(out: SteeringOutput) -> Tensor:
    return out.in_slot_order().images


@pytest.mark.few(8)
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(("lam", "particles"), [(0.0, K), (10.0, 1)], ids=["lambda 0", "one particle"])
def test_without_steering_the_bytes_are_the_pipelines_own(
    pipe_of: Callable[[str], Any], name: str, lam: float, particles: int
) -> None:
    pipe, call = pipe_of(name), steer_kwargs(name)
    count = next(key for key in IMAGES_PER_PROMPT if key in call_kwargs(name))
    if name == "img2img":
        call["image"] = call["image"][:particles]
    plain = pipe(**(call | {count: particles}), generator=seeded(), output_type="pt")
    out = FKSteeringPipeline(pipe, redness)(
        num_particles=particles, lam=lam, ess_threshold=1.0, generator=seeded(), output_type="pt", **call
    )
    assert torch.equal(in_slots(out), plain.frames if name == "wan" else plain.images)
    assert out.history and all((ess == particles).all() for ess in out.ess)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_is_steered(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe, call = pipe_of(name), steer_kwargs(name)
    scheduler = pipe.scheduler
    options = {"num_particles": K, "lam": 3000.0, "resample_steps": [0, 1, 2], "ess_threshold": 1.0}
    out = FKSteeringPipeline(pipe, redness)(**options, generator=seeded(3), output_type="pt", **call)
    again = FKSteeringPipeline(pipe, redness)(**options, generator=seeded(3), output_type="pt", **call)
    assert torch.equal(out.images, again.images) and all(map(torch.equal, out.ancestors, again.ancestors))
    assert [evaluation.step for evaluation in out.history] == [0, 1, 2]
    assert any((ancestors != torch.arange(K)).any() for ancestors in out.ancestors)
    assert (out.rewards.diff(dim=1) <= 0).all()
    frames = out.images if out.images.dim() == 4 else out.images[:, 0]
    assert all(not torch.equal(frames[i], frames[j]) for i in range(K) for j in range(i))  # copies have parted
    assert pipe.scheduler is scheduler and type(scheduler).__module__.startswith("diffusers")


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_several_prompts_keep_their_own_particles(pipe_of: Callable[[str], Any], name: str) -> None:
    call = steer_kwargs(name) | {"prompt": ["a red circle", "a blue star"]}
    scored_prompts: list[list[str]] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scored_prompts.append(list(prompts))
        return redness(images, prompts)

    out = FKSteeringPipeline(pipe_of(name), reward)(
        num_particles=K, lam=2000.0, ess_threshold=1.0, chunk_size=6, generator=seeded(), output_type="pt", **call
    )
    assert out.rewards.shape == (2, K) and len(out.images) == 2 * K
    assert all(prompts == ["a red circle"] * K + ["a blue star"] * K for prompts in scored_prompts)
    assert torch.allclose(redness(out.images, []).view(2, K), out.rewards, atol=1e-6)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "scheduler",
    [
        *(DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler, LCMScheduler),
        *(PNDMScheduler, HeunDiscreteScheduler),
    ],
)
def test_copies_part_under_deterministic_and_stochastic_solvers(pipe_of: Callable[[str], Any], scheduler: type) -> None:
    pipe = with_scheduler(pipe_of("sd"), scheduler.from_config(pipe_of("sd").scheduler.config))
    call = steer_kwargs("sd", steps=6)
    out = FKSteeringPipeline(pipe, redness)(
        num_particles=K, lam=1e5, resample_steps=[2], ess_threshold=1.0, generator=seeded(), output_type="pt", **call
    )
    (parent,) = set(out.ancestors[0][0].tolist())  # all from one particle …
    assert all(not torch.equal(out.latents[i], out.latents[j]) for i in range(K) for j in range(i))  # … and parted
    plain = pipe(**call, num_images_per_prompt=K, generator=seeded(), output_type="latent").images
    assert not torch.allclose(out.in_slot_order().latents[0], plain[parent], rtol=1e-3, atol=1e-3)  # the first too


@pytest.mark.few(4)
@pytest.mark.parametrize("steps", [3, 4, 6, 8])
@pytest.mark.parametrize("scheduler", [LCMScheduler, KDPM2AncestralDiscreteScheduler, EulerDiscreteScheduler])
def test_copies_part_at_the_last_step_that_is_read_too(
    pipe_of: Callable[[str], Any], scheduler: type, steps: int
) -> None:
    pipe = with_scheduler(pipe_of("sd"), scheduler.from_config(pipe_of("sd").scheduler.config))
    out = FKSteeringPipeline(pipe, redness)(
        num_particles=K, lam=1e5, ess_threshold=1.0, generator=seeded(), output_type="pt", **steer_kwargs("sd", steps)
    )
    assert out.history
    assert all(not torch.equal(out.latents[i], out.latents[j]) for i in range(K) for j in range(i))


@pytest.mark.parametrize("asked", [[4], [-1], [100]])
def test_steps_at_which_nothing_could_be_steered_are_refused(pipe_of: Callable[[str], Any], asked: list[int]) -> None:
    with pytest.raises(InputError, match="is not from 0 to 3, in a run of 5 steps"):
        FKSteeringPipeline(pipe_of("sd"), redness)(resample_steps=asked, **steer_kwargs("sd"))
    with pytest.raises(UnsupportedPipelineError, match="a run of 1 steps has none to resample at"):
        FKSteeringPipeline(pipe_of("flux"), redness)(**steer_kwargs("flux", steps=1))


def test_the_noise_of_steering_depends_on_the_state_of_the_generator(pipe_of: Callable[[str], Any]) -> None:
    run, generator = FKSteeringPipeline(pipe_of("flux"), redness), seeded()
    options = {"num_particles": K, "lam": 0.0, "eta": 1.0, "output_type": "pt"} | steer_kwargs("flux")
    latents = torch.randn(K, 4, 16, generator=seeded(5))
    first, second = (run(generator=generator, latents=latents, **options) for _ in range(2))
    assert torch.equal(first.images, second.images)  # with latents given, nothing was drawn from it …
    generator.manual_seed(1)
    assert not torch.equal(run(generator=generator, latents=latents, **options).images, first.images)


def test_several_images_and_several_prompts_are_refused_where_diffusers_mixes_them(
    pipe_of: Callable[[str], Any],
) -> None:
    call = steer_kwargs("img2img") | {"prompt": ["a red circle", "a blue star"]}
    with pytest.raises(InputError, match="one prompt a call"):
        FKSteeringPipeline(pipe_of("img2img"), redness)(num_particles=2, **call)


def test_a_stop_through_diffusers_own_interrupt_still_returns_images(pipe_of: Callable[[str], Any]) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return tensors

    out = FKSteeringPipeline(pipe_of("sd"), redness)(
        num_particles=2, callback_on_step_end=interrupt, generator=seeded(), **steer_kwargs("sd")
    )
    assert len(out.images) == 2 and out.cost.nfe == 3 * 2


def test_guess_mode_of_a_controlnet_is_steered(pipe_of: Callable[[str], Any]) -> None:
    call = steer_kwargs("controlnet") | {"guess_mode": True}
    assert (
        len(FKSteeringPipeline(pipe_of("controlnet"), redness)(num_particles=2, generator=seeded(), **call).images) == 2
    )


def test_a_hand_written_pipeline_is_steered() -> None:
    """DDPMPipeline takes `.sample` of its model, knows no "pt", and no prompt."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        3,
        3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    out = FKSteeringPipeline(pipe, redness)(num_particles=3, lam=500.0, num_inference_steps=5, generator=seeded())
    plain = pipe(batch_size=3, num_inference_steps=5, generator=seeded(), output_type="np").images
    base = BestOfNPipeline(pipe, redness)(num_particles=3, num_inference_steps=5, generator=seeded(), output_type="np")
    assert out.history and np.allclose(base.in_slot_order().images, plain, atol=1e-6)


def test_eta_is_ddims_own_where_the_pipeline_knows_it(pipe_of: Callable[[str], Any]) -> None:
    pipe, call = pipe_of("sd"), steer_kwargs("sd")
    plain = pipe(**call, num_images_per_prompt=K, eta=1.0, generator=seeded(), output_type="pt").images
    for method in (BestOfNPipeline(pipe, redness), FKSteeringPipeline(pipe, redness)):
        options = {"lam": 0.0} if isinstance(method, FKSteeringPipeline) else {}
        out = method(num_particles=K, eta=1.0, generator=seeded(), output_type="pt", **options, **call)
        assert torch.equal(in_slots(out), plain)


def test_eta_is_the_gaussian_kernel_elsewhere(pipe_of: Callable[[str], Any]) -> None:
    pipe, call = pipe_of("flux"), steer_kwargs("flux")
    run = BestOfNPipeline(pipe, redness)
    outs = [run(num_particles=2, eta=eta, generator=seeded(), output_type="pt", **call) for eta in (None, 0.0, 1.0)]
    own, still, noisy = (in_slots(out) for out in outs)
    assert torch.allclose(own, still, atol=1e-4) and not torch.allclose(own, noisy, atol=1e-2)


@pytest.mark.few(3)
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("resampler", ["systematic", "ssp"])
def test_a_steered_gaussian_is_the_tilted_gaussian(potential: str, resampler: str) -> None:
    pipe, steps = GaussianPipeline(mean=0.5, std=0.1), 8
    options = {"potential": potential, "resampler": resampler, "resample_steps": [3, 5], "num_inference_steps": steps}
    check_tilted(list(steered_gaussians(pipe, 4, **options)), *pipe.distribution(steps, eta=1.0))


def test_the_observer_sees_every_step_and_can_end_the_run(pipe_of: Callable[[str], Any]) -> None:
    steer, call = FKSteeringPipeline(pipe_of("sd"), redness), steer_kwargs("sd")
    reports: list[StepReport] = []
    steer(num_particles=K, resample_steps=[2], on_step=reports.append, generator=seeded(), **call)
    assert [report.step for report in reports] == [0, 1, 2, 3, 4] and {report.total for report in reports} == {5}
    assert [report.step for report in reports if report.evaluation] == [2]
    assert reports[2].previews is not None and reports[2].previews.shape == (K, 3, 8, 8)

    class Enough(Exception):
        pass

    def stop(report: StepReport) -> None:
        if report.step == 1:
            raise Enough

    with pytest.raises(Enough):
        steer(num_particles=K, on_step=stop, generator=seeded(), **call)


def test_cost_counts_what_was_done(pipe_of: Callable[[str], Any]) -> None:
    out = FKSteeringPipeline(pipe_of("sd"), redness)(
        num_particles=K, resample_steps=[1, 3], generator=seeded(), **steer_kwargs("sd")
    )
    assert (out.cost.nfe, out.cost.decodes, out.cost.reward_calls) == (5 * K, 3 * K, 3 * K)
    assert out.cost.seconds > 0


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types_are_diffusers_own(pipe_of: Callable[[str], Any], output_type: str) -> None:
    pipe, call = pipe_of("sd"), steer_kwargs("sd")
    plain = pipe(**call, num_images_per_prompt=K, generator=seeded(), output_type=output_type).images
    out = FKSteeringPipeline(pipe, redness)(
        num_particles=K, lam=0.0, generator=seeded(), output_type=output_type, **call
    )
    pairs = zip(out.in_slot_order().images, plain, strict=True)
    assert all(np.array_equal(np.asarray(ours), np.asarray(theirs)) for ours, theirs in pairs)


def test_a_video_is_scored_by_its_frames(pipe_of: Callable[[str], Any]) -> None:
    out = BestOfNPipeline(pipe_of("wan"), redness)(
        num_particles=2, generator=seeded(), output_type="pt", **steer_kwargs("wan")
    )
    by_hand = redness(out.images.flatten(0, 1).clamp(0, 1), []).view(2, -1).mean(1)
    assert torch.allclose(out.rewards[0], by_hand, atol=1e-6)


def test_prompt_embeddings_need_words_only_for_the_reward(pipe_of: Callable[[str], Any]) -> None:
    pipe, call = pipe_of("sd"), steer_kwargs("sd")
    embeds, negative = pipe.encode_prompt(call.pop("prompt"), "cpu", 1, True)
    scored_prompts: set[str] = set()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scored_prompts.update(prompts)
        return redness(images, prompts)

    out = FKSteeringPipeline(pipe, reward)(
        num_particles=2,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        reward_prompt="a red circle",
        generator=seeded(),
        **call,
    )
    assert len(out.images) == 2 and scored_prompts == {"a red circle"}


def test_the_users_callback_still_runs(pipe_of: Callable[[str], Any]) -> None:
    steps: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    FKSteeringPipeline(pipe_of("sd"), redness)(
        num_particles=2, callback_on_step_end=callback, generator=seeded(), **steer_kwargs("sd")
    )
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"potential": "diff"}, "unknown potential 'diff': did you mean difference"),
        ({"resampler": "nope"}, "unknown resampler"),
        ({"tempering": "geo"}, "unknown tempering 'geo'"),
        ({"ess_threshold": 0}, "ess_threshold"),
        ({"eta": -1.0}, "eta must be from 0 to 1"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"num_images_per_prompt": 3, "num_particles": 2}, "are the same: give one of them"),
        ({"stepz": 3}, "takes no argument 'stepz'"),
        ({"guidance_scale": None}, "NoneType"),  # what None means is the pipeline's own matter
    ],
)
def test_arguments_that_do_not_fit_are_named(
    pipe_of: Callable[[str], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FKSteeringPipeline(pipe_of("sd"), redness)(**(steer_kwargs("sd") | options))


def test_a_broken_reward_ends_the_run_by_name(pipe_of: Callable[[str], Any]) -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)

    with pytest.raises(RewardError, match="'broken' returned nan"):
        FKSteeringPipeline(pipe_of("sd"), broken)(num_particles=2, generator=seeded(), **steer_kwargs("sd"))


def test_schemes_and_potentials_may_be_functions(pipe_of: Callable[[str], Any]) -> None:
    run = FKSteeringPipeline(pipe_of("sd"), redness)
    options = {"num_particles": K, "lam": 500.0, "ess_threshold": 1.0, "output_type": "pt"} | steer_kwargs("sd")
    by_name = run(potential="max", resampler="ssp", generator=seeded(), **options)
    by_function = run(potential=POTENTIALS["max"], resampler=RESAMPLERS["ssp"], generator=seeded(), **options)
    assert torch.equal(by_name.images, by_function.images)


def test_from_pretrained_loads_a_folder(tmp_path: Any, pipe_of: Callable[[str], Any]) -> None:
    pipe_of("sd").save_pretrained(tmp_path)
    steer = FKSteeringPipeline.from_pretrained(tmp_path, redness).to("cpu")
    steer.pipe.set_progress_bar_config(disable=True)
    assert len(steer(num_particles=2, generator=seeded(), **steer_kwargs("sd")).images) == 2


def test_best_of_n_shows_its_run_to_an_observer_and_stays_the_same(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("sd")
    call = steer_kwargs("sd") | {"num_inference_steps": 5, "num_particles": K}
    observed: list[StepReport] = []
    plain = BestOfNPipeline(pipe, redness)(**call | {"generator": seeded()})
    shown = BestOfNPipeline(pipe, redness)(
        preview_steps=(1, 3), on_step=observed.append, **call | {"generator": seeded()}
    )
    assert torch.equal(plain.latents, shown.latents) and torch.equal(plain.rewards, shown.rewards)
    assert not plain.history and [one.step for one in shown.history] == [1, 3]
    assert [one.step for one in observed] == [0, 1, 2, 3, 4] and [one.previews is not None for one in observed].count(
        True
    ) == 2
    assert shown.cost.decodes == plain.cost.decodes + 2 * K
    assert torch.equal(plain.log_weights, shown.log_weights)
    with pytest.raises(InputError, match="preview_steps: 9 is not from 0"):
        BestOfNPipeline(pipe, redness)(preview_steps=(9,), **call)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "wan"])
def test_text_is_encoded_once_for_the_run_and_its_previews(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe, call, calls = pipe_of(name), steer_kwargs(name), []
    encoders = [model for key, model in pipe.components.items() if key.startswith("text_encoder") and model is not None]
    hooks = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in encoders]
    try:
        pipe(**call_kwargs(name, K, 5), generator=seeded())
        plain = len(calls)
        out = FKSteeringPipeline(pipe, redness)(num_particles=K, generator=seeded(), **call)
    finally:
        for hook in hooks:
            hook.remove()
    assert plain and out.history and len(calls) == 2 * plain
