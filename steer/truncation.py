"""Prompts that a tokenizer cuts: a warning for each, once."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from steer.errors import InputError

logger = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
LARGEST = 1_000_000  # tokens: a tokenizer without a limit has one far beyond


@functools.lru_cache(maxsize=65_536)
def note_cut(reader: str, prompt: str, tokens: int, limit: int) -> None:
    """Warn that a reader sees the first `limit` of a prompt's tokens alone; the same prompt is warned about once."""
    if tokens > limit:
        message = f"{reader} reads {limit} tokens, and this prompt has {tokens}: its end plays no part: {prompt!r:.200}"
        logger.warning("steer: %s", InputError(message))


def note_cut_by_pipeline(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    """Warn of the prompts that a tokenizer of a diffusers pipeline cuts."""
    for name, tokenizer, limit in _tokenizers(pipe, call):
        for prompt in dict.fromkeys(prompts):
            if len(prompt) + 2 > limit:  # every token but the two marks is a character at least
                note_cut(f"{name} of {type(pipe).__name__}", prompt, token_count(tokenizer, prompt), limit)


def token_count(tokenizer: Any, prompt: str) -> int:
    """The tokens of a prompt by a tokenizer of transformers, its marks of beginning and end among them."""
    return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


def noting_cuts(
    reader: str, encode: Callable[[list[str]], Tensor], count: Callable[[str], int], limit: int
) -> Callable[[list[str]], Tensor]:
    """The same encoder of prompts, which warns of those that it cuts."""

    def encoding(prompts: list[str]) -> Tensor:
        for prompt in prompts:
            note_cut(reader, prompt, count(prompt), limit)
        return encode(prompts)

    return encoding


def _tokenizers(pipe: Any, call: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """The tokenizers of a pipeline with their limits: CLIP's own, of others what the call says."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = call.get("max_sequence_length")
    if given is None and "max_sequence_length" in parameters:
        given = parameters["max_sequence_length"].default
    for name in TOKENIZERS:
        tokenizer = getattr(pipe, name, None)
        own = getattr(tokenizer, "model_max_length", None)
        if isinstance(own, int) and callable(tokenizer):
            limit = own if "CLIP" in type(tokenizer).__name__ or not isinstance(given, int) else given
            if limit < LARGEST:
                yield name, tokenizer, limit
