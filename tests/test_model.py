"""The embedded model as a user meets it, and the training that made it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline

from steer.apps.scenes.autoencoder import autoencoder_accuracy, encode, new_autoencoder, reconstruct, to_model, whiten
from steer.apps.scenes.denoiser import new_denoiser, new_scheduler, token_ids
from steer.apps.scenes.evaluate import agreement, compare, foresight, interval
from steer.apps.scenes.tokenizer import WORDS, build_tokenizer
from steer.apps.scenes.training import training_scenes
from steer.assets import MODELS
from steer.rewards.scene import SceneReward
from steer.training import Run

EASY = ["a circle", "a red square", "a blue star", "a black cross", "two green circles", "a yellow triangle"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_plain_load_and_call_makes_an_image_of_64_pixels(pipe: StableDiffusionPipeline) -> None:
    image = pipe("a red circle", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert json.loads((MODELS["scenes"] / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_easy_prompts_mostly_come_out_right(pipe: StableDiffusionPipeline) -> None:
    images = pipe(
        EASY,
        num_images_per_prompt=4,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    right = SceneReward()(images, [prompt for prompt in EASY for _ in range(4)]) == 1
    assert right.float().mean() >= 0.5


def test_it_takes_other_schedulers(pipe: StableDiffusionPipeline) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    assert other("two stars", num_inference_steps=4, output_type="pt").images.shape == (1, 3, 64, 64)


def test_the_autoencoder_alone_passes_the_scene_reward(pipe: StableDiffusionPipeline) -> None:
    assert autoencoder_accuracy(pipe.vae, scenes=1000) >= 0.99


def test_latents_are_white(pipe: StableDiffusionPipeline) -> None:
    latents = encode(pipe.vae, training_scenes(400, first=90_000)[0])
    flat = latents.movedim(1, -1).flatten(0, -2)
    assert flat.mean(0).abs().max() < 0.15
    assert (torch.cov(flat.T) - torch.eye(8)).abs().max() < 0.25


def test_whitening_changes_no_reconstruction() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder().eval()
    images, _ = training_scenes(8)
    before, latents = reconstruct(vae, images), encode(vae, images)
    whiten(vae, latents)
    assert torch.allclose(reconstruct(vae, images), before, atol=1e-4)
    flat = encode(vae, images).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(torch.cov(flat.T), torch.eye(8), atol=1e-2)
    assert isinstance(vae, AutoencoderKL) and to_model(images).shape == (8, 3, 64, 64)


def test_the_tokenizer_knows_every_word_and_any_byte(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert len(token_ids(tokenizer, ["a circle", "x"])[0]) == tokenizer.model_max_length
    for text in (*WORDS, "naïve 🦄 текст"):
        ids = tokenizer(text).input_ids[1:-1]
        assert ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_training_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))

    class Killed(Exception):
        pass

    def train(folder: Path, killed_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)

        def loss_at(step: int) -> torch.Tensor:
            if step == killed_at:
                raise Killed
            return (layer(data[step : step + 8]) - data[step : step + 8]).square().mean()

        Run(folder, steps=6, learning_rate=1e-2, log_every=2, save_every=2).train([layer], loss_at)
        return layer.weight.detach().clone()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "parts", 5)
    assert torch.equal(train(tmp_path / "parts", None), whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_the_denoiser_takes_the_autoencoders_latents() -> None:
    unet, scheduler = new_denoiser(), new_scheduler()
    assert unet.config.sample_size * 8 == 64 and unet.config.in_channels == new_autoencoder().config.latent_channels
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.steps_offset == 1


def test_the_comparison_runs_and_its_interval_holds_the_mean() -> None:
    result = compare("scenes", ["a circle", "a red star"], "scene-soft", 2, {"lam": 40.0}, {"num_inference_steps": 3})
    assert result["prompts"] == 2 and result["fk"]["cost"]["nfe"] == result["best_of_n"]["cost"]["nfe"] == 2 * 2 * 3
    mean, low, high = interval(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert low <= mean <= high and mean == 0.75


def test_agreement_counts_pairs_by_hand() -> None:
    truth, guess = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.2, 0.9]])
    assert agreement(guess, truth) == 0.5 and agreement(truth, truth) == 1.0 and agreement(-truth, truth) == 0.0


def test_the_end_foretells_itself_best() -> None:
    result = foresight("scenes", ["a red star", "two circles"], "scene-soft", 3, [0, 4], {"num_inference_steps": 6})
    assert len(result["order"]) == 2 and result["order"][1] >= 0.5
