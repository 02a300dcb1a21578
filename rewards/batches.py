"""Bounded memory: images in micro-batches, prompts encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steer.reward import RewardError

REMEMBERED = 4096  # prompts


def in_micro_batches(score: Callable[[Tensor, Sequence[str]], Tensor], size: int | str) -> Callable[..., Tensor]:
    """The same function of (images, prompts), called with at most `size` images at a time.

    Raises RewardError for a size (the option micro_batch=N) that is no whole number from 1 on.

    Where gradients are asked for, each micro-batch is computed once more on the way back instead of being kept:
    memory is that of one micro-batch then, too.
    """

    if not str(size).isdecimal() or int(size) < 1:
        raise RewardError(f"micro_batch={size}: use a whole number above 0")
    most = int(size)

    def batched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(images), most):
            some, texts = images[start : start + most], prompts[start : start + most]
            if torch.is_grad_enabled() and some.requires_grad and len(images) > most:
                parts.append(checkpoint(score, some, texts, use_reentrant=False))
            else:
                parts.append(score(some, texts))
        return torch.cat(parts)

    return batched


class PromptCache:
    """Text features by prompt: `encode` sees each prompt once; the least recently used are forgotten.

    They are kept, and returned, on the CPU: the model may have moved from one device to another meanwhile.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], size: int = REMEMBERED) -> None:
        self._encode, self._size = encode, size
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(N, …): the features of each prompt."""
        wanted = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in wanted if prompt not in self._known]:
            with torch.no_grad():
                # Copies: a row of a larger tensor would keep all of it in memory.
                rows = [row.clone() for row in self._encode(new).cpu()]
            self._known.update(zip(new, rows, strict=True))
        for prompt in wanted:
            self._known.move_to_end(prompt)
        # A new tensor: those made in inference mode can take no part in gradients.
        features = torch.stack([self._known[prompt] for prompt in prompts])
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return features
