"""`steer score`: every image with its own prompt, and no image lost for another one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Steer
from PIL import Image
from pyarrow import parquet

from steer.apps.scoring import MissingPrompts
from steer.reward import RewardError

REWARD = """
import torch


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def red(images, prompts):
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def images(tmp_path: Path, steer: Steer) -> Path:
    """A folder of three images; a reward that scores the length of the prompt, another one that reads no prompt."""
    (tmp_path / "own_scores.py").write_text(REWARD)
    folder = tmp_path / "images"
    folder.mkdir()
    for place, name in enumerate("abc"):
        Image.new("RGB", (4, 4), (51 * place, 0, 0)).save(folder / f"{name}.png")
    return folder


def scores(out: str) -> list[Any]:
    return [row.get("score") for row in json.loads(out)["scores"]]


def score(steer: Steer, *words: object, reward: str = "own_scores:length") -> tuple[int, str, str]:
    return steer("score", *words, "--reward", reward)


def test_one_prompt_for_all_or_one_for_each(steer: Steer, images: Path) -> None:
    paths = [images / "a.png", images / "b.png"]
    code, out, _ = score(steer, *paths, "--prompt", "four")
    assert code == 0 and scores(out) == [4, 4] and json.loads(out)["prompt"] == "four"
    code, out, _ = score(steer, *paths, "--prompt", "x", "--prompt", "yyy")
    assert code == 0 and scores(out) == [1, 3]
    assert [row["prompt"] for row in json.loads(out)["scores"]] == ["x", "yyy"]
    (images / "p.txt").write_text("x\nyy\n")
    assert scores(score(steer, *paths, "--prompts", images / "p.txt")[1]) == [1, 2]


@pytest.mark.parametrize(("count", "paths"), [(2, "abc"), (3, "ab"), (2, "a")])
def test_too_few_and_too_many_prompts_are_refused_with_both_counts(
    steer: Steer, images: Path, count: int, paths: str
) -> None:
    given = [word for n in range(count) for word in ("--prompt", f"p{n}")]
    code, out, err = score(steer, *(images / f"{name}.png" for name in paths), *given)
    assert (code, out) == (2, "") and f"{count} prompts for {len(paths)} images" in err


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet"])
@pytest.mark.parametrize("option", [[], ["--prompts"]])
def test_a_table_names_images_and_prompts(steer: Steer, images: Path, name: str, option: list[str]) -> None:
    rows = [{"image_path": "c.png", "Prompt": "x"}, {"image_path": "a.png", "Prompt": "yy"}]
    if name == "t.parquet":
        parquet.write_table(pa.Table.from_pylist(rows), images / name)
    else:
        lines = "\n".join(map(json.dumps, rows))
        text = {"t.csv": "image_path,Prompt\nc.png,x\na.png,yy\n", "t.jsonl": lines, "t.json": json.dumps(rows)}[name]
        (images / name).write_text(text)
    code, out, err = score(steer, *option, images / name)
    assert code == 0, err
    assert [(Path(row["image"]).name, row["score"]) for row in json.loads(out)["scores"]] == [
        ("c.png", 1),
        ("a.png", 2),
    ]


def test_a_table_without_images_lists_its_columns(steer: Steer, images: Path) -> None:
    (images / "t.csv").write_text("prompt,picture\nx,a.png\n")
    code, _, err = score(steer, images / "t.csv")
    assert code == 2 and "no path of an image under image, image_path" in err and "columns are picture" in err


def test_a_folder_brings_its_prompts(steer: Steer, images: Path) -> None:
    code, _, err = score(steer, images)
    assert code == 2 and "reads the prompt, and" in err and "a.png has none: give --prompt" in err
    assert scores(score(steer, images, "--prompt", "xx")[1]) == [2, 2, 2]
    for name, text in (("a", "x"), ("b", "xx\n")):
        (images / f"{name}.txt").write_text(text)
    code, _, err = score(steer, images)
    assert code == 2 and "2 captions for 3 images: c.png has no c.txt" in err
    (images / "c.txt").write_text("xxx")
    assert scores(score(steer, images)[1]) == [1, 2, 3]
    code, _, err = score(steer, images, "--prompt", "xx")
    assert code == 2 and "give no other one" in err
    lines = [{"file_name": "b.png", "text": "xxxx"}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert scores(score(steer, images)[1]) == [4]


@pytest.mark.parametrize("reward", ["own_scores:red", "brightness", "jpeg", "aesthetic:scenes", "brightness + jpeg:2"])
def test_a_reward_that_reads_no_prompt_needs_none(steer: Steer, images: Path, reward: str) -> None:
    plain = score(steer, images, "--prompt", "a star", reward=reward)
    code, out, err = score(steer, images, reward=reward)
    assert code == 0, err
    assert scores(out) == scores(plain[1]) and json.loads(out)["prompt"] is None


@pytest.mark.parametrize("reward", ["clip:scenes", "preference:scenes", "scene-soft", "brightness + clip:scenes"])
def test_a_reward_that_reads_the_prompt_says_so(steer: Steer, images: Path, reward: str) -> None:
    code, out, err = score(steer, images / "a.png", reward=reward)
    assert (code, out) == (2, "") and "reads the prompt, and" in err and len(err.splitlines()) == 1


def test_one_bad_image_does_not_lose_the_others(steer: Steer, images: Path) -> None:
    (images / "b.png").write_bytes(b"no image")
    code, out, err = score(steer, images, images / "none.png", reward="own_scores:red")
    assert code == 2 and err.startswith("steer: 2 of 4 images have no score: ") and len(err.splitlines()) == 1
    assert "b.png: not a readable image" in err and "none.png: cannot read the image (No such file" in err
    rows = json.loads(out)["scores"]
    assert [round(row["score"], 2) if "score" in row else None for row in rows] == [0, None, 0.4, None]
    assert "b.png" in rows[1]["error"] and "none.png" in rows[3]["error"]


def test_no_images_and_two_sources_of_prompts_are_refused(steer: Steer, images: Path) -> None:
    assert "no images: name files" in score(steer, "--prompt", "x")[2]
    (images / "p.txt").write_text("x\n")
    assert "use one of them" in score(steer, images, "--prompt", "x", "--prompts", images / "p.txt")[2]


def test_prompts_that_are_not_there_can_be_counted_and_cut_but_not_read() -> None:
    none = MissingPrompts(3)
    assert len(none) == 3 and len(none[1:]) == 2 and len(none[:0]) == 0
    for read in (lambda: none[0], lambda: list(none), lambda: "a" in none, lambda: list(reversed(none))):
        with pytest.raises(RewardError):
            read()
