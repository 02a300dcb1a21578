"""Prompt files as people have them: text, JSON lines, tables."""

import json
from collections.abc import Callable
from pathlib import Path

from steer.errors import InputError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order: .txt (one a line), .jsonl (key "prompt") or .tsv (column "prompt").

    Raises InputError that names the file, and the line where there is one.
    """
    readers: dict[str, Callable[[Path, str], list[str]]] = {".txt": _text, ".jsonl": _json_lines, ".tsv": _table}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: prompts are read from {', '.join(readers)} files")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    prompts = [prompt.strip() for prompt in readers[path.suffix.lower()](path, content)]
    if not any(prompts):
        raise InputError(f"{path}: no prompts in this file")
    return [prompt for prompt in prompts if prompt]


def _text(path: Path, content: str) -> list[str]:
    return _lines(content)


def _json_lines(path: Path, content: str) -> list[str]:
    prompts = []
    for number, line in enumerate(_lines(content), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise InputError(f'{path}, line {number}: expected an object with a text under "prompt"')
        prompts.append(prompt)
    return prompts


def _table(path: Path, content: str) -> list[str]:
    rows = [line.split("\t") if line.strip() else [] for line in _lines(content)]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if "prompt" not in header:
        raise InputError(f'{path}, line 1: expected a column named "prompt"')
    column = header.index("prompt")
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) <= column:
            raise InputError(f"{path}, line {number}: no column {column + 1}")
    return [row[column] for row in rows[1:] if row]


def _lines(content: str) -> list[str]:
    """Lines that end as files end them; other separators of Unicode may stand inside a prompt."""
    return content.replace("\r\n", "\n").split("\n")
