"""The words that a command takes for what decodes x̂0."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from gaussian import GaussianPipeline
from test_preview import tiny
from torch import Generator

from steer import FKSteeringPipeline
from steer.apps.methods import load_preview
from steer.assets import MODELS, TINY_VAES
from steer.diffusion.preview import Preview
from steer.errors import InputError

CALL = {"num_inference_steps": 8, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def scenes() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("word", ["full", "linear"])
def test_names_of_the_core_pass(word: str) -> None:
    assert load_preview(word, cached_pipe("sd")) == word
    assert load_preview(word, cached_pipe("wan")) == word  # the run itself refuses linear


def test_tiny_is_the_embedded_models_own(scenes: Any) -> None:
    decoder = load_preview("tiny", scenes)
    assert isinstance(decoder, AutoencoderTiny) and not decoder.training
    assert sum(file.stat().st_size for file in TINY_VAES["scenes"].iterdir()) < 1e6
    call = {"prompt": "three blue stars", "num_images_per_prompt": 4, **CALL}
    latents = scenes(**call, generator=Generator().manual_seed(0), output_type="latent").images
    full, small = Preview(scenes, call)(latents), Preview(scenes, call, 8, decoder)(latents)
    grey = (full - full.mean((2, 3), keepdim=True)).abs().mean()
    assert (small - full).abs().mean() < 0.3 * grey
    # Its encoder was trained beside it: it finds the latents that it paints.
    with torch.no_grad():
        encoded = decoder.encode(full * 2 - 1).latents
    assert (encoded - latents).square().mean() < 0.3 * latents.var()


def test_it_steers(scenes: Any) -> None:
    decoder = load_preview("tiny", scenes)
    steer = FKSteeringPipeline(scenes, "scene-soft")
    out = steer("a star", num_particles=2, preview=decoder, generator=Generator().manual_seed(0), **CALL)
    assert out.cost.decodes == 2 and out.cost.other_decodes == 2 * len(out.history) > 0


def test_a_folder_is_loaded_in_the_models_precision(tmp_path: Path) -> None:
    made = tiny()
    made.save_pretrained(tmp_path)
    loaded = load_preview(str(tmp_path), cached_pipe("sd"))
    assert loaded.config.scaling_factor == 0.7 and loaded.dtype == torch.float32
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("pipe", "says"),
    [
        (cached_pipe("sd"), "takes latents with 8 channels, .* have 4: use a decoder for this model"),
        (cached_pipe("wan"), "decodes video"),
        (GaussianPipeline(), "has no VAE"),
    ],
)
def test_tiny_is_for_the_embedded_models_latents(pipe: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_preview("tiny", pipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["tny", "./nothing/there", "/a/b/c", "a/b/c", "", "~/x"])
def test_what_is_neither_a_word_nor_a_folder_nor_on_the_hub_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="use full, linear, tiny, a folder, or ORGANISATION/NAME"):
        load_preview(word, cached_pipe("sd"))


def test_a_name_that_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' cannot be loaded") as error:
        load_preview("nobody/nothing", cached_pipe("sd"))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_preview(str(tmp_path), cached_pipe("sd"))


def test_weights_of_another_autoencoder_are_not_made_up(tmp_path: Path, scenes: Any) -> None:
    scenes.vae.save_pretrained(tmp_path / "kl")
    with pytest.raises(InputError, match="is not an AutoencoderTiny: its weights have no"):
        load_preview(str(tmp_path / "kl"), scenes)
    shutil.copytree(TINY_VAES["scenes"], tmp_path / "wider")
    config = tmp_path / "wider/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"decoder_block_out_channels": [8] * 4}))
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load_preview(str(tmp_path / "wider"), scenes)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_preview(str(tmp_path / "empty"), scenes)
