"""A noise optimisation on disk: all of it after every iteration, whole or not at all; safetensors, no code."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer.errors import InputError
from steer.noise import Search
from steer.pipelines.output import Iteration
from steer.staged import staged

SERIES = ("rewards", "norms", "best")
SUM = "sha256"  # of the tensors


class SearchFile:
    """`path`, or nothing at all where it is None; `about` says which run it may belong to."""

    def __init__(self, path: str | Path | None, about: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.about = json.dumps(about, sort_keys=True)

    def save(self, search: Search, trace: Sequence[Iteration]) -> None:
        """After an iteration: `search` stands where the next one begins."""
        if self.path is None:
            return
        series = {name: torch.stack([getattr(one, name) for one in trace]) for name in SERIES}
        parts = {f"parts/{name}": torch.stack([one.parts[name] for one in trace]) for name in trace[-1].parts}
        tensors = {f"search/{name}": value for name, value in search.tensors().items()} | series | parts
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            with staged(self.path) as new:
                save_file(plain, new, self._told() | {SUM: _sum(plain)})
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} cannot be written ({error}); make room, or choose another folder") from error

    def load(self, device: torch.device, total: int) -> tuple[Search, list[Iteration]] | None:
        """What was saved, for a run of `total` iterations; None where nothing was.

        Raises InputError for the file of another run, and for one that is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                told, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.path} cannot be read as a saved search ({error}); delete it to begin anew"
            ) from error
        known = told.pop(SUM, None)
        if told != self._told():
            raise InputError(f"{self.path} belongs to another run; delete it, or call with its settings and seed")
        if known is not None and known != _sum(tensors):  # files of older versions have none
            raise InputError(f"{self.path} is damaged: its sha256 is another; delete it to begin anew")
        if missing := sorted({*SERIES} - tensors.keys()):
            raise InputError(f"{self.path} lacks {missing[0]}; delete it to begin anew")
        if (held := len(tensors["rewards"])) > total:
            raise InputError(f"{self.path} holds {held} iterations, more than the {total} asked for; ask for {held}")
        saved = {name.removeprefix("search/"): value for name, value in tensors.items() if name.startswith("search/")}
        parts = {name.removeprefix("parts/"): value for name, value in tensors.items() if name.startswith("parts/")}
        trace = [
            Iteration(
                number=number,
                total=total,
                parts={name: values[number] for name, values in parts.items()},
                **{name: tensors[name][number] for name in SERIES},
            )
            for number in range(len(tensors["rewards"]))
        ]
        return Search.from_tensors(saved, device), trace

    def _told(self) -> dict[str, str]:
        return {"steer": "noise search", "about": self.about}


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
