"""`steer rewards train`: train a reward on preferences, and plot the training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer.apps.plots import DPI, FAINT, INK, style_axes
from steer.rewards.clip import clip_folder
from steer.rewards.learned import RewardTrainingConfig, train_clip, train_reward
from steer.rewards.preference_pairs import read_captions, read_pairs

CONTRASTIVE = "contrastive"


def run_reward_training(
    data: Path, config: RewardTrainingConfig, out: Path, work: Path, device: str, images: Path | None = None
) -> dict[str, Any]:
    """Train, write the folder `out` and the plot `work`/training.png, and return the report.

    images  the folder that image paths are relative to; by default that of `data`
    """
    if config.objective == CONTRASTIVE:
        report = train_clip(read_captions(data, images), clip_folder(config.backbone), out, work, config, device)
    else:
        report = train_reward(read_pairs(data, images), config, out, work, device)
    draw_training(work, report.get("ensemble", {}).get("bins", []), work / "training.png")
    (work / "report.json").write_text(json.dumps(report | {"config": asdict(config)}, indent=1) + "\n")
    return report


def summary(report: dict[str, Any]) -> str:
    """Summarise a report in one line."""
    if "ensemble" not in report:
        return f"correct caption of 32 for {report['caption_accuracy_of_32']:.1%} of held-out images"
    metrics, held = report["ensemble"], report["pairs"]["held_out"]
    pairs = f"{held} held-out pairs" if held else "the training pairs themselves"
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
