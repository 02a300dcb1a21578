"""Writers of files other than checkpoints: each writes an old and a new form, and detects the form in a folder."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import PROMPT
from PIL import Image
from rollouts import call_of, fresh_pipe
from safetensors.torch import load_file
from torch import nn

from steer import TrainingConfig
from steer.apps.models import find_adapter
from steer.apps.sampling import open_report
from steer.apps.settings import SamplingConfig
from steer.errors import InputError
from steer.noise import Search
from steer.pipelines.base import Iteration
from steer.pipelines.reno import SearchCheckpoint
from steer.pipelines.training.preference_data import PreferenceFolder
from steer.pipelines.training.preference_files import SampleProvenance, read_preferences
from steer.pipelines.training.state import RunFolder
from steer.reward import score
from steer.rewards.compose import Calibration, RewardStatistics, read_calibration
from steer.rewards.learned import ImageHead, LearnedReward, RewardCard, save_learned
from steer.training.distributed import SINGLE_PROCESS
from steer.training.rollout import Rows, Sampler
from steer.training.trainable import LoRA

OLD, NEW, REFUSED = "old", "new", "refused in a line"
CALL = call_of("sd")


@dataclass(frozen=True)
class Writer:
    """before: writes the old form; write: replaces it by the new one; read: OLD or NEW, or raises InputError."""

    before: Callable[[Path], Any]
    write: Callable[[Path], Any]
    read: Callable[[Path], str]
    expected: tuple[str, ...] = (OLD, NEW)


def which(value: Any, old: Any, new: Any) -> str:
    return OLD if value == old else NEW if value == new else "lost"


@functools.cache
def drew(seed: int) -> Any:
    return Sampler(fresh_pipe("sd"), CALL).rollout(Rows((PROMPT,) * 2, (seed,) * 2, (1, 2)))


@functools.cache
def provenance() -> SampleProvenance:
    return SampleProvenance.of(fresh_pipe("sd"), CALL, 1.0, "float32")


def choices(folder: Path, seed: int) -> None:
    recorded = PreferenceFolder.create_as(folder, provenance())
    recorded.write_preference(recorded.write_group(*drew(seed)), 0, 1)


def choices_in(folder: Path) -> str:
    starts = {
        read_preferences(folder).groups[choice.group].rows.starts[0] for choice in read_preferences(folder).preferences
    }
    return which(starts, {1}, {1, 2})


@functools.cache
def width() -> int:
    from steer.rewards.clip import load_backbone

    return load_backbone("scenes").width


@functools.cache
def heads(seed: int) -> tuple[nn.Module, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageHead(width()), ImageHead(width())


def reward(folder: Path, seed: int) -> None:
    save_learned(folder, RewardCard("image", "scenes", width(), (seed, 0.0), (1.0, 2.0), {}), heads(seed), [])


def reward_scores(folder: Path) -> list[float]:
    return score(LearnedReward(str(folder)), torch.full((1, 3, 32, 32), 0.3), ["a star"]).tolist()


@functools.cache
def scores(seed: int, home: Path) -> list[float]:
    reward(home / f"{seed}", seed)
    return reward_scores(home / f"{seed}")


def reward_in(folder: Path) -> str:
    home = folder.parent / "known"
    return which(reward_scores(folder), scores(1, home), scores(2, home))


def found_noise(seed: int) -> tuple[Search, list[Iteration]]:
    start = Search.start(torch.full((2, 4, 2, 2), float(seed))).record(torch.ones(2))
    start = replace(start, best_noise=start.noise.clone(), peak=start.peak.clone())  # safetensors refuses shared memory
    rows = torch.full((1, 2), float(seed))
    return start, [Iteration(n, 3, rows, {"red": rows}, rows, rows) for n in range(seed)]


def search_file(folder: Path) -> SearchCheckpoint:
    return SearchCheckpoint(folder / "state", {"prompt": "a star"})


def noise_in(folder: Path) -> str:
    loaded = search_file(folder).load(torch.device("cpu"), 3)
    if loaded is None:
        return "lost"
    right = torch.equal(loaded[0].noise, found_noise(len(loaded[1]))[0].noise)
    return which(len(loaded[1]) * right, 1, 2)


@functools.cache
def adapter() -> tuple[LoRA, dict[int, dict[str, Any]]]:
    trained = LoRA(fresh_pipe("sd"), rank=2)
    states = {seed: {name: torch.full_like(v, seed) for name, v in trained.state().items()} for seed in (1, 2)}
    return trained, states


def export(folder: Path, seed: int) -> None:
    trained, states = adapter()
    RunFolder(folder, {}, {}, TrainingConfig(max_steps=1), SINGLE_PROCESS)._export(trained, states[seed], "final")  # type: ignore[arg-type]


def export_in(folder: Path) -> str:
    finetuned = find_adapter(str(folder / "final"))
    with finetuned.applied_to(fresh_pipe("sd")):
        pass
    values = {value.unique().item() for value in load_file(finetuned.files[0]).values()}
    return which(values, {1.0}, {2.0})


SETTINGS = SamplingConfig.of(reward="brightness", particles=2)


def report(folder: Path, number: int) -> None:
    record = open_report(folder, ["a star", "a circle"], SETTINGS)
    Image.new("RGB", (2, 2)).save(folder / f"{number}.png")
    entry = {"prompt": ["a star", "a circle"][number], "images": [f"{number}.png"], "cost": {"seconds": 0.5}}
    record.keep(number, entry, single_process=True)


def report_in(folder: Path) -> str:
    record = open_report(folder, ["a star", "a circle"], SETTINGS)
    return which(record.missing(2, False), [1], [])


def calibration(folder: Path, mean: float) -> None:
    Calibration({"scene": RewardStatistics(mean, 1.0, 4, {"a star": mean})}, {}).save(folder / "c.json")


WRITERS = {
    "preferences": Writer(lambda f: choices(f, 1), lambda f: choices(f, 2), choices_in),
    # While its files are replaced one by one the checksums do not match, and reading is refused.
    "learned reward": Writer(lambda f: reward(f, 1), lambda f: reward(f, 2), reward_in, (OLD, NEW, REFUSED)),
    "noise search": Writer(
        lambda f: search_file(f).save(*found_noise(1)), lambda f: search_file(f).save(*found_noise(2)), noise_in
    ),
    # Between the two renames the folder has a temporary name.
    "exported weights": Writer(lambda f: export(f, 1), lambda f: export(f, 2), export_in, (OLD, NEW, REFUSED)),
    "report": Writer(lambda f: report(f, 0), lambda f: report(f, 1), report_in),
    "calibration": Writer(
        lambda f: calibration(f, 1.0),
        lambda f: calibration(f, 2.0),
        lambda f: which(read_calibration(f / "c.json").scales["scene"].mean, 1.0, 2.0),
    ),
}


def form_in(writer: Writer, folder: Path) -> str:
    """Form that a folder holds, or that it is refused."""
    try:
        return writer.read(folder)
    except InputError as error:
        return REFUSED if "\n" not in str(error) else "lost"
