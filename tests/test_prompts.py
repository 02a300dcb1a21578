"""`steer.apps.prompts`: files in every format, data sets of a local hub, columns as arguments of the pipeline."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from conftest import Steer
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from steer.apps.prompts import (
    PromptRow,
    argument_names,
    check_arguments,
    load_prompts,
    load_tagged_prompts,
    read_rows,
    sample_requests,
)
from steer.apps.recipes import read_metadata
from steer.apps.settings import SamplingConfig
from steer.assets import PROMPTS
from steer.errors import InputError
from steer.files import loads_with_checksum

TWO = ["a circle", "a star"]
STARS = ["a star", "a circle"]
CONVERTED = "refs/convert/parquet"


def write(path: Path, prompts: list[str], column: str = "prompt") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"image": [b"x"] * len(prompts), column: prompts}), path)
    else:
        lines = {
            ".txt": prompts,
            ".jsonl": [json.dumps({"n": 1, column: prompt}) for prompt in prompts],
            ".tsv": [f"n\t{column}", *(f"1\t{prompt}" for prompt in prompts)],
        }[path.suffix]
        path.write_text("\n".join(lines) + "\n")
    return path


def refused(source: str | Path, column: str | None = None) -> str:
    with pytest.raises(InputError) as raised:
        load_prompts(str(source), column)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".parquet", ".PARQUET"])
def test_every_format_holds_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix.lower()}", [TWO[0], "  ", f" {TWO[1]} "])
    path = path.rename(path.with_suffix(suffix))
    assert load_prompts(str(path)) == TWO


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".parquet"])
def test_a_column_is_selected_by_name_and_the_error_lists_the_existing_ones(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix}", TWO, "Words")
    assert load_prompts(str(path), "Words") == load_prompts(str(path), "words") == TWO
    assert load_prompts(str(write(tmp_path / f"q{suffix}", TWO, "Prompt"))) == TWO  # as PartiPrompts has it
    message, of_another = refused(path), refused(path, "text")
    assert message.startswith(str(path)) and 'under "prompt"' in message.replace("column named", "under")
    assert message.endswith(f"choose the column, there are {'image' if suffix == '.parquet' else 'n'}, Words")
    assert '"text"' in of_another and "Words" in of_another


def test_the_exact_column_comes_before_one_in_other_letters(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"PROMPT": ["no"], "prompt": ["yes"]}), path)
    assert load_prompts(str(path)) == ["yes"] and load_prompts(str(path), "PROMPT") == ["no"]


def test_text_has_no_column(tmp_path: Path) -> None:
    assert "no columns, leave out column 'text'" in refused(write(tmp_path / "p.txt", TWO), "text")


@given(prompts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=5))
@settings(deadline=None)
def test_parquet_gives_back_any_text(prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        column = pa.array(prompts, pa.string()).cast(kind)
        parquet.write_table(pa.table({"prompt": column}), path, row_group_size=2)
        expected = [prompt.strip() for prompt in prompts if prompt.strip()]
        if expected:
            assert load_prompts(str(path)) == expected
        else:
            assert "no prompts in this file" in refused(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], 'row 2: expected a text under "prompt", got null'),
        ([None, None], 'row 1: expected a text under "prompt", got null'),
        ([3], 'row 1: expected a text under "prompt", got int'),
        ([["a"]], 'expected texts under "prompt", got list<'),  # not read: 296 bytes of such took 7 GB
        ([{"text": "a"}], 'expected texts under "prompt", got struct<'),
        ([b"\xff"], "got bytes"),
        ([], "no prompts in this file"),
    ],
)
def test_cells_that_are_not_text_are_reported_with_their_row(
    tmp_path: Path, values: list[object], message: str
) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": values}), path)
    assert refused(path).startswith(str(path)) and message in refused(path)


def test_a_table_with_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"prompt": pa.array(["a"] * 3).dictionary_encode()}), tmp_path / "p.parquet")
    assert load_prompts(str(tmp_path / "p.parquet")) == ["a"] * 3
    monkeypatch.setattr("steer.apps.prompts.MAX_ROWS", 2)
    assert refused(tmp_path / "p.parquet").endswith("p.parquet: 3 rows; at most 2 are read")


def test_some_bytes_that_stand_for_many_are_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["a star"] * 5000}), path)
    assert load_prompts(str(path)) == ["a star"] * 5000
    monkeypatch.setattr("steer.apps.prompts.MAX_CHARACTERS", 29_999)
    assert refused(path).endswith("p.parquet: more than 29999 characters of text")
    forged = (Path(__file__).parent / "hard/corpus/parquet/values").read_bytes()  # it says −20 values, which took 7 GB
    path.write_bytes(forged)
    assert refused(path).endswith("not a parquet file that can be read (0 of 4 rows)")


def test_null_in_json_lines_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    assert 'line 2: expected a text under "prompt", got null' in refused(tmp_path / "p.jsonl")


def test_broken_parquet_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", TWO * 50)
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", b"a circle\n", whole[:-20], whole[:4] + bytes(200) + whole[204:]):
        path.write_bytes(broken)
        assert refused(path).startswith(f"{path}: ")
    assert "cannot read the prompt file (Is a directory)" in refused(tmp_path.rename(tmp_path.with_suffix(".parquet")))


def test_an_empty_file_of_every_format_and_another_format_are_refused(tmp_path: Path) -> None:
    for suffix in ("txt", "jsonl", "json", "csv", "tsv", "parquet"):
        (tmp_path / f"p.{suffix}").write_bytes(b"")
        assert refused(tmp_path / f"p.{suffix}").startswith(str(tmp_path))
        assert "No such file" in refused(str(tmp_path / f"none.{suffix}"))
    (tmp_path / "p.xlsx").write_text("prompt\na\n")
    assert "prompts are read from .txt, .jsonl, .json, .csv, .tsv, .parquet files" in refused(tmp_path / "p.xlsx")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.parquet", TWO)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(path) == f"{path}: parquet needs pyarrow: pip install 'steer-diffusion[train]'"


def test_reading_prompts_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", TWO)
    code = (
        f"import sys; from steer.apps.prompts import load_prompts; load_prompts({str(path)!r}); "
        "print({'torch', 'pyarrow', 'huggingface_hub', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_embedded_lists_are_found_by_name_and_near_ones_are_reported() -> None:
    for name, path in PROMPTS.items():
        assert load_prompts(name) == load_prompts(str(path))
    assert "unknown prompts 'scenes-trainning': use scenes-training" in refused("scenes-trainning")
    assert "or a data set of the hub, ORGANISATION/NAME[:SPLIT]" in refused("nothing like it")
    for source in ("", "a/b/c", "/nowhere", "org/name:", "x" * 5000, "a\0b"):
        assert "unknown prompts" in refused(source)


# The hub.


class Hub:
    """Files of one data set by revision, at the two functions of the hub's library that ask for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.revisions: dict[str | None, list[str]] = {None: []}

    def add(self, name: str, prompts: list[str], column: str = "prompt", revision: str | None = None) -> None:
        write(self.folder / str(revision) / name, prompts, column)
        self.revisions.setdefault(revision, []).append(name)

    def dataset_info(self, data_set: str, revision: str | None = None) -> SimpleNamespace:
        assert data_set == "org/name"
        if revision not in self.revisions:
            raise errors.RevisionNotFoundError("none", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.revisions[revision]])

    def hf_hub_download(self, data_set: str, name: str, repo_type: str, revision: str | None = None) -> str:
        assert (data_set, repo_type) == ("org/name", "dataset") and name in self.revisions[revision]
        return str(self.folder / str(revision) / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.hf_hub_download)
    monkeypatch.chdir(tmp_path)
    return made


LAYOUTS: dict[str, dict[str, list[str]]] = {
    "shards": {
        "data/train-00001-of-00002.parquet": ["a star"],
        "data/train-00000-of-00002.parquet": ["a circle"],
        "data/test-00000-of-00001.parquet": ["held"],
        "data/train_unique-00000-of-00001.parquet": ["other"],
    },
    "old shards": {
        "data/train-00000-of-00001-0123abcdef.parquet": TWO,
        "data/test-00000-of-00001-0123abcdef.parquet": ["held"],
    },
    "one file a split": {"train.jsonl": TWO, "test.jsonl": ["held"], "README.txt": ["about"]},
    "words in names": {"my_train2.tsv": TWO, "my-test.tsv": ["held"]},
    "folders": {"train/a.txt": TWO[:1], "train/b.txt": TWO[1:], "test/a.txt": ["held"]},
    "no splits": {"PartiPrompts.tsv": TWO, "README.txt": ["about"], "requirements.txt": ["about"]},
    "two formats": {"train.txt": ["other"], "train.parquet": TWO},
    "topmost": {"train.tsv": TWO, "old/train.tsv": ["other"]},
    "configurations": {"default/train.jsonl": TWO, "b/train.jsonl": ["other"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_the_split_and_no_other_are_read_in_order(hub: Hub, layout: str) -> None:
    for name, prompts in LAYOUTS[layout].items():
        hub.add(name, prompts)
    hub.add("default/train/0000.parquet", ["converted"], revision=CONVERTED)
    assert load_prompts("org/name") == load_prompts("org/name:train") == TWO
    if any("test" in name for name in LAYOUTS[layout]):
        assert load_prompts("org/name:test") == ["held"]


def test_a_split_named_in_full_is_not_another(hub: Hub) -> None:
    hub.add("data/train-00000-of-00001.parquet", TWO)
    hub.add("data/train_unique-00000-of-00001.parquet", ["other"])
    assert load_prompts("org/name:train_unique") == ["other"]


def test_the_conversion_to_parquet_is_read_where_a_data_set_has_other_formats(hub: Hub) -> None:
    hub.add("default/train/0001.parquet", ["a star"], "words", CONVERTED)
    hub.add("default/train/0000.parquet", ["a circle"], "words", CONVERTED)
    hub.add("default/partial-train/0000.parquet", ["part"], "words", CONVERTED)
    hub.add("other/train/0000.parquet", ["other"], "words", CONVERTED)
    hub.revisions[None] = ["prompts.csv", "README.md", "README.txt"]
    assert load_prompts("org/name", "words") == TWO
    assert load_prompts("org/name:other/train", "words") == ["other"]
    assert "choose the column, there are image, words" in refused("org/name")


def test_configurations_are_not_mixed(hub: Hub) -> None:
    hub.add("B/train.jsonl", ["b"])
    hub.add("A/train.jsonl", ["a"])
    assert refused("org/name").endswith("has A/train, B/train: name one, like org/name:A/train")
    assert load_prompts("org/name:A/train") == ["a"] and load_prompts("org/name:b/train") == ["b"]


def test_folders_of_a_data_set_without_splits_can_be_named(hub: Hub) -> None:
    hub.add("animals/all.txt", ["a cat"])
    hub.add("places/all.txt", ["a lake"])
    assert "name one, like org/name:animals/train" in refused("org/name")
    assert load_prompts("org/name:places/train") == ["a lake"]


def test_a_missing_split_is_reported_with_the_existing_files(hub: Hub) -> None:
    hub.add("train.txt", TWO)
    hub.revisions[None] += [f"image{n}.png" for n in range(30)]
    message = refused("org/name:validation")
    assert (
        message.startswith("data set 'org/name': no ") and "split 'validation': only train.txt, image0.png" in message
    )
    assert message.endswith("and 23 more")
    hub.revisions = {None: []}
    assert "it is empty" in refused("org/name")


def test_shards_may_be_empty_but_not_all(hub: Hub) -> None:
    hub.add("train-00000-of-00002.parquet", [])
    assert "data set 'org/name': no prompts in train-00000-of-00002.parquet" in refused("org/name")
    hub.add("train-00001-of-00002.parquet", TWO)
    assert load_prompts("org/name") == TWO


def test_a_file_that_is_there_comes_before_a_data_set(hub: Hub) -> None:
    hub.add("train.txt", ["of the hub"])
    write(Path("org/name.txt"), TWO)
    assert load_prompts("org/name.txt") == TWO and load_prompts("org/name") == ["of the hub"]
    Path("org/name.txt").rename("org/name")
    assert refused("org/name").startswith("org/name: prompts are read from")  # never another one in its place
    Path("org/name").unlink()
    Path("org/name").mkdir()
    assert "a folder; name a file in it (or a split of the data set of the hub, org/name:train)" in refused("org/name")
    assert load_prompts("org/name:train") == ["of the hub"]


# The hub's own library, before a server of one data set.

SHA = "0123456789" * 4
Serve = Callable[[str, int], None]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Two shards of org/name, or after serve(code, status) that error of the hub to every request."""
    content = {f"train-0000{k}-of-00002.jsonl": json.dumps({"prompt": TWO[k]}).encode() for k in (0, 1)}
    refusal: list[tuple[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            name = self.path.rpartition("/")[2]
            listing = json.dumps(
                {"id": "org/name", "sha": SHA, "siblings": [{"rfilename": name} for name in content]}
            ).encode()
            data = listing if self.path.startswith("/api/datasets/org/name") else content.get(name, b"")
            status, code = (refusal[0][1], refusal[0][0]) if refusal else (200, "")
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            for header, value in {"ETag": f'"{name[:11]}"', "X-Repo-Commit": SHA, "Content-Length": len(data)}.items():
                self.send_header(header, str(value))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        place = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        template = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield lambda code, status: refusal.append((code, status))
        running.shutdown()


def test_a_data_set_is_downloaded_once_and_then_read_offline(
    server: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE=1) not in the hub's cache" in refused("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert load_prompts("org/name") == TWO
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_prompts("org/name") == TWO
    next((tmp_path / "cache").rglob("train-00000*.jsonl")).unlink()
    assert "1 of 2 files are in the hub's cache" in refused("org/name")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("RepoNotFound", 404, "prompts 'org/name': no such file, no such data set on the hub"),
        ("GatedRepo", 403, "is gated: accept its terms at https://huggingface.co/datasets/org/name, then: hf auth"),
        ("", 500, "cannot be read: .*500.*HF_HUB_OFFLINE=1"),
    ],
)
def test_refusals_of_the_hub_are_one_line(server: Serve, code: str, status: int, message: str) -> None:
    server(code, status)
    with pytest.raises(InputError, match=message):
        load_prompts("org/name")
    refused("org/name")


def test_without_a_network_one_line_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody there
    message = refused("org/name")
    assert (
        message.startswith("prompts 'org/name': no such file")
        and "HF_HUB_OFFLINE=1" in message
        and "refused" in message
    )
    assert "org/na--me" in refused("org/na--me")  # a name that no data set may have


# Columns.


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
    assert load_prompts(str(tmp_path / name)) == STARS


def test_quotes_commas_and_line_breaks_inside_a_cell_belong_to_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,n\n"a ""big"", red\nstar",1\n\n,2\n')
    assert read_rows(tmp_path / "p.csv") == [PromptRow('a "big", red\nstar', {"n": "1"})]
    (tmp_path / "p.tsv").write_text('prompt\tn\n"big" stars\t1\nan 8" disc\t2\n')  # written without quoting
    assert load_prompts(str(tmp_path / "p.tsv")) == ['"big" stars', 'an 8" disc']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt\na star, a circle\n", "line 2: 2 values for 1 columns: quote prompts that contain"),
        ("p.csv", 'prompt\n"a star\n', "not a readable table"),
        ("p.csv", "a,b\n1,2\n", 'line 1: expected a column named "prompt" (--prompt-column names another); choose'),
        ("p.csv", "text,caption\n1,2\n", "text, caption could each be the prompts: choose one with --prompt-column"),
        ("p.jsonl", '{"text": "a", "caption": "b"}\n', "line 1: text, caption could each be the prompts"),
        ("p.csv", "prompt,n,n\na,1,2\n", "column 'n' is repeated"),
        ("p.json", '{"prompt": ["a", "b"], "seed": [1]}', "2 values under 'prompt', 1 under 'seed'"),
        ("p.json", "3", "expected a list of prompts or objects, got int"),
        ("p.json", "[3]", "entry 1: expected an object with a text"),
        ("p.json", "[", "not JSON"),
        ("p.json", '{"a": 1}', 'expected a list under "prompt"'),
    ],
)
def test_unreadable_files_are_reported_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as raised:
        load_prompts(str(tmp_path / name))
    assert str(raised.value).startswith(str(tmp_path / name)) and message in str(raised.value)


def test_columns_stay_with_their_prompts(tmp_path: Path) -> None:
    table = pa.table({"Prompt": STARS, "seed": [1, None], "image": [{"bytes": b"x"}] * 2, "note": ["", "n"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert read_rows(tmp_path / "p.parquet") == [
        PromptRow(STARS[0], {"seed": 1}),
        PromptRow(STARS[1], {"note": "n"}),
    ]
    (tmp_path / "p.json").write_text(FILES["json, lists by tag"][1])
    assert load_tagged_prompts(str(tmp_path / "p.json")) == (STARS, ["stars", "others"])
    (tmp_path / "p.csv").write_text("text,caption\na,b\n")
    assert load_prompts(str(tmp_path / "p.csv"), "Caption") == ["b"]


def test_unused_columns_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.csv").write_text("prompt,tag,negative_prompt\na,t,n\nb,t,n\n")
    with caplog.at_level(logging.WARNING):
        assert load_tagged_prompts(str(tmp_path / "p.csv"))[1] == ["t", "t"]
    assert [record.getMessage() for record in caplog.records] == [
        f"steer: {tmp_path / 'p.csv'}: unused columns: negative_prompt"
    ]


# Arguments.

VALUES: dict[str, Any] = {"model": "scenes", "method": "best-of-n", "reward": "brightness", "particles": 2, "steps": 2}
VALUES |= {"guidance": 2.0, "seed": 5, "compare": False, "dtype": None}
SETTINGS = SamplingConfig.of(**VALUES)


def bare(kind: Any) -> Any:
    return kind.__new__(kind)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline])
def test_arguments_are_those_of_the_pipeline_that_a_cell_can_hold(kind: type) -> None:
    names = argument_names(kind)
    assert {"negative_prompt", "height", "width"} <= names.keys()
    assert not names.keys() & {"prompt", "latents", "generator", "output_type", "callback_on_step_end", "prompt_embeds"}


def test_cells_become_the_values_of_the_arguments() -> None:
    cells = {"Negative_Prompt": "7", "seed": "42.0", "height": " 64 ", "width": 72}
    cells |= {"guidance_scale": "3", "note": "x"}
    one = sample_requests([PromptRow("a", cells)], SETTINGS, bare(StableDiffusionPipeline))[0]
    assert one.arguments == {"negative_prompt": "7", "height": 64, "width": 72}
    assert (one.settings.seed, one.settings.guidance, one.settings.steps) == (42, 3.0, 2)


@pytest.mark.parametrize(
    "cells", [{"seed": "x"}, {"seed": -1}, {"seed": 2**63}, {"height": "tall"}, {"num_inference_steps": 0.5}]
)
def test_a_cell_that_does_not_fit_is_named_with_its_prompt(cells: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="prompt 'a'") as raised:
        sample_requests([PromptRow("a", cells)], SETTINGS, bare(StableDiffusionPipeline))
    assert next(iter(cells)).split("_")[-1] in str(raised.value)


def test_equal_rows_have_different_seeds() -> None:
    rows = [PromptRow("a"), PromptRow("b"), PromptRow("a", {"id": 3}), PromptRow("a", {"seed": 1}), PromptRow("a")]
    requests = sample_requests(rows, SETTINGS, bare(StableDiffusionPipeline))
    assert [one.settings.seed for one in requests] == [5, 5, 6, 1, 7]


def test_arguments_of_a_untrusted_image_are_checked() -> None:
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


QUICK = ["--method", "best-of-n", "--reward", "brightness", "--particles", "2", "--steps", "2", "--no-compare"]


def test_rows_are_sampled_with_their_own_arguments_and_equal_ones_differ(
    steer: Steer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.csv").write_text(
        "prompt,negative_prompt,seed,Category\na star,,,x\na star,,,x\na star,a circle,,x\na star,,1,x\n"
    )
    command = [
        "sample",
        "--prompts",
        tmp_path / "p.csv",
        *QUICK,
        "--guidance",
        4,
        "--seed",
        0,
        "--out",
        tmp_path / "o",
    ]
    code, _, err = steer(*command)
    assert code == 0, err
    warnings = [record.getMessage() for record in caplog.records if "unused columns" in record.getMessage()]
    assert warnings == ["steer: prompts: unused columns: Category"]
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
    command = ["sample", "--prompts", tmp_path / "p.csv", *QUICK, "--out", tmp_path / "o"]
    code, _, err = steer(*command)
    assert code == 2 and "choose one with --prompt-column" in err
    assert steer(*command, "--prompt-column", "caption")[0] == 0
    assert json.loads((tmp_path / "o/report.json").read_text())["prompts"][0]["prompt"] == "a star"
    code, _, err = steer("sample", "a star", *QUICK, "--prompt-column", "caption", "--out", tmp_path / "p")
    assert code == 2 and "--prompt-column belongs to --prompts FILE" in err


def test_tags_are_read_beside_the_prompts(tmp_path: Path) -> None:
    lines = [{"tag": "x", "prompt": "one"}, {"tag": "y", "prompt": " "}, {"tag": " z", "prompt": "two"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert load_tagged_prompts(str(path)) == (["one", "two"], ["x", "z"])
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\none\tx\n\ntwo\tz\n")
    assert load_tagged_prompts(str(tmp_path / "p.tsv")) == (["one", "two"], None)
    assert load_tagged_prompts(str(tmp_path / "p.tsv"), tag="category") == (["one", "two"], ["x", "z"])
    (tmp_path / "p.txt").write_text("one\n")
    assert load_tagged_prompts(str(tmp_path / "p.txt")) == (["one"], None)
    with pytest.raises(InputError, match="there are Category"):
        load_tagged_prompts(str(tmp_path / "p.tsv"), tag="tag")
    prompts, tags = load_tagged_prompts("scenes-heldout")
    assert tags is not None and (prompts[2], tags[2]) == ("four black triangles", "counting")
