"""Prompts against files that other writers wrote, and the hub against a small one of our own."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from steer.apps.prompts import load_prompts, read_prompts
from steer.assets import PROMPTS
from steer.errors import InputError

TWO = ["a circle", "a star"]
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
        read_prompts(source, column) if isinstance(source, Path) else load_prompts(source, column)
    told = str(raised.value)
    assert "\n" not in told and len(told) < 500
    return told


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".parquet", ".PARQUET"])
def test_every_format_holds_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix.lower()}", [TWO[0], "  ", f" {TWO[1]} "])
    path = path.rename(path.with_suffix(suffix))
    assert read_prompts(path) == load_prompts(str(path)) == TWO


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".parquet"])
def test_another_column_is_chosen_by_name_and_the_error_names_those_there_are(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix}", TWO, "Words")
    assert read_prompts(path, "Words") == read_prompts(path, "words") == TWO
    assert read_prompts(write(tmp_path / f"q{suffix}", TWO, "Prompt")) == TWO  # as PartiPrompts has it
    told, of_another = refused(path), refused(path, "text")
    assert told.startswith(str(path)) and 'under "prompt"' in told.replace("column named", "under")
    assert told.endswith(f"choose the column, there are {'image' if suffix == '.parquet' else 'n'}, Words")
    assert '"text"' in of_another and "Words" in of_another


def test_the_exact_column_comes_before_one_in_other_letters(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"PROMPT": ["no"], "prompt": ["yes"]}), path)
    assert read_prompts(path) == ["yes"] and read_prompts(path, "PROMPT") == ["no"]


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
            assert read_prompts(path) == expected
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
def test_what_is_no_text_in_a_table_is_named_with_its_row(tmp_path: Path, values: list[object], message: str) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": values}), path)
    assert refused(path).startswith(str(path)) and message in refused(path)


def test_a_table_of_more_rows_than_anybody_has_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"prompt": pa.array(["a"] * 3).dictionary_encode()}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == ["a"] * 3
    monkeypatch.setattr("steer.apps.prompts.MAX_ROWS", 2)
    assert refused(tmp_path / "p.parquet").endswith("p.parquet: 3 rows; at most 2 are read")


def test_some_bytes_that_stand_for_many_are_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["a star"] * 5000}), path)
    assert read_prompts(path) == ["a star"] * 5000
    monkeypatch.setattr("steer.apps.prompts.MAX_CHARACTERS", 29_999)
    assert refused(path).endswith("p.parquet: more than 29999 characters of text")
    forged = (Path(__file__).parent / "hard/corpus/parquet/values").read_bytes()  # it says −20 values, which took 7 GB
    path.write_bytes(forged)
    assert refused(path).endswith("not a parquet file that can be read (0 of 4 rows)")


def test_null_in_json_lines_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    assert 'line 2: expected an object with a text under "prompt", got null' in refused(tmp_path / "p.jsonl")


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
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_embedded_lists_are_found_by_name_and_near_ones_are_told() -> None:
    for name, path in PROMPTS.items():
        assert load_prompts(name) == read_prompts(path)
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


def test_what_the_hub_made_of_a_data_set_is_read_where_it_has_no_such_files(hub: Hub) -> None:
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


def test_a_split_that_there_is_not_is_told_with_what_there_is(hub: Hub) -> None:
    hub.add("train.txt", TWO)
    hub.revisions[None] += [f"image{n}.png" for n in range(30)]
    told = refused("org/name:validation")
    assert told.startswith("data set 'org/name': no ") and "split 'validation': only train.txt, image0.png" in told
    assert told.endswith("and 23 more")
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
            told = json.dumps(
                {"id": "org/name", "sha": SHA, "siblings": [{"rfilename": name} for name in content]}
            ).encode()
            data = told if self.path.startswith("/api/datasets/org/name") else content.get(name, b"")
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


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody there
    told = refused("org/name")
    assert told.startswith("prompts 'org/name': no such file") and "HF_HUB_OFFLINE=1" in told and "refused" in told
    assert "org/na--me" in refused("org/na--me")  # a name that no data set may have
