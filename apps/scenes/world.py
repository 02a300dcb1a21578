"""Random scenes, their prompts, and the combinations held out from training."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from steer.rewards.scene import COLOURS, MIRRORED, RELATIONS, SHAPES, Phrase, SceneRequest, SceneReward, coverage

SIZE = 64
GAP = 3.0  # pixels of background between two objects
SMALLEST_RADIUS = 8.0  # pixels
HELD_OUT_SALT = 188  # one that holds out combinations of every task that has any
TRIES = 16  # spots tried for one object
COLOUR_NAMES = tuple(COLOURS)
TASKS = {
    "single_object": 0.04,
    "two_object": 0.08,
    "counting": 0.22,
    "colors": 0.12,
    "position": 0.28,
    "color_attr": 0.26,
}
RIGHT = f"{__name__}:right"  # as `steer evaluate --reward` reads it


def right(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mark images that meet all requirements of their prompts with 1, others with 0."""
    return (SceneReward()(images, prompts) == 1).float()


@dataclass(frozen=True)
class SceneObject:
    """One object: centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A scene: its objects (`things`) and its description (`request`)."""

    request: SceneRequest
    things: tuple[SceneObject, ...]

    @property
    def prompt(self) -> str:
        return str(self.request)


@cache
def is_held_out(request: SceneRequest) -> bool:
    """One combination in eight, chosen by a hash of its canonical wording, is kept for evaluation."""
    if request.task == "single_object":
        return False
    return hashlib.sha256(f"{HELD_OUT_SALT}{request.canonical}".encode()).digest()[0] % 8 == 0


def random_request(rng: np.random.Generator, task: str) -> SceneRequest:
    """Draw a request of one task, all combinations equally likely."""
    first, second = rng.choice(SHAPES, 2, replace=False)
    colours = [str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False)]
    count = int(rng.integers(2, 5))
    plain, coloured = (None, None), (colours[0], colours[1])
    c1, c2 = coloured if task in ("colors", "color_attr") else plain
    if task in ("counting", "position") and rng.random() < 0.6:
        c1, c2 = coloured
    if task in ("single_object", "colors", "counting"):
        return SceneRequest((Phrase(count if task == "counting" else 1, c1, str(first)),))
    relation = str(rng.choice(list(RELATIONS))) if task == "position" else None
    return SceneRequest((Phrase(1, c1, str(first)), Phrase(1, c2, str(second))), relation)


def true_requests(things: tuple[SceneObject, ...]) -> list[SceneRequest]:
    """All canonical descriptions of a scene of one kind or of two single objects."""
    first, last = things[0], things[-1]
    if first.shape == last.shape:
        colours = {thing.colour for thing in things}
        named = [None, *colours] if len(colours) == 1 else [None]
        return [SceneRequest((Phrase(len(things), colour, first.shape),)) for colour in named]
    dx, dy = first.x - last.x, first.y - last.y
    relation = ("right of" if dx > 0 else "left of") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
    plain = (Phrase(1, None, first.shape), Phrase(1, None, last.shape))
    coloured = (Phrase(1, first.colour, first.shape), Phrase(1, last.colour, last.shape))
    return [SceneRequest(phrases, joined).canonical for phrases in (plain, coloured) for joined in (None, relation)]


def captions(scene: Scene) -> list[str]:
    """List the prompts that are true of a training scene, its own first.

    A relation is worded only where it holds with the margin that drawing asks for.
    """
    requests = [scene.request]
    for request in true_requests(scene.things):
        if request.relation and not _clearly(scene.things, request):
            continue
        mirrored = {relation: other for other, relation in MIRRORED.items()} | MIRRORED
        requests.append(request)
        if len(request.phrases) == 2:
            requests.append(SceneRequest(request.phrases[::-1], mirrored.get(request.relation or "")))
    return list(dict.fromkeys(map(str, requests)))


def _clearly(things: Sequence[SceneObject], request: SceneRequest) -> bool:
    """Whether the relation of a request holds of the two objects with a margin of one half."""
    first, second = (next(thing for thing in things if thing.shape == phrase.shape) for phrase in request.phrases)
    sx, sy = RELATIONS[request.relation or ""]
    dx, dy = first.x - second.x, first.y - second.y
    return dx * sx + dy * sy >= 1.5 * (abs(dx * sy) + abs(dy * sx))


def _separated(a: SceneObject, b: SceneObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP


def _place(rng: np.random.Generator, request: SceneRequest) -> tuple[SceneObject, ...] | None:
    """Place objects at random; None where one has no room or the relation does not hold."""
    wanted = [phrase for phrase in request.phrases for _ in range(phrase.count)]
    largest = 13.0 if len(wanted) <= 2 else 9.5
    things: list[SceneObject] = []
    for phrase in wanted:
        radius = rng.uniform(SMALLEST_RADIUS, largest)
        colour = phrase.colour or COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
        spots = (radius + 1 + rng.random((TRIES, 2)) * (SIZE - 2 * radius - 2)).tolist()
        candidates = (SceneObject(colour, phrase.shape, x, y, radius) for x, y in spots)
        free = next((thing for thing in candidates if all(_separated(thing, other) for other in things)), None)
        if free is None:
            return None
        things.append(free)
    if request.relation and not _clearly(things, request):
        return None
    return tuple(things)


def random_scene(rng: np.random.Generator, request: SceneRequest | None = None) -> Scene:
    """Draw a scene for `request`, or a training scene: of a random task, with no held-out description."""
    if request is not None:
        while (things := _place(rng, request)) is None:
            continue
        return Scene(request, things)
    while True:
        wanted = random_request(rng, str(rng.choice(list(TASKS), p=list(TASKS.values()))))
        plain = tuple(replace(phrase, colour=None) for phrase in wanted.phrases)
        if any(map(is_held_out, (wanted, SceneRequest(plain), SceneRequest(plain, wanted.relation)))):
            continue
        for _ in range(TRIES):
            things = _place(rng, wanted)
            if things and not any(map(is_held_out, true_requests(things))):
                return Scene(wanted, things)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint a scene: (SIZE, SIZE, 3) uint8, on light grey, colours and grey slightly varied."""
    image = np.full((SIZE, SIZE, 3), rng.uniform(0.86, 0.98), np.float32)
    for thing in scene.things:
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1)
        left, top = int(thing.x - thing.radius) - 1, int(thing.y - thing.radius) - 1
        side = int(2 * thing.radius) + 4
        alpha = coverage(thing.shape, side, thing.x - left, thing.y - top, thing.radius)[..., None]
        box = image[max(top, 0) : top + side, max(left, 0) : left + side]
        alpha = alpha[max(-top, 0) :, max(-left, 0) :][: box.shape[0], : box.shape[1]]
        box += alpha * (colour.astype(np.float32) - box)
    return (image * 255).round().astype(np.uint8)


# Prompts of each task; single_object has no combination to hold out.
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
    """The request and its consequences: the same without its colours, its relation, or both."""
    plain = tuple(replace(phrase, colour=None) for phrase in request.phrases)
    return {
        SceneRequest(phrases, relation) for phrases in (request.phrases, plain) for relation in (request.relation, None)
    }


def is_for_training(request: SceneRequest) -> bool:
    """Whether no held-out description is true of its scenes, as in training, and tuning does not have it.

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
def _sampled_requests() -> dict[str, tuple[SceneRequest, ...]]:
    """Different requests of each task in the order of a fixed seed, from which all lists are taken."""
    rng = np.random.default_rng(SEED)
    return {task: tuple(dict.fromkeys(random_request(rng, task) for _ in range(DRAWS))) for task in TASKS}


def requests_of(name: str) -> list[SceneRequest]:
    """The requests of a list by task: the first that fit, as many as the table says."""
    counts, fits = LISTS[name]
    return [
        request
        for task, drawn in _sampled_requests().items()
        for request in islice(filter(fits, drawn), counts.get(task, 0))
    ]


@cache
def _tuning() -> frozenset[SceneRequest]:
    return frozenset(requests_of("scenes-tuning"))


def write_prompt_lists(folder: Path) -> None:
    """Write every list as NAME.jsonl: {"tag": task, "prompt": …} a line, as GenEval has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LISTS:
        records = [{"tag": request.task, "prompt": str(request)} for request in requests_of(name)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
