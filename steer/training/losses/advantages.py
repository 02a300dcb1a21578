"""Advantages from the running mean and deviation of each prompt's rewards, as in DDPO (arXiv 2305.13301).

A = (r − mean)/(std + 10⁻⁶), over the prompt's latest rewards, the current ones included, once there are enough;
until then, over the rewards of the whole batch.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.training.losses.policy_gradient import EPS


class PerPromptStatTracker:
    """A tracker of the last `size` rewards of every prompt; saved and restored with a run.

    size       rewards per prompt, at least 2; published 16
    min_count  2..size, rewards needed before the prompt's own statistics are used; published 16
    """

    def __init__(self, size: int = 16, min_count: int = 16) -> None:
        if not 2 <= min_count <= size:
            raise InputError(f"min_count must be from 2 to size, got {min_count} and {size}")
        self.size, self.min_count = size, min_count
        self._rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Record rewards (B, K) of B prompts, repeats allowed, and return their advantages (B, K) fp32.

        Raises InputError, and records nothing, where shapes differ or a reward is not finite.
        """
        if rewards.dim() != 2 or len(prompts) != len(rewards):
            raise InputError(f"rewards of shape {tuple(rewards.shape)} must be ({len(prompts)} prompts, samples)")
        if not rewards.isfinite().all():
            raise InputError("rewards must be finite: fix or drop the samples where they are not")
        exact = rewards.detach().double().cpu()
        for prompt, row in zip(prompts, exact.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.size)).extend(row)
        rows = [_standardised(row, self._known(prompt, exact)) for prompt, row in zip(prompts, exact, strict=True)]
        return torch.stack(rows).to(rewards.device, torch.float32)

    def _known(self, prompt: str, batch: Tensor) -> Tensor:
        """Return the rewards that standardise those of a prompt."""
        own = self._rewards[prompt]
        return torch.tensor(own, dtype=torch.float64) if len(own) >= self.min_count else batch

    def state(self) -> dict[str, Any]:
        """Return the rewards for JSON, which keeps floats to the last bit."""
        return {"rewards": {prompt: list(rewards) for prompt, rewards in self._rewards.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore from `state`. Raises InputError for anything else."""
        if not isinstance(saved := state.get("rewards"), Mapping):
            raise InputError("the saved tracker has no rewards: start with a new one")
        self._rewards = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in saved.items()}


def _standardised(rewards: Tensor, known: Tensor) -> Tensor:
    """Return (r − mean)/(std + 10⁻⁶), fp64: exactly 0 where all known rewards are equal."""
    return (rewards - known.mean()) / (known.std(correction=0) + EPS)
