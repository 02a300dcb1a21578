"""What all rewards made of rewards share: their parts, each held to the contract, and a total of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from steer.contract import Metadata
from steer.reward import Reward, score_parts


def part_names(rewards: Sequence[Reward]) -> list[str]:
    """The rewards' names; where one comes twice, with its number behind it."""
    names = [reward.name for reward in rewards]
    return [f"{name}#{k}" if names.count(name) > 1 else name for k, name in enumerate(names)]


class Composed(ABC):
    """A reward of other rewards: gradients flow where all of them allow it."""

    images = "pt"

    def __init__(self, rewards: Sequence[Reward], name: str) -> None:
        self._rewards, self._names = tuple(rewards), part_names(rewards)
        self.name = name
        self.differentiable = all(reward.differentiable for reward in rewards)

    @property
    def prompt_limit(self) -> int | None:
        """The tokens that the reward with the lowest limit reads of a prompt; None: no limit is known."""
        limits = [getattr(reward, "prompt_limit", None) for reward in self._rewards]
        return min((limit for limit in limits if limit is not None), default=None)

    def parts(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> dict[str, Tensor]:
        """The scores (N,) of each reward as it gives them and, below NAME/, of its own parts."""
        found: dict[str, Tensor] = {}
        for name, reward in zip(self._names, self._rewards, strict=True):
            found[name], inner = score_parts(reward, images, prompts, metadata)
            found.update({f"{name}/{part}": scores for part, scores in inner.items()})
        return found

    @abstractmethod
    def total(self, parts: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """The reward's own scores (N,), of its parts'."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return self.total(self.parts(images, prompts, metadata), prompts)
