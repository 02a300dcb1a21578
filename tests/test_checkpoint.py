"""Checkpoints: restored bit for bit, verified, and complete after a crash, a full disk or a power cut at any step."""

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import environment_with, run
from torch import Tensor

from steer.errors import InputError
from steer.training import checkpoint as checkpoint_files
from steer.training.checkpoint import MANIFEST, Checkpoint, Checkpoints, _manifest_bytes

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, NaNs and signs of zero included."""
    bits = [one.contiguous().flatten().view(torch.uint8) for one in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def content(step: int, version: int = 0) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(10 * step + version)
    weights = {"b": torch.randn(3, 5, generator=generator), "a": torch.randn(2, generator=generator).bfloat16()}
    return {"weights": weights, "none": {}}, {"state": {"step": step, "version": version, "rate": 0.1}}


def save(folder: Path, step: int, version: int = 0, keep: int = 1, **options: Any) -> Path:
    return Checkpoints(folder, keep).save(step, *content(step, version), **options)


def version_of(checkpoint: Checkpoint) -> int:
    """Version of its step that a checkpoint holds; all of its files must belong to it."""
    version: int = checkpoint.json("state")["version"]
    tensors, values = content(checkpoint.step, version)
    assert checkpoint.json("state") == values["state"] and checkpoint.tensors("none") == {}
    weights = checkpoint.tensors("weights")
    assert weights.keys() == {"a", "b"} and all(same(weights[key], tensors["weights"][key]) for key in weights)
    return version


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real fsync takes long on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


def test_a_checkpoint_is_a_folder_of_plain_files(tmp_path: Path) -> None:
    path = save(tmp_path / "runs" / "one", 120)
    assert path == tmp_path / "runs" / "one" / "step-00000120" and names(path.parent) == [path.name]
    assert names(path) == [MANIFEST, "none.safetensors", "state.json", "weights.safetensors"]
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["version"] == 1 and manifest["step"] == 120
    for name, one in manifest["files"].items():
        assert one["size"] == (path / name).stat().st_size
        assert one["sha256"] == subprocess.check_output(["sha256sum", path / name], text=True).split()[0]
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / MANIFEST).stat().st_mode}  # for all who may
    newest, skipped = Checkpoints(path.parent).latest()
    assert newest == Checkpoint.open(path) == Checkpoint(path, 120) and skipped == []
    assert version_of(Checkpoint.open(path.rename(tmp_path / "elsewhere"))) == 0


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, of any type and shape, contiguous or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    bits = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    tensor = (bits % 2 if dtype == torch.bool else bits).view(dtype).view(shape)
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


@pytest.mark.hard
@settings(max_examples=40, deadline=None)
@given(named=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: key.isprintable()), tensors()))
def test_tensors_come_back_bit_for_bit(named: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(folder).save(0, {"x": named}, {})
        newest, _ = Checkpoints(folder).latest()
        assert newest is not None
        loaded = newest.tensors("x")
    assert loaded.keys() == named.keys() and all(same(loaded[key], named[key]) for key in named)


def test_views_that_share_memory_and_leaves_are_saved(tmp_path: Path) -> None:
    base = torch.randn(4, 6, requires_grad=True)
    named = {"all": base, "row": base[1], "column": base[:, 2], "again": base, "wide": torch.ones(1).expand(3, 2)}
    named |= {"strided": torch.arange(12)[::5], "parameter": torch.nn.Parameter(torch.ones(2))}
    loaded = Checkpoint.open(Checkpoints(tmp_path).save(1, {"x": named}, {})).tensors("x")
    assert all(same(loaded[key], value.detach()) for key, value in named.items())


def test_values_come_back_and_equal_state_gives_equal_bytes(tmp_path: Path) -> None:
    value = {"b": [1, 0.1 + 0.2, -0.0, 1e-320, 2**70, True, None, "ε\ud800"], "a": {"": {}}}
    one = Checkpoints(tmp_path / "1").save(3, {"x": {"p": torch.ones(2), "q": torch.ones(3)}, "y": {}}, {"v": value})
    turned = {key: value[key] for key in reversed(value)}
    two = Checkpoints(tmp_path / "2").save(3, {"y": {}, "x": {"q": torch.ones(3), "p": torch.ones(2)}}, {"v": turned})
    assert repr(Checkpoint.open(one).json("v")) == repr({"a": value["a"], "b": value["b"]})
    assert names(one) == names(two)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names(one))


@pytest.mark.parametrize(
    ("named", "values", "message"),
    [
        ({}, {"state": {"best": -math.inf}}, "state is not plain JSON.*save non-finite numbers in a tensor"),
        ({}, {"state": [math.nan]}, "state is not plain JSON"),
        ({}, {"state": {"deep": [{3: "x"}]}}, "state has the key 3, which JSON would convert to a string"),
        ({}, {"state": torch.ones(1)}, "state is not plain JSON"),
        ({}, {"manifest": 1}, "a JSON file named 'manifest'"),
        ({}, {"../state": 1}, "a JSON file named '../state'"),
        ({"a/b": {}}, {}, "a file of tensors named 'a/b'"),
        ({"": {}}, {}, "a file of tensors named ''"),
        ({"x": {"p": 3}}, {}, "x: 'p' is not a dense tensor"),
        ({"x": {"p": torch.eye(2).to_sparse()}}, {}, "x: 'p' is not a dense tensor"),
        ({"x": {"__metadata__": torch.ones(1)}}, {}, "x has a tensor named '__metadata__'"),
    ],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(
    tmp_path: Path, named: Any, values: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Checkpoints(tmp_path).save(1, named, values)
    assert names(tmp_path) == []


def test_steps_and_numbers_to_keep_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be at least 0, got -1"):
        save(tmp_path, -1)
    with pytest.raises(InputError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    assert save(tmp_path, 10**9).name == "step-1000000000"
    assert save(tmp_path, 0, keep=2).name == "step-00000000"
    newest, _ = Checkpoints(tmp_path).latest()
    assert newest and newest.step == 10**9  # by number, not by letters


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(InputError, match=re.escape(str(file.parent))):
                Checkpoint.open(path)
        file.write_bytes(whole)
    Checkpoint.open(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest that is right in itself, as somebody may make it who means harm."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_bytes(_manifest_bytes(manifest["step"], manifest["files"]))


def link(file: Path, target: Path) -> None:
    shutil.copy(file, target)
    file.unlink()
    file.symlink_to(target)


ENTRY = {"size": 4, "sha256": "0" * 64}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda p: os.truncate(p / "weights.safetensors", 9), "weights.safetensors is corrupt: 9 bytes, not"),
    "empty": (lambda p: os.truncate(p / "state.json", 0), "state.json is corrupt: 0 bytes, not"),
    "longer": (lambda p: (p / "state.json").open("a").write("\n"), "state.json is corrupt: .* bytes, not"),
    "missing": (lambda p: (p / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "unknown": (lambda p: (p / "more.json").write_text("1"), "more.json is not in the checkpoint's manifest"),
    "unknown folder": (lambda p: (p / "more").mkdir(), "more is not in the checkpoint's manifest"),
    "hidden": (lambda p: (p / ".tmp3a").write_text("1"), ".tmp3a is not in the checkpoint's manifest"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "cut manifest": (lambda p: os.truncate(p / MANIFEST, 100), "is not a manifest"),
    "empty manifest": (lambda p: os.truncate(p / MANIFEST, 0), "is not a manifest"),
    "garbage": (lambda p: (p / MANIFEST).write_bytes(b"\xff\x00\x80garbage"), "is not a manifest"),
    "a list": (lambda p: (p / MANIFEST).write_text("[]"), "is not a manifest of version 1"),
    "deep": (lambda p: (p / MANIFEST).write_text("[" * 10**5), "is not a manifest"),
    "huge": (lambda p: (p / MANIFEST).write_text(" " * 2**20 + "{}"), "is too large"),
    "long number": (lambda p: (p / MANIFEST).write_text('{"version": ' + "9" * 5000 + "}"), "is not a manifest"),
    "later version": (lambda p: (p / MANIFEST).write_text('{"version": 2}'), "is not a manifest of version 1"),
    "no files": (lambda p: (p / MANIFEST).write_text('{"version": 1, "step": 1}'), "step or files are malformed"),
    "step": (lambda p: rewritten(p, lambda t: t.update(step=True)), "step or files are malformed"),
    "below": (lambda p: rewritten(p, lambda t: t.update(step=-1)), "step or files are malformed"),
    "entry": (lambda p: rewritten(p, lambda t: t["files"].update(a=3)), "step or files are malformed"),
    "size": (
        lambda p: rewritten(p, lambda t: t["files"].update(a=ENTRY | {"size": 1.0})),
        "step or files are malformed",
    ),
    "more": (lambda p: rewritten(p, lambda t: t["files"].update(a=ENTRY | {"x": 1})), "step or files are malformed"),
    "above": (lambda p: rewritten(p, lambda t: t["files"].update({"../a.json": ENTRY})), "refers to '../a.json'"),
    "root": (lambda p: rewritten(p, lambda t: t["files"].update({"/etc/a.json": ENTRY})), "refers to '/etc/a.json'"),
    "dots": (lambda p: rewritten(p, lambda t: t["files"].update({"..": ENTRY})), "refers to '..'"),
    "line": (lambda p: rewritten(p, lambda t: t["files"].update({"a.json\n": ENTRY})), r"refers to 'a.json\\n'"),
    "code": (lambda p: rewritten(p, lambda t: t["files"].update({"a.pkl": ENTRY})), "refers to 'a.pkl'"),
    "itself": (lambda p: rewritten(p, lambda t: t["files"].update({MANIFEST: ENTRY})), f"refers to '{MANIFEST}'"),
    "link": (lambda p: link(p / "state.json", p.parent / "target"), "state.json is a link, a folder or a device"),
    "linked manifest": (lambda p: link(p / MANIFEST, p.parent / "target"), f"{MANIFEST} is a link"),
    "folder": (lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()), "state.json is a link, a folder"),
    "pipe": (lambda p: ((p / "state.json").unlink(), os.mkfifo(p / "state.json")), "state.json is a link, a folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1, keep=3)
    save(tmp_path, 2, keep=3)
    path = save(tmp_path, 3, keep=3)
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    newest, skipped = Checkpoints(tmp_path).latest()
    assert newest and newest.step == 2 and version_of(newest) == 0 and skipped == [str(caught.value)]
    assert version_of(Checkpoint.open(save(tmp_path, 3, keep=3))) == 0  # and it can be saved again
    assert Checkpoints(tmp_path).latest() == (Checkpoint(path, 3), [])


def test_of_many_damaged_ones_each_has_its_line(tmp_path: Path) -> None:
    for step in range(1, 4):
        (save(tmp_path, step, keep=9) / "state.json").unlink()
    shutil.copytree(save(tmp_path, 4, keep=9), tmp_path / "step-00000005")
    shutil.rmtree(tmp_path / "step-00000004")
    newest, skipped = Checkpoints(tmp_path).latest()
    assert newest is None and [re.findall(r"step-0+(\d)", line)[0] for line in skipped] == ["5", "3", "2", "1"]
    assert "holds step 4" in skipped[0]


def test_where_nothing_is_nothing_is_found(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() == (None, [])
    good = save(tmp_path / "good", 1)
    for name in ("step-1", "step-000000001", "step-00000001.bak", "xstep-00000001", ".step-00000001.new-00000000"):
        shutil.copytree(good, tmp_path / "run" / name)
    (tmp_path / "run" / "step-00000001").symlink_to(good)
    (tmp_path / "run" / "step-00000008").write_text("")
    assert Checkpoints(tmp_path / "run").latest() == (None, [])
    for step in (1, 8):
        with pytest.raises(InputError, match=f"step-0000000{step} is not a folder, .*; remove it"):
            save(tmp_path / "run", step)
    assert version_of(Checkpoint.open(good)) == 0
    for path, message in ((tmp_path / "none", "is not a folder"), (tmp_path, "manifest.json is missing")):
        with pytest.raises(InputError, match=message):
            Checkpoint.open(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read as a folder of checkpoints"):
        Checkpoints(tmp_path / "file").latest()


@pytest.mark.parametrize("name", ["other", "../step-00000001/state", "manifest", "", "weights"])
def test_a_file_that_a_checkpoint_lacks_is_refused(tmp_path: Path, name: str) -> None:
    opened = Checkpoint.open(save(tmp_path, 1))
    with pytest.raises(InputError, match="has no"):
        opened.json(name)
    assert opened.file("state.json").is_file()


def test_right_sums_of_what_is_no_tensor_file_are_refused_in_reading(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in ("weights.safetensors", "state.json"):
        (path / name).write_bytes(b"[" * 10**5)
        entry = {"size": 10**5, "sha256": checkpoint_files.file_sha256(path / name)}
        rewritten(path, lambda manifest, name=name, entry=entry: manifest["files"].update({name: entry}))
    for read in (lambda: Checkpoint.open(path).tensors("weights"), lambda: Checkpoint.open(path).json("state")):
        with pytest.raises(InputError, match="cannot be read"):
            read()


# Crashes


class Died(BaseException):
    pass


class Machine:
    """Records what is done to files, and fails in call number `fatal`; of a file half is written then.

    With `error` that call alone fails, as on a full disk; without, it is the last that a dying process makes.
    """

    def __init__(self, fatal: int = -1, error: OSError | None = None) -> None:
        self.fatal, self.error = fatal, error
        self.operations: list[str] = []
        self.paths: dict[int, Path] = {}
        self.synced: set[int] = set()  # files whose bytes are on the disk
        self.renamed: list[tuple[Path, Path]] = []  # and names that are not
        self.dead = False

    @contextmanager
    def running(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            opened = os.open

            def watched(path: Any, *args: Any, **options: Any) -> int:
                number = opened(path, *args, **options)
                self.paths[number] = Path(path)
                return number

            patch.setattr(os, "open", watched)
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "chmod"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            patch.setattr(Path, "write_text", self._wrapped("write", Path.write_text))
            patch.setattr(Path, "write_bytes", self._wrapped("write", Path.write_bytes))
            patch.setattr(checkpoint_files, "save_file", self._wrapped("write", checkpoint_files.save_file))
            yield

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Died
            first, last = (self.paths[one] if name == "fsync" else one for one in (args[0], args[-1]))
            path = Path(last if name == "write" and isinstance(last, Path) else first)
            target = f" → {Path(last).name}" if name in ("rename", "replace") else ""
            self.operations.append(re.sub("(new|trash)-[0-9a-f]{8}", r"\1", f"{name} {path.name}{target}"))
            ours = len(self.operations) - 1 == self.fatal
            if ours and self.error and name != "write":
                raise self.error
            try:
                result = original(*args, **options)
            except OSError:  # such as a folder that is there already
                if ours:
                    self._fail()
                raise
            self._remember(name, path, Path(last) if target else path, args[0])
            if ours:
                if name == "write":
                    os.truncate(path, path.stat().st_size // 2)
                self._fail()
            return result

        return call

    def _remember(self, name: str, path: Path, target: Path, number: Any) -> None:
        if name == "write":
            self.synced.discard(path.stat().st_ino)
        elif name in ("rename", "replace"):
            self.renamed.append((path, target))
        elif name == "fsync":
            self.synced.add(os.fstat(number).st_ino)
            self.renamed = [pair for pair in self.renamed if pair[0].parent != path]

    def _fail(self) -> None:
        if self.error:
            raise self.error
        self.dead = True
        raise Died

    def lose_power(self, folder: Path, names_too: bool) -> None:
        """Drop all that no fsync has written to the disk: bytes, and new names if `names_too`."""
        for file in folder.rglob("*"):
            if file.is_file() and file.stat().st_ino not in self.synced:
                os.truncate(file, 0)
        for source, target in reversed(self.renamed if names_too else []):
            if target.exists():
                os.rename(target, source)


def started(folder: Path, kind: str) -> Machine:
    """A folder as the next save finds it, and the machine that wrote it."""
    machine = Machine()
    with machine.running():
        save(folder, 1)
        if kind == "the same step":
            save(folder, 2)
        if kind == "left-overs":  # one of each kind
            save(folder, 2, version=1)
            (folder / "step-00000002").rename(folder / ".step-00000002.old")
            for name in (".step-00000003.new-00000000", ".step-00000001.trash-11111111"):
                (folder / name).mkdir()
                (folder / name / "state.json").write_text("{}")
    return machine


def consistent(folder: Path, atleast: int) -> Checkpoint:
    newest, skipped = Checkpoints(folder).latest()
    assert newest and newest.step >= atleast and skipped == []
    version_of(newest)
    return newest


# The save under test, and the step that is there before it.
KINDS = {"the next step": (2, 1), "the same step": (2, 2), "left-overs": (3, 2)}


def calls(tmp_path: Path, kind: str) -> int:
    started(tmp_path / "count", kind)
    machine = Machine()
    with machine.running():
        save(tmp_path / "count", KINDS[kind][0], version=1)
    assert len(machine.operations) >= 20
    return len(machine.operations)


@pytest.mark.parametrize("power", ["stays", "is cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_dying_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, kind: str, power: str) -> None:
    step, before = KINDS[kind]
    for fatal in range(calls(tmp_path, kind)):
        folder = tmp_path / f"{fatal}"
        machine = started(folder, kind)
        machine.operations, machine.fatal = [], fatal
        with machine.running(), pytest.raises(Died):
            save(folder, step, version=1)
        consistent(folder, before)
        for names_too in (False, True) if power == "is cut" else ():
            machine.lose_power(folder, names_too)
            consistent(folder, before)
        save(folder, step, version=1)
        assert version_of(consistent(folder, step)) == 1 and names(folder) == [f"step-0000000{step}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_refuses_at_any_step_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    step, before = KINDS[kind]
    refused = 0
    for fatal in range(total := calls(tmp_path, kind)):
        folder = tmp_path / f"{fatal}"
        started(folder, kind)
        machine = Machine(fatal, OSError(errno.ENOSPC, "No space left on device"))
        with machine.running():
            try:
                save(folder, step, version=1)
            except InputError as error:
                refused += 1
                assert re.search(rf"{folder}: saving step {step} failed.*No space left.*make room", str(error))
        consistent(folder, before)
        left = {*folder.glob(".*.new-*")} - {folder / ".step-00000003.new-00000000"}
        assert not left  # room is not taken by half a checkpoint
        save(folder, step, version=1)
        assert version_of(consistent(folder, step)) == 1 and names(folder) == [f"step-0000000{step}"]
    assert refused >= total - 1  # the folder that is there already is no error


def test_dying_again_and_again_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(40):
        folder = tmp_path / f"{number}"
        machine, step, reached = started(folder, "the same step"), 2, 2
        for _ in range(3):
            machine.operations, machine.dead = [], False
            machine.fatal, step = rng.randrange(45), step + rng.randrange(2)
            try:
                with machine.running():
                    save(folder, step, version=rng.randrange(2))
            except Died:
                machine.lose_power(folder, names_too=rng.random() < 0.5)
                machine.renamed = []  # what was not lost is on the disk
            reached = consistent(folder, reached).step


def test_nothing_takes_its_name_before_it_is_on_the_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)
    machine = Machine()
    with machine.running():
        save(tmp_path, 2)
    operations = [one for one in machine.operations if not one.startswith("chmod")]
    new, folder = ".step-00000002.new", tmp_path.name
    files = ["weights.safetensors", "none.safetensors", "state.json", "manifest.json"]
    assert operations[0] == f"mkdir {folder}" and operations[1] == f"mkdir {new}"
    assert operations[2:13] == [
        *(f"{verb} {file}" for file in files for verb in ("write", "fsync")),
        f"fsync {new}",
        f"rename {new} → step-00000002",
        f"fsync {folder}",
    ]
    assert operations[13:15] == ["rename step-00000001 → .step-00000001.trash", f"fsync {folder}"]
    assert {one.split()[0] for one in operations[15:]} == {"unlink", "rmdir"} and operations[
        -1
    ] == "rmdir .step-00000001.trash"


def test_another_checkpoint_of_a_step_is_hidden_before_it_is_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    written = [(path / name).stat().st_mtime_ns for name in names(path)]
    machine = Machine()
    with machine.running():
        save(tmp_path, 2)  # equal: what is there stays
    assert [(path / name).stat().st_mtime_ns for name in names(path)] == written
    assert not [one for one in machine.operations if one.startswith("rename")]
    machine = Machine()
    with machine.running():
        save(tmp_path, 2, version=1)
    assert [one for one in machine.operations if one.startswith("rename") or one == f"fsync {tmp_path.name}"] == [
        "rename step-00000002 → .step-00000002.old",
        "rename .step-00000002.new → step-00000002",
        f"fsync {tmp_path.name}",
        "rename .step-00000002.old → .step-00000002.old.trash",
        f"fsync {tmp_path.name}",
    ]
    assert version_of(consistent(tmp_path, 2)) == 1 and names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(
    ("keep", "pinned", "left"),
    [(1, (), [5]), (2, (), [4, 5]), (9, (), [1, 2, 3, 4, 5]), (1, (2,), [2, 5]), (2, [1, 5, 77], [1, 4, 5])],
)
def test_rotation_keeps_the_newest_and_the_pinned(tmp_path: Path, keep: int, pinned: Any, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep, pinned=pinned)
    assert names(tmp_path) == [f"step-0000000{step}" for step in left]
    assert all(version_of(Checkpoint.open(path)) == 0 for path in tmp_path.iterdir())


def test_taken_up_again_before_its_end_a_run_keeps_what_it_just_saved(tmp_path: Path) -> None:
    for step in (1, 3, 4):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4)]
    save(tmp_path, 4, keep=1, version=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_disk_that_is_full_in_fact(tmp_path: Path) -> None:
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"weights": {"w": torch.zeros(50_000)}}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(InputError, match=r"saving step 2 failed.*File too large.*make room"):
            Checkpoints(tmp_path).save(2, big, {})
        with pytest.raises(InputError, match=r"saving step 2 failed.*File too large.*make room"):
            Checkpoints(tmp_path).save(2, {}, {"text": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"] and consistent(tmp_path, 1).step == 1
    with pytest.raises(InputError, match="saving step 1 failed"):
        save(tmp_path / "step-00000001" / "state.json", 1)  # a file is no folder


def killed_many_times(folder: Path, repeats: int) -> None:
    """In a process of its own: children that save without a pause, each killed at some moment."""
    os.fsync = lambda number: None  # a kill loses nothing that a power cut would
    rng, reached = random.Random(1), 0
    save(folder, 0)
    for _ in range(repeats):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            step = consistent(folder, reached).step
            while True:
                save(folder, step, version=1)
                step += 1
                save(folder, step)
                os.write(writing, b".")
        os.close(writing)
        for _ in range(2):  # however slow the machine is
            begun = time.monotonic()
            assert os.read(reading, 1)
        time.sleep(rng.uniform(0, time.monotonic() - begun))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        os.close(reading)
        assert consistent(folder, reached).step >= reached + 2
        reached = consistent(folder, reached).step
    save(folder, reached + 1)
    assert names(folder) == [f"step-{reached + 1:08d}"]


@pytest.mark.hard
def test_a_process_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    code = f"import pathlib, test_checkpoint as t; t.killed_many_times(pathlib.Path({str(tmp_path)!r}), 15)"
    here = Path(__file__).parent
    run(["-c", code], here, environment_with(here)).check_returncode()
