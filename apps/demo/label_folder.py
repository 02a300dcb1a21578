"""Where the choices of the Label tab are kept, and how they get from there into a training."""

import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path

from steer.apps.demo.studio import Studio
from steer.assets import MODELS
from steer.errors import InputError
from steer.pipelines.choice_files import CHOICES, LOTS, SETTINGS

CONFIG, CONFIGURED = "d3po-scenes", "scenes"  # and the model in it
ZIPPED = "choices"  # what the zip unpacks to


def label_folder(studio: Studio) -> Path:
    """That of the owner, or one that goes with the app."""
    return studio.labels or studio.home / "labels"


def place_told(studio: Studio) -> str:
    """Where choices go, in plain words."""
    if studio.labels is not None:
        return f"Every choice is written to {studio.labels} at once, with the images and how they were drawn."
    return (
        "Every choice is written at once, but to a temporary folder: it goes when the app ends. Make a zip before, "
        "or start the app with `steer demo --labels FOLDER`. The zip holds the choices, prompts and names of all who "
        "label in this app."
    )


def command_of(studio: Studio) -> str:
    """A line for a shell that finetunes the model from the choices; of a zip, beside the unpacked folder."""
    model, folder = studio.models[0], ZIPPED if studio.labels is None else str(studio.labels)
    words = ["steer", "finetune", CONFIG, "--choices", folder]
    if model != CONFIGURED:
        words += ["--model", model]
    if model not in MODELS:  # what judges scenes is blind to other images
        words += ["--reward", "null", "--eval-prompts", "null", "--eval-rewards", "[]"]
    return shlex.join(words)


def write_zip(folder: Path, path: Path) -> None:
    """All of a folder of choices, while it may be written to. Raises InputError where nobody has chosen yet."""
    if not (folder / CHOICES).exists():
        raise InputError("nothing has been chosen yet: label some images first")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in kept_files(folder):
            file.write(one, f"{ZIPPED}/{one.relative_to(folder)}")


def kept_files(folder: Path) -> Iterator[Path]:
    """The files of a folder of choices, written to meanwhile: each is to be read before the next is asked for."""
    for name in (CHOICES, LOTS, SETTINGS):  # before the files that they name, which are there by then
        yield folder / name
    for kind in ("images", "trajectories"):
        yield from (one for one in sorted((folder / kind).iterdir()) if one.suffix != ".new")
