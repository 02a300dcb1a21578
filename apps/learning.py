"""`steer rewards train`: train a reward on preferences, and plot the training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer.apps.plots import DPI, FAINT, INK, style_axes
from steer.rewards.clip import clip_folder
from steer.rewards.clip_training import train_clip
from steer.rewards.counts import pairs_of_counts, read_counts
from steer.rewards.learned import OnStep, train_reward
from steer.rewards.named_features import FeatureConfig, train_on_features
from steer.rewards.preference_pairs import check_output, read_captions, read_pairs, read_ratings, write_pairs
from steer.rewards.ratings import train_on_ratings
from steer.rewards.strength import FLIPPED, SOFTENED, clean, measure_strength
from steer.rewards.training_config import RewardTrainingConfig
from steer.rewards.users import train_on_users

CONTRASTIVE, RATING = "contrastive", "rating"
Users = tuple[str, int]  # groups or latent, and their number


def run_reward_training(
    data: Path,
    config: RewardTrainingConfig | FeatureConfig,
    out: Path,
    work: Path,
    device: str,
    images: Path | None = None,
    max_rows: int | None = None,
    users: Users | None = None,
    on_step: OnStep = lambda step, total: None,
) -> dict[str, Any]:
    """Train, write the folder `out` and, for heads on a CLIP, the plot `work`/training.png, and return the report.

    images    the folder that image paths are relative to; by default the folder of `data`
    max_rows  read only the first rows of `data`
    users     train a reward of users on pairs with a column user
    on_step   called at each step for heads on a CLIP trained on pairs (`steer.rewards.learned.train_reward`)
    """
    if isinstance(config, FeatureConfig):
        return train_on_features(read_pairs(data, images, max_rows), config, out, work, device)
    if users is not None:
        return train_on_users(read_pairs(data, images, max_rows), config, *users, out, work, device)
    if config.objective == CONTRASTIVE:
        captions = read_captions(data, images, max_rows)
        report = train_clip(captions, clip_folder(config.backbone), out, work, config, device)
    elif config.objective == RATING:
        report = train_on_ratings(read_ratings(data, images, max_rows), config, out, work, device)
    else:
        report = train_reward(read_pairs(data, images, max_rows), config, out, work, device, on_step)
    draw_training(work, report.get("ensemble", {}).get("bins", []), work / "training.png")
    (work / "report.json").write_text(json.dumps(report | {"config": asdict(config)}, indent=1) + "\n")
    return report


def clean_pairs(
    data: Path,
    config: RewardTrainingConfig,
    folds: int,
    shares: tuple[float, float],
    out: Path,
    work: Path,
    device: str,
    images: Path | None = None,
    max_rows: int | None = None,
) -> str:
    """Write pairs with measured strengths and cleaned labels, and a histogram beside them; return a summary.

    shares  shares of the labels to flip and to soften
    """
    pairs = read_pairs(data, images, max_rows)
    check_output(out, (*pairs.a, *pairs.b))
    strengths = measure_strength(pairs, config, folds, work, device)
    cleaned, changes = clean(pairs, strengths, *shares)
    spread = [round(value, 6) for value in strengths.spread.tolist()]
    write_pairs(out, cleaned, {"spread": spread, "change": changes})
    _draw_agreement(strengths.agreement(pairs.labels.choice).tolist(), changes, out.with_suffix(".png"))
    return f"{changes.count(FLIPPED)} of {len(pairs)} labels flipped, {changes.count(SOFTENED)} softened → {out}"


def label_counts(data: Path, out: Path, certainty: float, limit: int, seed: int, images: Path | None) -> int:
    """Write the preference pairs of a table of counts; return their number."""
    pairs = pairs_of_counts(*read_counts(data, images), certainty, limit, seed)
    write_pairs(out, pairs)
    return len(pairs)


def _draw_agreement(agreement: list[float], changes: list[str], path: Path) -> None:
    """Plot a histogram of the agreement of ensemble and label, by the change of the label."""
    figure = Figure(figsize=(5, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    kinds = sorted(set(changes))
    values = [[one for one, change in zip(agreement, changes, strict=True) if change == kind] for kind in kinds]
    axes.hist(values, bins=30, stacked=True, label=kinds)
    axes.set(xlabel="mean difference of the ensemble in favour of the label, nats", ylabel="pairs")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def summary(report: dict[str, Any]) -> str:
    """Summarise a report in one line."""
    if "ensemble" not in report:
        return f"correct caption of 32 for {report['caption_accuracy_of_32']:.1%} of held-out images"
    metrics = report["ensemble"]
    if "ratings" in report:
        held = report["ratings"]["held_out"]
        data = f"{held} held-out images" if held else "the training images themselves"
        return f"correlation {metrics['pearson']:.3f}, R² {metrics['r2']:.3f} on {data}"
    held = report["pairs"]["held_out"]
    pairs = f"{held} held-out pairs" if held else "the training pairs themselves"
    if weights := report.get("weights"):
        pairs += "; " + ", ".join(f"{weight:+.3g} {name}" for name, weight in weights.items())
    if "shared" in report:
        pairs += f"; accuracy of the mean user {report['shared']['accuracy']:.3f}"
    return f"accuracy {metrics['accuracy']:.3f}, calibration error {metrics['ece']:.3f} on {pairs}"


def draw_training(work: Path, bins: list[list[float]], path: Path) -> None:
    """Plot the loss of every member over the steps and, with held-out pairs, a reliability diagram."""
    figure = Figure(figsize=(9 if bins else 5, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2 if bins else 1, squeeze=False)[0]
    for each in axes:
        style_axes(each, grid=None)
    for log in sorted(work.glob("**/log.jsonl")):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        axes[0].plot([r["step"] for r in records], [r["loss"] for r in records], lw=1.3, label=log.parent.name)
    axes[0].set(xlabel="step", ylabel="loss", title="training")
    if len(axes[0].lines) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    if bins:
        _reliability(axes[1], bins)
    figure.savefig(path)


def _reliability(axes: Axes, bins: list[list[float]]) -> None:
    """Plot predicted against observed shares of labels; a calibrated reward lies on the diagonal."""
    predicted, observed, counts = zip(*bins, strict=True)
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1)
    axes.scatter(predicted, observed, s=[4 + 160 * count / max(counts) for count in counts], color=INK)
    axes.set(xlabel="predicted probability that a is preferred", ylabel="observed share", title="held-out pairs")
    axes.set(xlim=(0, 1), ylim=(0, 1))
