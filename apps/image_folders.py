"""Folders of images, each with the prompt that it was made for."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from steer.apps.prompt_rows import read_text
from steer.errors import InputError
from steer.sums import unsummed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LISTS = ("prompts.jsonl", "metadata.jsonl")
IMAGE_KEYS, PROMPT_KEYS = ("image", "file_name", "image_path"), ("prompt", "text", "caption")
WAYS = (
    "a report.json of `steer sample`, a prompts.jsonl or metadata.jsonl with image and prompt on each line, a .txt "
    "beside each image, or one prompt for all"
)


def images_with_prompts(folder: Path, prompt: str | None = None) -> tuple[list[Path], list[str]]:
    """The images of a folder and the prompt of each, as `images_and_prompts`. Raises InputError where there is none."""
    paths, prompts = images_and_prompts(folder, prompt)
    if None in prompts:
        raise InputError(f"{folder}: no prompts for its images: it takes {WAYS}")
    return paths, [text for text in prompts if text is not None]


def images_and_prompts(folder: Path, prompt: str | None = None) -> tuple[list[Path], list[str | None]]:
    """The images of a folder, sorted by path, and the prompt of each; None where the folder has no prompts.

    From report.json (the images and base images of `steer sample`), prompts.jsonl or metadata.jsonl (lines
    {"image": path in the folder, "prompt": text}; file_name and text, caption do too), which name the images that
    count; without them, all PNG, JPEG and WebP files in it and below it, each with the text of the .txt file of its
    name, or with `prompt`. Raises InputError where there are two sources of prompts, no image, an image without a
    caption beside others that have one, or a path that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of images")
    report = folder / "report.json"
    source = next((path for path in (report, *(folder / name for name in LISTS)) if path.exists()), None)
    if source is not None:
        if prompt is not None:
            raise InputError(f"{folder} has its prompts in {source.name}: give no other prompt, or move that file away")
        listed = _of_report(source) if source == report else _of_lines(source)
        named: list[tuple[Path, str | None]] = [(_inside(folder, name, source), text) for name, text in listed]
    else:
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        named = _captioned(folder, sorted(paths), prompt)
    if not named:
        raise InputError(f"{source or folder}: no images ({', '.join(SUFFIXES)})")
    named.sort(key=lambda one: (one[0], one[1] or ""))
    return [path for path, _ in named], [text for _, text in named]


def _captioned(folder: Path, paths: Sequence[Path], prompt: str | None) -> list[tuple[Path, str | None]]:
    """Each image with the text of the .txt file of its name, or with `prompt` where no image has one."""
    captions = {path: path.with_suffix(".txt") for path in paths if path.with_suffix(".txt").is_file()}
    if not captions:
        return [(path, prompt) for path in paths]
    if prompt is not None:
        raise InputError(f"{folder} has its prompts in .txt files beside the images: give no other prompt")
    if without := [path for path in paths if path not in captions]:
        raise InputError(
            f"{folder}: {len(captions)} captions for {len(paths)} images: {without[0].name} has no "
            f"{without[0].with_suffix('.txt').name}"
        )
    texts = [(path, " ".join(_read(caption).split())) for path, caption in captions.items()]
    if empty := [path for path, text in texts if not text]:
        raise InputError(f"{captions[empty[0]]}: an empty caption")
    return [*texts]


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from error


def _json(text: str, where: str) -> Any:
    try:
        return unsummed(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _of_report(path: Path) -> list[tuple[str, str]]:
    """The names and prompts of all images that `steer sample` wrote."""
    report = _json(_read(path), str(path))
    listed: list[tuple[str, str]] = []
    try:
        for entry in report["prompts"]:
            for part in (entry, entry.get("base", {"images": []})):
                listed += [(name, entry["prompt"]) for name in [*part["images"]]]
        if not all(isinstance(prompt, str) for _, prompt in listed):
            raise TypeError("a prompt that is no text")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a report of `steer sample`; prompts may stand in prompts.jsonl") from error
    return listed


def _of_lines(path: Path) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for number, line in enumerate(_read(path).replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        record = _json(line, f"{path}, line {number}")
        image, prompt = (_under(record, keys) for keys in (IMAGE_KEYS, PROMPT_KEYS))
        if not (isinstance(image, str) and isinstance(prompt, str)):
            raise InputError(f'{path}, line {number}: expected {{"image": "path", "prompt": "text"}}')
        listed.append((image, prompt))
    return listed


def _under(record: Any, keys: Sequence[str]) -> Any:
    """The value of the first of some keys that a record has."""
    return next((record[key] for key in keys if key in record), None) if isinstance(record, dict) else None


def _inside(folder: Path, name: Any, source: Path) -> Path:
    """The image of a name that a file gave. Raises InputError where it is none, or not in the folder."""
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{source}: {name!r} is no path of an image")
    path, given = folder / name, PurePosixPath(name)
    if given.is_absolute() or ".." in given.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: {name!r} leads out of {folder}; paths of images stay inside")
    if not path.is_file():
        raise InputError(f"{source}: there is no image {name!r} in {folder}")
    return path
