"""Preference tables as data sets publish them, each read as the same pairs."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from test_pairs import encoded, shades, table
from test_pairs import lines as lines_of

from steer.reward import RewardError
from steer.rewards.preference_pairs import read_captions, read_pairs

DARK, LIGHT = encoded(51), encoded(204)
# Every table says of prompt x that the light image is preferred, and of y that the light one is, too.
PICKAPIC = [
    {"jpg_0": DARK, "jpg_1": LIGHT, "label_0": 0.0, "label_1": 1.0, "caption": "x", "has_label": True},
    {"jpg_0": DARK, "jpg_1": LIGHT, "label_0": 0.5, "label_1": 0.5, "caption": "x", "has_label": True},
    {"jpg_0": DARK, "jpg_1": LIGHT, "label_0": 1.0, "label_1": 0.0, "caption": "x", "has_label": False},
    {"jpg_0": LIGHT, "jpg_1": DARK, "label_0": 1.0, "label_1": 0.0, "caption": "y", "has_label": True},
    {"jpg_0": None, "jpg_1": None, "label_0": None, "label_1": None, "caption": "y", "has_label": False},
]
HPDV2 = [
    {"image_path": ["dark.png", "light.png"], "human_preference": [0, 1], "prompt": "x"},
    {"image_path": ["dark.png", "light.png"], "human_preference": [1, 1], "prompt": "x"},
    {"image_path": ["light.png", "dark.png"], "human_preference": [1, 0], "prompt": "y"},
    {"image_path": ["light.png", "dark.png"], "human_preference": None, "prompt": "y"},
    {"image_path": ["light.png", "dark.png"], "human_preference": None, "prompt": "y"},
]
HPDV2_TEST = [
    {"image_path": ["dark.png", "light.png", "dark.png"], "rank": [2, 1, 2], "prompt": "x"},
    {"image_path": ["light.png", "dark.png"], "rank": [1, None], "prompt": "y"},
    {"image_path": ["light.png", "dark.png"], "rank": None, "prompt": "y"},
]
HPDV3 = [
    {"path1": "light.png", "path2": "dark.png", "prompt": "x", "confidence": 0.9, "model1": "a"},
    {"path1": "light.png", "path2": "dark.png", "prompt": "y", "confidence": None, "model1": "b"},
]
IMAGEREWARD = [
    {"id": "1", "generations": ["dark.png", "light.png"], "ranking": [2, 1], "prompt": "x"},
    {"id": "2", "generations": ["light.png", "dark.png"], "ranking": [1, 3], "prompt": "y"},
]
DPO = [
    {"chosen": "light.png", "rejected": "dark.png", "prompt": "x"},
    {"chosen": "light.png", "rejected": "dark.png", "prompt": "y"},
]


def put_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dark.png").write_bytes(DARK)
    (folder / "light.png").write_bytes(LIGHT)


def in_json(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(list(rows)))
    return path


def in_lines(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return lines_of(folder, *rows)


WRITERS = {"json": in_json, "jsonl": in_lines, "parquet": table}
TABLES = {
    "hpdv2": (HPDV2, 1, 2),
    "hpdv3": (HPDV3, 0, 0),
    "imagereward": (IMAGEREWARD, 0, 0),
    "dpo": (DPO, 0, 0),
}


def preferred(path: Path, images: Path | None = None) -> list[tuple[str, int]]:
    """Prompt and shade of the preferred image of every pair; the other one has the other shade."""
    loaded = read_pairs(path, images)
    assert set(loaded.labels.choice.tolist()) <= {0.0, 1.0} and loaded.labels.strength.tolist() == [1] * len(loaded)
    assert loaded.labels.choice.dtype == torch.float32
    a, b = shades(loaded.a), shades(loaded.b)
    assert all({one, other} == {51, 204} for one, other in zip(a, b, strict=True))
    won = [one if choice else other for one, other, choice in zip(a, b, loaded.labels.choice.tolist(), strict=True)]
    return list(zip(loaded.prompts, won, strict=True))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_published_tables_are_read(
    tmp_path: Path, name: str, writer: str, elsewhere: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows, ties, unlabelled = TABLES[name]
    images = tmp_path / "pictures" if elsewhere else tmp_path
    put_images(images)
    path = WRITERS[writer](tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        assert preferred(path, images if elsewhere else None) == [("x", 204), ("y", 204)]
    error_text = f"left out {ties} ties and {unlabelled} pairs without a label of {len(rows)} pairs"
    assert caplog.messages == ([f"{path}: {error_text}"] if ties or unlabelled else [])


def test_pick_a_pic_with_its_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert preferred(table(tmp_path, PICKAPIC)) == [("x", 204), ("y", 204)]
    assert "left out 1 ties and 2 pairs without a label of 5 pairs" in caplog.text
    short = [{name: row[name] for name in ("jpg_0", "jpg_1", "label_0", "caption")} for row in PICKAPIC]
    assert preferred(table(tmp_path, short[:2])) == [("x", 204)]
    structs = [{"chosen": {"bytes": LIGHT, "path": "a"}, "rejected": {"bytes": DARK, "path": "b"}, "prompt": "x"}]
    assert preferred(table(tmp_path, structs)) == [("x", 204)]


def test_ranks_of_more_than_two_are_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_images(tmp_path)
    assert preferred(in_json(tmp_path, HPDV2_TEST)) == [("x", 204), ("x", 204)]
    assert "left out 1 ties and 2 pairs without a label of 5 pairs" in caplog.text


def test_a_folder_of_choices_as_the_demo_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_images(tmp_path / "images")
    files = [{"file": f"images/{shade}.png", "sha256": ""} for shade in ("dark", "light")]
    lots = [{"lot": name, "prompts": [name] * 2, "starts": [1, 1], "noises": [2, 3], "images": files} for name in "xy"]
    rows = [
        {"lot": "x", "chosen": 0, "rejected": 1, "annotator": "ada"},
        {"lot": "x", "undo": True, "annotator": "ada"},
        {"lot": "x", "chosen": 1, "rejected": 0, "annotator": "ada"},
        {"lot": "x", "tie": True, "annotator": "bob"},
        {"lot": "y", "chosen": 1, "rejected": 0},
    ]
    for name, written in (("lots", lots), ("choices", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    assert preferred(tmp_path) == preferred(tmp_path / "choices.jsonl") == [("x", 204), ("y", 204)]
    assert "left out 1 ties and 0 pairs without a label of 3 pairs" in caplog.text
    lines_of(tmp_path, rows[0] | {"lot": "z"}).rename(tmp_path / "choices.jsonl")
    with pytest.raises(RewardError, match=r"choices\.jsonl, row 1: lot 'z' is not in lots\.jsonl"):
        read_pairs(tmp_path)
    lines_of(tmp_path, rows[0] | {"chosen": 2}).rename(tmp_path / "choices.jsonl")
    with pytest.raises(RewardError, match="row 1: chosen and rejected must be numbers of images of lot x"):
        read_pairs(tmp_path)


def test_a_table_of_no_known_kind_lists_columns_found_and_wanted(tmp_path: Path) -> None:
    for rows in ([{"left": "a", "right": "b", "prompt": "x"}], [{"jpg_0": "a", "jpg_1": "b", "label_0": 1}]):
        with pytest.raises(RewardError) as raised:
            read_pairs(in_lines(tmp_path, rows))
        error_text = str(raised.value)
        assert f"columns found: {', '.join(rows[0])}; columns wanted: image_a, image_b, prompt, choice | " in error_text
        for wanted in ("jpg_0, jpg_1, label_0", "path1, path2", "generations, ranking", "chosen, rejected"):
            assert wanted in error_text


BAD = [
    (HPDV2[0] | {"human_preference": [1]}, "row 1: human_preference must be a list of 2, one for each of image_path"),
    (HPDV2[0] | {"human_preference": ["a", "b"]}, "row 1: human_preference must hold numbers, got 'a'"),
    (HPDV2[0] | {"image_path": ["dark.png"]}, "row 1: image_path must be a list of two or more images"),
    (HPDV3[0] | {"path2": "gone.png"}, "row 1: 'path2' is neither an image file that is there nor its bytes"),
    (DPO[0] | {"prompt": 3}, 'row 1: expected a text under "prompt"'),
    ({"jpg_0": "dark.png", "jpg_1": "light.png", "label_0": "left", "caption": "x"}, "row 1: label_0 must be a number"),
    (HPDV2[1], "no preference to learn from: 1 ties and 0 pairs without a label of 1 pairs"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    put_images(tmp_path)
    with pytest.raises(RewardError) as raised:
        read_pairs(in_lines(tmp_path, [row]))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_json_that_is_no_list_of_rows_is_refused(tmp_path: Path) -> None:
    for text, message in (("{}", "expected a list of objects"), ("[1]", "expected a list"), ("[", "cannot be read as")):
        (tmp_path / "pairs.json").write_text(text)
        with pytest.raises(RewardError, match=message):
            read_pairs(tmp_path / "pairs.json")


def test_a_folder_of_images_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for read in (read_pairs, read_captions):
        with pytest.raises(RewardError, match="gone: no such folder of images"):
            read(in_lines(tmp_path, [{"chosen": "a", "rejected": "b", "image": "a", "prompt": "x"}]), tmp_path / "gone")


def test_the_command_learns_from_them(tmp_path: Path, steer: Steer) -> None:
    put_images(tmp_path / "pictures")
    rows = [row | {"prompt": f"{row['prompt']} {number}"} for number in range(4) for row in HPDV3]
    words = ["--images", tmp_path / "pictures", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    code, out, err = steer("rewards", "train", in_json(tmp_path, rows), *words, "--steps", 2, "--batch-size", 4)
    assert code == 0, err
    assert "accuracy" in out and (tmp_path / "out" / "reward.json").exists()
    code, _, err = steer("rewards", "train", in_json(tmp_path, [{"a": 1}]), *words)
    assert code == 2 and "columns found: a; columns wanted: image_a" in err and len(err.strip().splitlines()) == 1
