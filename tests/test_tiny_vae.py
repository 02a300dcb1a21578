"""How the tiny autoencoder of scenes is trained, and that it is several times smaller work than the full one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from steer.apps.scenes import distil as tiny_decoder
from steer.apps.scenes.distil import new_tiny_vae, pairs, path_latents, train_tiny_decoder
from steer.apps.scenes.preferences import trained_prompts
from steer.assets import MODELS, TINY_VAES


@pytest.fixture(scope="module")
def scenes() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCENES": 16, "DECODER_PROMPTS": 2, "DECODER_BATCH": 8, "CLEAN_ROWS": 4}.items():
        monkeypatch.setattr(tiny_decoder, name, value)


def test_it_is_a_fraction_of_the_full_decoders_work(scenes: Any) -> None:
    work = {}
    for name, vae in {"full": scenes.vae, "tiny": new_tiny_vae()}.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(torch.zeros(1, 8, 8, 8))
        work[name] = counter.get_total_flops()
    assert work["tiny"] < work["full"] / 6


def test_the_asset_is_what_the_training_makes() -> None:
    asset = AutoencoderTiny.from_pretrained(TINY_VAES["scenes"])
    made = new_tiny_vae()
    assert {name: w.shape for name, w in asset.state_dict().items()} == {
        name: w.shape for name, w in made.state_dict().items()
    }
    assert (asset.config.scaling_factor, asset.config.shift_factor) == (1.0, 0.0)  # as that of scenes


def test_the_path_is_that_of_the_solver(scenes: Any) -> None:
    prompts = trained_prompts(2)
    latents = path_latents(scenes, prompts)
    assert latents.shape == (2 * len(tiny_decoder.READ), 8, 8, 8)
    call = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
    end = scenes(prompts, generator=Generator().manual_seed(0), **call).images
    errors = (latents.view(-1, 2, 8, 8, 8) - end).square().mean((1, 2, 3, 4))
    assert errors[-1] < 0.02 < errors[0] and (errors.diff() < 0).all()  # x̂0 nears the end of the same run


def test_pairs_are_made_once_and_are_the_full_decoders(scenes: Any, small: None, tmp_path: Path) -> None:
    data = pairs(tmp_path, scenes)
    for name, count in {"clean": 16, "path": 16}.items():
        assert len(data[name]) == len(data[f"{name}_images"]) == count
        with torch.no_grad():
            decoded = scenes.vae.decode(data[name]).sample / 2 + 0.5
        assert (data[f"{name}_images"] / 255 - decoded.clamp(0, 1)).abs().max() < 0.51 / 255 + 1e-4
    written = (tmp_path / "pairs.safetensors").stat().st_mtime_ns
    pairs(tmp_path, scenes)
    assert (tmp_path / "pairs.safetensors").stat().st_mtime_ns == written


@pytest.mark.hard
def test_a_training_runs_resumes_and_learns(small: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_tiny_decoder(tmp_path, MODELS["scenes"], steps=50)
    vae = train_tiny_decoder(tmp_path, MODELS["scenes"], steps=100)
    assert vae.dtype == torch.float32
    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [50, 100] and losses[1]["loss"] < 0.8 * losses[0]["loss"]
    with caplog.at_level("WARNING"):
        loaded, about = AutoencoderTiny.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(about.values()) and not caplog.records
    z = torch.randn(1, 8, 8, 8, generator=Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.decode(z).sample, vae.decode(z).sample, atol=1e-2, rtol=0)
