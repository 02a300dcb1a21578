"""Looking at rewards: images with their prompts from a folder, their scores, and what is shown of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
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

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Ten colours that colour-blind readers can tell apart (Petroff, arXiv 2107.02270), and as many marks.
COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKS = "osD^vPX<>h"
WAYS = "a report.json of `steer sample`, a prompts.jsonl with image and prompt on each line, or one prompt for all"


def images_with_prompts(folder: Path, prompt: str | None = None) -> tuple[list[Path], list[str]]:
    """The images of a folder, sorted by path, and the prompt of each.

    From report.json (the images and base images of `steer sample`), or prompts.jsonl (lines {"image": path in the
    folder, "prompt": text}), which name the images that count; without either, all PNG, JPEG and WebP files in it and
    below it, with `prompt`. Raises InputError where there is no prompt, or two sources of one, no image, or a path
    that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of images")
    report, lines = folder / "report.json", folder / "prompts.jsonl"
    source = next((path for path in (report, lines) if path.exists()), None)
    if source is None:
        if prompt is None:
            raise InputError(f"{folder}: no prompts for its images: it takes {WAYS}")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        named = [(path, prompt) for path in paths]
    elif prompt is not None:
        raise InputError(f"{folder} has its prompts in {source.name}: give no other prompt, or move that file away")
    else:
        listed = _of_report(source) if source == report else _of_lines(source)
        named = sorted((_inside(folder, name, source), text) for name, text in listed)
    if not named:
        raise InputError(f"{source or folder}: no images ({', '.join(SUFFIXES)})")
    return [path for path, _ in named], [text for _, text in named]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error


def _of_report(path: Path) -> list[tuple[str, str]]:
    """The names and prompts of all images that `steer sample` wrote."""
    report = _json(_read(path), str(path))
    listed: list[tuple[str, str]] = []
    try:
        for entry in report["prompts"]:
            for part in (entry, entry.get("base", {"images": []})):
                listed += [(name, entry["prompt"]) for name in [*part["images"]]]
        if not all(isinstance(prompt, str) for _, prompt in listed):
            raise TypeError("a prompt that is no text")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not a report of `steer sample`; prompts may stand in prompts.jsonl") from error
    return listed


def _of_lines(path: Path) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for number, line in enumerate(_read(path).replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        record = _json(line, f"{path}, line {number}")
        image, prompt = (record.get("image"), record.get("prompt")) if isinstance(record, dict) else (None, None)
        if not (isinstance(image, str) and isinstance(prompt, str)):
            raise InputError(f'{path}, line {number}: expected {{"image": "path", "prompt": "text"}}')
        listed.append((image, prompt))
    return listed


def _inside(folder: Path, name: Any, source: Path) -> Path:
    """The image of a name that a file gave. Raises InputError where it is none, or not in the folder."""
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{source}: {name!r} is no path of an image")
    path, given = folder / name, PurePosixPath(name)
    if given.is_absolute() or ".." in given.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: {name!r} leads out of {folder}; paths of images stay inside")
    if not path.is_file():
        raise InputError(f"{source}: there is no image {name!r} in {folder}")
    return path


def score_all(reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16) -> Tensor:
    """Scores (N,) fp32 of N image files, each with its prompt, with a progress bar.

    Images of any sizes; at most `batch` neighbours of one size are scored together, and no more are in memory.
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
            scores.append(score(reward, torch.stack(waiting), list(prompts[done : done + len(waiting)])))
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


def consistency_of_files(
    reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16
) -> dict[str, Consistency]:
    """`steer.rewards.contrast.consistency` of image files of any sizes, each with the prompt that it shows."""
    pairs = contrast_pairs(prompts)
    if not pairs:
        return {}
    right = score_all(reward, paths, prompts, batch)
    wrong = score_all(reward, [paths[row] for row, _ in pairs], [contrast.prompt for _, contrast in pairs], batch)
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
