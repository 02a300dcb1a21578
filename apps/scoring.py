"""The job behind `steer score`: image files, folders and tables in, each image with its prompt, scores out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from steer.apps.image_folders import images_and_prompts
from steer.apps.prompt_rows import PromptRow
from steer.apps.prompts import read_rows
from steer.errors import InputError
from steer.images import read_image
from steer.reward import Reward, RewardError, score_parts

TABLES = (".csv", ".json", ".jsonl", ".tsv", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "path", "file")


class PromptMissing(RewardError):
    """A reward read the prompt of an image that has none."""


class Unprompted(Sequence[str]):
    """The prompts of images that have none: a reward that reads one raises PromptMissing, others never notice."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return Unprompted(len(range(self._count)[place]))
        raise PromptMissing("no prompt")

    def __iter__(self) -> Iterator[str]:
        raise PromptMissing("no prompt")


@dataclass(frozen=True)
class Shown:
    """An image file, and what it was asked to show; None where nobody says."""

    path: Path
    prompt: str | None


def shown_images(
    sources: Sequence[Path], prompts: Sequence[str] = (), file: Path | None = None, column: str | None = None
) -> list[Shown]:
    """Each image with its prompt.

    sources  image files, folders (`images_and_prompts`) and tables with columns of images and prompts
    prompts  one for all images, or one for each, in order
    file     a file of prompts in their place; without sources a table that names the images, too
    column   of the prompts in it
    Raises InputError, with both counts, where images and prompts do not pair, and where an image would have two.
    """
    if prompts and file is not None:
        raise InputError("--prompt and --prompts both say what the images show: leave one of them out")
    if not sources and file is None:
        raise InputError("no images: name files, folders or a table, or --prompts TABLE with a column of images")
    if not sources and file is not None:
        return _of_table(file, column)
    shown = [one for source in sources for one in _of_source(source, column)]
    given = [row.prompt for row in read_rows(file, column)] if file is not None else list(prompts)
    if not given:
        return shown
    if own := next((one for one in shown if one.prompt is not None), None):
        raise InputError(f"{own.path} has the prompt {own.prompt!r:.60} of its folder or table: give no other one")
    if len(given) not in (1, len(shown)):
        raise InputError(f"{len(given)} prompts for {len(shown)} images: give one for all, or one for each in order")
    if len(given) == 1:
        given *= len(shown)
    return [Shown(one.path, prompt) for one, prompt in zip(shown, given, strict=True)]


def _of_source(source: Path, column: str | None) -> list[Shown]:
    if source.is_dir():
        paths, prompts = images_and_prompts(source)
        return [Shown(path, prompt) for path, prompt in zip(paths, prompts, strict=True)]
    return _of_table(source, column) if source.suffix.lower() in TABLES else [Shown(source, None)]


def _of_table(table: Path, column: str | None) -> list[Shown]:
    """The images that a table names, from its folder on."""
    return [Shown(table.parent / _image(row, table), row.prompt) for row in read_rows(table, column)]


def _image(row: PromptRow, table: Path) -> str:
    for name in IMAGE_COLUMNS:
        found = next((value for key, value in row.columns.items() if key.lower() == name), None)
        if isinstance(found, str) and "\0" not in found:
            return found
    raise InputError(
        f"{table}: the prompt {row.prompt!r:.60} has no path of an image under {', '.join(IMAGE_COLUMNS)}; its columns "
        f"are {', '.join(row.columns) or 'none'}"
    )


@dataclass(frozen=True)
class Scored:
    """The rows of a report, one an image, and the errors of those that have no score."""

    rows: Sequence[dict[str, Any]]
    errors: Sequence[str]


def score_images(reward: Reward, shown: Sequence[Shown], device: str) -> Scored:
    """The score of each image, by itself; what cannot be read, or scored, is listed and the rest goes on.

    Raises InputError where the reward reads a prompt that an image does not have.
    """
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for one in shown:
        row: dict[str, Any] = {"image": str(one.path), "prompt": one.prompt}
        try:
            rows.append(row | _score(reward, one, device))
        except PromptMissing as error:
            raise InputError(
                f"reward {reward.name!r} reads the prompt, and {one.path} has none: give --prompt, one for all "
                "images or one for each"
            ) from error
        except InputError as error:
            known = len(shown) == 1 or str(one.path) in str(error)
            errors.append(str(error) if known else f"{one.path}: {error}")
            rows.append(row | {"error": errors[-1]})
    return Scored(rows, errors)


def _score(reward: Reward, one: Shown, device: str) -> dict[str, Any]:
    prompts = Unprompted(1) if one.prompt is None else [one.prompt]
    with torch.no_grad():
        total, parts = score_parts(reward, read_image(one.path)[None].to(device), prompts)
    told = {"parts": {name: value.item() for name, value in parts.items()}} if parts else {}
    return {"score": total.item()} | told
