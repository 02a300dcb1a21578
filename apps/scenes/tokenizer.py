"""A CLIP tokenizer that knows every byte and, in one token or a few, the words of the scenes."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from steer.rewards.scene_language import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES

WORDS = sorted({"and", *NUMBERS, *COLOURS, *SHAPES, *PLURALS, *" ".join(RELATIONS).split()})
LENGTH = 24  # tokens, start and end included


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [256 + k for k in range(256 - len(printable))]
    return [chr(code) for code in (*printable, *shifted)]


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that build one word letter by letter from the left."""
    letters = [*word[:-1], word[-1] + "</w>"]
    prefixes = ["".join(letters[:k]) for k in range(1, len(letters))]
    return list(zip(prefixes, letters[1:], strict=True))


def _segment(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Split a word as byte-pair encoding does: merge the adjacent pair of lowest rank until none is left."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    while pairs := [(ranks[pair], k) for k, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, k = min(pairs)
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    return symbols


def whole_word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges under which every word is one token.

    Merges spelled from the left alone do not suffice: an earlier merge of another word splits "three" in three. A
    merge that is appended ranks last, so that words which are one token already stay so.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        while len(symbols := _segment(word, ranks)) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
    return list(ranks)


def build_tokenizer(folder: Path, whole_words: bool = False) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and return the tokenizer they define.

    whole_words  one token a word; without it the merges of the first models, which split some words
    """
    alphabet = _byte_alphabet()
    spelled = list(dict.fromkeys(merge for word in WORDS for merge in _merges(word)))
    merges = whole_word_merges(WORDS) if whole_words else spelled
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
