"""Images as the rewards' backbones want them: tensors in, tensors out, differentiable.

All take images (N, 3, H, W) in [0, 1] and return (N, 3, size, size).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Preprocess = Callable[[Tensor, int], Tensor]

# Of OpenAI's CLIP (arXiv 2103.00020), which open_clip, HPSv2, PickScore and BLIP's ImageReward use too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def wide(tensor: Tensor) -> Tensor:
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
