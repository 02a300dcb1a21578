"""The fixed prompt lists: held-out combinations for evaluation, trained ones for tuning."""

import json
from pathlib import Path

import numpy as np

from steer.apps.scenes.world import TASKS, is_held_out, random_request

# How many prompts of each task; single_object has no combination that could be held out.
HELD_OUT = {"two_object": 2, "counting": 13, "colors": 4, "position": 120, "color_attr": 72}
TUNING = {"single_object": 4, "two_object": 16, "counting": 24, "colors": 12, "position": 40, "color_attr": 32}


def prompts_of(task: str, count: int, held_out: bool, rng: np.random.Generator) -> list[str]:
    """Up to `count` different prompts of one task, all held out or none."""
    found: dict[str, None] = {}
    for _ in range(20_000):
        request = random_request(rng, task)
        if is_held_out(request) == held_out and len(found) < count:
            found[str(request)] = None
    return list(found)


def write_prompt_lists(folder: Path) -> None:
    """Writes scenes-heldout.jsonl and scenes-tuning.jsonl: {"tag": task, "prompt": …} a line, as GenEval has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, counts in (("scenes-heldout", True, HELD_OUT), ("scenes-tuning", False, TUNING)):
        rng = np.random.default_rng(2026)
        records = [
            {"tag": task, "prompt": prompt}
            for task in TASKS
            for prompt in prompts_of(task, counts.get(task, 0), held_out, rng)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
