"""The embedded model as a user meets it, and the training that made it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from steer.apps.scenes.analyses import interval
from steer.apps.scenes.training import (
    LARGE,
    WORDS,
    Recipe,
    autoencoder_accuracy,
    build_tokenizer,
    deepened,
    development_requests,
    encode,
    new_autoencoder,
    new_denoiser,
    new_scheduler,
    reconstruct,
    save_checkpoint,
    to_model,
    token_ids,
    train_denoiser,
    train_large,
    training_scenes,
    velocity_loss,
    whiten,
)
from steer.apps.scenes.world import LISTS, captions, draw, is_held_out, random_scene, requests_of
from steer.assets import MODELS, ROOT
from steer.rewards.scene import SceneReward, parse
from steer.training.supervised import TrainingRun, read_state

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


def test_no_asset_names_a_place_on_the_machine_that_made_it() -> None:
    paths = [*ROOT.glob("*/model_index.json"), *ROOT.rglob("*config.json")]
    assert len(paths) > 10
    assert [path for path in paths if "_name_or_path" in json.loads(path.read_text(encoding="utf-8"))] == []


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


@pytest.mark.hard
def test_the_autoencoder_alone_passes_the_scene_reward(pipe: StableDiffusionPipeline) -> None:
    assert autoencoder_accuracy(pipe.vae, scenes=1000) >= 0.99


@pytest.mark.hard
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


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, average: float | None) -> None:
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

        run = TrainingRun(folder, steps=6, learning_rate=1e-2, log_every=2, save_every=2, average=average)
        run.train([layer], loss_at)
        return layer.weight.detach().clone()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "components", 5)
    assert torch.equal(train(tmp_path / "components", None), whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "components/log.jsonl").read_text().splitlines()] == [
        2,
        4,
        6,
    ]
    last, *_, averaged = read_state(tmp_path / "whole/state.pt", torch.device("cpu"))["states"]
    assert torch.equal(last["weight"], whole) == (average is None)
    assert average is None or torch.equal(averaged["shadow_params"][0], whole), "checkpoints are made from the last one"


def test_the_denoiser_takes_the_autoencoders_latents() -> None:
    unet, scheduler = new_denoiser(), new_scheduler()
    assert unet.config.sample_size * 8 == 64 and unet.config.in_channels == new_autoencoder().config.latent_channels
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.steps_offset == 1


def test_an_interval_holds_the_mean() -> None:
    mean, low, high = interval(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert low <= mean <= high and mean == 0.75


def test_every_word_of_the_scenes_is_one_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, whole_words=True)
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    assert tokenizer.decode(tokenizer("naïve 🦄 текст").input_ids[1:-1]).replace(" ", "") == "naïve🦄текст"


@pytest.mark.hard
def test_every_caption_of_a_training_scene_holds_of_its_image_and_none_is_held_out() -> None:
    wordings = 0
    for number in range(300):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        image = torch.from_numpy(draw(scene, rng)).permute(2, 0, 1)[None] / 255
        texts = captions(scene)
        wordings += len(texts)
        assert texts[0] == scene.prompt and len(set(texts)) == len(texts)
        assert SceneReward()(image.expand(len(texts), -1, -1, -1), texts).eq(1).all(), texts
        assert not any(is_held_out(parse(text).canonical) for text in texts)
    assert wordings > 900


def test_the_loss_of_an_exact_denoiser_is_zero_and_min_snr_weights_follow_the_formula() -> None:
    scheduler, generator = new_scheduler(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 8, 8, 8, generator=generator)
    t = torch.tensor([5, 300, 600, 990])
    velocity = scheduler.get_velocity(x0, noise, t)
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])

    class DisableAdapter(torch.nn.Module):
        def __init__(self, error: Tensor) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
            return (velocity + self.error,)

    states = torch.zeros(4, 1, 1)
    assert velocity_loss(DisableAdapter(torch.zeros(1)), states, x0, t, noise, Recipe()) == 0  # type: ignore[arg-type]
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    plain = velocity_loss(DisableAdapter(errors), states, x0, t, noise, Recipe())  # type: ignore[arg-type]
    assert plain.item() == pytest.approx(30 / 4)
    weighted = velocity_loss(DisableAdapter(errors), states, x0, t, noise, Recipe(min_snr=5.0))  # type: ignore[arg-type]
    weights = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    assert weighted.item() == pytest.approx((weights * torch.tensor([1.0, 4.0, 9.0, 16.0])).mean().item(), rel=1e-5)


def test_the_rate_warms_up_stays_and_falls_and_the_end_may_be_moved() -> None:
    def rates(steps: int) -> list[float]:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = TrainingRun(Path("."), steps, 1.0, warmup=4, decay=0.25)._schedule(optimiser)
        values = []
        for _ in range(steps):
            values.append(schedule.get_last_lr()[0])
            optimiser.step()
            schedule.step()
        return values

    assert rates(16) == [0.25, 0.5, 0.75, *[1.0] * 10, 0.75, 0.5, 0.25]
    assert rates(32)[:16] == [0.25, 0.5, 0.75, *[1.0] * 13]


@pytest.mark.hard
def test_two_steps_of_the_denoisers_training_resume_to_the_same_weights(tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(Path(MODELS["scenes"]) / "vae")
    tiny = replace(Recipe(), channels=(16, 16), width=16, heads=2, batch=4, scenes=8, text_steps=2)
    tiny_part = 8

    def weights(folder: Path, *ends: int) -> Tensor:
        for end in ends:
            pipe = train_denoiser(folder / "denoiser", vae, tiny, end, decay=1e-9)
        return torch.cat([parameter.flatten() for parameter in pipe.unet.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steer.apps.scenes.training.PART", tiny_part)
        once = weights(tmp_path / "once", 4)
        assert torch.equal(weights(tmp_path / "twice", 2, 4), once)
        save_checkpoint(tmp_path / "once/denoiser", vae, tiny, tmp_path / "checkpoint")
        assert json.loads((tmp_path / "checkpoint/training.json").read_text()) == {"step": 4}
        warm = train_denoiser(tmp_path / "warm/denoiser", vae, tiny, 4, start=tmp_path / "checkpoint")
        assert torch.allclose(torch.cat([p.flatten() for p in warm.unet.parameters()]), once, atol=1e-3)
        train_denoiser(tmp_path / "warm/denoiser", vae, tiny, 6, start=tmp_path / "checkpoint")
        assert read_state(tmp_path / "warm/denoiser/state.pt", torch.device("cpu"))["step"] == 6


@pytest.mark.hard
def test_a_deeper_denoiser_begins_as_the_one_it_grew_from_and_all_of_it_learns() -> None:
    torch.manual_seed(0)
    unet = new_denoiser(replace(Recipe(), channels=(16, 32), width=16))
    x, t, states = torch.randn(3, 8, 8, 8), torch.tensor([5, 500, 990]), torch.randn(3, 6, 16)
    for layers in (2, 4):
        larger = deepened(unet, layers)
        torch.testing.assert_close(larger(x, t, states).sample, unet(x, t, states).sample, rtol=1e-4, atol=1e-5)
        optimiser = torch.optim.SGD(larger.parameters(), lr=1e-2)
        for _ in range(4):  # zero weights hide those before them from the first gradients
            optimiser.zero_grad()
            (larger(x, t, states).sample - x).square().mean().backward()
            optimiser.step()
        still = [name for name, weight in larger.named_parameters() if not weight.grad.any()]
        assert all("to_k" in name or "to_q" in name for name in still), still
    assert new_denoiser().num_parameters() * 3 < deepened(new_denoiser(), LARGE).num_parameters()


@pytest.mark.hard
def test_two_steps_of_the_larger_models_training_resume_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(Recipe(), batch=4, scenes=8)
    monkeypatch.setattr("steer.apps.scenes.training.PART", 8)
    monkeypatch.setattr("steer.apps.scenes.training._BASE", tiny)

    def weights(folder: Path, *ends: int) -> Tensor:
        for end in ends:
            pipe = train_large(folder / "large", MODELS["scenes"], end, layers=2)
        assert pipe.unet.config.layers_per_block == [1, 2]
        return torch.cat([parameter.flatten() for parameter in pipe.unet.parameters()])

    monkeypatch.setattr(TrainingRun, "_schedule", lambda run, optimiser: LambdaLR(optimiser, lambda step: 1.0))
    assert torch.equal(weights(tmp_path / "twice", 2, 4), weights(tmp_path / "once", 4))


@pytest.mark.hard
def test_the_pilots_combinations_are_in_no_other_list_and_never_drawn_for_training() -> None:
    requests = development_requests()
    reserved = {request.canonical for name in LISTS for request in requests_of(name)}
    assert len(requests) > 100 and all(is_held_out(request) for request in requests)
    assert not reserved & {request.canonical for request in requests}
