"""`steer sample --lora`: images of a model that wears finetuned weights, beside those of the same noise without."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Steer
from PIL import Image
from test_evaluate import lora

from steer import BestOfNPipeline
from steer.apps.methods import METHODS
from steer.apps.models import load_pipeline
from steer.apps.plots import image_title
from steer.apps.recipes import read_png
from steer.apps.settings import METHOD_OPTIONS

WORDS = ["a red star", "--steps", "3", "--particles", "2", "--seed", "5", "--guidance", "4", "--reward", "brightness"]
NAMES = ("00", "01", "base-00", "base-01")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(load_pipeline("scenes"), tmp_path_factory.mktemp("lora"), 0.3)


def plain(weights: Path | None) -> list[Image.Image]:
    """Images of the same noise by diffusers' own loading of LoRAs."""
    pipe = load_pipeline("scenes")
    pipe.set_progress_bar_config(disable=True)
    if weights is not None:
        pipe.load_lora_weights(str(weights))
    call = {"num_inference_steps": 3, "num_particles": 2, "guidance_scale": 4.0}
    made = BestOfNPipeline(pipe, "brightness")("a red star", generator=torch.Generator().manual_seed(5), **call)
    return made.in_slot_order().images


def images(out: Path) -> dict[str, bytes]:
    return {path.stem: Image.open(path).tobytes() for path in sorted((out / "000-a-red-star").glob("*.png"))}


@pytest.mark.parametrize("method", ["base", "best-of-n", "fk"])
def test_images_wear_the_weights_and_base_images_do_not(
    steer: Steer, weights: Path, tmp_path: Path, method: str
) -> None:
    code, _, _ = steer("sample", *WORDS, "--method", method, "--lora", weights, "--lam", 40, "--out", tmp_path)
    assert code == 0
    made, without, worn = images(tmp_path), plain(None), plain(weights)
    assert tuple(made) == NAMES
    assert [made[name] for name in NAMES[2:]] == [image.tobytes() for image in without]
    if method != "fk":
        assert {made[name] for name in NAMES[:2]} == {image.tobytes() for image in worn}
    assert not {made[name] for name in NAMES[:2]} & {image.tobytes() for image in without}
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["lora"] == str(weights)
    refused = steer("sample", *WORDS, "--method", method, "--lam", 40, "--out", tmp_path)
    assert refused[0] == 2 and f"holds a run with lora {str(weights)!r}, not None" in refused[2]


def test_an_image_comes_out_again_with_the_weights_that_the_user_names(
    steer: Steer, weights: Path, tmp_path: Path
) -> None:
    assert steer("sample", *WORDS, "--method", "fk", "--lora", weights, "--out", tmp_path)[0] == 0
    source, base = (tmp_path / "000-a-red-star" / name for name in ("00.png", "base-01.png"))
    code, _, told = steer("sample", "--replay", source, "--out", tmp_path / "again")
    assert code == 2 and f"made with the finetuned weights {str(weights)!r}: say --lora PATH too" in told
    code, told, _ = steer("sample", "--replay", source, "--lora", weights, "--out", tmp_path / "again")
    assert code == 0 and "the same pixels" in told
    assert read_png(tmp_path / "again" / "00-replay.png")[0].settings.lora == str(weights)
    assert steer("sample", "--replay", base, "--out", tmp_path / "again")[0] == 0, "made without them"
    plain_words = [*WORDS, "--method", "base", "--out", tmp_path / "plain"]
    assert steer("sample", *plain_words)[0] == 0
    source = tmp_path / "plain" / "000-a-red-star" / "00.png"
    code, _, told = steer("sample", "--replay", source, "--lora", weights, "--out", tmp_path / "again")
    assert code == 2 and "made without finetuned weights: leave out --lora" in told


def test_weights_that_are_not_there_are_told_before_any_model_is_loaded(steer: Steer, tmp_path: Path) -> None:
    code, _, told = steer("sample", *WORDS, "--model", "no/model", "--lora", tmp_path / "none", "--out", tmp_path / "o")
    assert code == 2 and told == (
        f"steer: {tmp_path / 'none'}: no such folder; give one with weights, such as RUN/final of `steer finetune`\n"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("method", "lora", "said"),
    [
        ("base", None, "base"),
        ("fk", None, "fk, best first"),
        ("base", "x", "finetuned"),
        ("fk", "x", "finetuned, fk, best first"),
    ],
)
def test_the_grid_says_what_its_sides_are(method: str, lora: str | None, said: str) -> None:
    assert image_title({"method": method, "settings": {"lora": lora}}) == said
    assert lora or image_title({"method": method, "settings": {}}) == said, "an older report"


def test_every_method_has_options() -> None:
    assert METHOD_OPTIONS.keys() == METHODS.keys()
