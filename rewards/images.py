"""Differentiable preprocessing of images for the rewards' backbones, micro-batches, and the cache of prompt features.

Preprocessing takes images (N, 3, H, W) in [0, 1] and returns (N, 3, size, size).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, normalize, pad, resize

from steer.rewards.names import option_count

Preprocess = Callable[[Tensor, int], Tensor]

# OpenAI's CLIP (arXiv 2103.00020); open_clip, HPSv2, PickScore and BLIP's ImageReward use the same numbers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert to fp32 for resizing pixels and comparing features; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Preprocess as CLIP: the shorter side to `size`, bicubic, then the middle square.

    Values are clamped to [0, 1], like the values of an 8-bit image, so that results equal the published preprocessing
    by PIL up to its rounding to 256 levels.
    """
    if min(images.shape[-2:]) != size:
        images = resize(images, [size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return center_crop(images, [size, size])


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Preprocess as HPSv2: the longer side to `size`, bicubic, black bars to a square; nothing is clamped.

    Resizing is antialiased, as in torchvision from version 0.17 on. If the longer side is `size` already, the official
    code omits the bars, and its model then fails; here the image is padded.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    scaled = (round(height * scale), round(width * scale))
    if scaled != (height, width):
        images = resize(images, [*scaled], InterpolationMode.BICUBIC, antialias=True)
    down, right = size - scaled[0], size - scaled[1]
    return pad(images, [right // 2, down // 2, right - right // 2, down - down // 2])


PREPROCESS: dict[str, Preprocess] = {"crop": resize_and_crop, "pad": resize_and_pad}


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Return (x − mean) / std, channel by channel."""
    return normalize(images, [*mean], [*std])


def in_micro_batches(score: Callable[[Tensor, Sequence[str]], Tensor], size: int | str) -> Callable[..., Tensor]:
    """Return `score` as a function of (images, prompts) that processes at most `size` images at a time.

    Raises RewardError for a size (the option micro_batch=N) that is not a positive integer.

    With gradients, each micro-batch is recomputed in the backward pass (checkpointing), so that memory stays that of
    one micro-batch.
    """
    max_batch = option_count("micro_batch", size)

    def batched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        outputs = []
        for start in range(0, len(images), max_batch):
            chunk, texts = images[start : start + max_batch], prompts[start : start + max_batch]
            if torch.is_grad_enabled() and chunk.requires_grad and len(images) > max_batch:
                outputs.append(checkpoint(score, chunk, texts, use_reentrant=False))
            else:
                outputs.append(score(chunk, texts))
        return torch.cat(outputs)

    return batched


class PromptCache:
    """LRU cache of text features: `encode` is called once for each prompt.

    Features are kept and returned on the CPU: the model may move to another device between calls.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], size: int = 4096) -> None:
        self._encode, self._size = encode, size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the features of each prompt: (N, …)."""
        unique = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in unique if prompt not in self._cache]:
            with torch.no_grad():
                # Copies: a row of a larger tensor would keep all of it in memory.
                rows = [row.clone() for row in self._encode(new).cpu()]
            self._cache.update(zip(new, rows, strict=True))
        for prompt in unique:
            self._cache.move_to_end(prompt)
        # A new tensor: tensors created in inference mode cannot take part in autograd.
        features = torch.stack([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return features
