"""Files: atomic writes, checksums, and images from outside."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import zlib
from io import BytesIO
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from steer.errors import InputError
from steer.files import (
    CHECKSUMS,
    atomic_write,
    atomic_write_with_checksums,
    dumps_with_checksum,
    loads_with_checksum,
    make_folder,
    read_image,
    sync,
    verify_checksums,
    write_checksums,
    write_text,
)
from steer.training.supervised import read_state, write_state

# Atomic writes


def test_a_file_is_replaced_at_the_end_of_the_block_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    with atomic_write(path) as new:
        new.write_text("one")
        assert new.parent == path.parent and not path.exists()
    assert path.read_text() == "one"
    with atomic_write(path) as new:
        new.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "ε ∇ 星\n")
    assert (tmp_path / "file").read_bytes() == "ε ∇ 星\n".encode()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("before", [None, "old"])
def test_after_an_exception_only_the_old_file_is_there(
    tmp_path: Path, error: BaseException, before: str | None
) -> None:
    path = tmp_path / "file"
    if before:
        path.write_text(before)
    with pytest.raises(type(error)), atomic_write(path) as new:
        new.write_text("half")
        raise error
    assert [one.read_text() for one in tmp_path.iterdir()] == ([before] if before else [])


def test_a_temporary_file_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_text("a long half of something")
    write_text(tmp_path / "file", "short")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["short"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_fsync_of_bytes_then_rename_then_fsync_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operations: list[str] = []
    inodes: dict[int, str] = {}
    fsync, replace = os.fsync, os.replace

    def watched(number: int) -> None:
        operations.append(f"fsync {inodes[os.fstat(number).st_ino]}")
        fsync(number)

    def moved(source: Path, target: Path) -> None:
        operations.append(f"{source.name} → {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", moved)
    inodes[tmp_path.stat().st_ino] = "folder"
    with atomic_write(tmp_path / "file") as new:
        new.write_text("x")
        inodes[new.stat().st_ino] = "file"
    assert operations == ["fsync file", "file.new → file", "fsync folder"]


def test_new_folders_are_synced_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("steer.files.sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fatal: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, "refused")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="refused"):
        sync(tmp_path / "file")
    if fatal:
        with pytest.raises(OSError, match="refused"):
            sync(tmp_path)
    else:
        sync(tmp_path)


def test_an_unwritable_path_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# Checksums


FILES = {"a.bin": b"one", "deep/b.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_checksums(tmp_path)
    return tmp_path


def test_sha256sum_reads_the_checksums(folder: Path) -> None:
    assert (folder / CHECKSUMS).read_text().split()[1::2] == [*FILES]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", CHECKSUMS], cwd=folder, check=True, capture_output=True)


def test_files_are_verified_by_the_checksums_of_their_folder_or_its_parent(folder: Path) -> None:
    paths = [folder / name for name in FILES]
    (folder / "other").write_text("x")
    assert verify_checksums(*paths, folder / "other") == [folder / "other"]
    for path in paths:
        whole = path.read_bytes()
        for corrupt in (whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(corrupt)
            with pytest.raises(InputError, match=f"{path} is corrupt: checksum mismatch with {CHECKSUMS}"):
                verify_checksums(*paths)
        path.write_bytes(whole)
    assert verify_checksums(*paths) == []
    (folder / CHECKSUMS).unlink()
    assert verify_checksums(*paths) == paths


@pytest.mark.parametrize("content", [b"x\n", b"\0\xff", b"0" * 64 + b" a.bin\n", b"G" * 64 + b"  a.bin\n"])
def test_malformed_checksums_are_refused(folder: Path, content: bytes) -> None:
    (folder / CHECKSUMS).write_bytes(content)
    with pytest.raises(InputError, match=f"{CHECKSUMS} is corrupt; restore it, or delete it"):
        verify_checksums(folder / "a.bin")
    (folder / CHECKSUMS).write_bytes(b"0" * (1 << 21))
    with pytest.raises(InputError, match=f"{CHECKSUMS} is too large"):
        verify_checksums(folder / "a.bin")


def test_files_are_renamed_together_and_their_checksums_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed, replace = [], os.replace

    def moved(source: Path, target: Path) -> None:
        assert all((tmp_path / f"{name}.new").exists() or name in renamed for name in ("a", "b", CHECKSUMS))
        renamed.append(target.name)
        replace(source, target)

    with atomic_write_with_checksums(tmp_path, ["a", "b"]) as new:
        for path in new.values():
            path.write_text(path.name)
        monkeypatch.setattr(os, "replace", moved)
    assert renamed == [CHECKSUMS, "b", "a"] and verify_checksums(tmp_path / "a", tmp_path / "b") == []
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(InputError, match=r"cannot write there \(full\); make room"),
        atomic_write_with_checksums(tmp_path, ["a"]) as new,
    ):
        new["a"].write_text("half")
        raise OSError("full")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUES, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_json_with_a_checksum_round_trips_and_no_flipped_bit_is_accepted(
    original: dict[str, object], data: st.DataObject
) -> None:
    text = dumps_with_checksum(original)
    assert loads_with_checksum(text) == original and list(json.loads(text))[-1] == "sha256"
    place, bit = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 6))
    corrupt = text[:place] + chr(ord(text[place]) ^ 1 << bit) + text[place + 1 :]
    try:
        loaded = loads_with_checksum(corrupt)
    except ValueError:  # no JSON, or another checksum
        return
    assert "sha256" not in loaded or place, corrupt
    loaded = {key: value for key, value in loaded.items() if key in original}
    assert loaded == original, "only the key of the checksum has changed"


def test_infinities_and_json_without_a_checksum_are_read() -> None:
    assert loads_with_checksum(dumps_with_checksum({"a": -math.inf, "b": "\ud800"})) == {"a": -math.inf, "b": "\ud800"}
    assert loads_with_checksum('{"a": 1}') == {"a": 1} and loads_with_checksum("[]") == []
    with pytest.raises(InputError, match="checksum mismatch: the file was changed after it was written"):
        loads_with_checksum(dumps_with_checksum({"a": 1}).replace("1", "2", 1))


def test_a_training_state_with_a_flipped_bit_is_refused_and_an_older_format_is_read(tmp_path: Path) -> None:
    path, state = tmp_path / "state.pt", {"step": 3, "states": [{"w": torch.arange(64.0)}]}
    write_state(path, state)
    whole, cpu = path.read_bytes(), torch.device("cpu")
    assert torch.load(path, weights_only=True)["step"] == 3, "torch reads it too"
    weight = whole.index(torch.arange(64.0).numpy().tobytes()) + 30
    path.write_bytes(whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :])
    assert torch.load(path, weights_only=True)["step"] == 3, "and does not notice the flip"
    with pytest.raises(InputError, match=r"state\.pt is corrupt; delete it to start over: checksum mismatch"):
        read_state(path, cpu)
    torch.save(state, path)
    assert torch.equal(read_state(path, cpu)["states"][0]["w"], torch.arange(64.0))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"state\.pt is corrupt; delete it to start over"):
        read_state(path, cpu)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_is_not_reported_as_corruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Users delete files that are reported as corrupt."""

    def full(*_: object, **__: object) -> None:
        raise error

    write_state(tmp_path / "state.pt", {"step": 1})
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(error):
        read_state(tmp_path / "state.pt", torch.device("cpu"))


# Images


KINDS = (b"iCCP", b"tRNS", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"eXIf", b"zTXt", b"IHDR", b"PLTE")


def whole() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def with_chunk(raw: bytes, place: int, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk, whose CRC is right."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return raw[:place] + chunk + raw[place:]


@pytest.mark.parametrize(("kind", "data"), product(KINDS, (b"", b"x", b"x\0", b"x\0\1")))
def test_a_truncated_chunk_is_refused_or_ignored(kind: bytes, data: bytes, tmp_path: Path) -> None:
    raw = whole()
    for name, place in (("before", 33), ("after", raw.index(b"IEND") - 4)):
        path = tmp_path / f"{name}.png"
        path.write_bytes(with_chunk(raw, place, kind, data))
        for source, named in ((path, f"{name}.png"), (path.read_bytes(), "bytes")):
            try:
                assert read_image(source).shape == (3, 4, 4)
            except InputError as error:
                assert f"{named}: " in str(error) and "\n" not in str(error)


def test_a_truncated_colour_profile_is_refused(tmp_path: Path) -> None:
    raw = whole()
    (tmp_path / "cut.png").write_bytes(with_chunk(raw, raw.index(b"IEND") - 4, b"iCCP", b""))
    with pytest.raises(InputError, match=r"cut\.png: cannot read the image"):
        read_image(tmp_path / "cut.png")
