"""Images as the rewards' backbones want them: tensors in, tensors out, differentiable.

All take images (N, 3, H, W) in [0, 1] and return (N, 3, size, size).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from steer.reward import RewardError

Preprocess = Callable[[Tensor, int], Tensor]

# Of OpenAI's CLIP (arXiv 2103.00020), which open_clip, HPSv2, PickScore and BLIP's ImageReward use too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def at_least_float32(tensor: Tensor) -> Tensor:
    """At least fp32, in which pixels are resized and features compared; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """CLIP's own: the shorter side to `size`, bicubic, then the middle square.

    Values are clamped to [0, 1] as an 8-bit image's are, so that it follows the published path over PIL up to
    that path's rounding to 256 levels.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    scaled = (size, int(size * width / height)) if height == short else (int(size * height / width), size)
    if short != size:
        images = F.interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (round((side - size) / 2.0) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """HPSv2's: the longer side to `size`, bicubic, black bars to a square. It works on tensors: nothing is clamped.

    As torchvision resizes tensors from version 0.17 on: with antialiasing; the official code asks for none or any.
    Where the longer side is `size` already, the official code forgets the bars, and its model then cannot take
    the picture; here it gets them.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    scaled = (round(height * scale), round(width * scale))
    if scaled != (height, width):
        images = F.interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False)
    down, right = size - scaled[0], size - scaled[1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


PREPROCESS: dict[str, Preprocess] = {"crop": resize_and_crop, "pad": resize_and_pad}


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(x − mean) / std, channel by channel."""
    centre, spread = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - centre.to(images.dtype)) / spread.to(images.dtype)


PROMPT_CACHE_SIZE = 4096  # prompts


def in_micro_batches(score: Callable[[Tensor, Sequence[str]], Tensor], size: int | str) -> Callable[..., Tensor]:
    """The same function of (images, prompts), called with at most `size` images at a time.

    Raises RewardError for a size (the option micro_batch=N) that is no whole number from 1 on.

    Where gradients are asked for, each micro-batch is computed once more on the way back instead of being kept:
    memory is that of one micro-batch then, too.
    """

    if not str(size).isdecimal() or int(size) < 1:
        raise RewardError(f"micro_batch={size}: use a whole number above 0")
    max_batch = int(size)

    def batched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        components = []
        for start in range(0, len(images), max_batch):
            chunk, texts = images[start : start + max_batch], prompts[start : start + max_batch]
            if torch.is_grad_enabled() and chunk.requires_grad and len(images) > max_batch:
                components.append(checkpoint(score, chunk, texts, use_reentrant=False))
            else:
                components.append(score(chunk, texts))
        return torch.cat(components)

    return batched


class PromptCache:
    """Text features by prompt: `encode` sees each prompt once; the least recently used are forgotten.

    They are kept, and returned, on the CPU: the model may have moved from one device to another meanwhile.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], size: int = PROMPT_CACHE_SIZE) -> None:
        self._encode, self._size = encode, size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(N, …): the features of each prompt."""
        wanted = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in wanted if prompt not in self._cache]:
            with torch.no_grad():
                # Copies: a row of a larger tensor would keep all of it in memory.
                rows = [row.clone() for row in self._encode(new).cpu()]
            self._cache.update(zip(new, rows, strict=True))
        for prompt in wanted:
            self._cache.move_to_end(prompt)
        # A new tensor: those made in inference mode can take no part in gradients.
        features = torch.stack([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return features
