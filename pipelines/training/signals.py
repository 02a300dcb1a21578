"""The signal of a loss from the rewards of a rollout: several rewards on one scale, constraints, the Pareto front."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.training.config import SignalConfig
from steer.pipelines.training.method import Scored
from steer.reward import Composite, Metadata, Reward, WrappedReward, score_components, with_metadata
from steer.rewards.compose import CombinedReward, CompositeReward
from steer.rewards.parser import load_reward
from steer.training.constraints import Constraints, read_bounds
from steer.training.losses import group_advantages
from steer.training.signals import normalized_sum


class RewardWithConstraints(CompositeReward):
    """A trained reward, with the rewards of constraints among its components."""

    def __init__(self, reward: Reward, bounded: Sequence[Reward]) -> None:
        super().__init__([reward, *bounded], reward.name)

    def components(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> dict[str, Tensor]:
        trained, *others = self._rewards
        scores, components = score_components(trained, images, prompts, metadata)
        bounded = {one.name: score_components(one, images, prompts, metadata)[0] for one in others}
        return (components or {self.name: scores}) | bounded

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        trained, *others = self._rewards
        if not isinstance(trained, Composite):
            return components[self.name]
        bounded = {one.name for one in others}
        return trained.total({name: v for name, v in components.items() if name not in bounded}, prompts)


class RewardSignal:
    """The mixed reward of the samples of an update under a configuration, with the multipliers of its constraints.

    Raises InputError for options that do not fit the reward.
    """

    def __init__(self, reward: Reward, config: SignalConfig) -> None:
        plain = unwrapped(reward)
        self.name, self.weights = reward.name, plain.weights if isinstance(plain, CombinedReward) else None
        known = {reward.name, *(plain.component_names if isinstance(plain, CompositeReward) else ())}
        self.constraints = Constraints(read_bounds(config.constraints), config.dual_rate)
        self.bounded: list[Reward] = [load_reward(name) for name in config.constraints if name not in known]
        self.normalize = config.normalize_components
        if self.normalize and self.weights is None:
            raise InputError(
                f"normalize_components is for a weighted sum of rewards, and {reward.name!r} is none: leave it out"
            )

    def attach_metadata(self, rows: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Attach metadata by prompt to the rewards of constraints."""
        self.bounded = [with_metadata(one, rows) for one in self.bounded]

    def scored_reward(self, reward: Reward) -> Reward:
        """Return the reward of the training samples, with the components that constraints need."""
        return RewardWithConstraints(reward, self.bounded) if self.bounded else reward

    def __call__(self, scored: Scored) -> Tensor:
        """Return the signal (B, K) of an update, after moving the multipliers by its means."""
        rewards = scored.rewards
        if self.normalize and self.weights is not None:
            rewards = normalized_sum(scored.components, self.weights)
        return self._constrained(rewards, scored) if self.constraints.bounds else rewards

    def objectives(self, scored: Scored) -> Tensor:
        """Return the weighted components of the trained sum (B, K, M), higher is better.

        With constraints, each component is standardised among the samples of a prompt, then mixed with the bounded
        rewards. (As further objectives these would count alike whatever their multipliers: dominance has no scale.)
        """
        weights = self.weights or {}
        components = [weight * scored.components[name] for name, weight in weights.items()]
        if not self.constraints.bounds:
            return torch.stack(components, -1)
        return self._constrained(torch.stack([group_advantages(one, True) for one in components], -1), scored)

    def _constrained(self, rewards: Tensor, scored: Scored) -> Tensor:
        """Return rewards (B, K) or (B, K, M) mixed with the bounded rewards, after moving the multipliers."""
        bounded = {self.name: scored.rewards} | scored.components
        self.constraints = self.constraints.after(rewards, bounded)
        return self.constraints.signal(rewards, bounded)


def unwrapped(reward: Reward) -> Reward:
    """Return a reward without metadata and time limits."""
    while isinstance(reward, WrappedReward):
        reward = reward.reward
    return reward


def check_pareto(reward: Reward) -> None:
    """Raise InputError where a reward is not a weighted sum, whose components could be compared."""
    plain = unwrapped(reward)
    if not (isinstance(plain, CombinedReward) and plain.weights):
        raise InputError(
            f"pareto compares the components of a weighted sum of rewards, and {reward.name!r} is none: leave it out"
        )
