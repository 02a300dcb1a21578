"""Strength of preferences, measured by an ensemble trained without the pair, and cleaning of labels by it.

After "Secrets of RLHF in Large Language Models, Part II" (arXiv 2401.06080, section 2): with Δ_m = r_m(a) − r_m(b) of
the members m that were trained without a pair, and c its label,

    μ = mean_m Δ_m,   s = std_m Δ_m,   strength = |μ|,   agreement = μ (2c − 1)

The labels of least agreement are flipped, the labels of the next band become the ensemble's probability mean_m σ(Δ_m).
Unlike in the paper, a flip needs odds of 2 : 1 against the label, and labels with odds of 2 : 1 for them are not
softened: shares alone change right labels if few are wrong (3 flips of 250 cost a retrained reward .06 of accuracy).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steer.registry import choose
from steer.reward import RewardError
from steer.rewards import objectives
from steer.rewards.clip import load_backbone
from steer.rewards.learned import (
    features_of,
    pair_loss,
    raw_pair,
    rows_of,
    train_members,
    write_run_config,
)
from steer.rewards.preference_pairs import Pairs
from steer.rewards.training_config import RewardTrainingConfig


@dataclass(frozen=True)
class Strengths:
    """Differences Δ (M, P) of pairs in nats, by members that were trained without the pair."""

    differences: Tensor

    @property
    def mean(self) -> Tensor:
        """Return μ (P,), in nats."""
        return self.differences.mean(0)

    @property
    def spread(self) -> Tensor:
        """Return s (P,), in nats."""
        return self.differences.std(0, correction=0)

    def agreement(self, choice: Tensor) -> Tensor:
        """Return μ (2c − 1) (P,): below 0 if the ensemble contradicts the label."""
        return self.mean * (2 * choice - 1)


def measure_strength(
    pairs: Pairs, config: RewardTrainingConfig, folds: int, work: Path, device: str = "cpu"
) -> Strengths:
    """Train `config.members` heads without each fold of the pairs and measure Δ on the fold; a run in `work` resumes.

    Raises RewardError for a configuration that trains more than heads.
    """
    objective = choose("objective", config.objective, objectives.OBJECTIVES)
    if config.train_backbone or config.head == "similarity" or config.start:
        raise RewardError("strength is measured by heads on a frozen CLIP: take --head pair, image or general")
    if not 2 <= folds <= len(pairs):
        raise RewardError(f"--folds must be from 2 to the number of pairs, {len(pairs)}, got {folds}")
    write_run_config(work, config, pairs, folds=folds)
    backbone = load_backbone(config.backbone).to(device)
    features, labels = features_of(backbone, pairs), pairs.labels.to(device)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config.seed))
    differences = torch.zeros(config.members, len(pairs))
    for number, fold in enumerate(order.chunk(folds)):
        others = order[~torch.isin(order, fold)]
        loss, frozen = pair_loss(objective, labels[others], config), rows_of(features, others)
        data, first = pairs.select(others.tolist()), number * config.members
        for k, (member, _) in enumerate(train_members(data, frozen, backbone, loss, config, work, first)):
            with torch.no_grad():
                a, b = raw_pair(member["head"], *rows_of(features, fold))
            differences[k, fold] = (a - b).cpu()
    return Strengths(differences)


KEPT, SOFTENED, FLIPPED = "kept", "softened", "flipped"
CLEAR = math.log(2)  # nats: odds of 2 : 1


def clean(pairs: Pairs, strengths: Strengths, flip: float = 0.1, soften: float = 0.1) -> tuple[Pairs, list[str]]:
    """Flip the labels of least agreement, and soften the labels of the next band.

    In the share `flip` of least agreement, labels with agreement below −ln 2 are flipped; in the next share, `soften`,
    labels with agreement below ln 2 are softened. Ties are kept. Returns pairs with |μ| as their strength, and for each
    pair whether its label is kept, softened or flipped.
    """
    if not 0 <= flip + soften <= 1 or min(flip, soften) < 0:
        raise RewardError(f"--flip and --soften are shares from 0 to 1, together at most 1, got {flip} and {soften}")
    choice = pairs.labels.choice.clone()
    decided = (choice != 0.5).nonzero()[:, 0]
    ranked = decided[strengths.agreement(choice)[decided].argsort()]
    first, second = round(flip * len(ranked)), round((flip + soften) * len(ranked))
    agreement = strengths.agreement(choice)[ranked]
    contradicted = ranked[:first][agreement[:first] < -CLEAR]
    softened = ranked[first:second][agreement[first:second] < CLEAR]
    choice[softened] = strengths.differences.sigmoid().mean(0)[softened]
    choice[contradicted] = 1 - choice[contradicted]
    names = [KEPT] * len(pairs)
    for name, rows in ((SOFTENED, softened), (FLIPPED, contradicted)):
        for row in rows.tolist():
            names[row] = name
    return replace(pairs, labels=objectives.PreferenceLabels(choice, strengths.mean.abs())), names
