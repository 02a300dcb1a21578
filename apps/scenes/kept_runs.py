"""Runs of contenders over prompts that go on where they stopped: a file for every contender and group of prompts."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from steer.apps.models import load_pipeline
from steer.apps.scenes.contenders import Contender, Found, Spent
from steer.errors import InputError
from steer.staged import write_text

logger = logging.getLogger(__name__)

SIDE_BY_SIDE = 32  # images in one call, whatever K: seconds are then those of one and the same batch


@dataclass
class KeptRuns:
    """Results in `folder`, of contenders steered by `reward`; `call` goes to every pipeline.

    On the CPU, where seconds of processor time tell what a method costs, whatever else the machine does.
    """

    folder: Path
    reward: str
    call: Mapping[str, Any]
    _pipes: dict[str, Any] = field(default_factory=dict)

    def run(self, contenders: Sequence[Contender], prompts: Sequence[str]) -> list[Found]:
        """What each contender found; only what is not in the folder is computed.

        Raises InputError for results of other settings, or prompts, in the folder.
        """
        work = [(one, start, some) for one in contenders for start, some in _groups(one, prompts)]
        groups: dict[Contender, list[dict[str, Any]]] = {one: [] for one in contenders}
        with tqdm(total=sum(len(some) for _, _, some in work), unit="prompt", disable=None) as bar:
            for one, start, some in work:
                bar.set_description(f"{one.name}, {one.size}")
                groups[one].append(self._kept(one, start, some))
                bar.update(len(some))
        return [_merged(groups[one]) for one in contenders]

    def _kept(self, one: Contender, start: int, prompts: list[str]) -> dict[str, Any]:
        path = self.folder / one.key / f"{start:04d}.json"
        about = one.about() | {"reward": self.reward, "call": dict(self.call), "prompts": prompts}
        about = json.loads(json.dumps(about))  # as it comes back from the file
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept.get("about") != about:
                raise InputError(
                    f"{path} holds results of other settings or prompts; delete it, or choose another --out"
                )
            return kept
        found = one.run(self._pipe(one.model), self.reward, prompts, start, self.call)
        spent = found.spent.times(len(prompts))
        kept = {
            "about": about,
            "proxy": found.proxy.tolist(),
            "exact": found.exact.tolist(),
            "spent": {"evaluations": spent.evaluations, "decodes": spent.decodes, "seconds": spent.seconds},
        }
        write_text(path, json.dumps(kept) + "\n")
        logger.info("%s, prompts from %d on: %.1f s", one.key, start, spent.seconds)
        return kept

    def _pipe(self, model: str) -> Any:
        if model not in self._pipes:
            self._pipes[model] = load_pipeline(model, "cpu")
            self._pipes[model].set_progress_bar_config(disable=True)
        return self._pipes[model]


def _groups(one: Contender, prompts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Its prompts in groups that fill one call, each with the number of its first."""
    own, together = prompts[: one.prompts], max(1, SIDE_BY_SIDE // one.images)
    return [(start, list(own[start : start + together])) for start in range(0, len(own), together)]


def _merged(groups: Sequence[Mapping[str, Any]]) -> Found:
    count = sum(len(group["proxy"]) for group in groups)
    proxy, exact = (torch.tensor([row for group in groups for row in group[name]]) for name in ("proxy", "exact"))
    total = {name: sum(group["spent"][name] for group in groups) for name in groups[0]["spent"]}
    return Found(proxy, exact, Spent(**total).times(1 / count))
