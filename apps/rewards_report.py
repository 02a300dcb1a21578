"""Looking at rewards: the scores of image files, and what is shown of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.pictures import FAINT, INK
from steer.errors import InputError
from steer.images import read_image
from steer.reward import Reward, score
from steer.rewards.agreement import Agreement
from steer.rewards.checks import Finding
from steer.rewards.contrast import Consistency, consistency_by_kind, contrast_pairs

# Ten colours that colour-blind readers can tell apart (Petroff, arXiv 2107.02270), and as many marks.
COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKS = "osD^vPX<>h"


def score_all(
    reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16, device: str = "cpu"
) -> Tensor:
    """Scores (N,) fp32 of N image files, each with its prompt, with a progress bar.

    Images of any sizes; at most `batch` neighbours of one size are scored together on `device`, and no more are in
    memory.
    Raises InputError for a file that is no image, RewardError where the reward does not score.
    """
    if batch < 1:
        raise InputError(f"the batch must be at least 1 image, got {batch}")
    if len(paths) != len(prompts):
        raise InputError(f"images are scored with one prompt each, got {len(prompts)} for {len(paths)} images")
    scores: list[Tensor] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        if waiting:
            done = sum(map(len, scores))
            texts = list(prompts[done : done + len(waiting)])
            scores.append(score(reward, torch.stack(waiting).to(device), texts))
            progress.update(len(waiting))
            waiting.clear()

    with torch.no_grad(), tqdm(total=len(paths), desc=reward.name, unit="image", disable=None) as progress:
        for path in paths:
            image = read_image(path)
            if len(waiting) == batch or (waiting and waiting[0].shape != image.shape):
                flush()
            waiting.append(image)
        flush()
    return torch.cat(scores) if scores else torch.zeros(0)


def batch_of_files(paths: Sequence[Path], prompts: Sequence[str], most: int) -> tuple[Tensor, list[str]]:
    """The first image and up to `most` − 1 others of its size: (N, 3, H, W), and their prompts."""
    images: list[Tensor] = []
    texts: list[str] = []
    for path, prompt in zip(paths, prompts, strict=True):
        if len(images) == most:
            break
        image = read_image(path)
        if not images or image.shape == images[0].shape:
            images.append(image)
            texts.append(prompt)
    return torch.stack(images), texts


def consistency_of_files(
    reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16, device: str = "cpu"
) -> dict[str, Consistency]:
    """`steer.rewards.contrast.consistency` of image files of any sizes, each with the prompt that it shows."""
    pairs = contrast_pairs(prompts)
    if not pairs:
        return {}
    right = score_all(reward, paths, prompts, batch, device)
    changed = [contrast.prompt for _, contrast in pairs]
    wrong = score_all(reward, [paths[row] for row, _ in pairs], changed, batch, device)
    return consistency_by_kind([contrast.kind for _, contrast in pairs], right[[row for row, _ in pairs]] - wrong)


def draw_scatter(
    a_name: str,
    a: Tensor,
    b_name: str,
    b: Tensor,
    prompts: Sequence[str],
    agreement: Agreement,
    path: Path,
) -> Path:
    """Writes a PNG: each image a mark at its two scores (N,), histograms of both at the sides, the measures above.

    Up to ten prompts have a colour and a mark each.
    """
    known = list(dict.fromkeys(prompts))
    named = known if len(known) <= len(COLOURS) else []
    height = 6.2 + 0.17 * len(named)
    figure = Figure(figsize=(6.4, height), dpi=120)
    bottom, top = (0.65 + 0.17 * len(named)) / height, 1 - 0.65 / height
    place: dict[str, Any] = {"left": 0.12, "right": 0.97, "bottom": bottom, "top": top}
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.03, hspace=0.03, **place)
    axes = figure.add_subplot(grid[1, 0])
    for kind, prompt in enumerate(named or [""]):
        rows = [row for row, text in enumerate(prompts) if not named or text == prompt]
        style: dict[str, Any] = {"color": COLOURS[kind], "marker": MARKS[kind], "label": _plain(prompt, 90)}
        axes.scatter(a[rows], b[rows], s=34, alpha=0.85, edgecolors="white", linewidths=0.5, **style)
    axes.set_xlabel(_plain(a_name, 80), size=9, color=INK)
    axes.set_ylabel(_plain(b_name, 80), size=9, color=INK)
    _clean(axes)
    _side(figure.add_subplot(grid[0, 0], sharex=axes), a, "vertical")
    _side(figure.add_subplot(grid[1, 1], sharey=axes), b, "horizontal")
    if named:
        figure.legend(loc="lower left", bbox_to_anchor=(0.1, 0.04 / height), fontsize=7.5, frameon=False)
    measures = (
        f"{agreement.n} images: Spearman {agreement.spearman:.2f}, STARC distance {agreement.starc:.2f}, "
        f"pairs of one prompt ranked alike {agreement.pairs_alike:.0%}"
    )
    title: dict[str, Any] = {"x": 0.12, "va": "top", "color": INK}
    figure.text(y=1 - 0.14 / height, s=f"{_plain(a_name, 32)} against {_plain(b_name, 32)}", size=11, **title)
    figure.text(y=1 - 0.38 / height, s=measures, size=8.5, **title)
    figure.savefig(path, format="png")
    return path


def _side(axes: Axes, scores: Tensor, orientation: Any) -> None:
    axes.hist(scores.tolist(), bins=24, color=FAINT, orientation=orientation)
    axes.axis("off")


def _clean(axes: Axes) -> None:
    axes.grid(color=FAINT, alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[:].set_color(FAINT)


def _plain(text: str, length: int) -> str:
    """Text for matplotlib, which would read $…$ as mathematics and hide a label that starts with _."""
    shown = text if len(text) <= length else text[: length - 1] + "…"
    return shown.replace("$", r"\$").lstrip("_")


def render_findings(findings: Sequence[Finding]) -> str:
    """One line a finding: ok, FAILED, or - where there is nothing to pass."""
    width = max(len(finding.name) for finding in findings)
    marks = {True: "ok", False: "FAILED", None: "-"}
    return "\n".join(f"{marks[found.passed]:6}  {found.name:{width}}  {found.detail}" for found in findings)


def render_consistency(consistency: Mapping[str, Consistency]) -> str:
    """A table: how often the prompt scores higher than a changed one, by what was changed."""
    if not consistency:
        return "no prompt has a colour, a number or a relation to change"
    rows = [f"{'changed':8}  {'prompt preferred':>16}  {'pairs':>6}  {'mean margin':>11}"]
    for kind, found in consistency.items():
        rows.append(f"{kind:8}  {found.share:>16.1%}  {found.pairs:>6}  {found.margin:>11.3g}")
    return "\n".join(rows)


def render_agreement(agreement: Agreement) -> str:
    """The measures, a line each."""
    rows = (
        ("images", f"{agreement.n}"),
        ("Spearman", f"{agreement.spearman:.3f}"),
        ("Kendall", f"{agreement.kendall:.3f}"),
        ("pairs of one prompt ranked alike", f"{agreement.pairs_alike:.1%}"),
        ("STARC distance (0 same, 1 opposite)", f"{agreement.starc:.3f}"),
    )
    return "\n".join(f"{name:36}{value:>8}" for name, value in rows)
