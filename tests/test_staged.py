"""A file that takes its place whole, after its bytes are on the disk."""

import errno
import os
from pathlib import Path

import pytest

from steer.files import atomic_write, make_folder, sync, write_text


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
def test_after_an_exception_the_old_file_stays_alone(tmp_path: Path, error: BaseException, before: str | None) -> None:
    path = tmp_path / "file"
    if before:
        path.write_text(before)
    with pytest.raises(type(error)), atomic_write(path) as new:
        new.write_text("half")
        raise error
    assert [one.read_text() for one in tmp_path.iterdir()] == ([before] if before else [])


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file.new").write_text("a long half of something")
    write_text(tmp_path / "file", "short")
    assert [one.read_text() for one in tmp_path.iterdir()] == ["short"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_bytes_then_the_name_then_the_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    inodes: dict[int, str] = {}
    fsync, replace = os.fsync, os.replace

    def watched(number: int) -> None:
        told.append(f"fsync {inodes[os.fstat(number).st_ino]}")
        fsync(number)

    def moved(source: Path, target: Path) -> None:
        told.append(f"{source.name} → {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", moved)
    inodes[tmp_path.stat().st_ino] = "folder"
    with atomic_write(tmp_path / "file") as new:
        new.write_text("x")
        inodes[new.stat().st_ino] = "file"
    assert told == ["fsync file", "file.new → file", "fsync folder"]


def test_new_folders_reach_the_disk_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Path] = []
    monkeypatch.setattr("steer.files.sync", told.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert told == [tmp_path, tmp_path / "a"] and (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize(("number", "fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_may_need_no_sync_of_folders(
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


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "below", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
