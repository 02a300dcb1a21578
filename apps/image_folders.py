"""Folders of images, each with the prompt that it was made for."""

from pathlib import Path, PurePosixPath
from typing import Any

from steer.errors import InputError
from steer.sums import unsummed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WAYS = "a report.json of `steer sample`, a prompts.jsonl with image and prompt on each line, or one prompt for all"


def images_with_prompts(folder: Path, prompt: str | None = None) -> tuple[list[Path], list[str]]:
    """The images of a folder, sorted by path, and the prompt of each.

    From report.json (the images and base images of `steer sample`), or prompts.jsonl (lines {"image": path in the
    folder, "prompt": text}), which name the images that count; without either, all PNG, JPEG and WebP files in it and
    below it, with `prompt`. Raises InputError where there is no prompt, or two sources of one, no image, or a path
    that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of images")
    report, lines = folder / "report.json", folder / "prompts.jsonl"
    source = next((path for path in (report, lines) if path.exists()), None)
    if source is None:
        if prompt is None:
            raise InputError(f"{folder}: no prompts for its images: it takes {WAYS}")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        named = [(path, prompt) for path in paths]
    elif prompt is not None:
        raise InputError(f"{folder} has its prompts in {source.name}: give no other prompt, or move that file away")
    else:
        listed = _of_report(source) if source == report else _of_lines(source)
        named = sorted((_inside(folder, name, source), text) for name, text in listed)
    if not named:
        raise InputError(f"{source or folder}: no images ({', '.join(SUFFIXES)})")
    return [path for path, _ in named], [text for _, text in named]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


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
        image, prompt = (record.get("image"), record.get("prompt")) if isinstance(record, dict) else (None, None)
        if not (isinstance(image, str) and isinstance(prompt, str)):
            raise InputError(f'{path}, line {number}: expected {{"image": "path", "prompt": "text"}}')
        listed.append((image, prompt))
    return listed


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
