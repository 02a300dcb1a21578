"""`steer.apps.replay`: the same pixels again, or one line with the reason; untrusted recipes run no code."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Steer, replaced
from PIL import Image

from steer.apps.recipes import Recipe, read_png, write_png
from steer.apps.settings import SHARED, SamplingConfig, option_names

FAST = ["--steps", "3", "--particles", "2", "--seed", "5"]
Changed = Callable[..., Path]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the images that all tests look at."""
    return tmp_path_factory.mktemp("replay")


@pytest.fixture
def image(steer: Steer, shared: Path) -> Path:
    """The second of two steered images of a prompt with words that are not ASCII."""
    if not (shared / "o" / "report.json").exists():
        words = ["a red star – “ein roter Stern”", *FAST, "--lam", 40, "--reward", "brightness + colour:red:1"]
        assert steer("sample", *words, "--out", shared / "o")[0] == 0
    return shared / "o" / "000-a-red-star-ein-roter-stern" / "01.png"


@pytest.fixture
def changed(image: Path, tmp_path: Path) -> Changed:
    """A copy of the image with an edited recipe."""

    def change(settings: dict[str, Any] | None = None, **changes: Any) -> Path:
        recipe, pixels = read_png(image)
        values = recipe.settings.plain() | (settings or {})
        names = (*SHARED, *option_names(values["method"]))
        values = {name: value for name, value in values.items() if name in names}
        recipe = replace(recipe, settings=SamplingConfig.of(**values), **changes)
        write_png(pixels, tmp_path / "changed.png", recipe)
        return tmp_path / "changed.png"

    return change


def test_every_image_records_how_it_was_made(image: Path) -> None:
    folder = image.parent
    report = json.loads((folder.parent / "report.json").read_text())
    (entry,) = report["prompts"]
    recipes: list[tuple[str, Recipe]] = []
    for path in sorted(folder.glob("*.png")):
        recipe, pixels = read_png(path)
        assert recipe.pixels == read_png(path)[0].pixels and pixels.size == (64, 64)
        assert recipe.prompt == entry["prompt"] == "a red star – “ein roter Stern”"
        assert recipe.settings.plain() == report["settings"]
        scores = entry["base"]["rewards"] if recipe.base else entry["rewards"]
        assert recipe.reward == scores[recipe.rank] == pytest.approx(sum(recipe.components.values()))
        if not recipe.base:
            assert recipe.components == {name: values[recipe.rank] for name, values in entry["components"].items()}
        recipes.append((path.name, recipe))
    assert [(name, recipe.base, recipe.rank) for name, recipe in recipes] == [
        *(("00.png", False, 0), ("01.png", False, 1), ("base-00.png", True, 0), ("base-01.png", True, 1))
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["01.png", "base-01.png"])
def test_a_replay_is_identical_to_the_byte(steer: Steer, image: Path, tmp_path: Path, name: str) -> None:
    source, path = image.with_name(name), list(sys.path)
    code, out, _ = steer("sample", "--replay", source, "--out", tmp_path / "again")
    again = tmp_path / "again" / f"{source.stem}-replay.png"
    assert code == 0 and out == f"{again}: the same pixels as {source}\n"
    assert again.read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "again").iterdir()] == [again.name]
    assert sys.path == path  # the current folder may be where a stranger's files were unpacked


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "words",
    [
        ["--method", "reno", "--seeds", "2", "--iterations", "2", "--model", "scenes-turbo"],
        ["--method", "best-of-n", *FAST],
    ],
    ids=["reno", "best-of-n"],
)
def test_other_methods_are_replayed(steer: Steer, tmp_path: Path, words: list[str]) -> None:
    assert steer("sample", "a red circle", *words, "--out", tmp_path / "o")[0] == 0
    names = ["00.png", "base-01.png"]
    for name in names:
        source = tmp_path / "o" / "000-a-red-circle" / name
        code, out, _ = steer("sample", "--replay", source, "--out", tmp_path / "again")
        assert code == 0 and "the same pixels" in out
    assert {path.name for path in (tmp_path / "again").iterdir()} == {f"{Path(name).stem}-replay.png" for name in names}


def test_other_pixels_are_reported_with_the_differing_versions(steer: Steer, changed: Changed, tmp_path: Path) -> None:
    source = changed({"lam": 0.5, "seed": 6}, torch="1.0", device="cuda (A Card)")
    code, out, _ = steer("sample", "--replay", source, "--out", tmp_path)
    assert code == 1 and len(out.splitlines()) == 1
    assert f"not the pixels of {source}" in out and " of 4096 differ by up to " in out
    assert "torch 1.0 there, " in out and "device cuda (A Card) there, cpu here" in out and "dtype" not in out
    assert read_png(tmp_path / "changed-replay.png")[0].settings.seed == 6
    _, out, _ = steer("sample", "--replay", changed({"seed": 6}), "--out", tmp_path)
    assert "versions and device are the same" in out


def test_an_edited_image_is_distinguished_from_a_differing_replay(steer: Steer, image: Path, tmp_path: Path) -> None:
    recipe, pixels = read_png(image)
    pixels.putpixel((3, 4), (1, 2, 3))
    write_png(pixels, tmp_path / "painted.png", recipe)
    code, out, _ = steer("sample", "--replay", tmp_path / "painted.png", "--out", tmp_path)
    assert code == 1 and ", 1 of 4096 differ by up to " in out and "so the file was edited" in out
    write_png(pixels.resize((8, 8)), tmp_path / "painted.png", recipe)
    _, out, _ = steer("sample", "--replay", tmp_path / "painted.png", "--out", tmp_path)
    assert "RGB 64x64 in place of RGB 8x8" in out


EVIL = """
from pathlib import Path

Path({canary!r}).touch()

def reward(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def canary(steer: Steer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the importable module evil_rewards has run."""
    (tmp_path / "evil_rewards.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))
    (tmp_path / "evil.yaml").write_text("rewards: ['evil_rewards:reward']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil_rewards", raising=False)
    return tmp_path / "canary"


@pytest.mark.parametrize("spec", ["evil_rewards:reward", "scene-soft + evil_rewards:reward:0", "evil.yaml"])
def test_no_code_that_an_image_names_runs_without_the_word_of_the_user(
    steer: Steer, changed: Changed, canary: Path, spec: str
) -> None:
    source, path = changed({"reward": spec}), list(sys.path)
    code, out, err = steer("sample", "--replay", source, "--out", canary.parent / "again")
    assert code == 2 and not out and len(err.splitlines()) == 1 and err.startswith(f"steer: {source}: its reward ")
    assert spec in err and "add --reward SPEC" in err
    assert not canary.exists() and "evil_rewards" not in sys.modules and sys.path == path
    assert not (canary.parent / "again").exists()


def test_a_reward_that_the_user_names_is_taken(steer: Steer, changed: Changed, canary: Path) -> None:
    source = changed({"reward": "evil_rewards:reward"}, base=True)
    code, out, _ = steer("sample", "--replay", source, "--reward", "evil_rewards:reward", "--out", canary.parent)
    assert canary.exists() and code == 1  # the pixels are of a steered image
    assert read_png(canary.parent / "changed-replay.png")[0].settings.reward == "evil_rewards:reward"
    code, out, _ = steer("sample", "--replay", source, "--reward", "jpeg", "--out", canary.parent)
    assert code == 1 and "reward 'evil_rewards:reward' there, 'jpeg' here" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a star"], "leave out PROMPT"),
        (["--prompts", "p.txt"], "leave out --prompts"),
        (["--lam", "10"], "leave out --lam"),
        (["--seeds", "4"], "leave out --particles"),
        (["--no-compare"], "leave out --compare"),
        (["--animation"], "leave out --animation"),
        (["--model", "scenes"], "leave out --model"),
    ],
)
def test_options_that_the_image_determines_are_refused(
    steer: Steer, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, err = steer("sample", "--replay", tmp_path / "nowhere.png", *words)
    assert code == 2 and err == f"steer: --replay takes all from the image: {message}\n"


def test_recipes_that_cannot_be_replayed_are_one_line(
    steer: Steer, image: Path, changed: Changed, tmp_path: Path
) -> None:
    (tmp_path / "short.png").write_bytes(image.read_bytes()[:-2000])
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "in-the-way").touch()
    model = changed({"model": "../nowhere"}).rename(tmp_path / "model.png")
    method = changed({"model": "../nowhere", "reward": "jpeg", "method": "reno"}).rename(tmp_path / "method.png")
    for words, message in (
        ([tmp_path / "nowhere.png"], "nowhere.png: cannot read the PNG (No such file or directory)"),
        ([tmp_path / "short.png"], "short.png: cannot read the PNG"),
        ([tmp_path / "plain.png"], "plain.png: no metadata of `steer sample`"),
        ([image, "--device", "warp"], "--device 'warp' cannot be used"),
        ([image, "--reward", "scen"], "unknown reward 'scen'"),
        ([image, "--out", tmp_path / "in-the-way"], "cannot write there"),
        ([model], "unknown model '../nowhere'"),
        ([method], "'jpeg' is not differentiable"),
    ):
        code, _, err = steer(*replaced(["sample", "--out", tmp_path / "again"], "--replay", *words))
        assert code == 2 and message in err and len(err.splitlines()) == 1 and "Traceback" not in err
