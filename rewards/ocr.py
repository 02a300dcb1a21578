"""Does the image say the words that its prompt quotes? Read by PP-OCRv4, whose weights come as a Python package."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.reward import RewardError
from steer.rewards.inputs import as_uint8, takes_any_images

THREADS = 2  # of the processor, for each of the engine's three networks
# What opens and what closes a quotation. Straight quotes after a digit are inches.
DOUBLE = re.compile(
    '(?<!\\d)"([^"]*)"|' + "|".join(f"{opens}([^{opens}{closes}]*){closes}" for opens, closes in ("“”", "„“", "«»"))
)
# Only where no double quotes are. An apostrophe has a letter behind it (don't) or before it (the dogs' park), and
# rock 'n' roll quotes nothing.
SINGLE = re.compile(r"(?<!\w)'((?!n')[^']+(?:'\w[^']*)*)'(?!\w)|‘((?!n’)[^‘’]+(?:’\w[^‘’]*)*)’(?!\w)")
PLAIN_QUOTES = str.maketrans("‘’“”", "''\"\"")


class Ocr:
    """How well the text in the image is what the prompt quotes, 0..1; 1: the words are there and nothing else is.

    Half of the score is for saying the words somewhere, half for saying nothing else; see `text_score`. Letters are
    compared without regard to case and whitespace. The engine knows Latin letters without accents, digits,
    punctuation and Chinese. It runs on the CPU; images are read one by one, at 8 bits.

    It departs from the reward of Flow-GRPO (arXiv 2505.05470), max(0, 1 − N_e / N_ref) with N_e the edit distance to
    all text read, or 0 where the words are contained in it: there the words among any amount of other text are
    perfect, but one wrong letter makes that other text count.

    Raises RewardError where a prompt quotes nothing, or the engine is not installed.
    """

    name = "ocr"
    differentiable = False

    def __init__(self) -> None:
        self._read = _engine()

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = [_quoted_words(prompt) for prompt in prompts]
        scores = [text_score(words, self._read(image)) for words, image in zip(wanted, as_uint8(images), strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def text_score(words: Sequence[str], lines: Sequence[str]) -> float:
    """The score of the lines read, in reading order, for the quotations wanted: (said + only) / 2, 0..1.

    recall   mean over the quotations of 1 − d_w / |w|, d_w the least edit distance of w to any stretch of the text
    precision   1 − d / max(|all w|, |text|), d the edit distance of all quotations in a row to the whole text
    """
    targets, text = [normalised(word) for word in words], normalised("".join(lines))
    recall = sum(1 - distance_within(target, text) / len(target) for target in targets) / len(targets)
    return (recall + similarity("".join(targets), text)) / 2


def similarity(one: str, other: str) -> float:
    """1 − edit distance / length of the longer, 0..1; two empty texts are alike."""
    return 1 - edit_distance(one, other) / max(len(one), len(other), 1)


def edit_distance(one: str, other: str) -> int:
    """Fewest letters to insert, remove or replace to turn one into the other (Levenshtein 1966)."""
    return _distances(one, other, range(len(other) + 1))[-1]


def distance_within(target: str, text: str) -> int:
    """The least edit distance of the target to any stretch of the text, which may be empty (Sellers 1980)."""
    return min(_distances(target, text, [0] * (len(text) + 1)))


def _distances(target: str, text: str, skipping: Sequence[int]) -> Sequence[int]:
    """Of the target to the text up to each place, where leaving out what stands before a place costs `skipping`."""
    row = skipping
    for length, wanted in enumerate(target, start=1):
        above, row = row, [skipping[0] + length]
        for place, read in enumerate(text, start=1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (wanted != read)))
    return row


def normalised(text: str) -> str:
    """What is compared: no whitespace, no case, full-width letters as plain ones, straight quotes."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().translate(PLAIN_QUOTES).split())


def quoted(prompt: str) -> list[str]:
    """The quotations of a prompt, in order: in double quotes, straight or “ ” „ “ « », or else in single ones."""
    for pattern in (DOUBLE, SINGLE):
        matches = [match[match.lastindex or 0].strip() for match in pattern.finditer(prompt)]
        if any(matches):
            return [words for words in matches if words]
    return []


def _quoted_words(prompt: str) -> list[str]:
    if words := quoted(prompt):
        return words
    raise RewardError(
        f"ocr: the prompt {prompt!r} quotes no words: put what the image shall say into double quotes, "
        'like a sign that says "open"'
    )


def _engine() -> Callable[[np.ndarray[Any, Any]], list[str]]:
    """What reads the lines of a picture (H, W, 3) of bytes, RGB, from top to bottom."""
    try:
        package = import_module("rapidocr_onnxruntime")
    except ModuleNotFoundError as error:
        raise RewardError(f"ocr: {error}: pip install 'steer-diffusion[ocr]'") from error
    except ImportError as error:  # OpenCV's usual wheel wants a system library that bare machines lack
        remedy = "install libgl1, or put opencv-python-headless in the place of opencv-python"
        raise RewardError(f"ocr: {error}: {remedy}") from error
    engine = package.RapidOCR(intra_op_num_threads=THREADS, inter_op_num_threads=1)

    def read(picture: np.ndarray[Any, Any]) -> list[str]:
        matches, _ = engine(np.ascontiguousarray(picture[..., ::-1]))  # it takes BGR, as OpenCV has it
        return [text for _, text, _ in matches or []]

    return read
