"""Prompt files as people have them, and their columns as arguments of the pipeline."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Steer
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from pyarrow import parquet

from steer.apps.prompts import (
    PromptRow,
    argument_names,
    check_arguments,
    load_prompts,
    load_tagged_prompts,
    read_prompts,
    read_rows,
    sample_requests,
)
from steer.apps.recipes import read_metadata
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.files import loads_with_checksum

TWO = ["a star", "a circle"]
FILES: dict[str, tuple[str, str]] = {
    "csv": ("p.csv", "Prompts,Kind\na star,x\na circle,y\n"),
    "csv of Excel": ("p.csv", "Nr;Prompt\r\n1;a star\r\n2;a circle\r\n"),
    "tsv, quoted": ("p.tsv", 'Prompt\tNote\n"a star"\t\n"a circle"\tx\n'),
    "jsonl, caption": ("p.jsonl", '{"caption": "a star"}\n{"caption": "a circle"}\n'),
    "jsonl, Text": ("p.jsonl", '{"Text": "a star", "id": 1}\n{"Text": "a circle", "id": 2}\n'),
    "jsonl, texts alone": ("p.jsonl", '"a star"\n"a circle"\n'),
    "json, texts": ("p.json", '["a star", "a circle"]'),
    "json, objects": ("p.json", '[{"id": 1, "prompt": "a star"}, {"id": 2, "prompt": "a circle"}]'),
    "json, columns": ("p.json", '{"id": [1, 2], "prompt": ["a star", "a circle"]}'),
    "json, one list": ("p.json", '{"prompts": ["a star", "a circle"]}'),
    "json, lists by tag": ("p.json", '{"stars": ["a star"], "others": ["a circle"]}'),
    "json, objects by name": ("p.json", '{"001": {"prompt": "a star"}, "002": {"prompt": "a circle"}}'),
    "json, a list of objects in an object": ("p.json", '{"data": [{"text": "a star"}, {"text": "a circle"}]}'),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", FILES)
def test_every_form_in_every_encoding_gives_its_prompts(tmp_path: Path, kind: str, encoding: str) -> None:
    name, text = FILES[kind]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_prompts(tmp_path / name) == load_prompts(str(tmp_path / name)) == TWO


def test_quotes_commas_and_lines_inside_a_cell_are_the_prompts_own(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,n\n"a ""big"", red\nstar",1\n\n,2\n')
    assert read_rows(tmp_path / "p.csv") == [PromptRow('a "big", red\nstar', {"n": "1"})]
    (tmp_path / "p.tsv").write_text('prompt\tn\n"big" stars\t1\nan 8" disc\t2\n')  # written without quoting
    assert read_prompts(tmp_path / "p.tsv") == ['"big" stars', 'an 8" disc']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt\na star, a circle\n", "line 2: 2 values for 1 columns: put a prompt with the separator"),
        ("p.csv", 'prompt\n"a star\n', "not a table that can be read"),
        ("p.csv", "a,b\n1,2\n", 'line 1: expected a column named "prompt" (--prompt-column names another); choose'),
        ("p.csv", "text,caption\n1,2\n", "text, caption could each be the prompts: choose one with --prompt-column"),
        ("p.jsonl", '{"text": "a", "caption": "b"}\n', "line 1: text, caption could each be the prompts"),
        ("p.csv", "prompt,n,n\na,1,2\n", "the column 'n' is there twice"),
        ("p.json", '{"prompt": ["a", "b"], "seed": [1]}', "2 values under 'prompt', 1 under 'seed'"),
        ("p.json", "3", "expected a list of prompts or objects, got int"),
        ("p.json", "[3]", "entry 1: expected an object with a text"),
        ("p.json", "[", "not JSON"),
        ("p.json", '{"a": 1}', 'expected a list under "prompt"'),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as raised:
        read_prompts(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name)) and message in str(raised.value)


def test_columns_stay_with_their_prompts(tmp_path: Path) -> None:
    table = pa.table({"Prompt": TWO, "seed": [1, None], "image": [{"bytes": b"x"}] * 2, "note": ["", "n"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_rows(tmp_path / "p.parquet") == [PromptRow(TWO[0], {"seed": 1}), PromptRow(TWO[1], {"note": "n"})]
    (tmp_path / "p.json").write_text(FILES["json, lists by tag"][1])
    assert load_tagged_prompts(str(tmp_path / "p.json")) == (TWO, ["stars", "others"])
    (tmp_path / "p.csv").write_text("text,caption\na,b\n")
    assert read_prompts(tmp_path / "p.csv", "Caption") == ["b"]


def test_columns_without_a_use_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.csv").write_text("prompt,tag,negative_prompt\na,t,n\nb,t,n\n")
    with caplog.at_level(logging.WARNING):
        assert load_tagged_prompts(str(tmp_path / "p.csv"))[1] == ["t", "t"]
    assert [record.getMessage() for record in caplog.records] == [
        f"steer: {tmp_path / 'p.csv'}: columns without a use here: negative_prompt"
    ]


# Arguments.

VALUES: dict[str, Any] = {"model": "scenes", "method": "best-of-n", "reward": "brightness", "particles": 2, "steps": 2}
VALUES |= {"guidance": 2.0, "seed": 5, "compare": False, "dtype": None}
SETTINGS = SamplingConfig.of(**VALUES)


def bare(kind: Any) -> Any:
    return kind.__new__(kind)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline])
def test_arguments_are_those_of_the_pipeline_that_a_cell_can_hold(kind: type) -> None:
    names = argument_names(bare(kind))
    assert {"negative_prompt", "height", "width"} <= names.keys()
    assert not names.keys() & {"prompt", "latents", "generator", "output_type", "callback_on_step_end", "prompt_embeds"}


def test_cells_become_the_values_of_the_arguments() -> None:
    cells = {"Negative_Prompt": "7", "seed": "42.0", "height": " 64 ", "guidance_scale": "3", "note": "x"}
    one = sample_requests([PromptRow("a", cells)], SETTINGS, bare(StableDiffusionPipeline))[0]
    assert one.arguments == {"negative_prompt": "7", "height": 64}
    assert (one.settings.seed, one.settings.guidance, one.settings.steps) == (42, 3.0, 2)


@pytest.mark.parametrize(
    "cells", [{"seed": "x"}, {"seed": -1}, {"seed": 2**63}, {"height": "tall"}, {"num_inference_steps": 0.5}]
)
def test_a_cell_that_does_not_fit_is_named_with_its_prompt(cells: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="prompt 'a'") as raised:
        sample_requests([PromptRow("a", cells)], SETTINGS, bare(StableDiffusionPipeline))
    assert next(iter(cells)).split("_")[-1] in str(raised.value)


def test_equal_rows_have_seeds_of_their_own() -> None:
    rows = [PromptRow("a"), PromptRow("b"), PromptRow("a", {"id": 3}), PromptRow("a", {"seed": 1}), PromptRow("a")]
    asked = sample_requests(rows, SETTINGS, bare(StableDiffusionPipeline))
    assert [one.settings.seed for one in asked] == [5, 5, 6, 1, 7]


def test_arguments_of_a_strangers_image_are_checked() -> None:
    assert check_arguments({"negative_prompt": "x", "height": 64}, "arguments") == {
        "negative_prompt": "x",
        "height": 64,
    }
    refused: list[Any] = [
        [],
        {"height": 10**6},
        {"x": {}},
        {"x": [[1]]},
        {"x": float("inf")},
        {"x": "\0"},
        {"x": [1] * 65},
    ]
    for wrong in refused:
        with pytest.raises(InputError, match="arguments"):
            check_arguments(wrong, "arguments")


WORDS = ["--method", "best-of-n", "--reward", "brightness", "--particles", "2", "--steps", "2", "--no-compare"]


def test_rows_are_sampled_with_their_own_arguments_and_equal_ones_differ(
    steer: Steer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.csv").write_text(
        "prompt,negative_prompt,seed,Category\na star,,,x\na star,,,x\na star,a circle,,x\na star,,1,x\n"
    )
    command = ["sample", "--prompts", tmp_path / "p.csv", *WORDS, "--guidance", 4, "--seed", 0, "--out", tmp_path / "o"]
    code, _, err = steer(*command)
    assert code == 0, err
    said = [record.getMessage() for record in caplog.records if "without a use" in record.getMessage()]
    assert said == ["steer: prompts: columns without a use here: Category"]
    entries = loads_with_checksum((tmp_path / "o/report.json").read_text())["prompts"]
    first = [Image.open(tmp_path / "o" / sorted(entry["images"])[0]) for entry in entries]
    recipes = [read_metadata(tmp_path / "o" / sorted(entry["images"])[0]) for entry in entries]
    assert [one.settings.seed for one in recipes] == [0, 1, 0, 1]
    assert len({one.pixels for one in recipes}) == 3 and recipes[1].pixels == recipes[3].pixels
    assert recipes[2].arguments == {"negative_prompt": "a circle"} and entries[0]["columns"] == {"Category": "x"}
    lines = first[2].text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:2] == ["a star", "Negative prompt: a circle"]
    assert (
        lines[2].startswith("Steps: 2, Sampler: ") and "CFG scale: 4.0, Seed: 0, Size: 64x64, Model: scenes" in lines[2]
    )
    code, out, err = steer("sample", "--replay", tmp_path / "o" / sorted(entries[2]["images"])[0], "--out", tmp_path)
    assert code == 0 and "the same pixels" in out, err
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace("a circle", "a cross"))
    code, _, err = steer(*command)
    assert code == 2 and "other columns of prompt 3; choose another --out" in err


def test_the_column_can_be_chosen(steer: Steer, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text,caption\na circle,a star\n")
    command = ["sample", "--prompts", tmp_path / "p.csv", *WORDS, "--out", tmp_path / "o"]
    code, _, err = steer(*command)
    assert code == 2 and "choose one with --prompt-column" in err
    assert steer(*command, "--prompt-column", "caption")[0] == 0
    assert json.loads((tmp_path / "o/report.json").read_text())["prompts"][0]["prompt"] == "a star"
    code, _, err = steer("sample", "a star", *WORDS, "--prompt-column", "caption", "--out", tmp_path / "p")
    assert code == 2 and "--prompt-column belongs to --prompts FILE" in err
