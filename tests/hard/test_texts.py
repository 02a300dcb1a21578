"""Texts of every kind as prompts and file names, through the command line, files of prompts, PNGs and reports."""

import json
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Steer, cached_pipe
from pyarrow import parquet
from reliability import Tally

from steer.apps.prompts import MAX_PROMPT_LENGTH, load_prompts
from steer.apps.recipes import read_png
from steer.errors import InputError
from steer.files import loads_with_checksum

FULL = pytest.mark.hard
WORDS = [
    "--method",
    "base",
    "--steps",
    "1",
    "--particles",
    "2",
    "--reward",
    "brightness",
    "--guidance",
    "3",
    "--no-compare",
]
TEXTS = {
    "one letter": "x",
    "10,000 tokens": "star " * 10_000,
    "longest": "é" * MAX_PROMPT_LENGTH,
    "right to left": "שלום عالم ‏star‏",
    "override": "\u202egnp.exe",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "invisible": "\u200b\u2060",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘",
    "HTML": "<script>alert(1)</script>&lt;img src=x onerror=alert(2)>",
    "shell": "$(touch canary); `touch canary` | touch canary && touch canary # ' \"",
    "path": "../../../etc/passwd",
    "absolute path": "/etc/passwd",
    "dots": "..",
    "Windows": "C:\\con\\nul:$DATA",
    "lines": "a star\nand a\r\ncircle\ttabbed\x0b\x0c\x85\u2028\u2029end",
    "escapes": "\x1b[31mred\x1b]0;title\x07\x1b[2J",
    "formulas": "$\\frac{1}{0}$ $ \\$ $x^{$ {{x}} %s {0} ${x}",
    "JSON": '{"prompt": "a", "images": ["/etc/passwd"]}',
    "option": "a --lam 3 -h",
    "private": "\ue000\ufffe\uffff\U0010ffff",
}
REFUSED = {
    "empty": "",
    "blank": " \t\n",
    "NUL": "a\0b",
    "lone surrogate": "a\udcffb",
    "half a pair": "\ud83d",
    "too long": "x" * (MAX_PROMPT_LENGTH + 1),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    cached_pipe("sd").save_pretrained(folder)
    return folder


def is_recorded(out: Path, prompt: str) -> bool:
    """Return whether report and images contain the exact prompt, and all files lie in the folder."""
    entry = loads_with_checksum((out / "report.json").read_text())["prompts"][0]
    prompts = [read_png(out / name)[0].prompt for name in entry["images"]]
    inside = all((out / name).resolve().is_relative_to(out.resolve()) for name in entry["images"])
    return bool(inside and [entry["prompt"], *prompts] == [prompt.strip()] * 3)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("names", [["lines"], pytest.param([*TEXTS], marks=FULL)], ids=["some", "all"])
def test_every_text_is_recorded_exactly(
    steer: Steer, tiny: Path, tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally()
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    for number, name in enumerate(names):
        prompt, out = TEXTS[name], tmp_path / f"{number}"
        code, printed, err = steer("sample", prompt, "--model", tiny, *WORDS, "--out", out)
        assert code == 0, (name, err)
        tally.count("as an argument", is_recorded(out, prompt))
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
        again = steer("sample", "--prompts", tmp_path / "prompts.jsonl", "--model", tiny, *WORDS, "--out", out)
        assert again[0] == 0 and "1 prompts" in again[1], "the same run: nothing is sampled again"
        tally.count("from a file, to the same run", is_recorded(out, prompt))
        image = out / loads_with_checksum((out / "report.json").read_text())["prompts"][0]["images"][0]
        code, printed, err = steer("sample", "--replay", image, "--out", out)
        tally.count("replayed from its PNG", code == 0 and "the same pixels" in printed)
        assert tally.lost == 0 and not [*home.iterdir()], name
    if len(names) == len(TEXTS):
        tally.note("texts as prompts")


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_prompt_is_refused_in_one_line(steer: Steer, tiny: Path, tmp_path: Path, name: str) -> None:
    words = ["--model", tiny, *WORDS, "--out", tmp_path / "out"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": REFUSED[name]}))
    for given in ([REFUSED[name]], ["--prompts", tmp_path / "prompts.jsonl"]):
        code, _, err = steer("sample", *given, *words)
        assert code == 2 and err.startswith("steer: ") and len(err.splitlines()) == 1 and len(err) < 400
        assert err.encode("utf-8") and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_invalid_prompt_is_refused_in_every_file_format(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a star\na\0b\n")
    (tmp_path / "p.tsv").write_bytes(b"prompt\na\0b\n")
    parquet.write_table(pa.table({"prompt": ["a star", "a\0b"]}), tmp_path / "p.parquet")
    for suffix in ("txt", "tsv", "parquet"):
        with pytest.raises(InputError, match=r"p\.\w+: the prompt 'a\\x00b' holds '\\x00', which is not text"):
            load_prompts(str(tmp_path / f"p.{suffix}"))


def test_prompts_with_the_same_slug_do_not_overwrite_each_other(steer: Steer, tiny: Path, tmp_path: Path) -> None:
    prompts = ["A star!", "a star", "a * star?", "a star", "星", "☆"]
    code, _, err = steer("sample", *prompts, "--model", tiny, *WORDS, "--out", tmp_path)
    assert code == 0, err
    entries = loads_with_checksum((tmp_path / "report.json").read_text())["prompts"]
    assert [entry["prompt"] for entry in entries] == prompts
    names = [name for entry in entries for name in entry["images"]]
    assert len(set(names)) == 2 * len(prompts)
    assert [read_png(tmp_path / entry["images"][0])[0].prompt for entry in entries] == prompts


FOLDERS = ["two\nlines", "not\udcfftext", "a b$(touch canary);'\"", "<b>&amp;", "-h", "émoji 👍", "x" * 200]


@pytest.mark.parametrize("names", [FOLDERS[1:2], pytest.param(FOLDERS, marks=FULL)], ids=["some", "all"])
def test_folders_may_have_any_name(steer: Steer, tiny: Path, tmp_path: Path, names: list[str]) -> None:
    tally = Tally()
    for name in names:
        out = tmp_path / name
        code, printed, err = steer("sample", "a star", "--model", tiny, *WORDS, "--out", out)
        assert code == 0 and "1 prompts" in printed, (shlex.quote(ascii(name)), err)
        code, printed, _ = steer("score", out / "000-a-star" / "00.png", "--prompt", "a star", "--reward", "brightness")
        tally.count("written and scored", code == 0 and json.loads(printed)["scores"][0]["image"].startswith(str(out)))
        code, _, err = steer("sample", "--prompts", out / "none.txt", "--model", tiny, *WORDS, "--out", out)
        tally.count("reported in a line", code == 2 and len(err.splitlines()) == 1)
    assert tally.lost == 0 and not [*Path.cwd().glob("canary")]
    if len(names) == len(FOLDERS):
        tally.note("texts as names of folders")
