"""Scores of images, and of videos by their frames."""

from collections.abc import Callable

import torch
from torch import Tensor

VIDEO_FRAMES = 8  # of a video that a reward sees, evenly spaced
Scores = tuple[Tensor, dict[str, Tensor]]


def over_frames(images: Tensor, score: Callable[[Tensor], Scores]) -> Scores:
    """What `score` says of images (N, 3, H, W); of videos (N, F, 3, H, W) the mean over evenly spaced frames."""
    if images.dim() == 4:
        return score(images)
    frames = torch.linspace(0, images.shape[1] - 1, min(VIDEO_FRAMES, images.shape[1])).round().long()
    rewards, parts = zip(*(score(images[:, frame]) for frame in frames), strict=True)
    return torch.stack(rewards).mean(0), {name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]}
