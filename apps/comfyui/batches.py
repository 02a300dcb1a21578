"""Scores of a ComfyUI IMAGE batch, (N, H, W, C) in [0, 1], by any reward; selection of the best images."""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.apps.models import default_device
from steer.apps.reward_specs import only_named_rewards, resolve_reward
from steer.apps.scoring import score_in_batches
from steer.errors import InputError
from steer.reward import Reward

ALLOWED = "STEER_COMFYUI_REWARDS"  # environment variable: further rewards, separated by ;


@dataclass(frozen=True)
class BatchScores:
    """Rewards of images, and components of a composed reward by name: (N,) each, on the CPU."""

    reward: str
    totals: Tensor
    components: dict[str, Tensor]

    def table(self) -> str:
        """Format one line for each image, best first: rank, number in the batch from 0, reward, components."""
        lines = []
        for rank, number in enumerate(self.order(), start=1):
            parts = "".join(f"  {name} {values[number]:.4g}" for name, values in self.components.items())
            lines.append(f"{rank}. image {number}: {self.totals[number]:.4g}{parts}")
        return "\n".join([self.reward, *lines])

    def order(self) -> list[int]:
        """Return the indices of the images, best first; among equals, the first comes first."""
        return torch.argsort(self.totals, descending=True, stable=True).tolist()


def check_reward_text(text: str) -> None:
    """Raise InputError for a reward that a workflow may not load: workflows are shared, and some rewards run code.

    Allowed are rewards with names, sums and functions of them, and the rewards in the environment variable ALLOWED.
    """
    allowed = [one.strip() for one in os.environ.get(ALLOWED, "").split(";")]
    if text.strip() not in allowed and not only_named_rewards(text):
        raise InputError(
            f"reward {text!r:.100}: a workflow may load rewards with names (`steer rewards` lists them); to allow this "
            f"one, start ComfyUI with {ALLOWED}={text!r:.100}"
        )


@functools.lru_cache(maxsize=2)
def load_named(text: str) -> Reward:
    """Load a reward that `check_reward_text` allows; the last two rewards stay in memory."""
    check_reward_text(text)
    return resolve_reward(text)


def score_batch(images: Tensor, prompt: str, reward: str) -> BatchScores:
    """Score images (N, H, W, C) in [0, 1] with C = 3, or C = 4, of which the last channel is ignored.

    Raises InputError for any other shape, a reward that is not allowed, or an empty prompt if the reward reads prompts.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or not len(images):
        raise InputError(f"images must be (N, H, W, 3), got {tuple(images.shape)}")
    loaded = load_named(reward.strip())
    channels_first = images[..., :3].permute(0, 3, 1, 2).float().clamp(0, 1)
    totals, components = score_in_batches(loaded, channels_first, [prompt] * len(images), default_device())
    return BatchScores(reward.strip(), totals.cpu(), {name: values.cpu() for name, values in components.items()})


def pick(images: Tensor, scores: BatchScores, keep: int = 0) -> tuple[Tensor, list[int]]:
    """Return the best `keep` images, best first, and their indices in the batch; 0 keeps all."""
    numbers = scores.order()[: keep or None]
    return images[numbers], numbers
