"""What the Rewards tab runs: images that visitors bring, scored by several rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from steer.apps.demo.page import MOST_CHARACTERS, public
from steer.apps.demo.worker import Ticket
from steer.apps.finetune_grids import thumbnail
from steer.apps.png_metadata import prompt_inside
from steer.errors import InputError
from steer.images import BROKEN, FORMATS, read_image
from steer.reward import Reward, score_parts

MOST_FILES, MOST_REWARDS = 32, 8
MOST_BYTES = 10 * 2**20
MOST_PIXELS = 16_000_000
# A longer side against the shorter one: rewards that bring the shorter side to a size would make huge images of strips.
MOST_LENGTH = 8


@dataclass(frozen=True)
class Score:
    """A reward's score of an image, and those of its parts, where it has several."""

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """An image: its file's name, pixels across and down, and its scores by the rewards that could score it.

    prompt  that it was scored by; inside: whether that comes from the image's own metadata
    """

    name: str
    size: tuple[int, int]
    thumbnail: Image.Image
    scores: Mapping[str, Score]
    prompt: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Scoring:
    """Image `number`, from 1, of `count` is being scored."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"Scoring image {self.number} of {self.count} …"


@dataclass(frozen=True)
class Scores:
    """All that could be scored: images in their order, rewards as they were named; notes: a line for what could not."""

    prompt: str
    rewards: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def best_first(self, reward: str) -> list[Row]:
        """The images by one reward, those that it did not score last."""
        return sorted(self.rows, key=lambda row: -row.scores[reward].total if reward in row.scores else float("inf"))


def check_asked(paths: Sequence[Path], prompt: str, rewards: Sequence[str]) -> None:
    """Raises InputError for nothing, or too much, to do."""
    if not paths:
        raise InputError("no images: drop some first")
    if len(paths) > MOST_FILES:
        raise InputError(f"{len(paths)} images: at most {MOST_FILES} at a time")
    if not rewards:
        raise InputError("no rewards: tick one or more, or name one")
    if len(rewards) > MOST_REWARDS:
        raise InputError(f"{len(rewards)} rewards: at most {MOST_REWARDS} at a time")
    if len(prompt) > MOST_CHARACTERS:
        raise InputError(f"a prompt of {len(prompt)} characters: at most {MOST_CHARACTERS}")


def score_files(
    paths: Sequence[Path],
    prompt: str,
    rewards: Sequence[str],
    find: Callable[[str], Reward],
    ticket: Ticket,
    device: str = "cpu",
) -> None:
    """Scores image files, one in memory at a time; says Scoring and, at the end, Scores.

    prompt  of all; empty: of each the one in its metadata, if any
    find    gives the reward of a specification, or raises InputError
    device  where the images are scored
    What cannot be read or scored has a line in the notes, once; the rest goes on. Raises InputError where no reward
    was found, or no image could be read.
    """
    notes: dict[str, None] = {}
    found = {}
    for spec in rewards:
        ticket.check()
        try:
            found[spec] = find(spec)
        except InputError as error:
            notes[_line(spec, error)] = None
    if not found:
        raise InputError(next(iter(notes)))
    rows = []
    for number, path in enumerate(paths):
        ticket.say(Scoring(number + 1, len(paths)))
        try:
            image = read_upload(path)
        except InputError as error:
            notes[_line(path.name, error)] = None
            continue
        own = None if prompt else prompt_inside(path)
        row = Row(path.name, (image.shape[2], image.shape[1]), thumbnail(image), {}, own or prompt, own is not None)
        rows.append(_scored(row, image.to(device), found, notes, ticket))
    if not rows:
        raise InputError("; ".join(notes))
    ticket.say(Scores(prompt, tuple(found), tuple(rows), tuple(notes)))


def _scored(row: Row, image: Tensor, rewards: Mapping[str, Reward], notes: dict[str, None], ticket: Ticket) -> Row:
    scores = {}
    for spec, reward in rewards.items():
        ticket.check()
        try:
            with torch.no_grad():
                total, parts = score_parts(reward, image[None], [row.prompt])
        except InputError as error:
            notes[_line(spec, error)] = None
            continue
        several = parts if len(parts) > 1 else {}
        scores[spec] = Score(total.item(), {name: values.item() for name, values in several.items()})
    return replace(row, scores=scores)


def read_upload(path: Path) -> Tensor:
    """An image file of a visitor as (3, H, W) in [0, 1]. Its size is known before its pixels are decoded.

    Raises InputError, without the file's place, for one that is too big, too long or no image.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise InputError(f"{size / 2**20:.1f} MB: at most {MOST_BYTES / 2**20:.0f} MB an image")
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size
    except BROKEN as error:  # Pillow's own words name the place
        raise InputError("not an image that can be read: use PNG, JPEG or WebP") from error
    if width * height > MOST_PIXELS:
        raise InputError(f"{width} × {height} pixels: at most {MOST_PIXELS // 10**6} megapixels, make it smaller")
    if max(width, height) > MOST_LENGTH * min(width, height):
        raise InputError(f"{width} × {height} pixels: at most {MOST_LENGTH} times as long as wide, crop it")
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from error


def _line(name: str, error: InputError) -> str:
    return f"{name:.80}: {public(str(error))}"
