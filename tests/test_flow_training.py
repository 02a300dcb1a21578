"""scenes-flow: prompts, loss and format are those of diffusers' Stable Diffusion 3 pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from steer import MODELS, BestOfNPipeline
from steer.apps.models import load_pipeline
from steer.apps.scenes import flow
from steer.apps.scenes.training import build_tokenizer, token_ids

PROMPTS = ["a red circle left of a blue star", "three green triangles"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    """A saved and loaded pipeline with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = build_tokenizer(folder / "tokenizer", whole_words=True)
    vae = AutoencoderKL.from_pretrained(f"{MODELS['scenes']}/vae")
    encoders = [flow.new_text_encoder(tokenizer) for _ in range(2)]
    flow.assemble(vae, flow.new_transformer(), encoders, tokenizer).save_pretrained(folder / "pipeline")
    pipe = load_pipeline(str(folder / "pipeline"), "cpu")
    assert isinstance(pipe, StableDiffusion3Pipeline) and pipe.text_encoder_3 is None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipe: StableDiffusion3Pipeline) -> None:
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    states, pooled = flow.encode_prompts(encoders, token_ids(pipe.tokenizer, PROMPTS))
    expected, _, expected_pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(states, expected[:, : states.shape[1]])
    assert not expected[:, states.shape[1] - 1 :].any() and expected.shape[1] == states.shape[1] - 1 + flow.ZEROS
    torch.testing.assert_close(pooled, expected_pooled)


def test_one_token_stands_for_all_zeros(pipe: StableDiffusion3Pipeline) -> None:
    x_t, t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([100.0, 900.0])
    states, pooled = flow.encode_prompts([pipe.text_encoder, pipe.text_encoder_2], token_ids(pipe.tokenizer, PROMPTS))
    every, *_ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    expected = pipe.transformer(x_t, every, pooled, t).sample
    plain = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(flow.OneZeroToken())
    velocity = pipe.transformer(x_t, states, pooled, t).sample
    pipe.transformer.set_attn_processor(plain)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity, pipe.transformer(x_t, states, pooled, t).sample, rtol=1e-3, atol=1e-4)


def test_the_loss_noises_as_the_scheduler_does_and_vanishes_for_the_true_velocity(
    pipe: StableDiffusion3Pipeline,
) -> None:
    x0, noise = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe.scheduler.set_timesteps(1000)
    t = torch.tensor([99, 499, 899])
    expected = torch.cat(
        [pipe.scheduler.scale_noise(x0[k : k + 1], t[k : k + 1] + 1.0, noise[k : k + 1]) for k in range(3)]
    )

    def velocity(x_t: torch.Tensor, *_: object, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        torch.testing.assert_close(x_t, expected)
        assert timestep.tolist() == [100, 500, 900]
        return (noise - x0 + 0.5,)

    assert flow.flow_loss(velocity, x0, x0, x0, t, noise).item() == pytest.approx(0.25)


def test_the_pipeline_is_a_plain_one(pipe: StableDiffusion3Pipeline) -> None:
    images = pipe(PROMPTS, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_two_steps_of_the_training_resume_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL.from_pretrained(f"{MODELS['scenes']}/vae").eval()
    tiny = replace(flow.RECIPE, width=16, layers=1, heads=2, batch=4, scenes=8, text_steps=2)
    for name, value in {"RECIPE": tiny, "WIDTH": 32, "LAYERS": 2, "HEADS": 2}.items():
        monkeypatch.setattr(flow, name, value)
    monkeypatch.setattr("steer.apps.scenes.training.PART", 8)

    def weights(folder: Path, *ends: int) -> torch.Tensor:
        for end in ends:
            pipe = flow.train_flow(folder / "flow", vae, end, decay=1e-9)
        return torch.cat([parameter.flatten() for parameter in pipe.transformer.parameters()])

    once = weights(tmp_path / "once", 4)
    assert torch.equal(weights(tmp_path / "twice", 2, 4), once)
    assert isinstance(load_pipeline(str(tmp_path / "once/flow/pipeline"), "cpu"), StableDiffusion3Pipeline)


EASY = ["a red square", "a blue star", "two green triangles", "a black cross", "three purple circles", "a yellow star"]


@pytest.mark.hard
def test_the_trained_model_draws_what_is_asked_and_a_steering_pipeline_loads_it_without_t5() -> None:
    best = BestOfNPipeline.from_pretrained(MODELS["scenes-flow"], "scene")
    call = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "pt"}
    out = best(EASY, num_particles=1, generator=torch.Generator().manual_seed(0), **call)
    assert (out.rewards == 1).float().mean() >= 0.6
