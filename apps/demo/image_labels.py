"""Preferences between the owner's images: a table of pairs that rewards and Diffusion-DPO learn from."""

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from steer.apps.demo.labels import OVERLAP_EVERY, LabelRequest, Progress, now
from steer.apps.demo.pictures import as_png
from steer.apps.scoring import images_with_prompts
from steer.errors import InputError
from steer.files import atomic_write, read_image, write_errors, write_text
from steer.pipelines.training.preference_files import pixels_of

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
    rows = [json.loads(line) for line in (source / TABLE).read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        row |= {side: str((source / row[side]).resolve()) for side in ("image_a", "image_b")}
    write_text(to / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ImageLabelStore:
    """Pairs of images and the answers of all annotators, in pairs.jsonl: the rows of `steer rewards train`.

    images  folder with prompts (`steer.apps.scoring.images_of_folder`)
    path    folder of the table; existing rows are kept, and must be of these images
    Thread-safe. An answer is on disk when its method returns. Raises InputError.
    """

    def __init__(self, images: Path, path: Path) -> None:
        self.path, self.pairs = path, {pair.id: pair for pair in pairs_of(images)}
        self._lock = threading.RLock()
        self._undone = Counter[str]()
        self._assigned: set[tuple[str, str]] = set()
        self._skipped: set[tuple[str, str]] = set()
        self._rows: list[dict[str, Any]] = []
        if (path / TABLE).exists():
            try:
                self._rows = [
                    json.loads(line) for line in (path / TABLE).read_text(encoding="utf-8").split("\n") if line
                ]
            except (OSError, ValueError, RecursionError) as error:
                raise InputError(f"{path / TABLE}: cannot be read as JSON lines ({error})") from error
            if not all(map(self._is_ours, self._rows)):
                raise InputError(f"{path / TABLE} is of other images than {images}: give another --labels folder")

    def _is_ours(self, row: Any) -> bool:
        """Tell whether a row of the table is of these images, in the form that this class writes."""
        known = isinstance(row, dict) and row.get("pair") in self.pairs and {"annotator", "choice"} <= row.keys()
        return known and bool(row == row | self._names(row["pair"]))

    def _names(self, pair: str) -> dict[str, str]:
        one = self.pairs[pair]
        a, b = (os.path.relpath(file, self.path) for file in one.files)
        return {"image_a": a, "image_b": b, "prompt": one.prompt}

    def _of(self, annotator: str) -> list[dict[str, Any]]:
        return [row for row in self._rows if row["annotator"] == annotator]

    def offer(self, request: LabelRequest) -> ImagePair | None:
        """Assign a pair to the annotator: a shared one that they have not answered, or one without answers, or None."""
        with self._lock:
            mine = {row["pair"] for row in self._of(request.annotator)}
            mine |= {pair for name, pair in self._assigned | self._skipped if name == request.annotator}
            taken = {row["pair"] for row in self._rows} | {pair for _, pair in self._assigned}
            left = (one for one in self.pairs.values() if one.id not in mine and (one.shared or one.id not in taken))
            if (selected := next(left, None)) is not None:
                self._assigned.add((request.annotator, selected.id))
            return selected

    def choose(self, annotator: str, pair: str, chosen: int) -> bool:
        """Record that an image is the better one; False if the annotator has answered already."""
        return self._judge(annotator, pair, {"choice": CHOICES[chosen]})

    def tie(self, annotator: str, pair: str, bad: bool = False) -> bool:
        """Record a tie; False if the annotator has answered already. bad: both images are bad."""
        return self._judge(annotator, pair, {"choice": "tie"} | ({"bad": True} if bad else {}))

    def _judge(self, annotator: str, pair: str, answer: dict[str, Any]) -> bool:
        with self._lock:
            if pair not in self.pairs:
                raise InputError(f"there is no pair {pair!r:.70} here: press Start for one")
            if any(row["pair"] == pair for row in self._of(annotator)):
                return False
            row = self._names(pair) | answer | {"pair": pair, "annotator": annotator, "time": now()}
            self._write([*self._rows, row])
            self._assigned.discard((annotator, pair))
            return True

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with write_errors(self.path, "make room and answer again"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._rows = rows

    def skip(self, annotator: str, pair: str) -> None:
        """Leave a pair to others; it is not offered to this annotator again until the app restarts."""
        with self._lock:
            self._assigned.discard((annotator, pair))
            self._skipped.add((annotator, pair))

    def undo(self, annotator: str) -> ImagePair | None:
        """Remove the annotator's latest answer and assign its pair again; None if there is no answer."""
        with self._lock:
            if not (own := self._of(annotator)):
                return None
            self._write([row for row in self._rows if row is not own[-1]])
            self._undone[annotator] += 1
            self._assigned.add((annotator, own[-1]["pair"]))
            return self.pairs[own[-1]["pair"]]

    def release(self, annotator: str, pairs: Collection[Any]) -> None:
        """Release pairs that the annotator will not answer."""
        with self._lock:
            self._assigned -= {(annotator, pair.id) for pair in pairs}

    def progress(self, annotator: str) -> Progress:
        """Count the annotator's answers so far, and answers undone since the app started."""
        with self._lock:
            own = self._of(annotator)
            ties = [row for row in own if row["choice"] == "tie"]
            return Progress(len(own) - len(ties), len(ties), sum("bad" in row for row in ties), self._undone[annotator])

    def judgements(self) -> dict[str, dict[str, int | None]]:
        """Return the answers by pair and annotator: the index of the better image, or None for a tie."""
        with self._lock:
            selected: dict[str, dict[str, int | None]] = {}
            for row in self._rows:
                chosen = CHOICES.index(row["choice"]) if row["choice"] in CHOICES else None
                selected.setdefault(row["pair"], {})[row["annotator"]] = chosen
            return selected
