"""Functions that rewards written by a language model may call. Images (N, 3, H, W) in [0, 1]."""

from collections.abc import Callable, Sequence

import torch
from PIL import ImageColor
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """Return the brightness of each pixel, (N, H, W), 0..1 (ITU-R BT.601)."""
    return (images * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1)


def saturation(images: Tensor) -> Tensor:
    """Return max − min of the channels of each pixel, (N, H, W), 0..1."""
    return images.amax(1) - images.amin(1)


def colour_mask(images: Tensor, colour: str, width: float = 0.25) -> Tensor:
    """Return the closeness of each pixel to a CSS colour, (N, H, W), 0..1: exp(−‖x − colour‖² / 2 width²)."""
    target = torch.tensor(ImageColor.getrgb(colour)[:3], device=images.device) / 255
    return torch.exp(-(images - target[:, None, None]).square().sum(1) / (2 * width**2))


def edges(images: Tensor) -> Tensor:
    """Return the length of the gradient of the luma at each pixel, (N, H, W), per pixel."""
    grey = F.pad(luma(images)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    across, down = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    return (across.square() + down.square()).sqrt() / 2


def blur(images: Tensor, sigma: float) -> Tensor:
    """Return images blurred by a Gaussian of `sigma` pixels, (N, 3, H, W)."""
    radius = max(1, int(3 * sigma))
    grid = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-grid.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    for dim in (2, 3):
        size = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        weight = kernel[..., None] if dim == 2 else kernel[:, :, None]
        images = F.conv2d(F.pad(images, size, mode="replicate"), weight, groups=images.shape[1])
    return images


def load_clip_cosine(name: str) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Return clip_cosine(images, texts) → (N,) by a CLIP of `steer.rewards.clip`."""
    from steer.rewards.clip import clip

    reward = clip(name)

    def clip_cosine(images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its text, (N,)."""
        return reward(images, [texts] * len(images) if isinstance(texts, str) else list(texts))

    return clip_cosine
