"""Checkpoints: bit for bit, verified, and whole after a crash at any moment."""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def version_of(found: Checkpoint) -> int:
    """Which version of its step a checkpoint holds, after a look at all of it."""
    version: int = found.json("state")["version"]
    tensors, values = content(found.step, version)
    assert found.json("state") == values["state"] and found.tensors("none") == {}
    weights = found.tensors("weights")
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
    found, skipped = Checkpoints(path.parent).latest()
    assert found == Checkpoint.open(path) == Checkpoint(path, 120) and skipped == []
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


@settings(max_examples=40, deadline=None)
@given(named=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda key: key.isprintable()), tensors()))
def test_tensors_come_back_bit_for_bit(named: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(folder).save(0, {"x": named}, {})
        found, _ = Checkpoints(folder).latest()
        assert found is not None
        loaded = found.tensors("x")
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
    found, _ = Checkpoints(tmp_path).latest()
    assert found and found.step == 10**9  # by number, not by letters


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(InputError, match=re.escape(str(file.parent))):
                Checkpoints.verify(path)
        file.write_bytes(whole)
    Checkpoints.verify(path)


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
    "no files": (lambda p: (p / MANIFEST).write_text('{"version": 1, "step": 1}'), "step or files are wrong"),
    "step": (lambda p: rewritten(p, lambda t: t.update(step=True)), "step or files are wrong"),
    "below": (lambda p: rewritten(p, lambda t: t.update(step=-1)), "step or files are wrong"),
    "entry": (lambda p: rewritten(p, lambda t: t["files"].update(a=3)), "step or files are wrong"),
    "size": (lambda p: rewritten(p, lambda t: t["files"].update(a=ENTRY | {"size": 1.0})), "step or files are wrong"),
    "more": (lambda p: rewritten(p, lambda t: t["files"].update(a=ENTRY | {"x": 1})), "step or files are wrong"),
    "above": (lambda p: rewritten(p, lambda t: t["files"].update({"../a.json": ENTRY})), "names '../a.json'"),
    "root": (lambda p: rewritten(p, lambda t: t["files"].update({"/etc/a.json": ENTRY})), "names '/etc/a.json'"),
    "dots": (lambda p: rewritten(p, lambda t: t["files"].update({"..": ENTRY})), "names '..'"),
    "line": (lambda p: rewritten(p, lambda t: t["files"].update({"a.json\n": ENTRY})), r"names 'a.json\\n'"),
    "code": (lambda p: rewritten(p, lambda t: t["files"].update({"a.pkl": ENTRY})), "names 'a.pkl'"),
    "itself": (lambda p: rewritten(p, lambda t: t["files"].update({MANIFEST: ENTRY})), f"names '{MANIFEST}'"),
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
    for check in (Checkpoints.verify, Checkpoint.open):
        with pytest.raises(InputError, match=message) as caught:
            check(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    found, skipped = Checkpoints(tmp_path).latest()
    assert found and found.step == 2 and version_of(found) == 0 and skipped == [str(caught.value)]
    assert version_of(Checkpoint.open(save(tmp_path, 3, keep=3))) == 0  # and it can be saved again
    assert Checkpoints(tmp_path).latest() == (Checkpoint(path, 3), [])


def test_of_many_damaged_ones_each_has_its_line(tmp_path: Path) -> None:
    for step in range(1, 4):
        (save(tmp_path, step, keep=9) / "state.json").unlink()
    shutil.copytree(save(tmp_path, 4, keep=9), tmp_path / "step-00000005")
    shutil.rmtree(tmp_path / "step-00000004")
    found, skipped = Checkpoints(tmp_path).latest()
    assert found is None and [re.findall(r"step-0+(\d)", line)[0] for line in skipped] == ["5", "3", "2", "1"]
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
    found = Checkpoint.open(save(tmp_path, 1))
    with pytest.raises(InputError, match="has no"):
        found.json(name)
    assert found.file("state.json").is_file()


def test_right_sums_of_what_is_no_tensor_file_are_refused_in_reading(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in ("weights.safetensors", "state.json"):
        (path / name).write_bytes(b"[" * 10**5)
        entry = {"size": 10**5, "sha256": checkpoint_files._sha256(path / name)}
        rewritten(path, lambda manifest, name=name, entry=entry: manifest["files"].update({name: entry}))
    for read in (lambda: Checkpoint.open(path).tensors("weights"), lambda: Checkpoint.open(path).json("state")):
        with pytest.raises(InputError, match="cannot be read"):
            read()
