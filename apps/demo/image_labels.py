"""Preferences between the owner's images: a table of pairs that rewards and Diffusion-DPO learn from."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from steer.apps.demo.labels import OVERLAP_EVERY, AnswerStore, LabelRequest, Verdict, now
from steer.apps.demo.pictures import as_png
from steer.apps.scoring import images_with_prompts
from steer.errors import InputError
from steer.files import atomic_write, read_image, write_errors, write_text
from steer.pipelines.training.preference_files import pixels_of, read_lines

TABLE = "pairs.jsonl"
PAIRS_PER_PROMPT = 200  # maximum number, drawn without repetition
ORDER = 0  # seed of the order of pairs
MAX_SIDE = 1024  # pixels of an image on the page
CHOICES = ("a", "b")


@dataclass(frozen=True)
class ImagePair:
    """Two images of one prompt; a shared pair is for every annotator."""

    id: str
    prompt: str
    files: tuple[Path, Path]
    shared: bool

    def pictures(self) -> list[bytes]:
        """Return both images as PNG without metadata, at most MAX_SIDE pixels a side. Raises InputError."""
        return [_png(file) for file in self.files]


def _png(file: Path) -> bytes:
    """Read an image as the training of a reward does: rotated by its EXIF entry, transparency on white."""
    try:
        picture = Image.fromarray(pixels_of(read_image(file)))
    except InputError as error:
        raise InputError(f"{file.name} cannot be read as an image: move it away and start the app again") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return as_png(picture)


def pairs_of(folder: Path) -> list[ImagePair]:
    """Return the pairs of images with the same prompt in a folder, in the order in which they are offered.

    Every third pair is shared. Raises InputError for a folder without prompts, or without two images of one prompt.
    """
    paths, prompts = images_with_prompts(folder)
    generator, drawn = random.Random(ORDER), list[tuple[str, Path, Path]]()
    for prompt in dict.fromkeys(prompts):
        own = [path for path, text in zip(paths, prompts, strict=True) if text == prompt]
        pairs = list(combinations(own, 2))
        for pair in generator.sample(pairs, min(PAIRS_PER_PROMPT, len(pairs))):
            a, b = generator.sample(pair, 2)  # random sides
            drawn.append((prompt, a, b))
    if not drawn:
        raise InputError(f"{folder}: no prompt has two images to choose between")
    generator.shuffle(drawn)
    return [
        ImagePair(str(number), prompt, (a, b), number % OVERLAP_EVERY == 0)
        for number, (prompt, a, b) in enumerate(drawn)
    ]


def write_images(folder: Path, pngs: Sequence[bytes], prompt: str) -> None:
    """Write images of one prompt into a folder that `pairs_of` reads. Raises InputError."""
    with write_errors(folder, "make room and try again"):
        for number, png in enumerate(pngs):
            with atomic_write(folder / f"{number:02d}.png") as new:
                new.write_bytes(png)
            write_text(folder / f"{number:02d}.txt", prompt)


def copy_table(source: Path, to: Path) -> None:
    """Copy the table of a folder, with absolute paths of its images."""
    sides = ("image_a", "image_b")
    rows = [row | {side: str((source / row[side]).resolve()) for side in sides} for row in read_table(source)]
    write_table(to, rows)


def read_table(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of the table of a folder. Raises InputError."""
    return [row for _, row in read_lines(folder / TABLE)]


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table of a folder. Raises OSError."""
    write_text(folder / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ImageLabelStore(AnswerStore):
    """Pairs of images and the answers of all annotators, in pairs.jsonl: the rows of `steer rewards train`.

    images  folder with prompts (`steer.apps.scoring.images_of_folder`)
    path    folder of the table; existing rows are kept, and must be of these images
    """

    kind = "pair"

    def __init__(self, images: Path, path: Path) -> None:
        super().__init__(path)
        self.pairs = {pair.id: pair for pair in pairs_of(images)}
        self._rows = read_table(path) if (path / TABLE).exists() else []
        if not all(map(self._is_ours, self._rows)):
            raise InputError(f"{path / TABLE} is of other images than {images}: give another --labels folder")
        for row in self._rows:
            chosen = CHOICES.index(row["choice"]) if row["choice"] in CHOICES else None
            self._verdicts.setdefault(row["annotator"], {})[row["pair"]] = Verdict(chosen, "bad" in row)

    @property
    def groups(self) -> Mapping[str, ImagePair]:
        return self.pairs

    def _is_ours(self, row: dict[str, Any]) -> bool:
        """Tell whether a row of the table is of these images, in the form that this class writes."""
        known = row.get("pair") in self.pairs and isinstance(row.get("annotator"), str) and "choice" in row
        return known and bool(row == row | self._names(row["pair"]))

    def _names(self, pair: str) -> dict[str, str]:
        one = self.pairs[pair]
        a, b = (os.path.relpath(file, self.path) for file in one.files)
        return {"image_a": a, "image_b": b, "prompt": one.prompt}

    def offer(self, request: LabelRequest) -> ImagePair | None:
        """Assign a pair to the annotator: a shared one that they have not answered, or one without answers, or None."""
        with self._lock:
            mine = self._of(request.annotator).keys() | {
                pair for name, pair in self._assigned | self._skipped if name == request.annotator
            }
            taken = self.judgements().keys() | {pair for _, pair in self._assigned}
            left = (one for one in self.pairs.values() if one.id not in mine and (one.shared or one.id not in taken))
            if (selected := next(left, None)) is not None:
                self._assigned.add((request.annotator, selected.id))
            return selected

    def _record(self, annotator: str, group: str, verdict: Verdict) -> None:
        choice = {"choice": "tie" if verdict.chosen is None else CHOICES[verdict.chosen]}
        answer = choice | ({"bad": True} if verdict.bad else {})
        row = self._names(group) | answer | {"pair": group, "annotator": annotator, "time": now()}
        self._write([*self._rows, row])

    def _remove(self, annotator: str, group: str) -> None:
        self._write([row for row in self._rows if (row["annotator"], row["pair"]) != (annotator, group)])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_table(self.path, rows)
        self._rows = rows
