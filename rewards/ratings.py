"""Rewards from ratings: regression on stars, likes or grades of single images (HelpSteer2, arXiv 2410.01257)."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from steer.reward import RewardError
from steer.rewards.analysis import pairwise_agreement
from steer.rewards.clip import load_backbone
from steer.rewards.learned import (
    Features,
    RewardCard,
    card_backbone,
    features_of,
    save_members,
    train_members,
    write_run_config,
)
from steer.rewards.preference_pairs import Ratings, split_by_prompt
from steer.rewards.training_config import RewardTrainingConfig


def train_on_ratings(
    ratings: Ratings, config: RewardTrainingConfig, out: Path, work: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Minimise (r(x) − (y − ȳ)/s_y)², write the reward to `out` and return its report; a run in `work` resumes.

    The reward's score is the predicted rating, in the unit of the ratings y. The report has the correlation with the
    held-out ratings, R², and the share of image pairs of one prompt in the order of their ratings.
    Raises RewardError if all ratings are equal, and for a head that compares images.
    """
    if config.head == "general" or (config.head == "similarity" and not config.train_backbone):
        raise RewardError(f"--head {config.head} does not learn from ratings: take --head pair or image")
    write_run_config(work, config, ratings)
    training_rows, held_rows = split_by_prompt(ratings.prompts, config.held_out, config.seed)
    training, held = ratings.select(training_rows), ratings.select(held_rows or training_rows)
    mean, std = training.ratings.mean().item(), training.ratings.std().item()
    if not std > 0:
        raise RewardError(f"all {len(training)} ratings are {mean:g}: nothing to learn")
    backbone, members, predictions = load_backbone(config.backbone).to(device), [], []
    frozen = None if config.train_backbone else features_of(backbone, training)
    target = ((training.ratings - mean) / std).to(device)

    def loss(head: nn.Module, features: Features, rows: Tensor) -> Tensor:
        return F.mse_loss(head(*features), target[rows])

    for member, own in train_members(training, frozen, backbone, loss, config, work):
        with torch.no_grad():
            predictions.append((member["head"](*features_of(own, held)) * std + mean).cpu())
        members.append(member)
    report = {
        "config": asdict(config),
        "unit": "rating",
        "ratings": {"trained": len(training), "held_out": len(held_rows), "mean": mean, "std": std},
        "members": [rating_metrics(one, held) for one in predictions],
        "ensemble": rating_metrics(torch.stack(predictions).mean(0), held),
    }
    count = config.members  # (r + ȳ/s_y) / (1/s_y) is the rating
    scales = (-mean / std,) * count, (1 / std,) * count
    save_members(out, RewardCard(config.head, card_backbone(config), backbone.width, *scales, report), members, config)
    return report


def rating_metrics(predicted: Tensor, held: Ratings) -> dict[str, float]:
    """Return Pearson's correlation, R² and the pairwise accuracy within prompts (nan without such pairs)."""
    if len(held) < 2:
        return dict.fromkeys(("pearson", "r2", "pair_accuracy"), math.nan)
    error = (predicted - held.ratings).square().mean() / held.ratings.var(correction=0)
    correlation = stats.pearsonr(predicted.numpy(), held.ratings.numpy()).statistic
    accuracy = pairwise_agreement(predicted.tolist(), held.ratings.tolist(), held.prompts)
    values = {"pearson": float(correlation), "r2": 1 - error.item(), "pair_accuracy": accuracy}
    return {name: round(value, 4) for name, value in values.items()}
