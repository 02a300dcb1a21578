"""geneval — the requirements of a prompt, checked on the boxes of an open-vocabulary detector (GenEval, 2310.11513)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.ops import nms

from steer.errors import InputError
from steer.reward import Metadata, RewardError
from steer.rewards.clip import load_backbone, loading
from steer.rewards.inputs import as_uint8, takes_any_images
from steer.rewards.names import option_number

DETECTOR = "google/owlv2-base-patch16-ensemble"
CLIP = "ViT-L-14/openai"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
# They would else be read as part of a class.
OTHER_NUMBERS = re.compile(
    r"\b(?:zero|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|dozen)\b"
)
RELATIONS = ("left of", "right of", "above", "below")
SLACK = 0.1  # margin of a relation, relative to the sum of both boxes' sides
THRESHOLD, OVERLAP = 0.3, 0.5  # confidence of a box; IoU above which the weaker of two boxes of a class is dropped
PREFIX = re.compile(r"^(?:an? )?(?:photo|picture|image)s? of ", re.IGNORECASE)
PHRASE = re.compile(rf"(?:({'|'.join(NUMBERS)}) )?(?:({'|'.join(COLOURS)}) )?([a-z][a-z -]*)", re.IGNORECASE)
SYNTAX = "'three red apples', 'a cat and a blue dog' or 'a cup left of a plate'"


@dataclass(frozen=True)
class Box:
    """A detected object: corners in pixels, confidence 0..1."""

    left: float
    top: float
    right: float
    bottom: float
    confidence: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """Return (x, y), in pixels."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Return (width, height), in pixels."""
        return self.right - self.left, self.bottom - self.top


Boxes = Mapping[str, Sequence[Box]]  # class → boxes, most confident first


class Detector(Protocol):
    """Detector of objects of named classes."""

    def detect(self, image: Tensor, classes: Sequence[str]) -> Boxes: ...


class ColourNamer(Protocol):
    """Classifier of the colour, one of COLOURS, of each box of one class."""

    def name_colours(self, image: Tensor, boxes: Sequence[Box], kind: str) -> list[str]: ...


@dataclass(frozen=True)
class Clause:
    """A required class: at least `count` objects, their colour, and their relation to the objects of another clause."""

    kind: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Requirements:
    """Classes that an image must show, and classes with an exclusive upper limit on their number of objects."""

    include: tuple[Clause, ...]
    exclude: tuple[tuple[str, int], ...] = ()

    @property
    def classes(self) -> list[str]:
        """Return the distinct classes to detect."""
        return list(dict.fromkeys([*(one.kind for one in self.include), *(kind for kind, _ in self.exclude)]))


def read_requirements(prompt: str, metadata: Mapping[str, Any]) -> Requirements:
    """Read GenEval's metadata (`include`, `exclude`), or else the prompt. Raises RewardError if both fail."""
    if "include" in metadata:
        try:
            include = []
            for one in metadata["include"]:
                relation, target = one.get("position", (None, 0))
                include.append(Clause(one["class"], int(one["count"]), one.get("color"), relation, int(target)))
            excluded = tuple((one["class"], int(one["count"])) for one in metadata.get("exclude", ()))
            return Requirements(tuple(include), excluded)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RewardError(f"geneval: the metadata of {prompt!r:.60} is not GenEval's: {error!r}") from error
    text = PREFIX.sub("", " ".join(prompt.lower().split()).strip(". ")).replace("to the left of", "left of")
    pieces = re.split(rf" ({'|'.join(RELATIONS)}|and) ", text.replace("to the right of", "right of"))
    clauses: list[Clause] = []
    exclude: list[tuple[str, int]] = []
    for k, piece in enumerate(pieces[::2]):
        if not (read := PHRASE.fullmatch(piece)) or (k and pieces[2 * k - 1] != "and" and len(pieces) > 3):
            raise RewardError(f"geneval: cannot read {prompt!r:.80}: write {SYNTAX}, or give GenEval's `include` rows")
        if OTHER_NUMBERS.search(read[3]):
            raise RewardError(f"geneval: cannot read {prompt!r:.80}: it counts to six, {', '.join(NUMBERS)}")
        count = NUMBERS[read[1].lower()] if read[1] else 1
        kind = _singular(read[3]) if count > 1 else read[3]
        clauses.append(Clause(kind, count, read[2]))
        exclude += [(kind, count + 1)] if count > 1 else []
    if len(pieces) == 3 and pieces[1] in RELATIONS:  # A left of B: A is judged against B, which is read first
        first, second = clauses
        clauses = [second, Clause(first.kind, first.count, first.colour, pieces[1], 0)]
    return Requirements(tuple(clauses), tuple(exclude))


def _singular(word: str) -> str:
    for ending, single in (("ves", "f"), ("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending):
            return word.removesuffix(ending) + single
    return word.removesuffix("s")


def met(required: Requirements, boxes: Boxes, image: Tensor, namer: ColourNamer) -> list[bool]:
    """Return whether each requirement is met: the count, the colour and the relation of each clause, each exclusion.

    Colours and relations are judged on the `count` most confident boxes; they fail if objects are missing.
    """
    results: list[bool] = []
    groups: list[Sequence[Box]] = []
    for one in required.include:
        chosen = list(boxes.get(one.kind, ()))[: one.count]
        enough = len(chosen) == one.count
        right = [enough]
        if one.colour:
            right.append(enough and namer.name_colours(image, chosen, one.kind).count(one.colour) >= one.count)
        if one.relation:
            others = groups[one.target] if one.target < len(groups) else ()
            right.append(
                all(right) and bool(others) and all(one.relation in relations(a, b) for a in chosen for b in others)
            )
        groups.append(chosen if all(right) else ())
        results += right
    return results + [len(boxes.get(kind, ())) < count for kind, count in required.exclude]


def relations(a: Box, b: Box) -> set[str]:
    """Return the relations of box a to box b.

    The offset of the centres is shortened along each axis by SLACK times the sum of both sides; a relation holds if the
    rest is more than half of the length of the full offset.
    """
    offset = torch.tensor(a.centre) - torch.tensor(b.centre)
    slack = SLACK * (torch.tensor(a.size) + torch.tensor(b.size))
    if offset.norm() == 0:
        return set()
    x, y = ((offset.abs() - slack).clamp(min=0) * offset.sign() / offset.norm()).tolist()
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, one in holds.items() if one}


class OwlDetector:
    """OWLv2 of transformers: boxes of named classes above a confidence, after non-maximum suppression."""

    def __init__(self, model: str, threshold: float) -> None:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        with loading(f"detector {model!r}", "download it where there is a network, or name a folder"):
            self._processor = Owlv2Processor.from_pretrained(model)
            self._model = Owlv2ForObjectDetection.from_pretrained(model, use_safetensors=True)
        self._model.eval().requires_grad_(False)
        self._threshold = threshold

    def detect(self, image: Tensor, classes: Sequence[str]) -> Boxes:
        """Detect objects in an image (3, H, W)."""
        model = self._model.to(image.device)
        texts = [f"a photo of a {name}" for name in classes]
        inputs = self._processor(text=[texts], images=as_uint8(image[None])[0], return_tensors="pt").to(image.device)
        with torch.no_grad():
            outputs = model(**inputs)
        (read,) = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self._threshold, target_sizes=[tuple(image.shape[-2:])]
        )
        result: dict[str, list[Box]] = {name: [] for name in classes}
        for index, name in enumerate(classes):
            rows = read["labels"] == index
            corners, confidence = read["boxes"][rows].float(), read["scores"][rows].float()
            for k in nms(corners, confidence, OVERLAP):  # sorted by confidence
                left, top, right, bottom = corners[k].tolist()
                result[name].append(Box(left, top, right, bottom, confidence[k].item()))
        return result


class ClipColours:
    """Classifier of the colour of a box among COLOURS, by a CLIP on its crop, with GenEval's texts."""

    def __init__(self, name: str) -> None:
        self._backbone = load_backbone(name).eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    def name_colours(self, image: Tensor, boxes: Sequence[Box], kind: str) -> list[str]:
        """Return the most probable colour of each box of an image (3, H, W)."""
        if not boxes:
            return []
        backbone = self._backbone.to(image.device)
        with torch.no_grad():
            if kind not in self._texts:
                texts = [text.format(colour=colour, name=kind) for colour in COLOURS for text in COLOUR_TEXTS]
                means = backbone.texts(texts).unflatten(0, (len(COLOURS), -1)).mean(1)
                self._texts[kind] = torch.nn.functional.normalize(means, dim=-1)
            crops = [backbone.images(_crop(image, box)[None])[0] for box in boxes]
            best = (torch.stack(crops) @ self._texts[kind].to(image.device).T).argmax(1)
        return [COLOURS[k] for k in best.tolist()]


def _crop(image: Tensor, box: Box) -> Tensor:
    height, width = image.shape[-2:]
    left, top = min(max(int(box.left), 0), width - 1), min(max(int(box.top), 0), height - 1)
    right, bottom = max(left + 1, min(round(box.right), width)), max(top + 1, min(round(box.bottom), height))
    return image[:, top:bottom, left:right]


class Geneval:
    """Share 0..1 of a prompt's requirements that the detected objects meet; strict: 1 if all are met, else 0.

    model     an OWLv2 on the hub, or a folder;  clip: the CLIP for colours;  threshold: minimum confidence of a box
    Needs prompts in GenEval's forms, or metadata with GenEval's `include` and `exclude`; others raise RewardError.
    """

    differentiable = False

    def __init__(
        self,
        model: str = DETECTOR,
        *,
        strict: str | bool = False,
        clip: str = CLIP,
        threshold: str | float = THRESHOLD,
        detector: Detector | None = None,
        namer: ColourNamer | None = None,
    ) -> None:
        if str(strict).lower() not in ("true", "false"):
            raise InputError(f"strict={strict}: use true or false")
        self._strict = str(strict).lower() == "true"
        self.name = "geneval" + (f":{model}" if model != DETECTOR else "") + (",strict=true" if self._strict else "")
        self._detector = detector or OwlDetector(model, option_number("threshold", threshold))
        self._namer = namer or ClipColours(clip)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        scores = []
        for image, prompt, row in zip(images, prompts, metadata or [{}] * len(prompts), strict=True):
            required = read_requirements(prompt, row)
            results = met(required, self._detector.detect(image.detach(), required.classes), image, self._namer)
            scores.append(float(all(results)) if self._strict else sum(results) / len(results))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
