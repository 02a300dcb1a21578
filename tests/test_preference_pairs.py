"""Preference tables: rows by hand, the tables of published datasets, bad rows by name, splits by prompt."""

import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from conftest import Steer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.training.forward import DPOTrainer
from steer.reward import RewardError
from steer.rewards.images import resize_and_crop
from steer.rewards.preference_pairs import load_images, read_captions, read_pairs, read_rows, split_by_prompt

SHADES = {"dark.png": 51, "light.png": 204}


def encoded(shade: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images in images/."""
    (tmp_path / "images").mkdir()
    for name, shade in SHADES.items():
        (tmp_path / "images" / name).write_bytes(encoded(shade))
    return tmp_path


GOOD = {"image_a": "images/dark.png", "image_b": "images/light.png", "prompt": "x", "choice": "b"}


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def table(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def shades(sources: Sequence[Path | bytes]) -> list[int]:
    images = load_images(sources, lambda image: resize_and_crop(image, 2))
    return [round(255 * value) for value in images[:, 0].mean((1, 2)).tolist()]


def test_lines_by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        GOOD,
        GOOD | {"choice": "a", "strength": 2},
        "",
        GOOD | {"choice": "tie", "strength": 0, "prompt": "größer ½"},
        GOOD | {"choice": 0.8, "strength": None, "more": [1]},
        GOOD | {"choice": 1, "image_b": str(folder / "images" / "dark.png")},
        "   ",
    ]
    path = lines(folder, *rows)
    monkeypatch.chdir(folder / "images")  # paths are relative to the file, not to the working directory
    loaded = read_pairs(path)
    assert len(loaded) == 5
    assert loaded.labels.choice.tolist() == pytest.approx([0, 1, 0.5, 0.8, 1])
    assert loaded.labels.strength.tolist() == [1, 2, 0, 1, 1]
    assert loaded.labels.choice.dtype == loaded.labels.strength.dtype == torch.float32
    assert loaded.prompts == ("x", "x", "größer ½", "x", "x")
    assert shades(loaded.a) == [51] * 5 and shades(loaded.b) == [204] * 4 + [51]


@pytest.mark.parametrize(
    "held",
    [
        {"image_a": "images/dark.png", "image_b": "images/light.png"},
        {"image_a": encoded(51), "image_b": encoded(204)},
        {
            "image_a": {"bytes": encoded(51), "path": "gone.png"},
            "image_b": {"bytes": None, "path": "images/light.png"},
        },
    ],
    ids=["paths", "bytes", "structs"],
)
def test_parquet_by_hand(folder: Path, held: dict[str, Any]) -> None:
    rows = [
        held | {"prompt": "x", "choice": 1.0, "strength": 3},
        held | {"prompt": "y", "choice": 0.5, "strength": None},
    ]
    loaded = read_pairs(table(folder, rows))
    assert shades(loaded.a) == [51, 51] and shades(loaded.b) == [204, 204]
    assert loaded.labels.choice.tolist() == [1, 0.5] and loaded.labels.strength.tolist() == [3, 1]
    words = read_pairs(table(folder, [held | {"prompt": "x", "choice": word} for word in ("a", "b", "tie")]))
    assert words.labels.choice.tolist() == [1, 0, 0.5]


def test_captions_are_rows_too(folder: Path) -> None:
    rows = [{"image": "images/light.png", "prompt": "x"}, {"image": "images/dark.png", "prompt": ""}]
    for path in (lines(folder, *rows), table(folder, rows)):
        loaded = read_captions(path)
        assert shades(loaded.images) == [204, 51] and loaded.prompts == ("x", "")
    with pytest.raises(RewardError, match=r"pairs\.jsonl, row 2: expected a text under \"prompt\""):
        read_captions(lines(folder, rows[0], {"image": "images/dark.png"}))
    with pytest.raises(RewardError, match=r"pairs\.jsonl, row 1: 'image' is neither"):
        read_captions(lines(folder, GOOD))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


NO_IMAGE = "is neither an existing image file nor its bytes"
BAD_CHOICE = "choice must be a, b, tie or a number from 0 to 1, got "
BAD_STRENGTH = "strength must be a number from 0 to 1e+06, got "
BAD_ROWS = [
    (without("image_a"), f"row 2: 'image_a' {NO_IMAGE}"),
    (without("image_b"), f"row 2: 'image_b' {NO_IMAGE}"),
    (GOOD | {"image_a": "images/gone.png"}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_a": "images"}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_a": ""}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_a": "x" * 5000}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_a": "a\0b"}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_b": {"bytes": None, "path": None}}, f"row 2: 'image_b' {NO_IMAGE}"),
    (GOOD | {"image_b": {"path": "gone.png"}}, f"row 2: 'image_b' {NO_IMAGE}"),
    (without("prompt"), 'row 2: expected a text under "prompt"'),
    (GOOD | {"prompt": 3}, 'row 2: expected a text under "prompt"'),
    (without("choice"), f"row 2: {BAD_CHOICE}None"),
    (GOOD | {"choice": "A"}, f"row 2: {BAD_CHOICE}'A'"),
    (GOOD | {"choice": 1.5}, f"row 2: {BAD_CHOICE}1.5"),
    (GOOD | {"choice": -1}, f"row 2: {BAD_CHOICE}-1"),
    (GOOD | {"choice": True}, f"row 2: {BAD_CHOICE}True"),
    (GOOD | {"choice": "much\nmore " * 99}, f"row 2: {BAD_CHOICE}'much"),
    (GOOD | {"strength": -0.5}, f"row 2: {BAD_STRENGTH}-0.5"),
    (GOOD | {"strength": "strong"}, f"row 2: {BAD_STRENGTH}'strong'"),
    (GOOD | {"strength": True}, f"row 2: {BAD_STRENGTH}True"),
    (GOOD | {"strength": 1e30}, f"row 2: {BAD_STRENGTH}1e+30"),
]
BAD_LINES = [
    (GOOD | {"image_a": 3}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"image_a": ["images/dark.png"]}, f"row 2: 'image_a' {NO_IMAGE}"),
    (GOOD | {"choice": ["a"]}, f"row 2: {BAD_CHOICE}['a']"),
    (GOOD | {"choice": math.nan}, f"row 2: {BAD_CHOICE}nan"),
    (GOOD | {"strength": math.inf}, f"row 2: {BAD_STRENGTH}inf"),
    (GOOD | {"strength": 10**400}, f"row 2: {BAD_STRENGTH}1000"),
    ("{", "line 2: not JSON"),
    ("[" * 100_000, "line 2: not JSON"),
    ('{"a": ' + "9" * 5000 + "}", "line 2: not JSON"),
    ("[1]", "line 2: expected an object"),
    ("3", "line 2: expected an object"),
]


def refused(path: Path, message: str) -> None:
    with pytest.raises(RewardError) as raised:
        read_pairs(path)
    error_text = str(raised.value)
    assert error_text.startswith(str(path)) and message in error_text
    assert "\n" not in error_text and len(error_text) < len(str(path)) + 200


@pytest.mark.parametrize(("row", "message"), [*BAD_ROWS, *BAD_LINES], ids=lambda value: str(value)[-40:])
def test_a_bad_row_of_lines_is_named(folder: Path, row: Any, message: str) -> None:
    refused(lines(folder, GOOD, row, GOOD), message)


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda value: str(value)[-40:])
def test_a_bad_row_of_parquet_is_named(folder: Path, row: dict[str, Any], message: str) -> None:
    # Alone, as a column has one type.
    refused(table(folder, [row]), message.replace("row 2", "row 1"))


def test_a_row_of_parquet_is_named_by_its_number(folder: Path) -> None:
    refused(table(folder, [GOOD, GOOD, GOOD | {"choice": "c"}]), f"row 3: {BAD_CHOICE}'c'")
    refused(table(folder, [GOOD, without("image_b")]), f"row 2: 'image_b' {NO_IMAGE}")


def test_files_that_are_none_are_named(folder: Path) -> None:
    refused(folder / "pairs.xlsx", "pairs are read from .jsonl and .parquet files")
    refused(folder / "pairs", "pairs are read from .jsonl and .parquet files")
    refused(folder / "gone.jsonl", "no such file of pairs")
    (folder / "folder.parquet").mkdir()
    refused(folder / "folder.parquet", "no table in this folder")
    refused(lines(folder, "", " "), "no rows in this file")
    refused(table(folder, []), "no rows in this file")
    (folder / "pairs.parquet").write_bytes(b"PAR1 no, not at all PAR1")
    refused(folder / "pairs.parquet", "not a parquet file that can be read")
    (folder / "pairs.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(folder / "pairs.jsonl", "not the UTF-16 text of its byte order mark")
    assert read_rows(lines(folder, {"a": 1}).rename(folder / "PAIRS.JSONL")) == [{"a": 1}]


def test_broken_images_are_named_when_they_are_loaded(folder: Path) -> None:
    (folder / "images" / "broken.png").write_bytes(b"no image")
    loaded = read_pairs(lines(folder, GOOD | {"image_a": "images/broken.png"}))
    with pytest.raises(InputError, match=r"images/broken\.png: not a readable image format"):
        load_images(loaded.a, lambda image: image)
    loaded = read_pairs(table(folder, [GOOD | {"image_a": b"no image"}]))
    with pytest.raises(InputError, match="an image of 8 bytes: not a readable image format"):
        load_images(loaded.a, lambda image: image)


def test_images_of_any_size_become_one_batch(folder: Path) -> None:
    sizes = [(4, 4), (9, 3), (1, 1), (2, 30)]
    calls: list[tuple[int, ...]] = []

    def fit(image: Tensor) -> Tensor:
        calls.append(tuple(image.shape))
        return resize_and_crop(image, 5)

    batch = load_images([encoded(51 * (k + 1), size) for k, size in enumerate(sizes)], fit)
    assert calls == [(1, 3, height, width) for width, height in sizes]
    assert batch.shape == (4, 3, 5, 5)
    expected = torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None].expand(4, 5, 5)
    assert torch.allclose(batch[:, 0], expected, atol=1e-5)


def test_some_of_the_pairs_stay_together(folder: Path) -> None:
    rows = [GOOD | {"choice": choice, "strength": k, "prompt": f"p{k}"} for k, choice in enumerate(["a", "b", "tie"])]
    rows[1] |= {"image_a": "images/light.png", "image_b": "images/dark.png"}
    loaded = read_pairs(lines(folder, *rows)).select([2, 1, 1])
    assert loaded.prompts == ("p2", "p1", "p1") and len(loaded) == 3
    assert loaded.labels.choice.tolist() == [0.5, 0, 0] and loaded.labels.strength.tolist() == [2, 1, 1]
    assert shades(loaded.a) == [51, 204, 204] and shades(loaded.b) == [204, 51, 51]
    assert len(loaded.select([])) == 0


@given(
    prompts=st.lists(st.sampled_from([f"p{k}" for k in range(12)]), max_size=40),
    share=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_on_both_sides(prompts: list[str], share: float, seed: int) -> None:
    training, held = split_by_prompt(prompts, share, seed)
    assert sorted(training + held) == list(range(len(prompts)))
    assert training == sorted(training) and held == sorted(held)
    trained, kept = ({prompts[row] for row in rows} for rows in (training, held))
    assert not trained & kept
    count = len(set(prompts))
    if count > 1 and share > 0:
        assert 1 <= len(kept) < count and abs(len(kept) - share * count) <= 1
    else:
        assert not held
    assert (training, held) == split_by_prompt(prompts, share, seed)
    # The sides of prompts do not hang on how often or in what order they come.
    again, again_held = split_by_prompt([*prompts[::-1], *prompts], share, seed)
    assert len(again) == 2 * len(training) and len(again_held) == 2 * len(held)


def test_another_seed_holds_out_other_prompts() -> None:
    prompts = [f"p{k}" for k in range(100)]
    one, other = (split_by_prompt(prompts, 0.2, seed)[1] for seed in (0, 1))
    assert len(one) == len(other) == 20 and one != other


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
    return lines(folder, *rows)


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
    error_text = f"skipped {ties} ties and {unlabelled} pairs without a label of {len(rows)} pairs"
    assert caplog.messages == ([f"{path}: {error_text}"] if ties or unlabelled else [])


def test_pick_a_pic_with_its_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert preferred(table(tmp_path, PICKAPIC)) == [("x", 204), ("y", 204)]
    assert "skipped 1 ties and 2 pairs without a label of 5 pairs" in caplog.text
    short = [{name: row[name] for name in ("jpg_0", "jpg_1", "label_0", "caption")} for row in PICKAPIC]
    assert preferred(table(tmp_path, short[:2])) == [("x", 204)]
    structs = [{"chosen": {"bytes": LIGHT, "path": "a"}, "rejected": {"bytes": DARK, "path": "b"}, "prompt": "x"}]
    assert preferred(table(tmp_path, structs)) == [("x", 204)]


def test_ranks_of_more_than_two_are_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_images(tmp_path)
    assert preferred(in_json(tmp_path, HPDV2_TEST)) == [("x", 204), ("x", 204)]
    assert "skipped 1 ties and 2 pairs without a label of 5 pairs" in caplog.text


def test_a_folder_of_choices_as_the_demo_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_images(tmp_path / "images")
    files = [{"file": f"images/{shade}.png", "sha256": ""} for shade in ("dark", "light")]
    stored = [
        {"lot": name, "prompts": [name] * 2, "starts": [1, 1], "noises": [2, 3], "images": files} for name in "xy"
    ]
    rows = [
        {"lot": "x", "chosen": 0, "rejected": 1, "annotator": "ada"},
        {"lot": "x", "undo": True, "annotator": "ada"},
        {"lot": "x", "chosen": 1, "rejected": 0, "annotator": "ada"},
        {"lot": "x", "tie": True, "annotator": "bob"},
        {"lot": "y", "chosen": 1, "rejected": 0},
    ]
    for name, written in (("lots.jsonl", stored), ("choices.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    assert preferred(tmp_path) == preferred(tmp_path / "choices.jsonl") == [("x", 204), ("y", 204)]
    assert "skipped 1 ties and 0 pairs without a label of 3 pairs" in caplog.text
    assert read_pairs(tmp_path).users == ("ada", None)
    lines(tmp_path, rows[0] | {"lot": "z"}).rename(tmp_path / "choices.jsonl")
    with pytest.raises(RewardError, match=r"choices\.jsonl, row 1: group 'z' is not in lots\.jsonl"):
        read_pairs(tmp_path)
    for wrong in ({"chosen": 2}, {"chosen": -1}, {"chosen": 1}, {"rejected": True}, {"chosen": None}):
        lines(tmp_path, rows[0] | wrong).rename(tmp_path / "choices.jsonl")
        with pytest.raises(RewardError, match="row 1: chosen and rejected must be numbers of two images of group x"):
            read_pairs(tmp_path)


def test_a_table_of_no_known_kind_lists_columns_found_and_wanted(tmp_path: Path) -> None:
    for rows in ([{"left": "a", "right": "b", "prompt": "x"}], [{"jpg_0": "a", "jpg_1": "b", "label_0": 1}]):
        with pytest.raises(RewardError) as raised:
            read_pairs(in_lines(tmp_path, rows))
        error_text = str(raised.value)
        assert (
            f"unknown columns {', '.join(rows[0])}; expected one of: image_a, image_b, prompt, choice | " in error_text
        )
        for wanted in ("jpg_0, jpg_1, label_0", "path1, path2", "generations, ranking", "chosen, rejected"):
            assert wanted in error_text


BAD = [
    (HPDV2[0] | {"human_preference": [1]}, "row 1: human_preference must be a list of 2, one for each of image_path"),
    (HPDV2[0] | {"human_preference": ["a", "b"]}, "row 1: human_preference must hold numbers, got 'a'"),
    (HPDV2[0] | {"image_path": ["dark.png"]}, "row 1: image_path must be a list of two or more images"),
    (HPDV3[0] | {"path2": "gone.png"}, "row 1: 'path2' is neither an existing image file nor its bytes"),
    (DPO[0] | {"prompt": 3}, 'row 1: expected a text under "prompt"'),
    ({"jpg_0": "dark.png", "jpg_1": "light.png", "label_0": "left", "caption": "x"}, "row 1: label_0 must be a number"),
    (HPDV2[1], "no preferences to train on: 1 ties and 0 pairs without a label of 1 pairs"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    put_images(tmp_path)
    with pytest.raises(RewardError) as raised:
        read_pairs(in_lines(tmp_path, [row]))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_json_that_is_no_list_of_rows_is_refused(tmp_path: Path) -> None:
    for text, message in (("{}", "expected a list of objects"), ("[1]", "expected a list"), ("[", "not JSON")):
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
    assert code == 2 and "unknown columns a; expected one of: image_a" in err and len(err.strip().splitlines()) == 1


def test_users_come_along(tmp_path: Path) -> None:
    """Pick-a-Pic's user_id, HPDv2's user_hash and the demo's annotator; none where no row has one."""
    put_images(tmp_path)
    rows = [DPO[0] | {"user_id": 7}, DPO[1] | {"user_id": None}, DPO[1] | {"user_id": 8}]
    loaded = read_pairs(in_lines(tmp_path, rows))
    assert loaded.users == ("7", None, "8") and loaded.select([2, 0]).users == ("8", "7")
    assert read_pairs(in_lines(tmp_path, [HPDV2[0] | {"user_hash": "ada"}])).users == ("ada",)
    assert read_pairs(in_lines(tmp_path, DPO)).users == ()


def test_rows_of_one_image_are_gathered_by_their_prompt(tmp_path: Path) -> None:
    """ImageRewardDB: a row for each image, with its rank among those of its prompt_id."""
    put_images(tmp_path)
    rows = [
        {"image_path": f"{shade}.png", "prompt_id": name, "prompt": name, "rank": rank}
        for name in "xy"
        for shade, rank in (("dark", 3), ("light", 1))
    ]
    assert preferred(in_lines(tmp_path, [*rows, rows[0] | {"prompt_id": "alone"}])) == [("x", 204), ("y", 204)]


def test_tables_of_cells_and_of_other_encodings(tmp_path: Path) -> None:
    put_images(tmp_path)
    lists = '"[""dark.png"", ""light.png""]","[2, 1]"'
    texts = {
        "dpo.csv": "chosen,rejected,prompt\nlight.png,dark.png,x\n\n",
        "dpo.tsv": "chosen\trejected\tprompt\nlight.png\tdark.png\tx\n",
        "labels.csv": "image_0;image_1;label_0;has_label;prompt\nlight.png;dark.png;1;True;x\n",
        "lists.csv": f"generations,ranking,prompt\n{lists},x\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert preferred(tmp_path / name) == [("x", 204)], name
    DPOTrainer.check_preferences(tmp_path / "dpo.csv", {})  # finetuning reads what rewards are trained on
    (tmp_path / "wide.jsonl").write_bytes((json.dumps(DPO[0]) + "\n").encode("utf-16"))
    (tmp_path / "split.json").write_text(json.dumps({"train": DPO[:1]}))
    assert preferred(tmp_path / "wide.jsonl") == preferred(tmp_path / "split.json") == [("x", 204)]
    (tmp_path / "odd.csv").write_text("chosen,rejected,prompt\na,b,a cat, red\n")
    with pytest.raises(RewardError, match=r"odd\.csv, line 2: more cells than the 3 columns: quote texts"):
        read_pairs(tmp_path / "odd.csv")
    (tmp_path / "twice.csv").write_text("chosen,rejected,prompt,chosen\nlight.png,dark.png,x,dark.png\n")
    with pytest.raises(RewardError, match=r"twice\.csv, line 1: column 'chosen' is repeated: remove one"):
        read_pairs(tmp_path / "twice.csv")


def test_the_shards_of_a_folder_are_one_table(tmp_path: Path) -> None:
    """As a data set of the hub lies on a disk: other splits stay out."""
    (tmp_path / "data").mkdir()
    for name, row in (("train-00000-of-00002", 0), ("train-00001-of-00002", 3), ("test-00000-of-00001", 0)):
        table(tmp_path / "data", [PICKAPIC[row]]).rename(tmp_path / "data" / f"{name}.parquet")
    assert preferred(tmp_path) == [("x", 204), ("y", 204)]
    assert len(read_pairs(tmp_path, limit=1)) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="no table in this folder: name one file"):
        read_pairs(tmp_path / "empty")


def test_a_data_set_of_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            assert name == "org/pairs"
            names = [] if revision is None else ["default/train/0000.parquet", "default/test/0000.parquet"]
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})

    def download(name: str, file: str, **options: Any) -> str:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        return str(table(tmp_path, PICKAPIC[:1]).rename(tmp_path / file))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert preferred(Path("org/pairs")) == preferred(Path("org/pairs:test")) == [("x", 204)]
    with pytest.raises(RewardError, match=r"no \.parquet, \.jsonl, \.json files of split 'other'"):
        read_pairs(Path("org/pairs:other"))
