"""The small language of scenes: what a prompt asks for, in GenEval's six tasks.

single_object   a circle
two_object      a circle and a star
counting        three circles, three red circles
colors          a red circle
position        a circle left of a star, a red circle above a blue star
color_attr      a red circle and a blue star
"""

import re
from dataclasses import dataclass, replace

from steer.reward import RewardError

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.13, 0.62, 0.24),
    "blue": (0.14, 0.34, 0.90),
    "yellow": (0.97, 0.80, 0.10),
    "purple": (0.60, 0.20, 0.76),
    "black": (0.09, 0.09, 0.11),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
PLURALS = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES if shape != "cross"}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# Where the first object lies as seen from the second, in image coordinates (y points down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MIRRORED = {"right of": "left of", "below": "above"}

_PHRASE = re.compile(
    rf"(?P<count>{'|'.join(NUMBERS)}) (?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<shape>{'|'.join((*PLURALS, *SHAPES))})"
)
_JOIN = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")
_PREFIX = re.compile(r"^(?:a (?:photo|picture|drawing|scene) (?:of|with) )")


@dataclass(frozen=True, order=True)
class Phrase:
    """`count` objects of one shape, all of one colour (None: any)."""

    count: int
    colour: str | None
    shape: str

    def __str__(self) -> str:
        plural = {shape: word for word, shape in PLURALS.items()}
        number = next(word for word, count in NUMBERS.items() if count == self.count)
        noun = self.shape if self.count == 1 else plural[self.shape]
        return " ".join(word for word in (number, self.colour, noun) if word)


@dataclass(frozen=True)
class SceneRequest:
    """One phrase, or two of different shapes, joined by "and" or by a relation."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """The GenEval task that this request belongs to."""
        if self.relation:
            return "position"
        coloured = any(phrase.colour for phrase in self.phrases)
        if len(self.phrases) == 2:
            return "color_attr" if coloured else "two_object"
        if self.phrases[0].count > 1:
            return "counting"
        return "colors" if coloured else "single_object"

    @property
    def canonical(self) -> "SceneRequest":
        """The same scene in one wording: "B right of A" is "A left of B", "B and A" is "A and B"."""
        if self.relation in MIRRORED:
            return SceneRequest(self.phrases[::-1], MIRRORED[self.relation])
        return self if self.relation else replace(self, phrases=tuple(sorted(self.phrases, key=str)))

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.phrases))


def parse(prompt: str) -> SceneRequest:
    """Reads a prompt; the inverse of `str(request)`. Raises RewardError for anything else."""
    words = re.sub(r"\s+", " ", prompt.strip().strip(".").lower())
    words = _PREFIX.sub("", words).replace(" to the left of ", " left of ").replace(" to the right of ", " right of ")
    head, *tail = _JOIN.split(words)
    matches = [_PHRASE.fullmatch(part) for part in (head, *tail[1::2])]
    shapes = [match and PLURALS.get(match["shape"], match["shape"]) for match in matches]
    if None in matches or len(matches) > 2 or len(set(shapes)) < len(shapes):
        raise RewardError(
            f"the scene reward cannot read {prompt!r}: it asks for one kind of object or two different ones, like "
            f"'three red circles' or 'a red circle left of a blue star' (colours: {', '.join(COLOURS)}; "
            f"shapes: {', '.join(SHAPES)}; joined by: and, {', '.join(RELATIONS)})"
        )
    phrases = tuple(
        Phrase(NUMBERS[match["count"]], match["colour"], shape)
        for match, shape in zip(matches, shapes, strict=True)
        if match and shape
    )
    return SceneRequest(phrases, tail[0] if tail and tail[0] in RELATIONS else None)
