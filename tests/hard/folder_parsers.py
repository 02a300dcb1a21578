"""Parsers of folders as functions of bytes: preferences, checkpoints, reports and calibrations."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from parser_checks import check_line

from steer.apps.sampling import REPORT, open_report
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.pipelines.training.preference_files import (
    GROUPS,
    PREFERENCES,
    SETTINGS,
    PreferenceRecords,
    SampleProvenance,
    read_preferences,
)
from steer.rewards.compose import read_calibration
from steer.training.checkpoint import MANIFEST, Checkpoint, read_manifest, write_files
from steer.training.rollout import Rows, Trajectories

SAMPLE = SamplingConfig.of(reward="brightness", particles=2, steps=4, lam=10.0)  # as the corpus was written
PARTED = b"\n---\n"  # separates the files of a folder in one input


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def choices(data: bytes, folder: Path) -> Any:
    """Parse settings.json, lots.jsonl and choices.jsonl, with images and trajectories of two groups."""
    if not (folder / "images").exists():
        write_choices(folder)
    texts = (data.split(PARTED, 2) + [b""] * 2)[:3]
    for name, text in zip((SETTINGS, GROUPS, PREFERENCES), texts, strict=True):
        put(folder / name, text)
    return _records_text(read_preferences(folder))


def write_choices(folder: Path) -> None:
    """Write two groups, of which one has trajectories, and one preference in each."""
    plain = (
        "P",
        "scenes",
        {"_class_name": "S"},
        {"num_inference_steps": 3},
        1.0,
        "float32",
        "float32",
        "cpu",
        "1",
        "1",
    )
    recorded = PreferenceFolder.create_as(folder, SampleProvenance(*plain))
    for number in (1, 2):
        rows = Rows(("a star",) * 2, (number,) * 2, (3, 4))
        drew = Trajectories(rows, torch.zeros(2, 3, 1, 2, 2), (0, 2), torch.zeros(2, 2))
        group = recorded.write_group(drew, torch.full((2, 3, 1, 1), number / 2), keep_trajectories=number == 2)
        recorded.write_preference(group, 0, 1)


def _records_text(records: PreferenceRecords) -> Any:
    groups = [group.line() for group in records.groups.values()]
    judged = [{"lot": one.group, "chosen": one.chosen, "rejected": one.rejected} for one in records.preferences]
    return json.dumps([asdict(records.provenance), groups, judged])


def choices_again(written: str, folder: Path) -> Any:
    drawn, *rows = json.loads(written)
    files = (json.dumps(drawn), *("\n".join(map(json.dumps, some)) + "\n" for some in rows))
    return choices(PARTED.join(text.encode() for text in files), folder)


def manifest(data: bytes, folder: Path) -> Any:
    """Parse the manifest of a checkpoint of two files: the bytes themselves, then with a correct checksum."""
    if not (folder / MANIFEST).exists():
        write_files(folder, 7, {"weights": {"a": torch.zeros(2)}}, {"told": "{}\n"})
    put(folder / MANIFEST, data)
    try:
        return read_manifest(folder)
    except InputError as error:
        check_line(str(error))
    put(folder / MANIFEST, _sealed(data))
    Checkpoint.open(folder)
    return read_manifest(folder)


def _sealed(data: bytes) -> bytes:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(values, dict):
        return data
    values.pop("sha256", None)
    own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return (json.dumps(values | {"sha256": own}, sort_keys=True, indent=1) + "\n").encode()


def manifest_again(value: Any, folder: Path) -> Any:
    step, files = value
    put(folder / MANIFEST, _sealed(json.dumps({"version": 1, "step": step, "files": files}).encode()))
    return read_manifest(folder)


def report(data: bytes, folder: Path) -> Any:
    put(folder / REPORT, data)
    return _report_text(folder)


def _report_text(folder: Path) -> Any:
    record = open_report(folder, ["a star", "a circle"], SAMPLE)
    record.missing(2, animation=True)
    return json.dumps([record.header, record.entries], sort_keys=True)


def report_again(text: str, folder: Path) -> Any:
    open_report(folder, ["a star", "a circle"], SAMPLE).save()
    return _report_text(folder)


def calibration(data: bytes, folder: Path) -> Any:
    return read_calibration(put(folder / "c.json", data))


def calibration_again(value: Any, folder: Path) -> Any:
    value.save(folder / "d.json")
    return read_calibration(folder / "d.json")
