"""`steer rewards …` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Steer
from PIL import Image

from steer.apps.scenes.world import draw, random_scene
from steer.rewards import FACTS, REWARDS
from steer.rewards.compose import read_calibration

FIRST = """
class First:
    name, differentiable = "first", True

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def compare(self, images_a, images_b, prompts):
        return torch.full((len(images_a),), 0.6)

first = First()
"""


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of twelve drawn scenes and their prompts."""
    folder, lines = tmp_path / "drawn", []
    folder.mkdir()
    for number in range(12):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        Image.fromarray(draw(scene, rng)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": scene.prompt}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def test_without_a_command_it_lists_them(steer: Steer) -> None:
    code, out, _ = steer("rewards")
    assert code == 0
    assert {"imagereward", "hpsv2.1", "scene-soft"} <= {line.split()[0] for line in out.splitlines()}


def test_check_passes_a_good_reward_and_fails_a_bad_one(steer: Steer, scenes: Path) -> None:
    code, out, _ = steer("rewards", "check", "scene-soft", "--images", scenes)
    assert code == 0 and "gradient" in out and "FAILED" not in out
    code, out, _ = steer("rewards", "check", "own_rewards:not_a_number", "--images", scenes)
    assert code == 1 and "returned nan" in out


def test_check_compares_both_orders_of_a_judge(steer: Steer, scenes: Path, tmp_path: Path) -> None:
    code, out, err = steer("rewards", "check", "hierarchy(brightness, jpeg)", "--images", scenes)
    assert code == 0 and out.startswith("ok      both orders  P(a ≻ b) + P(b ≻ a) of 8 pairs differs from 1 by 0 "), err
    with (tmp_path / "own_rewards.py").open("a") as file:
        file.write(FIRST)
    code, out, err = steer("rewards", "check", "own_rewards:first", "--images", scenes)
    failed = [line.split()[1:3] for line in out.splitlines() if "FAILED" in line]
    assert code == 1 and failed == [["both", "orders"]], err


def test_compare_tells_how_alike_they_are_and_draws_it(steer: Steer, scenes: Path, tmp_path: Path) -> None:
    code, out, _ = steer("rewards", "compare", "jpeg", "jpeg:2", "--images", scenes, "--out", tmp_path / "same.png")
    assert code == 0 and "Spearman" in out and "1.000" in out
    assert Image.open(tmp_path / "same.png").width > 400


def test_contrast_tells_whether_the_prompt_is_read(steer: Steer, scenes: Path) -> None:
    code, out, _ = steer("rewards", "contrast", "scene", "--images", scenes)
    assert code == 0 and out.splitlines()[-1].split()[:2] == ["all", "100.0%"]
    code, _, err = steer("rewards", "contrast", "jpeg", "--images", scenes, "--prompt", "a thing")
    assert code == 2 and "prompts.jsonl" in err


def test_calibrate_measures_what_z_needs(steer: Steer, scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    assert steer("rewards", "calibrate", "brightness", "--images", scenes, "--out", file)[0] == 0
    assert steer("rewards", "calibrate", "jpeg", "--images", scenes, "--out", file)[0] == 0
    assert set(read_calibration(file).scales) == {"brightness", "jpeg"}
    images = [scenes / f"{number}.png" for number in range(12)]
    code, out, _ = steer("score", *images, "--prompt", "a star", "--reward", f"z(brightness, from={file})")
    scores = [row["score"] for row in json.loads(out)["scores"]]
    assert code == 0 and np.mean(scores) == pytest.approx(0, abs=1e-5) and np.std(scores, ddof=1) == pytest.approx(1)


def test_train_makes_a_folder_that_scores(steer: Steer, scenes: Path, tmp_path: Path) -> None:
    rows = [
        {"image_a": f"{a}.png", "image_b": f"{b}.png", "prompt": f"scene {a % 3}", "choice": "a" if a < b else "b"}
        for a in range(12)
        for b in range(12)
        if a != b
    ]
    data = scenes / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out, work = tmp_path / "earlier", tmp_path / "work"
    code, stdout, err = steer("rewards", "train", data, "--out", out, "--work", work, "--steps", 40, "--members", 2)
    assert code == 0, err
    assert "accuracy" in stdout and Image.open(work / "training.png").width > 400
    code, scored, _ = steer("score", scenes / "0.png", "--prompt", "a star", "--reward", out)
    assert code == 0 and len(json.loads(scored)["scores"][0]["components"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "scene-soft", "--images", "nowhere"], "nowhere: not a folder of images"),
        (["check", "nosuch", "--images", "{scenes}"], "unknown reward 'nosuch'"),
        (["train", "nowhere.jsonl", "--out", "r"], "nowhere.jsonl: no such file of pairs"),
        (["train", "{scenes}/0.png", "--out", "r"], "0.png: pairs are read from .jsonl and .parquet files"),
        (["train", "{scenes}/prompts.jsonl", "--out", "r"], "unknown columns image"),
        (["train", "x.jsonl", "--out", "r", "--device", "nosuch"], "--device 'nosuch' cannot be used"),
        (["calibrate", "colour:red", "--images", "{scenes}", "--out", "{scenes}/0.png"], "not a calibration"),
    ],
)
def test_bad_input_is_one_line(
    steer: Steer, scenes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = steer("rewards", *(word.format(scenes=scenes) for word in words))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.hard
def test_a_reward_that_hangs_ends_the_run_and_finished_prompts_stay(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "own_hanging.py").write_text(
        "import time\n\n\ndef hangs_on_stars(images, prompts):\n"
        "    time.sleep(6 * ('star' in prompts[0]))\n    return images.mean((1, 2, 3))\n"
    )
    words = ["a circle", "a star", "--steps", 4, "--particles", 2, "--method", "best-of-n"]
    limit = ["--reward", "own_hanging:hangs_on_stars", "--reward-timeout", 2]
    code, _, err = steer("sample", *words, *limit, "--out", tmp_path / "out")
    assert code == 2 and "'hangs_on_stars' timed out after 2 s" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["prompt"] for entry in report["prompts"]] == ["a circle"]
    assert (tmp_path / "out" / report["prompts"][0]["images"][0]).is_file()


def test_a_report_tells_every_part(steer: Steer, tmp_path: Path) -> None:
    words = ["a circle", "--steps", 4, "--particles", 3, "--reward", "brightness + colour:red:2"]
    assert steer("sample", *words, "--out", tmp_path / "out")[0] == 0
    entry = json.loads((tmp_path / "out" / "report.json").read_text())["prompts"][0]
    total = np.array(entry["components"]["brightness"]) + 2 * np.array(entry["components"]["colour:red"])
    assert np.allclose(total, entry["rewards"], atol=1e-5) and entry["rewards"] == sorted(
        entry["rewards"], reverse=True
    )


def test_a_bound_and_a_filter_come_from_images_alone(steer: Steer, scenes: Path) -> None:
    rows = [{"image": f"{number}.png", "prompt": f"prompt {number % 3}"} for number in range(12)]
    (scenes / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = steer("rewards", "usefulness", "brightness", "brightness:0", "--images", scenes)
    assert code == 0 and 'constraints: {"brightness": "<= ' in out and "peaks at the best of 1," in out
    code, out, _ = steer("rewards", "usefulness", "brightness", "brightness", "--images", scenes)
    assert code == 0 and "rises up to the best of 4" in out
    code, out, _ = steer("rewards", "reliability", "brightness", "jpeg", "--images", scenes)
    kinds = {line.split()[0] for line in out.splitlines() if "R²" in line}
    assert code == 0 and kinds == {"none", "best", "best-random", "best-worst"} and "sample_filter: " in out
    (scenes / "prompts.jsonl").write_text("\n".join(json.dumps(row | {"prompt": row["image"]}) for row in rows))
    code, _, err = steer("rewards", "reliability", "brightness", "jpeg", "--images", scenes)
    assert code == 2 and "has one image: give at least 2" in err


def test_the_list_has_unit_gradients_size_licence_and_needs_of_each(steer: Steer) -> None:
    _, out, _ = steer("rewards")
    lines = out.splitlines()
    assert set(FACTS) == set(REWARDS)
    for name, facts in FACTS.items():
        (row,) = [k for k, line in enumerate(lines) if line.split()[0] == name and not line.startswith(" ")]
        assert lines[row + 1].strip() == str(facts)
    assert str(FACTS["imagereward"]) == "standardised, -2..2; differentiable; 1.8 GB; Apache-2.0; from the hub"
