"""Damaged files of a run, disk errors and power cuts: each is reported in one line, or repaired."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer
from PIL import Image
from rollouts import fresh_pipe
from safetensors.torch import load_file, save_file

from steer import TrainingConfig
from steer.apps.cli import main as cli
from steer.apps.finetune_report import read_grid
from steer.apps.models import adapter_applied
from steer.apps.plots import open_image, plain_text
from steer.apps.sampling import open_report
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.files import CHECKSUMS
from steer.pipelines.training.state import RunFolder
from steer.training.distributed import SINGLE_PROCESS
from steer.training.trainable import LoRA


def exported(family: str, folder: Path) -> tuple[Any, Path]:
    """A pipeline, and the LoRA that a run exported of it."""
    pipe = fresh_pipe(family)
    trained = LoRA(pipe, rank=2)
    run = RunFolder(folder, {}, {}, TrainingConfig(max_steps=1), SINGLE_PROCESS)  # type: ignore[arg-type]
    run._export(trained, {name: value + 0.5 for name, value in trained.state().items()}, "final")
    return fresh_pipe(family), folder / "final"


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_a_weight_with_a_flipped_bit_is_refused(tmp_path: Path, family: str) -> None:
    pipe, folder = exported(family, tmp_path)
    with adapter_applied(pipe, str(folder)):
        pass
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{path.name} is corrupt: checksum"), adapter_applied(pipe, str(folder)):
        pass
    (folder / CHECKSUMS).unlink()
    with adapter_applied(pipe, str(folder)):  # nobody knows better
        pass


@pytest.mark.parametrize("family", ["sd", "pixart"])
@pytest.mark.parametrize("change", ["gone", "another name"])
def test_a_lora_that_lacks_a_tensor_is_not_applied(tmp_path: Path, family: str, change: str) -> None:
    pipe, folder = exported(family, tmp_path)
    path = next(folder.glob("*.safetensors"))
    (folder / CHECKSUMS).unlink()
    state = load_file(path)
    name = next(key for key in state if "lora_B" in key)
    moved = {name.replace("lora_B", "lora_C"): state.pop(name)}
    save_file(state | (moved if change == "another name" else {}), path)
    reason = r"lacks a tensor for|of its .* tensors have a place"
    with pytest.raises(InputError, match=reason), adapter_applied(pipe, str(folder)):
        pass


def test_pictures_that_a_power_cut_took_the_end_of_are_sampled_again(tmp_path: Path) -> None:
    settings = SamplingConfig.of(reward="brightness", particles=2, steps=4, guidance=4.0, lam=1.0)
    record = open_report(tmp_path, ["a star"], settings)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "0.png")
    (tmp_path / "noise.safetensors").write_bytes(b"x")
    entry = {"prompt": "a star", "images": ["0.png"], "noise": "noise.safetensors", "cost": {"seconds": 0.5}}
    record.keep(0, entry, single_process=True)
    assert record.missing(1, False) == []
    whole = (tmp_path / "0.png").read_bytes()
    for cut in (b"", whole[:10], whole[:-1], whole[:-12] + bytes(12)):
        (tmp_path / "0.png").write_bytes(cut)
        assert record.missing(1, False) == [0]
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "noise.safetensors").write_bytes(b"")
    assert record.missing(1, False) == [0]


def test_a_picture_that_is_corrupt_is_named_where_it_is_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "0.png")
    whole = (tmp_path / "0.png").read_bytes()
    assert open_image(tmp_path / "0.png").size == (20, 20)
    for content in (b"", whole[:45], b"GIF89a"):
        (tmp_path / "0.png").write_bytes(content)
        with pytest.raises(InputError, match=r"0\.png is damaged .*; delete it and run the command again"):
            open_image(tmp_path / "0.png")
        assert read_grid(tmp_path / "0.png") is None


def test_a_prompt_is_one_line_of_a_picture() -> None:
    assert plain_text("a\n\tstar\x1b[31m\u2028$x$") == r"a star [31m \$x\$"


def test_errors_of_the_operating_system_are_one_line(steer: Steer, tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (8, 8), (number * 90,) * 3).save(tmp_path / f"{number}.png")
    code, _, err = steer(
        "rewards", "calibrate", "brightness", "--images", tmp_path, "--prompt", "x", "--out", "/proc/c.json"
    )
    assert code == 2 and err == "steer: /proc/c.json.new: No such file or directory; finished work is kept\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device; make room there, or choose"),
        (OSError(24, "Too many open files"), "Too many open files; allow more open files: ulimit -n 4096"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; choose a folder that can be written"),
        (OSError("odd"), "odd; finished work is kept"),
    ],
)
def test_each_refusal_has_its_remedy(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**options: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "steer", refused)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"steer: {message}") and len(err.splitlines()) == 1


def test_a_closed_pipe_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from steer.apps.cli.main import main; main()", "--help"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_tensors_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    from steer.noise import Search
    from steer.pipelines.base import Iteration
    from steer.pipelines.reno import SearchCheckpoint

    search = Search.start(torch.ones(2, 4)).record(torch.ones(2))
    (tmp_path / "in-the-way").write_text("")
    rows = torch.ones(1, 2)
    with pytest.raises(InputError, match=r"state: cannot write there .*; make room, or choose another folder"):
        SearchCheckpoint(tmp_path / "in-the-way" / "state", {}).save(search, [Iteration(0, 1, rows, {}, rows, rows)])
