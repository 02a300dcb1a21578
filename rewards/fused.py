"""fused(REWARD): the mean score over the wordings of a prompt, so that no wording is favoured.

    r(x, p) = 1/J Σ_j r(x, p_j),   p_1 … p_J the wordings of p, in the order of the file

The weights are equal: weights by the likeness of p_j to p would make the score depend on the wording again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.reward import Metadata, Reward, RewardError, Texts, score_components
from steer.rewards.compose import CompositeReward
from steer.rewards.preference_pairs import read_rows
from steer.rewards.scene import parse

Wordings = Callable[[str], Sequence[str]]


class FusedReward(CompositeReward):
    """The mean of a reward over the wordings of each prompt, at the cost of one call on J times the batch.

    wordings  returns all wordings of a prompt, including itself, in the same order for each of them
    """

    def __init__(self, reward: Reward, wordings: Wordings, option: str = "") -> None:
        super().__init__([reward], f"fused({reward.name}{option})")
        self._wordings = wordings

    def components(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> dict[str, Tensor]:
        wordings = {prompt: self._wordings(prompt) for prompt in dict.fromkeys(prompts)}
        rows = [row for row, prompt in enumerate(prompts) for _ in wordings[prompt]]
        texts = [text for prompt in prompts for text in wordings[prompt]]
        given = None if metadata is None else [metadata[row] for row in rows]
        total, inner = score_components(self._rewards[0], _repeated(images, rows), texts, given)
        name, owner = self._names[0], torch.tensor(rows, device=total.device)
        parts = {name: total} | {f"{name}/{part}": scores for part, scores in inner.items()}
        counts = torch.bincount(owner)
        return {
            part: scores.new_zeros(len(prompts)).index_add(0, owner, scores) / counts for part, scores in parts.items()
        }

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Return the scores (N,)."""
        return components[self._names[0]]


def _repeated(images: Any, rows: list[int]) -> Any:
    if isinstance(images, Texts):
        return Texts([images[row] for row in rows], None if images.ids is None else images.ids[rows])
    return images[rows]


def scene_wordings(prompt: str) -> tuple[str, ...]:
    """Return both wordings of a prompt of two kinds of objects: "A left of B", "B right of A". Raises RewardError."""
    try:
        return tuple(map(str, parse(prompt).wordings))
    except RewardError as error:
        raise RewardError(
            f"fused(…): no other wordings of {prompt!r:.80} are known: give them, fused(REWARD, paraphrases=FILE)"
        ) from error


def read_paraphrases(path: Path) -> Wordings:
    """Read a table of rows {"prompt": TEXT, "paraphrases": [TEXT, …]}: all texts of a row are wordings of each other.

    A prompt that is in no row has no other wording. Raises RewardError.
    """
    wordings: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(read_rows(path), 1):
        texts = [row.get("prompt"), *(given if isinstance(given := row.get("paraphrases"), list) else [None])]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise RewardError(f'{path}, row {number}: expected {{"prompt": TEXT, "paraphrases": [TEXT, …]}}')
        group = tuple(dict.fromkeys(texts))
        if repeated := [text for text in group if text in wordings]:
            raise RewardError(f"{path}, row {number}: {repeated[0]!r:.80} is in an earlier row: put both into one")
        wordings |= dict.fromkeys(group, group)
    return lambda prompt: wordings.get(prompt, (prompt,))
