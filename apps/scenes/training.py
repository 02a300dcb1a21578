"""The scenes that both trainings draw, by number."""

import numpy as np
import torch
from torch import Tensor

from steer.apps.scenes.world import draw, random_scene


def training_scenes(count: int, first: int = 0) -> tuple[Tensor, list[str]]:
    """Scenes number first … first + count − 1: images (count, 3, 64, 64) uint8 and their prompts.

    Scene n depends on n alone, so that a resumed run, or one on another machine, sees the same data.
    """
    images, prompts = [], []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        scene = random_scene(rng)
        images.append(draw(scene, rng))
        prompts.append(scene.prompt)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), prompts
