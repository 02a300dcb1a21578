"""Files cut off and with bits turned over: what is read is what was written, or it is refused in a line."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cached_pipe
from reliability import Tally
from rollouts import fresh_pipe
from test_checkpoint import save
from test_recipes import RECIPE, picture
from tiny_rewards import tiny_learned, tiny_open_clip
from torch import Tensor
from writers import SETTINGS, WRITERS, found_noise, report, search_file

from steer import TrainingConfig
from steer.apps.models import find_adapter
from steer.apps.recipes import read_metadata, write_png
from steer.apps.sampling import open_report
from steer.apps.scoring import images_with_prompts
from steer.errors import InputError
from steer.files import CHECKSUMS
from steer.pipelines.training.preference_files import read_preferences
from steer.pipelines.training.state import RunFolder
from steer.reward import score
from steer.rewards.compose import read_calibration
from steer.rewards.learned import LearnedReward
from steer.training.checkpoint import Checkpoint
from steer.training.distributed import SINGLE_PROCESS
from steer.training.supervised import read_state, write_state
from steer.training.trainable import FullFinetuning, LoRA

FULL = pytest.mark.hard
CUTS, FLIPS = 100, 1000
GOOD = ("refused", "read unchanged")


@dataclass(frozen=True)
class Kind:
    """make: writes it into a folder; read: all that it says, in a form that can be compared; but: no part of it."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    but: tuple[str, ...] = ()


def bits(named: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (v.dtype, tuple(v.shape), v.contiguous().numpy().tobytes()) for name, v in sorted(named.items())}


def checkpoint_in(folder: Path) -> Any:
    found = Checkpoint.open(folder / "step-00000001")
    weights = {name: value.float() for name, value in found.tensors("weights").items()}
    return found.step, found.json("state"), bits(weights)


def exported(family: str, rank: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pipe = fresh_pipe(family)
        trained = LoRA(pipe, rank=rank) if rank else FullFinetuning(pipe)
        state = {name: value + 0.25 for name, value in trained.state().items()}
        RunFolder(folder, {}, {}, TrainingConfig(max_steps=1), SINGLE_PROCESS)._export(trained, state, "final")  # type: ignore[arg-type]

    return make


def worn(family: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        pipe = cached_pipe(family)
        with find_adapter(str(folder / "final")).applied_to(pipe):
            denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            scales = [layer.scaling for layer in denoiser.modules() if hasattr(layer, "scaling")]
            return bits(dict(denoiser.state_dict())), str(scales)

    return read


def reward(folder: Path) -> None:
    tiny_learned(folder / "reward", tiny_open_clip(folder.parent / f"{folder.name}-clip"))


def reward_in(folder: Path) -> Any:
    loaded = LearnedReward(str(folder / "reward"))
    prompts = ["a red circle", "zebra"]
    return score(loaded, torch.linspace(0, 1, 2 * 3 * 64).view(2, 3, 8, 8), prompts).tolist(), loaded.name


def noise_in(folder: Path) -> Any:
    search, trace = search_file(folder).load(torch.device("cpu"), 3) or (None, [])
    return bits(search.tensors()) if search else None, [one.rewards.tolist() for one in trace]


def report_in(folder: Path) -> Any:
    record = open_report(folder, ["a star", "a circle"], SETTINGS)
    told = {
        name: record.header[name] for name in ("model", "method", "settings")
    }  # and perhaps a key that nobody reads
    return told, record.entries, images_with_prompts(folder)


def png_in(folder: Path) -> Any:
    return read_metadata(folder / "a.png")


KINDS = {
    "checkpoint": Kind(lambda f: save(f, 1), checkpoint_in),
    "LoRA": Kind(exported("sd", 2), worn("sd")),
    "LoRA of peft": Kind(exported("pixart", 2), worn("pixart")),
    "whole denoiser": Kind(exported("sd", 0), worn("sd")),
    "learned reward": Kind(reward, reward_in),
    "noise search": Kind(lambda f: search_file(f).save(*found_noise(2)), noise_in),
    "report.json": Kind(lambda f: report(f, 0), report_in, ("0.png",)),
    "PNG metadata": Kind(lambda f: (f.mkdir(), write_png(picture(), f / "a.png", RECIPE)), png_in),
    "training state": Kind(
        lambda f: write_state(f / "state.pt", {"w": torch.arange(9.0), "step": 3}),
        lambda f: [str(one) for one in read_state(f / "state.pt", torch.device("cpu")).items()],
    ),
    "calibration": Kind(WRITERS["calibration"].before, lambda f: read_calibration(f / "c.json")),
}


def spoilt(whole: bytes, cuts: int, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file cut off at every so many hundredths, and with single bits turned over."""
    for number in range(cuts):
        yield "truncated", whole[: len(whole) * number // cuts]
    for _ in range(flips):
        place, bit = divmod(rng.randrange(8 * len(whole)), 8)
        yield "flip", whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def verdict(kind: Kind, folder: Path, original: Any) -> str:
    """What comes of reading; anything but an InputError is raised."""
    try:
        found = kind.read(folder)
    except InputError as error:
        return "refused" if "\n" not in str(error) else "more than a line"
    return "read unchanged" if found == original else "read wrong"


def tried(kind: Kind, folder: Path, cuts: int, flips: int, good: tuple[str, ...] = GOOD) -> Tally:
    """Spoils every file of a folder, one after the other, and reads."""
    original, tally = kind.read(folder), Tally()
    assert kind.read(folder) == original
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in kind.but):
        whole = path.read_bytes()
        few = 1 + 9 * (path.name != CHECKSUMS)  # of ten: where sums are spoilt, all that they tell of is loaded
        for what, data in spoilt(whole, cuts, flips * few // 10, random.Random(path.name)):
            path.write_bytes(data)
            told = verdict(kind, folder, original)
            tally.count(f"{what}, {told}", told in good)
            assert told in good, (path, what, data)
        path.write_bytes(whole)
    assert kind.read(folder) == original
    return tally


@pytest.mark.few(3)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("cuts", "flips"), [(3, 6), pytest.param(CUTS, FLIPS, marks=FULL)])
def test_nothing_that_is_spoilt_is_read_wrong(tmp_path: Path, name: str, cuts: int, flips: int) -> None:
    kind, folder = KINDS[name], tmp_path / "folder"
    kind.make(folder)
    tally = tried(kind, folder, cuts, flips)
    assert tally.lost == 0 and tally.outcomes["flip, refused"], tally
    if flips == FLIPS:
        tally.note(f"{name}, every file truncated at each 1 % and 1,000 bits flipped")


def without_sums(kind: Kind) -> Kind:
    """As others write it, and as older versions of steer did."""

    def make(folder: Path) -> None:
        kind.make(folder)
        for path in folder.rglob(CHECKSUMS):
            path.unlink()

    return Kind(make, kind.read)


def choices(folder: Path) -> None:
    WRITERS["choices"].before(folder)
    WRITERS["choices"].write(folder)


UNSUMMED = {
    "LoRA without sums": without_sums(KINDS["LoRA"]),
    "LoRA of peft without sums": without_sums(KINDS["LoRA of peft"]),
    "learned reward without sums": without_sums(KINDS["learned reward"]),
    "folder of choices": Kind(choices, read_preferences),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", UNSUMMED)
@pytest.mark.parametrize(("cuts", "flips"), [(2, 4), pytest.param(CUTS, 150, marks=FULL)])
def test_what_has_no_sums_is_read_or_refused_in_a_line(tmp_path: Path, name: str, cuts: int, flips: int) -> None:
    """A bit of a weight that is another is not noticed: docs/reliability.md says so."""
    kind, folder = UNSUMMED[name], tmp_path / "folder"
    kind.make(folder)
    tally = tried(kind, folder, cuts, flips, (*GOOD, "read wrong"))
    assert tally.outcomes["truncated, refused"], tally
    if flips == 150:
        tally.lost = sum(count for outcome, count in tally.outcomes.items() if "read wrong" in outcome)
        tally.survived = tally.tries - tally.lost
        tally.note(f"{name}, every file truncated at each 1 % and 150 bits flipped")
