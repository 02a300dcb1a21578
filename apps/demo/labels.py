"""Preferences of annotators between images: assignments and answers, in a preference folder."""

import shlex
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from steer.apps.demo.studio import Studio, plural, write_zip
from steer.apps.scenes.preferences import CHOICES_CALL as CALL
from steer.assets import MODELS
from steer.diffusion.seeds import derived_seed
from steer.diffusion.views import denoisers_in
from steer.errors import InputError
from steer.files import write_errors
from steer.pipelines.training.config import DTYPES
from steer.pipelines.training.method import prompts_at
from steer.pipelines.training.preference_data import TRY_AGAIN, PreferenceFolder, append_line
from steer.pipelines.training.preference_files import (
    GROUPS,
    PREFERENCES,
    SETTINGS,
    SampleGroup,
    file_inside,
    parse_preference,
    read_lines,
)
from steer.training.rollout import Rows, Sampler

IMAGES = (2, 3, 4)  # sizes of a group
LONGEST_NAME, MAX_GOAL = 40, 10_000
OVERLAP_EVERY = 3  # an annotator gets a group that others have answered once in this many groups
ORDER = 0  # seed of the order of prompts


@dataclass(frozen=True)
class LabelRequest:
    """A request of an annotator for images to choose between.

    annotator  name of the annotator, 1 to 40 characters
    prompts    prompts of the images
    images     number of images of a group, 2 to 4
    goal       number of groups that the annotator plans to answer; 0: none planned
    """

    annotator: str
    prompts: tuple[str, ...]
    images: int = 2
    goal: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.annotator) <= LONGEST_NAME or not self.annotator.isprintable():
            raise InputError(f"the name must have 1 to {LONGEST_NAME} characters that can be seen: who is choosing?")
        if not self.prompts or self.images not in IMAGES:
            raise InputError(f"images must be {', '.join(map(str, IMAGES))}, of one prompt or more")
        if not 0 <= self.goal <= MAX_GOAL:
            raise InputError(f"the goal must be from 0 (none) to {MAX_GOAL}, got {self.goal}")

    def fits(self, group: SampleGroup) -> bool:
        return len(group.rows) == self.images and group.rows.prompts[0] in self._distinct

    @cached_property
    def _distinct(self) -> frozenset[str]:
        return frozenset(self.prompts)


@dataclass(frozen=True)
class Verdict:
    """An answer: the index of the preferred image, or None; bad: all images are bad."""

    chosen: int | None
    bad: bool = False


@dataclass(frozen=True)
class Progress:
    """Counts of an annotator's answers: choices, ties (`bad` of them: all images bad), and undone answers."""

    choices: int
    ties: int
    bad: int
    undone: int

    def __str__(self) -> str:
        bad = f" ({self.bad} all bad)" if self.bad else ""
        return f"{plural(self.choices, 'choice')}, {plural(self.ties, 'tie')}{bad}, {self.undone} undone."


class AnswerStore(ABC):
    """The answers of all annotators to groups of images: subclasses offer and read the groups, and write the answers.

    Thread-safe; one program at a time may write. An answer is on disk when its method returns. Raises InputError.
    """

    kind = "group"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._verdicts: dict[str, dict[str, Verdict]] = {}  # verdicts by annotator and group, the latest last
        self._undone = Counter[str]()
        self._skipped: set[tuple[str, str]] = set()
        self._assigned: set[tuple[str, str]] = set()  # pairs of annotator and assigned group

    @property
    @abstractmethod
    def groups(self) -> Mapping[str, Any]:
        """Return the groups by name."""

    @abstractmethod
    def offer(self, request: LabelRequest) -> Any:
        """Assign a group to the annotator until they answer or it is released; None where there is none."""

    @abstractmethod
    def _record(self, annotator: str, group: str, verdict: Verdict) -> None:
        """Write an answer."""

    @abstractmethod
    def _remove(self, annotator: str, group: str) -> None:
        """Write that an answer was undone."""

    def choose(self, annotator: str, group: str, chosen: int) -> bool:
        """Record that an image is the best of its group; False if the annotator has answered already."""
        return self._judge(annotator, group, Verdict(chosen))

    def tie(self, annotator: str, group: str, bad: bool = False) -> bool:
        """Record a tie; False if the annotator has answered already. bad: all images are bad."""
        return self._judge(annotator, group, Verdict(None, bad))

    def _judge(self, annotator: str, group: str, verdict: Verdict) -> bool:
        with self._lock, write_errors(self.path, TRY_AGAIN):
            if group not in self.groups:
                raise InputError(f"there is no {self.kind} {group!r:.70} here: press Start for one")
            if group in self._of(annotator):
                return False
            self._record(annotator, group, verdict)
            self._verdicts.setdefault(annotator, {})[group] = verdict
            self._assigned.discard((annotator, group))
            return True

    def skip(self, annotator: str, group: str) -> None:
        """Leave a group to others; it is not offered to this annotator again until the app restarts."""
        with self._lock:
            self._assigned.discard((annotator, group))
            self._skipped.add((annotator, group))

    def undo(self, annotator: str) -> Any:
        """Undo the annotator's latest answer and assign its group again; None if there is no answer."""
        with self._lock, write_errors(self.path, TRY_AGAIN):
            if not (verdicts := self._of(annotator)):
                return None
            group = next(reversed(verdicts))
            self._remove(annotator, group)
            del verdicts[group]
            self._undone[annotator] += 1
            self._assigned.add((annotator, group))
            return self.groups[group]

    def release(self, annotator: str, groups: Collection[Any]) -> None:
        """Release groups that the annotator will not answer."""
        with self._lock:
            self._assigned -= {(annotator, group.id) for group in groups}

    def progress(self, annotator: str) -> Progress:
        """Count the annotator's answers so far."""
        with self._lock:
            verdicts = [*self._of(annotator).values()]
            choices = sum(verdict.chosen is not None for verdict in verdicts)
            bad = sum(verdict.bad for verdict in verdicts)
            return Progress(choices, len(verdicts) - choices, bad, self._undone[annotator])

    def judgements(self) -> dict[str, dict[str, int | None]]:
        """Return the answers by group and annotator: the preferred image, or None for a tie."""
        with self._lock:
            selected: dict[str, dict[str, int | None]] = {}
            for name, verdicts in self._verdicts.items():
                for group, verdict in verdicts.items():
                    selected.setdefault(group, {})[name] = verdict.chosen
            return selected

    def _of(self, annotator: str) -> dict[str, Verdict]:
        return self._verdicts.get(annotator, {})


class LabelStore(AnswerStore):
    """The groups and answers of all annotators, in a folder that `steer finetune d3po-scenes --preferences` reads.

    path  an existing folder keeps its sampling arguments; a new one takes `call`
    """

    def __init__(self, path: Path, call: Mapping[str, Any] = CALL) -> None:
        super().__init__(path)
        self._folder: PreferenceFolder | None = None
        self._sampling: tuple[dict[str, Any], float, str] = dict(call), 1.0, "float32"
        self._checked = False
        if (path / SETTINGS).exists():
            self._folder = PreferenceFolder(path)
            sampling = self._folder.provenance
            self._sampling = sampling.call, sampling.eta, sampling.latents_dtype
            self._read()

    def _read(self) -> None:
        if not (self.path / PREFERENCES).exists():
            return
        path = file_inside(self.path, PREFERENCES)
        for number, row in read_lines(path):
            choice, name = parse_preference(f"{path}, line {number}", row, self.groups), row.get("annotator")
            if not isinstance(name, str):
                continue  # a program wrote it: no annotator may undo it
            if row.get("undo") is True:
                self._verdicts.get(name, {}).pop(row["lot"], None)
                self._undone[name] += 1
            else:
                chosen = None if choice is None else choice.chosen
                self._verdicts.setdefault(name, {})[row["lot"]] = Verdict(chosen, row.get("bad") is True)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline for every group."""
        return self._sampling[0]

    @property
    def groups(self) -> dict[str, SampleGroup]:
        return {} if self._folder is None else self._folder.groups

    def offer(self, request: LabelRequest) -> SampleGroup | None:
        """Assign a stored group to the annotator until they answer or it is released; None: one must be sampled.

        Every third group has answers of others, the oldest first, to measure agreement; the other groups are new.
        """
        with self._lock:
            answered = self._of(request.annotator).keys()
            mine = {group for name, group in self._assigned if name == request.annotator} | answered
            skipped = {group for name, group in self._skipped if name == request.annotator}
            fitting = [group for group in self.groups.values() if request.fits(group)]
            left = [group for group in fitting if group.id not in mine | skipped]
            judged = self.judgements().keys()
            taken = judged | {group for _, group in self._assigned}
            known = [group for group in left if group.id in judged and len(mine) % OVERLAP_EVERY == OVERLAP_EVERY - 1]
            selected = next(iter(known + [group for group in left if group.id not in taken]), None)
            if selected is not None:
                self._assigned.add((request.annotator, selected.id))
            return selected

    def draw(self, pipe: Any, request: LabelRequest, check: Callable[[], object]) -> SampleGroup:
        """Sample a group as one batch and assign it to the annotator; one thread at a time may sample.

        check  called before each step; an exception from it ends the sampling, and nothing is written
        Raises InputError if the pipeline differs from that of the stored groups.
        """
        with self._lock:
            folder = self._open_folder(pipe)
            fitting, number = sum(map(request.fits, folder.groups.values())), len(folder.groups)
        (prompt,) = prompts_at(fitting, 1, request.prompts, ORDER)
        start, *noises = (derived_seed(number, name) for name in ("start", *map(str, range(request.images))))
        sampling = folder.provenance

        def checked(denoiser: Any, *args: Any, **kwargs: Any) -> Any:
            check()
            return denoiser(*args, **kwargs)

        denoisers = {name: partial(checked, getattr(pipe, name)) for name in denoisers_in(pipe)}
        sampler = Sampler(pipe, sampling.call, sampling.eta, DTYPES[sampling.latents_dtype], denoisers)
        sampled_rows, images = sampler.rollout(
            Rows((prompt,) * request.images, (start,) * request.images, tuple(noises))
        )
        with self._lock, write_errors(self.path, TRY_AGAIN):
            group = folder.groups[folder.write_group(sampled_rows, images)]
            self._assigned.add((request.annotator, group.id))
        return group

    def _open_folder(self, pipe: Any) -> PreferenceFolder:
        """Open the folder, after checking that its groups are of this pipeline."""
        if self._folder is None or not self._checked:
            self._folder = PreferenceFolder.create(self.path, pipe, *self._sampling)
            self._checked = True
        return self._folder

    def _record(self, annotator: str, group: str, verdict: Verdict) -> None:
        assert self._folder is not None, "it has the group"
        source = {"annotator": annotator, "time": now()}
        if verdict.chosen is None:
            self._folder.write_tie(group, **source, **({"bad": True} if verdict.bad else {}))
        else:
            for rejected in range(len(self.groups[group].rows)):
                if rejected != verdict.chosen:
                    self._folder.write_preference(group, verdict.chosen, rejected, **source)

    def _remove(self, annotator: str, group: str) -> None:
        append_line(self.path / PREFERENCES, {"lot": group, "undo": True, "annotator": annotator, "time": now()})


def now() -> str:
    """Return the current time as text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def goal_text(request: LabelRequest, judgements: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe how many of the planned answers are given, and how many of these groups others have answered too.

    Every third group is also answered by others, so that agreement can be measured.
    """
    own = [answers for answers in judgements.values() if request.annotator in answers]
    shared = sum(len(answers) > 1 for answers in own)
    if not request.goal:
        return f"{len(own)} answered, {shared} of them by others too."
    planned = request.goal // OVERLAP_EVERY
    done = " The goal is reached." if len(own) >= request.goal else ""
    return f"{len(own)} of {request.goal} answered, {shared} of them by others too ({planned} planned).{done}"


CONFIG, CONFIG_MODEL = "d3po-scenes", "scenes"  # and the model in it
ARCHIVE_FOLDER = "choices"  # folder inside the zip
RUN = "run-"  # prefix of folders with the images of a run, and their labels


def label_folder(studio: Studio) -> Path:
    """Return the owner's folder of preferences, or a temporary one."""
    return studio.labels or studio.home / "labels"


def storage_notice(studio: Studio) -> str:
    """Return a sentence about the place where choices are stored."""
    if studio.labels is not None:
        return f"Every choice is written to {studio.labels} at once, with the images and how they were drawn."
    return (
        "Every choice is written at once, to a temporary folder that is removed when the app ends. Make a zip before, "
        "or start the app with `steer demo --labels FOLDER`. The zip holds the choices, prompts and names of all who "
        "label in this app."
    )


def command_of(studio: Studio) -> str:
    """Return the command that finetunes the model from the choices, or from the unpacked zip beside it."""
    if studio.label_images is not None:
        words = ["steer", "rewards", "train", str(label_folder(studio) / "pairs.jsonl"), "--out", "my-reward"]
        return shlex.join(words)
    model, folder = studio.models[0], ARCHIVE_FOLDER if studio.labels is None else str(studio.labels)
    words = ["steer", "finetune", CONFIG, "--preferences", folder]
    if model != CONFIG_MODEL:
        words += ["--model", model]
    if model not in MODELS:  # rewards of scenes cannot score other images
        words += ["--reward", "null", "--eval-prompts", "null", "--eval-rewards", "[]"]
    return shlex.join(words)


def write_label_zip(folder: Path, path: Path) -> None:
    """Zip a preference folder, even during writes to it. Raises InputError if it is empty."""
    files = [*label_files(folder)] if (folder / PREFERENCES).exists() else []
    if not (files := [*files, *sorted(folder.glob(f"{RUN}*/*"))]):
        raise InputError("nothing has been chosen yet: label some images first")
    write_zip(path, folder, files, ARCHIVE_FOLDER)


def label_files(folder: Path) -> Iterator[Path]:
    """List the files of a preference folder, even during writes to it: read each before the next."""
    for name in (PREFERENCES, GROUPS, SETTINGS):  # before the files that they name, which exist by then
        yield folder / name
    for kind in ("images", "trajectories"):
        yield from (one for one in sorted((folder / kind).iterdir()) if one.suffix != ".new")
