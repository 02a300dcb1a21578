"""The fixed prompt lists: held-out combinations for evaluation, trained ones for tuning, others to finetune on."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from steer.apps.scenes.world import TASKS, is_held_out, random_request
from steer.rewards.scene_language import SceneRequest

# How many prompts of each task; single_object has no combination that could be held out.
HELD_OUT = {"two_object": 2, "counting": 13, "colors": 4, "position": 120, "color_attr": 72}
TUNING = {"single_object": 4, "two_object": 16, "counting": 24, "colors": 12, "position": 40, "color_attr": 32}
# All that held-out and tuning prompts leave of four tasks, and as many of position as of color_attr.
TRAINING = {"single_object": 1, "two_object": 2, "counting": 66, "colors": 14, "position": 258, "color_attr": 258}
# A few, and a thousand, for comparing methods of finetuning; the thousand hold all of TRAINING.
FEW = {"counting": 8, "colors": 4, "position": 10, "color_attr": 10}
MANY = {"single_object": 1, "two_object": 2, "counting": 66, "colors": 14, "position": 533, "color_attr": 408}
SEED = 2026
DRAWS = 20_000  # of each task: enough to meet every combination of the small ones


def implied(request: SceneRequest) -> set[SceneRequest]:
    """The request and what is true of each of its scenes too: the same without its colours, its relation, or both."""
    plain = tuple(replace(phrase, colour=None) for phrase in request.phrases)
    return {
        SceneRequest(phrases, relation) for phrases in (request.phrases, plain) for relation in (request.relation, None)
    }


def is_for_training(request: SceneRequest) -> bool:
    """Nothing held out is true of its scenes, as of every scene the model was trained on, and tuning does not ask it.

    Tuning has every pair of the task two_object that is not held out; what is left are other wordings of two of them.
    """
    if any(map(is_held_out, implied(request))):
        return False
    if request.task == "two_object":
        return request not in _tuning()
    return request.canonical not in {other.canonical for other in _tuning() if other.task == request.task}


LISTS: dict[str, tuple[dict[str, int], Callable[[SceneRequest], bool]]] = {
    "scenes-heldout": (HELD_OUT, is_held_out),
    "scenes-tuning": (TUNING, lambda request: not is_held_out(request)),
    "scenes-training": (TRAINING, is_for_training),
    "scenes-few": (FEW, is_for_training),
    "scenes-many": (MANY, is_for_training),
}


@cache
def _drawn() -> dict[str, tuple[SceneRequest, ...]]:
    """What all lists are taken from: different requests of each task in the order of a fixed seed."""
    rng = np.random.default_rng(SEED)
    return {task: tuple(dict.fromkeys(random_request(rng, task) for _ in range(DRAWS))) for task in TASKS}


def requests_of(name: str) -> list[SceneRequest]:
    """The requests of a list, task by task: of each the first that fit, as many as the table says."""
    counts, fits = LISTS[name]
    return [request for task, drawn in _drawn().items() for request in islice(filter(fits, drawn), counts.get(task, 0))]


@cache
def _tuning() -> frozenset[SceneRequest]:
    return frozenset(requests_of("scenes-tuning"))


def write_prompt_lists(folder: Path) -> None:
    """Writes every list as NAME.jsonl: {"tag": task, "prompt": …} a line, as GenEval has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LISTS:
        records = [{"tag": request.task, "prompt": str(request)} for request in requests_of(name)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
