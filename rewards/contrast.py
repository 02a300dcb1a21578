"""Contrast prompts: a prompt with one fact changed, which a good reward likes less for the same picture.

Sources: compositional hard negatives, where a few words decide: Winoground (arXiv 2204.03162), ARO (arXiv 2210.01936).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from steer.contract import Reward, score

KINDS = ("colour", "binding", "count", "relation")
# What replaces a colour: the next one of these that the prompt lacks. Neighbours are easy to tell apart, and the
# language of scenes knows all six.
RING = ("blue", "yellow", "purple", "green", "black", "red")
# Colour words with the hue that each is taken for, so that "crimson" is not contrasted with "red". Words that mostly
# name a thing (rose, olive, navy, lime) are left out.
HUES = {hue: hue for hue in (*RING, "orange", "pink", "brown", "white", "grey")} | {
    "gray": "grey",
    "silver": "grey",
    "crimson": "red",
    "scarlet": "red",
    "maroon": "red",
    "gold": "yellow",
    "golden": "yellow",
    "violet": "purple",
    "magenta": "purple",
    "turquoise": "blue",
    "cyan": "blue",
    "teal": "green",
}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "left side of": "right side of",
    "right side of": "left side of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
    "on top of": "under",
    "under": "on top of",
    "underneath": "on top of",
    "beneath": "on top of",
}


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Any of the phrases as whole words, in any case, with any white space between them."""
    spaced = (r"\s+".join(phrase.split()) for phrase in sorted(phrases, key=len, reverse=True))
    return re.compile(rf"\b(?:{'|'.join(spaced)})\b", re.IGNORECASE)


_COLOUR, _NUMBER, _RELATION = _any_of(list(HUES)), _any_of(NUMBERS), _any_of(list(OPPOSITES))
# An orange is a colour only before the thing that has it: "an orange car", not "an orange on a plate".
_BEFORE_A_THING = re.compile(r"[\s-]+(?!(?:and|or|with|on|in|at|of|to|next|near|by|is|left|right|above|below)\b)\w")
_JOINED = re.compile(r"[\s,/&-]*(?:(?:and|or)[\s-]*)?", re.IGNORECASE)  # "black-and-white", "red, blue"
_ARTICLE = re.compile(r"\ban?(?=\s+$)", re.IGNORECASE)


@dataclass(frozen=True)
class Contrast:
    """A changed prompt and what was changed: "colour", "binding" (two colours exchanged), "count" or "relation"."""

    kind: str
    prompt: str


@dataclass(frozen=True)
class Consistency:
    """Of `pairs` (image, contrast): the share 0..1 where the prompt scores higher, ties half; the mean of how much."""

    share: float
    pairs: int
    margin: float


def contrasts(prompt: str) -> list[Contrast]:
    """What the prompt becomes with one fact changed, by plain-English word rules; the same every time.

    Each colour word becomes a colour that the prompt lacks; two colours of different things change places; each
    number from two to ten becomes the one below it, two becomes three; each relation becomes its opposite. Empty where
    the prompt has none of these. The rules see words, not meaning: "Red Square" becomes "Blue Square".
    """
    return [
        *(Contrast("colour", text) for text in _other_colours(prompt)),
        *(Contrast("binding", text) for text in _exchanged_colours(prompt)),
        *(Contrast("count", text) for text in _other_counts(prompt)),
        *(Contrast("relation", text) for text in _opposite_relations(prompt)),
    ]


def contrast_pairs(prompts: Sequence[str]) -> list[tuple[int, Contrast]]:
    """Every contrast of every prompt, with the row of its prompt."""
    return [(row, contrast) for row, prompt in enumerate(prompts) for contrast in contrasts(prompt)]


def consistency(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, Consistency]:
    """How often a reward prefers the prompt over its contrasts, for images (N, 3, H, W) that show the prompts.

        share = mean over (image, contrast) of [r(x, prompt) > r(x, contrast)], a tie counts 1/2

    1 is perfect, 1/2 is what a reward that ignores prompts gets. By kind of contrast and for "all"; a kind that does
    not occur is absent. Sources: those of this module. Raises RewardError where the reward does not score.
    """
    pairs = contrast_pairs(prompts)
    if not pairs:
        return {}
    with torch.no_grad():
        right, wrong = score(reward, images, prompts), []
        for start in range(0, len(pairs), len(images)):  # never more at once than the caller's own batch
            some = pairs[start : start + len(images)]
            wrong.append(score(reward, images[[row for row, _ in some]], [contrast.prompt for _, contrast in some]))
    margins = right[[row for row, _ in pairs]] - torch.cat(wrong)
    return consistency_by_kind([contrast.kind for _, contrast in pairs], margins)


def consistency_by_kind(kinds: Sequence[str], margins: Tensor) -> dict[str, Consistency]:
    """Sums up margins (P,), score of the prompt minus score of its contrast, by the P kinds and for "all"."""
    found: dict[str, Consistency] = {}
    for kind in [kind for kind in KINDS if kind in kinds] + (["all"] if kinds else []):
        of_kind = margins[[k for k, name in enumerate(kinds) if kind in (name, "all")]].double()
        share = ((of_kind.sign() + 1) / 2).mean().item()
        found[kind] = Consistency(share, len(of_kind), of_kind.mean().item())
    return found


def _colour_words(prompt: str) -> list[re.Match[str]]:
    found = _COLOUR.finditer(prompt)
    return [word for word in found if word[0].lower() != "orange" or _BEFORE_A_THING.match(prompt, word.end())]


def _hue(word: re.Match[str]) -> str:
    return HUES[word[0].lower()]


def _other_colours(prompt: str) -> Iterator[str]:
    words = _colour_words(prompt)
    free = [hue for hue in RING if hue not in map(_hue, words)]
    for word in words:
        start = RING.index(_hue(word)) if _hue(word) in RING else 0
        ordered = (hue for hue in (*RING[start:], *RING[:start]) if hue in free)
        if (other := next(ordered, None)) is not None:
            yield _with_colour(prompt, word, other)


def _exchanged_colours(prompt: str) -> Iterator[str]:
    """Neighbouring colours change places, where that says something else.

    It does not for one thing of both colours ("a black and white photo") or two of a kind ("a red and a blue ball").
    """
    for first, second in pairwise(_colour_words(prompt)):
        between = prompt[first.end() : second.start()]
        things = [re.match(r"[\s-]*(\w*)", prompt[word.end() :], re.IGNORECASE) for word in (first, second)]
        one_kind = len({thing[1].lower() for thing in things if thing}) == 1
        if _hue(first) != _hue(second) and not one_kind and not _bare(between):
            # From the right, so that the place on the left stays where it was found.
            yield _with_colour(_with_colour(prompt, second, first[0]), first, second[0])


def _bare(between: str) -> bool:
    """Whether nothing that has a colour stands between two colour words."""
    without_article = re.sub(r"\b(?:an?|the)\s+$", "", between, flags=re.IGNORECASE)
    return _JOINED.fullmatch(without_article) is not None


def _other_counts(prompt: str) -> Iterator[str]:
    for word in _NUMBER.finditer(prompt):
        # One fewer: 1 would need a singular, so that two becomes three.
        place = NUMBERS.index(word[0].lower())
        yield _replaced(prompt, word, NUMBERS[place - 1] if place else NUMBERS[1])


def _opposite_relations(prompt: str) -> Iterator[str]:
    for words in _RELATION.finditer(prompt):
        yield _replaced(prompt, words, OPPOSITES[" ".join(words[0].lower().split())])


def _with_colour(prompt: str, word: re.Match[str], colour: str) -> str:
    """The prompt with another colour in the place of `word`, and "a" or "an" before it as it must be."""
    changed = _replaced(prompt, word, colour.lower())
    article = "an" if colour[0].lower() in "aeiou" else "a"
    before = _ARTICLE.sub(lambda old: _cased(article, old[0]), changed[: word.start()])
    return before + changed[word.start() :]


def _replaced(prompt: str, old: re.Match[str], new: str) -> str:
    return prompt[: old.start()] + _cased(new, old[0]) + prompt[old.end() :]


def _cased(new: str, old: str) -> str:
    """`new` in capitals, with a first capital, or small, as `old` was."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new
