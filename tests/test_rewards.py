"""Built-in rewards keep the contract; colour, brightness and JPEG by hand; rewards by name, path and entry point."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import preloaded
import pytest
import torch
from PIL import Image
from tiny_rewards import tiny_specifications
from torch import Tensor

from steer.reward import Reward, RewardError, Texts, score
from steer.rewards import REWARDS, names
from steer.rewards.names import registered_name, reward_names
from steer.rewards.parser import load_reward

PROMPTS = ["a red circle", "two stars"]
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def specifications(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Specification of each reward that needs more than its name: tiny weights in the published formats.

    A learned reward has the name of its folder.
    """
    return tiny_specifications(tmp_path_factory.mktemp("tiny"))


OF_TEXTS = ("parses", "says", "regex", "bigram", "perplexity")  # tests/test_text_rewards.py holds their values

PACKAGED = ("nsfw", "faces", "brisque", "lpips")  # optional packages: tests/test_packaged.py


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in (*OF_TEXTS, *PACKAGED)])
def test_every_built_in_reward_keeps_the_contract(name: str, specifications: dict[str, str]) -> None:
    reward = load_reward(specifications.get(name, name))
    prompts = ['a sign that says "A"', 'the words "two stars"'] if name == "ocr" else PROMPTS
    assert isinstance(reward, Reward)
    assert reward.name.split(":")[0] == name
    images = IMAGES.clone().requires_grad_(reward.differentiable)
    scores = score(reward, images, prompts)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    assert scores.requires_grad == reward.differentiable
    one_by_one = torch.cat([score(reward, IMAGES[k : k + 1], prompts[k : k + 1]) for k in range(2)])
    assert torch.allclose(scores.detach(), one_by_one, atol=1e-6)


@pytest.mark.parametrize("name", OF_TEXTS[:4])
def test_every_reward_of_texts_keeps_the_contract_and_refuses_images(name: str, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a red circle\n")
    argument = {"says": ":red", "regex": ":r.d", "bigram": f":{tmp_path / 'lines.txt'}"}.get(name, "")
    reward, texts = load_reward(name + argument), Texts(["a red circle", "two stars"])
    assert isinstance(reward, Reward) and reward.name.split(":")[0] == name
    scores = score(reward, texts, PROMPTS)  # type: ignore[arg-type]
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores[0] >= scores[1]
    with pytest.raises(RewardError, match="was given images"):
        score(reward, IMAGES, PROMPTS)


@pytest.mark.parametrize("name", [name for name in REWARDS if name in ("colour", "brightness")])
def test_gradients_match_finite_differences(name: str) -> None:
    reward = load_reward("colour:#336699" if name == "colour" else "brightness:0.2")
    pixels = IMAGES[:1, :, :3, :3].clone().requires_grad_()
    score(reward, pixels, PROMPTS[:1]).sum().backward()
    assert pixels.grad is not None
    step = torch.zeros_like(pixels)
    step[0, 1, 2, 0] = 2e-3
    with torch.no_grad():
        slope = (score(reward, pixels + step, PROMPTS[:1]) - score(reward, pixels - step, PROMPTS[:1])) / 4e-3
    assert slope.item() == pytest.approx(pixels.grad[0, 1, 2, 0].item(), rel=1e-2)


def test_jpeg_is_the_size_that_pillow_writes() -> None:
    pixels = (IMAGES[0] * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    kilobytes = buffer.getbuffer().nbytes / 1000
    assert score(load_reward("jpeg"), IMAGES[:1], [""]).item() == pytest.approx(-kilobytes)
    assert score(load_reward("jpeg-incompressible"), IMAGES[:1], [""]).item() == pytest.approx(kilobytes)


def test_colour_and_brightness_by_hand() -> None:
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert score(load_reward("colour:red"), red, [""]).item() == pytest.approx(1, abs=1e-5)
    assert score(load_reward("colour:cyan"), red, [""]).item() == pytest.approx(0, abs=1e-5)
    assert score(load_reward("brightness"), red, [""]).item() == pytest.approx(0.299)
    assert score(load_reward("brightness:0.3"), red, [""]).item() == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scen", "unknown reward 'scen': did you mean scene"),
        ("", "unknown reward ''"),
        ("colour", "'colour' needs an argument"),
        ("colour:nosuch", "unknown colour"),
        ("brightness:much", "number from 0 to 1"),
        ("jpeg:much", "'jpeg' takes no argument, got 'much'"),
        ("no.such.module:thing", "cannot load reward 'no.such.module:thing'"),
        ("math:pi", "a name, got float"),
        ("os.path:sep", "a name, got str"),
        (3.5, "a name, got float"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_in_one_line(spec: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(spec)


@pytest.mark.parametrize("spec", ["JPEG", "Jpeg:2", "Colour:red", "Aesthetic:scenes", "ImageReward:path=x"])
def test_names_of_rewards_are_found_in_any_case(spec: str) -> None:
    """Models call themselves ImageReward and HPSv2.1; the argument keeps its case."""
    name, colon, rest = spec.partition(":")
    lower = f"{name.lower()}{colon}{rest}"
    assert outcome(lambda: load_reward(spec).name) == outcome(lambda: load_reward(lower).name)
    assert registered_name(name) == name.lower()


def outcome(make: Callable[[], str]) -> str:
    try:
        return make()
    except RewardError as error:
        return str(error).lower()


def test_two_names_that_differ_in_case_alone_are_both_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "reward_names", lambda: dict.fromkeys(("glow", "Glow", "jpeg"), ""))
    assert [registered_name(one) for one in ("glow", "Glow", "GLOW", "JPEG", "x")] == [
        "glow",
        "Glow",
        None,
        "jpeg",
        None,
    ]


def test_functions_classes_and_paths_are_rewards() -> None:
    def mean(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    by_path = load_reward("steer.rewards.jpeg:JpegCompressibility")
    assert load_reward(mean).name == "mean"
    assert torch.equal(score(load_reward(mean), IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)))
    assert load_reward(type(by_path)).name == by_path.name == "jpeg"


def test_a_plugin_is_found_by_its_entry_point(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "darkness.py").write_text(
        "def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n\ndef make():\n    return dark\n"
    )
    info = tmp_path / "darkness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: darkness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[steer.rewards]\ndarkness = darkness:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "darkness" in reward_names()
    assert torch.equal(score(load_reward("darkness"), IMAGES, PROMPTS), -IMAGES.mean((1, 2, 3)))


def test_looking_for_rewards_imports_none_of_them(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in [name for name in sys.modules if name.startswith('steer.rewards')]:\n"
        "    del sys.modules[name]\n"
        "import steer.rewards.names\n"
        "steer.rewards.names.reward_names()\n"
        "loaded = {name for name in sys.modules if name.startswith('steer.rewards.')}\n"
        "assert loaded <= {'steer.rewards.names', 'steer.rewards.inputs'}"
    )
    ran = preloaded.run(["-c", code], tmp_path, os.environ)
    assert ran.returncode == 0, ran.stderr
