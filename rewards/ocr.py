"""Agreement of the text in the image with the prompt's quotations, read by PP-OCR (RapidOCR, a Python package)."""

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

THREADS = 2  # CPU threads for each of the engine's three networks
# Pairs of quotation marks. Straight quotes after a digit are inches.
DOUBLE = re.compile(
    '(?<!\\d)"([^"]*)"|' + "|".join(f"{opens}([^{opens}{closes}]*){closes}" for opens, closes in ("“”", "„“", "«»"))
)
# Used if there are no double quotes. Apostrophes are not quotation marks: don't, the dogs' park, rock 'n' roll.
SINGLE = re.compile(r"(?<!\w)'((?!n')[^']+(?:'\w[^']*)*)'(?!\w)|‘((?!n’)[^‘’]+(?:’\w[^‘’]*)*)’(?!\w)")
PLAIN_QUOTES = str.maketrans("‘’“”", "''\"\"")


class Ocr:
    """Agreement of the text in the image with the prompt's quotations, 0..1; 1: exactly the quoted words.

    Half of the score is the recall of the words, half the precision of all text; see `text_score`. Case and whitespace
    are ignored. The engine reads Latin letters without accents, digits, punctuation and Chinese. It runs on the CPU;
    images are read one by one, at 8 bits.

    Flow-GRPO (arXiv 2505.05470) uses max(0, 1 − N_e / N_ref) with N_e the edit distance to all text read, or 0 if that
    text contains the words. There, words among any amount of other text are perfect, but one wrong letter makes all
    other text count.

    Raises RewardError if a prompt quotes nothing, or if the engine is not installed.
    """

    name = "ocr"
    differentiable = False

    def __init__(self) -> None:
        self._read = _engine()

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        words = [quoted(prompt) for prompt in prompts]
        if [] in words:
            raise RewardError(
                f"ocr: the prompt {prompts[words.index([])]!r} quotes no words: put the text of the image into double "
                'quotes, like a sign that says "open"'
            )
        scores = [text_score(some, self._read(image)) for some, image in zip(words, as_uint8(images), strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def text_score(words: Sequence[str], lines: Sequence[str]) -> float:
    """Score the lines read, in reading order, against the quotations: (recall + precision) / 2, 0..1.

    recall   mean over the quotations of 1 − d_w / |w|, d_w the least edit distance of w to any substring of the text
    precision   1 − d / max(|all w|, |text|), d the edit distance of the concatenated quotations to the whole text
    """
    targets, text = [normalised(word) for word in words], normalised("".join(lines))
    recall = sum(1 - distance_within(target, text) / len(target) for target in targets) / len(targets)
    return (recall + similarity("".join(targets), text)) / 2


def similarity(one: str, other: str) -> float:
    """Return 1 − edit distance / length of the longer, 0..1; 1 for two empty texts."""
    return 1 - edit_distance(one, other) / max(len(one), len(other), 1)


def edit_distance(one: str, other: str) -> int:
    """Count the fewest insertions, deletions and substitutions between two texts (Levenshtein 1966)."""
    return _distances(one, other, range(len(other) + 1))[-1]


def distance_within(target: str, text: str) -> int:
    """Return the least edit distance of the target to any substring of the text (Sellers 1980)."""
    return min(_distances(target, text, [0] * (len(text) + 1)))


def _distances(target: str, text: str, skipping: Sequence[int]) -> Sequence[int]:
    """Return edit distances of the target to each prefix of the text; skipping a prefix costs `skipping`."""
    row = skipping
    for length, letter in enumerate(target, start=1):
        above, row = row, [skipping[0] + length]
        for index, read in enumerate(text, start=1):
            row.append(min(above[index] + 1, row[-1] + 1, above[index - 1] + (letter != read)))
    return row


def normalised(text: str) -> str:
    """Normalise a text: no whitespace, no case, full-width letters as plain ones, straight quotes."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().translate(PLAIN_QUOTES).split())


def quoted(prompt: str) -> list[str]:
    """Return the quotations of a prompt, in order: in double quotes (" “ ” „ « »), or else in single ones."""
    for pattern in (DOUBLE, SINGLE):
        matches = [match[match.lastindex or 0].strip() for match in pattern.finditer(prompt)]
        if any(matches):
            return [words for words in matches if words]
    return []


def _engine() -> Callable[[np.ndarray[Any, Any]], list[str]]:
    """Return a function that reads the lines of an image (H, W, 3) of 8 bits, RGB, from top to bottom."""
    try:
        package = import_module("rapidocr")
    except ModuleNotFoundError as error:
        raise RewardError(f"ocr: {error}: pip install 'steer-diffusion[ocr]'") from error
    except ImportError as error:  # OpenCV's usual wheel needs a system library
        remedy = "install libgl1, or replace opencv-python by opencv-python-headless"
        raise RewardError(f"ocr: {error}: {remedy}") from error
    threads = {"intra_op_num_threads": THREADS, "inter_op_num_threads": 1}
    options = {f"EngineConfig.onnxruntime.{name}": number for name, number in threads.items()}
    engine = package.RapidOCR(params={"Global.log_level": "critical", **options})

    def read(image: np.ndarray[Any, Any]) -> list[str]:
        return list(engine(np.ascontiguousarray(image[..., ::-1])).txts or ())  # BGR, as OpenCV

    return read
