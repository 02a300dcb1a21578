"""A CLIP tokenizer that knows every byte and, in one token or a few, the words of the scenes."""

import json
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


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json and merges.txt to `folder` and returns the tokenizer they define."""
    alphabet = _byte_alphabet()
    merges = list(dict.fromkeys(merge for word in WORDS for merge in _merges(word)))
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
