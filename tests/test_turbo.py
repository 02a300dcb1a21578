"""The one-step model: its distillation, its use, and its optimised noise as the start of the multi-step model."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from matplotlib.colors import to_rgb
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Generator

from steer import FKSteeringPipeline, StepReport
from steer.apps.plots import MET, MISSED
from steer.apps.scenes import analyses, distil
from steer.apps.scenes.analyses import reno_then_steering
from steer.apps.scenes.distil import STARTS, Distillation, assemble_turbo, denoised, noised, text_features
from steer.apps.scenes.preferences import trained_prompts
from steer.apps.scenes.training import CALL
from steer.assets import ADAPTERS, MODELS
from steer.rewards.scene import SceneReward

EASY = ["a circle", "a red square", "a blue star", "a black cross", "a purple star", "a yellow triangle"]
BATCH = 4


@pytest.fixture(scope="module")
def turbo() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes-turbo"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODELS["scenes"])


@pytest.fixture
def distillation(scenes: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Distillation:
    monkeypatch.setattr(distil, "BATCH", BATCH)
    teacher = scenes.unet.requires_grad_(False)
    student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    with torch.no_grad():  # as after some training: a fake score that differs from the teacher's
        fake.conv_out.weight.mul_(1.1)
    texts, nothing = text_features(scenes, ["a circle", "two red stars"]), text_features(scenes, [""])
    return Distillation(teacher, student, fake, scenes.scheduler, texts, nothing)


@pytest.mark.few(1)
@pytest.mark.parametrize(("steps", "least"), [(1, 0.85), (2, 0.85), (4, 0.7)])
def test_easy_prompts_come_out_right(turbo: StableDiffusionPipeline, steps: int, least: float) -> None:
    call = {"num_images_per_prompt": 8, "num_inference_steps": steps, "output_type": "pt"}
    images = turbo(EASY, generator=Generator().manual_seed(0), **call).images
    right = SceneReward()(images, [prompt for prompt in EASY for _ in range(8)]) == 1
    assert right.float().mean() >= least


def test_a_student_may_begin_with_an_adapter(scenes: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapted, x, t = copy.deepcopy(scenes.unet), torch.randn(1, 8, 8, 8), torch.tensor([999])
    adapted.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=distil.LORA_MODULES, init_lora_weights=False))
    layers = get_peft_model_state_dict(adapted)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    text = text_features(scenes, ["a circle"])
    with torch.no_grad():
        plain, wanted = (denoised(unet, scenes.scheduler, x, t, text) for unet in (scenes.unet, adapted))
        merged = distil.with_adapter(scenes.unet, tmp_path)
        torch.testing.assert_close(denoised(merged, scenes.scheduler, x, t, text), wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.01 and merged.state_dict().keys() == scenes.unet.state_dict().keys()


def test_guidance_is_built_in(turbo: StableDiffusionPipeline) -> None:
    def image(scale: float) -> torch.Tensor:
        rng = Generator().manual_seed(0)
        return turbo("a star", num_inference_steps=1, guidance_scale=scale, generator=rng, output_type="pt").images

    assert torch.equal(image(0.0), image(9.0))


def test_the_student_is_trained_where_its_scheduler_goes(turbo: StableDiffusionPipeline) -> None:
    assert isinstance(turbo.scheduler, LCMScheduler)
    visited = set()
    for steps in (1, 2, 4):
        turbo.scheduler.set_timesteps(steps)
        visited |= set(turbo.scheduler.timesteps.tolist())
    assert visited == set(STARTS)
    assert [sum(distil.SINGLE_STEP), sum(distil.SEVERAL_STEPS)] == pytest.approx([1, 1])


def test_x0_is_what_diffusers_makes_of_it(distillation: Distillation) -> None:
    scheduler, rng = distillation.scheduler, Generator().manual_seed(0)
    x = torch.randn(1, 8, 8, 8, generator=rng)
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        v = distillation.teacher(x, 400, distillation.texts[:1], return_dict=False)[0]
        x0 = denoised(distillation.teacher, scheduler, x, torch.tensor([400]), distillation.texts[:1])
    assert torch.allclose(x0, scheduler.step(v, 400, x).pred_original_sample, atol=1e-4)


def test_the_gradient_of_the_matching_loss_is_the_difference_of_the_two_scores(distillation: Distillation) -> None:
    x0 = torch.randn(BATCH, 8, 8, 8, generator=Generator().manual_seed(1)).requires_grad_(True)
    text = distillation.texts[torch.tensor([0, 1, 0, 1])]
    distillation.matching_loss(x0, text, Generator().manual_seed(2)).backward()
    rng = Generator().manual_seed(2)
    t = torch.randint(distil.EARLIEST, distil.LATEST, (BATCH,), generator=rng)
    with torch.no_grad():
        x_t = noised(distillation.scheduler, x0, torch.randn(x0.shape, generator=rng), t)
        by = {
            name: denoised(unet, distillation.scheduler, x_t, t, given)
            for name, unet, given in (
                ("fake", distillation.fake, text),
                ("prompted", distillation.teacher, text),
                ("blind", distillation.teacher, distillation.nothing.expand_as(text)),
            )
        }
        real = by["blind"] + 4.0 * (by["prompted"] - by["blind"])
        expected = (by["fake"] - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True) / x0.numel()
    assert torch.allclose(x0.grad, expected, rtol=1e-3, atol=1e-7)


def test_a_step_trains_the_student_or_the_fake_score_and_no_other(distillation: Distillation) -> None:
    for step, (moves, stays) in enumerate([("student", "fake"), ("fake", "student")]):
        for unet in (distillation.student, distillation.fake):
            unet.zero_grad()
        distillation.loss_at(step).backward()
        assert all(p.grad is None for p in getattr(distillation, stays).parameters())
        assert any(p.grad is not None and p.grad.any() for p in getattr(distillation, moves).parameters())


@pytest.mark.hard
def test_a_distillation_runs_and_its_pipeline_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "BATCH", 2)
    monkeypatch.setattr(distil, "PROMPTS", 4)
    distil.distil(tmp_path, MODELS["scenes"], steps=2)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a circle", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
    assert json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())["_class_name"] == (
        "LCMScheduler"
    )


def test_the_student_says_in_the_pipeline_what_it_said_in_training(
    scenes: StableDiffusionPipeline, distillation: Distillation
) -> None:
    turbo = assemble_turbo(scenes, distillation.fake)
    x, text = torch.randn(1, 8, 8, 8, generator=Generator().manual_seed(0)), distillation.texts[:1]
    with torch.no_grad():
        actual = turbo.unet(x, 999, text, timestep_cond=torch.randn(1, distil.GUIDANCE_WIDTH), return_dict=False)[0]
        assert torch.equal(actual, distillation.fake(x, 999, text, return_dict=False)[0])


@pytest.mark.hard
def test_the_second_stage_starts_from_the_optimised_noise() -> None:
    call = {"num_inference_steps": 4}
    figures = reno_then_steering("scenes-turbo", "scenes", "scene-soft", ["a circle", "a red star"], 2, 2, call)
    assert set(figures["methods"]) == {"ReNO", "base, random", "base, optimised", "fk, random", "fk, optimised"}
    base = figures["methods"]
    gain = base["base, optimised"]["all"][0] - base["base, random"]["all"][0]
    assert figures["gain"]["base"]["all"][0] == pytest.approx(gain, abs=1e-3)


@pytest.mark.hard
def test_a_lora_is_distilled_along_the_teachers_own_runs(
    scenes: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "PATHS", 2)
    monkeypatch.setattr(distil, "LORA_BATCH", 2)
    distil.distil_lora(tmp_path, MODELS["scenes"], 2)
    paths = load_file(tmp_path / "paths.safetensors")
    assert paths["x"].shape[:2] == (2, 20) and len(paths["timesteps"]) == 20
    teacher = copy.copy(scenes)
    teacher.scheduler = DDIMScheduler.from_config(scenes.scheduler.config, timestep_spacing="trailing")
    teacher.set_progress_bar_config(disable=True)
    call = CALL | {"generator": Generator().manual_seed(0), "output_type": "latent"}
    torch.testing.assert_close(paths["x0"].float(), teacher(trained_prompts(2), **call).images, atol=5e-3, rtol=0)
    assert torch.equal(teacher.scheduler.timesteps, paths["timesteps"])
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert any("attn2" in name and "lora_A" in name for name in names)


@pytest.mark.hard
def test_the_lcm_adapter_predicts_the_end_of_a_run_better_than_x0_does(scenes: StableDiffusionPipeline) -> None:
    pipe = FKSteeringPipeline(scenes, SceneReward())
    call = {"num_particles": 8, "lam": 0.0, "resample_steps": [5], "output_type": "pt", "guidance_scale": 4.0}
    prompts = ["a red star above a blue circle", "two green squares"]
    errors = {}
    for lookahead in (1, "lora:scenes-lcm"):
        reports: list[StepReport] = []
        rng = Generator().manual_seed(0)
        run = {"num_inference_steps": 20, "on_step": reports.append, "lookahead": lookahead, "generator": rng}
        out = pipe(prompts, **call, **run).in_slot_order()
        previews = next(report.previews for report in reports if report.previews is not None)
        errors[lookahead] = (previews - out.images).abs().mean().item()
    assert errors["lora:scenes-lcm"] < 0.8 * errors[1]


@pytest.mark.hard
def test_the_lcm_adapter_makes_images_in_four_steps(scenes: StableDiffusionPipeline) -> None:
    pipe = copy.copy(scenes)
    pipe.unet, pipe.scheduler = copy.deepcopy(scenes.unet), LCMScheduler.from_config(scenes.scheduler.config)
    pipe.load_lora_weights(ADAPTERS["scenes-lcm"])
    call = {"num_images_per_prompt": 8, "num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "pt"}
    images = pipe(EASY, generator=Generator().manual_seed(0), **call).images
    right = SceneReward()(images, [prompt for prompt in EASY for _ in range(8)]) == 1
    assert right.float().mean() >= 0.5


def test_unsteered_images_are_framed_by_right_and_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_alone(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert images.shape == (2, 3, 64, 64) and 0 <= images.min() < images.max() <= 1 and prompts == EASY[:2]
        return torch.tensor([1.0, 0.0])

    monkeypatch.setattr(analyses, "right", first_alone)
    figures = analyses.draw_unsteered("scenes", EASY[:2], tmp_path / "a.png")
    assert figures == {"model": "scenes", "prompts": 2, "right": 1}
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    framed = [(pixels == [round(255 * one) for one in to_rgb(color)]).all(1).sum() for color in (MET, MISSED)]
    assert min(framed) > 100 and abs(framed[0] - framed[1]) < 0.2 * framed[0]
