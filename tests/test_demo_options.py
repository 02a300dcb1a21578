"""Optional settings of the Steer tab, against diffusers' own arguments and the rewards themselves."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rollouts import random_lora

pytest.importorskip("gradio")

import gradio as gr

from steer.apps.demo.steer_options import RewardChips, reward_choices, reward_text, uploaded_loras
from steer.apps.demo.steer_tab import fields_from_recipe, settings_of
from steer.apps.demo.steering import PromptResult, as_command, as_python, steering
from steer.apps.demo.studio import Studio
from steer.apps.models import load_pipeline
from steer.apps.reward_specs import resolve_reward
from steer.errors import InputError

ASKED: dict[str, Any] = {
    "method": "base", "reward": "brightness", "particles": 2, "lam": 5.0, "steps": 5, "guidance": 3.0, "iterations": 3,
    "seed": 5, "fresh": False, "model": "scenes", "compare": False, "adapter": False, "auto": True,
}  # fmt: skip
CALL: dict[str, Any] = {"negative_prompt": "a red star", "height": 64, "width": 128}
PROMPT = "a red circle"


def run(studio: Studio, asked: dict[str, Any], folder: Path) -> PromptResult:
    work = steering(studio, [PROMPT], settings_of(asked), folder, None, asked.get("loras") or ())
    (made,) = (one for one in studio.worker.submit(work).events() if isinstance(one, PromptResult))
    return made


def plain(**call: Any) -> list[bytes]:
    pipe = load_pipeline("scenes", scheduler=call.pop("scheduler", None))
    generator = torch.Generator().manual_seed(5)
    given = {"num_images_per_prompt": 2, "num_inference_steps": 5, "guidance_scale": 3.0, "generator": generator}
    return [image.tobytes() for image in pipe(PROMPT, **given, **call).images]


@pytest.mark.hard
def test_negative_prompt_size_and_scheduler_are_those_of_the_pipeline(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ASKED | CALL | {"scheduler": "euler"}
    made = run(studio, asked, tmp_path)
    assert [Image.open(one.path).tobytes() for one in made.images] == plain(**CALL, scheduler="euler")
    assert Image.open(made.images[0].path).size == (128, 64)
    restored = fields_from_recipe(made.images[0].recipe, studio.models)
    assert settings_of(restored) == made.settings and restored["scheduler"] == "euler"
    for option in ("--negative-prompt 'a red star'", "--height 64", "--width 128", "--scheduler euler"):
        assert option in as_command(PROMPT, made.settings)
    monkeypatch.chdir(tmp_path)
    exec(compile(as_python(PROMPT, made.settings), "program", "exec"), {})
    assert Image.open("best.png").tobytes() == Image.open(made.images[0].path).tobytes()
    own = run(studio, ASKED, tmp_path / "own")
    assert [Image.open(one.path).tobytes() for one in own.images] == plain(), "the studio keeps its own scheduler"


def test_uploaded_loras_have_their_weights(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for number, file in enumerate(files):
        made = random_lora(load_pipeline("scenes"), tmp_path / file.stem, 0.2 + number / 10)
        shutil.copy(next(made.glob("*.safetensors")), file)
    asked = ASKED | {"loras": [str(file) for file in files], "lora_weights": "0.5, 1"}
    result = run(studio, asked, tmp_path / "out")
    assert result.settings.lora == "a.safetensors:0.5 + b.safetensors"
    monkeypatch.chdir(tmp_path)
    exec(compile(as_python(PROMPT, result.settings), "program", "exec"), {})  # diffusers' own set_adapters
    theirs, ours = (torch.tensor([*Image.open(path).tobytes()]) for path in ("best.png", result.images[0].path))
    assert (theirs - ours).abs().max() <= 1
    base = run(studio, ASKED, tmp_path / "base")
    assert [Image.open(one.path).tobytes() for one in base.images] == plain() != ours.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 2048}, "height can be at most 1024 pixels in this app, got 2048"),
        ({"width": 64.5}, "width must be a whole number"),
        ({"negative_prompt": "a" * 501}, "the negative prompt has more than 500 characters"),
        ({"scheduler": "eular"}, "unknown scheduler 'eular'"),
        ({"loras": ["/x/a b.safetensors"]}, "LoRA file 'a b.safetensors': rename it"),
        ({"loras": ["/x/a.safetensors", "/y/a.safetensors"]}, "once each"),
        ({"loras": ["/x/a.safetensors"], "lora_weights": "1, 2"}, "2 for 1 files"),
        ({"loras": ["/x/a.safetensors"], "lora_weights": "much"}, "'much' is no number"),
        ({"loras": [f"/x/{n}.safetensors" for n in range(5)]}, "5 LoRA files: at most 4"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings_of(ASKED | change)


def test_a_lora_of_another_model_is_refused_without_a_path(studio: Studio, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, file := tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"odd\.safetensors"):
        run(studio, ASKED | {"loras": [str(file)]}, tmp_path / "out")


def test_chips_write_the_weighted_sum_of_the_rewards() -> None:
    weights = {"brightness": 1, "colour:red": 0.5}
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = {name: resolve_reward(name)(images, [""] * 3) for name in weights}
    combined = resolve_reward(reward_text(weights))(images, [""] * 3)
    assert torch.allclose(combined, scores["brightness"] + 0.5 * scores["colour:red"])
    with gr.Blocks():
        field = gr.Textbox()
        chips = RewardChips(field, ())
    values = dict.fromkeys(chips.sliders.values(), 1) | {chips.sliders["jpeg"]: 0.5}
    change = chips.write(values | {chips.chosen: ["brightness", "jpeg"]})
    assert change[field] == "brightness + jpeg:0.5"
    assert [name for name, slider in chips.sliders.items() if change[slider]["visible"]] == ["jpeg", "brightness"]
    assert chips.clear()[chips.chosen] == []


def test_every_offered_reward_has_a_meaning_and_can_be_used() -> None:
    studio: Any = SimpleNamespace(rewards=())
    studio.check_reward = lambda spec: Studio.check_reward(studio, spec)
    for name, text in reward_choices(("mine:reward",)).items():
        assert text and (name == "mine:reward" or Studio.reward(studio, name))


@pytest.mark.parametrize("empty", [None, 0, ""])
def test_an_empty_size_is_that_of_the_model(empty: Any) -> None:
    assert settings_of(ASKED | {"height": empty, "width": empty}) == settings_of(ASKED)


def test_no_upload_means_no_adapter() -> None:
    assert uploaded_loras(ASKED) is None and uploaded_loras({"loras": None, "lora_weights": ""}) is None
