"""Scores of image files for `steer score` and `steer rewards`: files, folders and tables, paired with prompts."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.plots import FAINT, INK, plain_text, save_figure, style_axes
from steer.apps.prompts import read_rows
from steer.errors import InputError
from steer.files import IMAGE_SUFFIXES, read_image, read_json
from steer.reward import (
    Judge,
    Reward,
    RewardError,
    Scores,
    compare,
    compares_images,
    mean_over_frames,
    score,
    score_components,
)
from steer.rewards.analysis import Agreement, CheckResult, Consistency, Contrast, consistency_by_kind, contrast_pairs
from steer.rewards.inputs import file_batches, rows_by_prompt
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.preference_pairs import Pairs, check_output, draw_pairs, write_pairs
from steer.tables import numbered_lines, read_text
from steer.training.overoptimization import Usefulness

T = TypeVar("T")
REPORT_HINT = "; prompts can be given in prompts.jsonl"
REPORT, LISTS = "report.json", ("prompts.jsonl", "metadata.jsonl")
IMAGE_KEYS, PROMPT_KEYS = ("image", "file_name", "image_path"), ("prompt", "text", "caption")
PROMPT_SOURCES = (
    "a report.json of `steer sample`, a prompts.jsonl or metadata.jsonl with image and prompt on each line, a .txt "
    "beside each image, or one prompt for all"
)


@dataclass(frozen=True)
class ImageWithPrompt:
    """An image file and its prompt, or None."""

    path: Path
    prompt: str | None


def images_with_prompts(folder: Path, prompt: str | None = None) -> tuple[list[Path], list[str]]:
    """Return the images of a folder and the prompt of each. Raises InputError if one has no prompt."""
    shown = images_of_folder(folder, prompt)
    prompts = [one.prompt for one in shown if one.prompt is not None]
    if len(prompts) < len(shown):
        raise InputError(f"{folder}: no prompts for its images: it takes {PROMPT_SOURCES}")
    return [one.path for one in shown], prompts


def images_of_folder(folder: Path, prompt: str | None = None) -> list[ImageWithPrompt]:
    """Return the images of a folder, sorted by path, each with its prompt if there is one.

    The images are listed in report.json (images and base images of `steer sample`), prompts.jsonl or metadata.jsonl
    (lines {"image": path in the folder, "prompt": text}, or with the keys file_name and text or caption); otherwise
    they are all PNG, JPEG and WebP files in the folder and below, each with the text of the .txt file of its name, or
    with `prompt`. Raises InputError for two sources of prompts, no image, an image without a caption beside others with
    captions, or a path that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder of images")
    source = next((path for name in (REPORT, *LISTS) if (path := folder / name).exists()), None)
    if source is not None:
        if prompt is not None:
            raise InputError(f"{folder} has its prompts in {source.name}: give no other prompt, or move that file away")
        listed = (_read_report if source.name == REPORT else _read_lines)(source)
        shown = [ImageWithPrompt(_resolve_image(folder, name, source), text) for name, text in listed]
    else:
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        shown = _with_captions(folder, sorted(paths), prompt)
    if not shown:
        raise InputError(f"{source or folder}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(shown, key=lambda one: (one.path, one.prompt or ""))


def _with_captions(folder: Path, paths: Sequence[Path], prompt: str | None) -> list[ImageWithPrompt]:
    """Pair each image with the text of the .txt file of its name, or with `prompt` if no image has one."""
    captions = [path.with_suffix(".txt") for path in paths]
    missing = [caption for caption in captions if not caption.is_file()]
    if len(missing) == len(paths):
        return [ImageWithPrompt(path, prompt) for path in paths]
    if prompt is not None:
        raise InputError(f"{folder} has its prompts in .txt files beside the images: give no other prompt")
    if missing:
        image = paths[captions.index(missing[0])].name
        count = len(paths) - len(missing)
        raise InputError(f"{folder}: {count} captions for {len(paths)} images: {image} has no {missing[0].name}")
    texts = [" ".join(_read(read_text, caption).split()) for caption in captions]
    if "" in texts:
        raise InputError(f"{captions[texts.index('')]}: an empty caption")
    return [ImageWithPrompt(path, text) for path, text in zip(paths, texts, strict=True)]


def _read(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from error


def _read_report(path: Path) -> list[tuple[str, str]]:
    """Return the names and prompts of all images that `steer sample` wrote."""
    report = read_json(path, "a report of `steer sample`", REPORT_HINT)
    listed: list[tuple[str, str]] = []
    try:
        for entry in report["prompts"]:
            for part in (entry, entry.get("base", {"images": []})):
                listed += [(name, entry["prompt"]) for name in [*part["images"]]]
        if not all(isinstance(prompt, str) for _, prompt in listed):
            raise TypeError("a prompt that is no text")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is not a report of `steer sample`{REPORT_HINT}") from error
    return listed


def _read_lines(path: Path) -> list[tuple[str, str]]:
    listed: list[tuple[str, str]] = []
    for where, line in _read(numbered_lines, path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        known = record if isinstance(record, dict) else {}
        image, prompt = (next((known[key] for key in keys if key in known), None) for keys in (IMAGE_KEYS, PROMPT_KEYS))
        if not (isinstance(image, str) and isinstance(prompt, str)):
            raise InputError(f'{where}: expected {{"image": "path", "prompt": "text"}}')
        listed.append((image, prompt))
    return listed


def _resolve_image(folder: Path, name: Any, source: Path) -> Path:
    """Return the image that a file names. Raises InputError if it is not an image, or not in the folder."""
    if not isinstance(name, str) or "\0" in name:
        raise InputError(f"{source}: {name!r} is no image path")
    path, given = folder / name, PurePosixPath(name)
    if given.is_absolute() or ".." in given.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: {name!r} leads out of {folder}; paths of images stay inside")
    if not path.is_file():
        raise InputError(f"{source}: there is no image {name!r} in {folder}")
    return path


TABLES = (".csv", ".json", ".jsonl", ".tsv", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "path", "file")


class MissingPromptError(RewardError):
    """Error for a reward that reads the prompt of an image without one."""


class MissingPrompts(Sequence[str]):
    """Prompts of images without prompts: reading one raises MissingPromptError, rewards that ignore prompts work."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return MissingPrompts(len(range(self._count)[index]))
        raise MissingPromptError("no prompt")

    def __iter__(self) -> Iterator[str]:
        raise MissingPromptError("no prompt")


def collect_images(
    sources: Sequence[Path], prompts: Sequence[str] = (), file: Path | None = None, column: str | None = None
) -> list[ImageWithPrompt]:
    """Pair each image with its prompt.

    sources  image files, folders (`images_of_folder`) and tables with columns of images and prompts
    prompts  one for all images, or one for each, in order
    file     a file of prompts instead; without sources, a table with columns of images and prompts
    column   column of the prompts in `file`
    Raises InputError, with both counts, if images and prompts do not match, and if an image would have two prompts.
    """
    if prompts and file is not None:
        raise InputError("--prompt and --prompts both give the prompts of the images: use one of them")
    if not sources:
        if file is None:
            raise InputError("no images: name files, folders or a table, or --prompts TABLE with a column of images")
        return _read_table(file, column)
    shown: list[ImageWithPrompt] = []
    for source in sources:
        table = source.suffix.lower() in TABLES and not source.is_dir()
        whole = images_of_folder(source) if source.is_dir() else [ImageWithPrompt(source, None)]
        shown += _read_table(source, column) if table else whole
    given = [row.prompt for row in read_rows(file, column)] if file is not None else list(prompts)
    if not given:
        return shown
    if own := next((one for one in shown if one.prompt is not None), None):
        raise InputError(f"{own.path} has the prompt {own.prompt!r:.60} of its folder or table: give no other one")
    if len(given) not in (1, len(shown)):
        raise InputError(f"{len(given)} prompts for {len(shown)} images: give one for all, or one for each in order")
    given = given * len(shown) if len(given) == 1 else given
    return [ImageWithPrompt(one.path, prompt) for one, prompt in zip(shown, given, strict=True)]


def _read_table(table: Path, column: str | None) -> list[ImageWithPrompt]:
    """Return the images that a table names, relative to its folder."""
    shown = []
    for row in read_rows(table, column):
        cells = {name.lower(): cell for name, cell in reversed([*row.columns.items()]) if isinstance(cell, str)}
        image = next((cells[name] for name in IMAGE_COLUMNS if name in cells and "\0" not in cells[name]), None)
        if image is None:
            raise InputError(
                f"{table}: the prompt {row.prompt!r:.60} has no path of an image under {', '.join(IMAGE_COLUMNS)}; its "
                f"columns are {', '.join(row.columns) or 'none'}"
            )
        shown.append(ImageWithPrompt(table.parent / image, row.prompt))
    return shown


def score_images(
    reward: Reward, shown: Sequence[ImageWithPrompt], device: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score each image by itself: a row for each, and the errors of images that cannot be read or scored.

    Raises InputError if the reward reads the prompt of an image without one.
    """
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for one in shown:
        rows.append({"image": str(one.path), "prompt": one.prompt})
        prompts = MissingPrompts(1) if one.prompt is None else [one.prompt]
        try:
            with torch.no_grad():
                total, components = score_components(reward, read_image(one.path)[None].to(device), prompts)
            rows[-1]["score"] = total.item()
            if components:
                rows[-1]["components"] = {name: value.item() for name, value in components.items()}
        except MissingPromptError as error:
            raise InputError(
                f"reward {reward.name!r} reads the prompt, and {one.path} has none: give --prompt, one for all "
                "images or one for each"
            ) from error
        except InputError as error:
            known = len(shown) == 1 or str(one.path) in str(error)
            errors.append(str(error) if known else f"{one.path}: {error}")
            rows[-1]["error"] = errors[-1]
    return rows, errors


# Ten colours that are distinct for colour-blind readers (Petroff, arXiv 2107.02270), and ten marks.
COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKS = "osD^vPX<>h"


def score_all(
    reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16, device: str = "cpu"
) -> Tensor:
    """Score N image files, each with its prompt, with a progress bar: (N,) fp32.

    Images of any sizes; at most `batch` consecutive ones of one size are loaded and scored together on `device`; all of
    them, of one size, if the reward compares images. Raises InputError for a file that is not an image, RewardError if
    the reward fails.
    """
    if batch < 1:
        raise InputError(f"the batch must be at least 1 image, got {batch}")
    if len(paths) != len(prompts):
        raise InputError(f"images are scored with one prompt each, got {len(prompts)} for {len(paths)} images")
    scores = [torch.zeros(0)]
    with torch.no_grad(), tqdm(total=len(paths), desc=reward.name, unit="image", disable=None) as progress:
        whole = compares_images(reward)
        for images, texts in file_batches(paths, prompts, len(paths) if whole else batch):
            if whole and len(texts) < len(paths):
                raise InputError(f"{reward.name} compares images, and these have several sizes: make them equal")
            scores.append(score(reward, images.to(device), texts))
            progress.update(len(texts))
    return torch.cat(scores)


SCORE_BATCH = 8  # images of a tensor that are scored at a time


@torch.no_grad()
def score_in_batches(reward: Reward, images: Tensor, prompts: Sequence[str], device: str | None = None) -> Scores:
    """Score images (N, 3, H, W) or videos (N, F, 3, H, W) by a reward and its components: (N,) each.

    In batches, moved to `device`; images that the reward compares are in one batch.
    """
    scored, size = [], len(images) if compares_images(reward) else SCORE_BATCH
    for start in range(0, len(images), size):
        cut = slice(start, start + size)
        score_frames: Callable[[Tensor], Scores] = partial(score_components, reward, prompts=prompts[cut])
        scored.append(mean_over_frames(images[cut].to(device).float().clamp(0, 1), score_frames, reward))
    totals, components = zip(*scored, strict=True)
    return torch.cat(totals), {name: torch.cat([one[name] for one in components]) for name in components[0]}


def score_each(rewards: Iterable[Reward], paths: Sequence[Path], prompts: Sequence[str], device: str) -> Tensor:
    """Score N image files, each with its prompt, by each of M rewards: (M, N) fp32. Raises like `score_all`."""
    return torch.stack([score_all(reward, paths, prompts, device=device) for reward in rewards])


def load_batch(paths: Sequence[Path], prompts: Sequence[str], max_images: int) -> tuple[Tensor, list[str]]:
    """Load the first image and up to `max_images` − 1 others of its size, (N, 3, H, W), and their prompts."""
    first = read_image(paths[0])
    loaded = chain([(first, prompts[0])], zip(map(read_image, paths[1:]), prompts[1:], strict=True))
    images, texts = zip(*islice((one for one in loaded if one[0].shape == first.shape), max_images), strict=True)
    return torch.stack(images), list(texts)


def label_pairs(
    judge: Judge, paths: Sequence[Path], prompts: Sequence[str], limit: int, seed: int, device: str, out: Path
) -> int:
    """Write pairs of images of one prompt and a judge's P(a ≻ b) as a .jsonl table; return the number of rows.

    Raises InputError if no prompt has two images, and for any other suffix.
    """
    check_output(out, paths)
    drawn = draw_pairs(prompts, limit, seed)
    if not drawn:
        raise InputError("no prompt has two images: sample several of each, or give one prompt for all, --prompt")
    preferred = []
    for pair in drawn:
        first, second = (read_image(paths[row])[None].to(device) for row in pair)
        preferred.append(compare(judge, first, second, [prompts[pair[0]]]))
    a, b = (tuple(paths[row] for row in side) for side in zip(*drawn, strict=True))
    labels = PreferenceLabels(torch.cat(preferred), torch.ones(len(drawn)))
    write_pairs(out, Pairs(a, b, tuple(prompts[row] for row, _ in drawn), labels))
    return len(drawn)


def score_contrasts(
    reward: Reward,
    paths: Sequence[Path],
    prompts: Sequence[str],
    pairs: Sequence[tuple[int, Contrast]],
    batch: int = 16,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Score N image files with their prompts, (N,), and with the contrasts of `contrast_pairs`, (P,)."""
    right = score_all(reward, paths, prompts, batch, device)
    rows, changed = [row for row, _ in pairs], [contrast.prompt for _, contrast in pairs]
    return right, score_all(reward, [paths[row] for row in rows], changed, batch, device)


def score_consistency(
    reward: Reward, paths: Sequence[Path], prompts: Sequence[str], batch: int = 16, device: str = "cpu"
) -> dict[str, Consistency]:
    """Compute `steer.rewards.analysis.consistency` for image files of any sizes, each with its prompt."""
    pairs = contrast_pairs(prompts)
    if not pairs:
        return {}
    right, wrong = score_contrasts(reward, paths, prompts, pairs, batch, device)
    return consistency_by_kind([contrast.kind for _, contrast in pairs], right[[row for row, _ in pairs]] - wrong)


def draw_scatter(
    a_name: str, a: Tensor, b_name: str, b: Tensor, prompts: Sequence[str], agreement: Agreement, path: Path
) -> Path:
    """Draw a PNG: a mark for each image at its two scores (N,), histograms of both scores, and the measures above.

    Up to ten prompts have their own colour and mark.
    """
    known = list(dict.fromkeys(prompts))
    named = known if len(known) <= len(COLOURS) else []
    height = 6.2 + 0.17 * len(named)
    figure = Figure(figsize=(6.4, height), dpi=120)
    bottom, top = (0.65 + 0.17 * len(named)) / height, 1 - 0.65 / height
    index: dict[str, Any] = {"left": 0.12, "right": 0.97, "bottom": bottom, "top": top}
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.03, hspace=0.03, **index)
    axes = figure.add_subplot(grid[1, 0])
    for kind, prompt in enumerate(named or [""]):
        rows = [row for row, text in enumerate(prompts) if not named or text == prompt]
        # matplotlib hides a label that starts with _.
        style: dict[str, Any] = {
            "color": COLOURS[kind],
            "marker": MARKS[kind],
            "label": plain_text(prompt, 90).lstrip("_"),
        }
        axes.scatter(a[rows], b[rows], s=34, alpha=0.85, edgecolors="white", linewidths=0.5, **style)
    axes.set_xlabel(plain_text(a_name, 80), size=9, color=INK)
    axes.set_ylabel(plain_text(b_name, 80), size=9, color=INK)
    axes.set_axisbelow(True)
    style_axes(axes, "both")
    above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    above.hist(a.tolist(), bins=24, color=FAINT)
    beside.hist(b.tolist(), bins=24, color=FAINT, orientation="horizontal")
    for side in (above, beside):
        side.axis("off")
    if named:
        figure.legend(loc="lower left", bbox_to_anchor=(0.1, 0.04 / height), fontsize=7.5, frameon=False)
    measures = (
        f"{agreement.n} images: Spearman {agreement.spearman:.2f}, STARC distance {agreement.starc:.2f}, "
        f"pairs of one prompt ranked alike {agreement.pairwise_agreement:.0%}"
    )
    title: dict[str, Any] = {"x": 0.12, "va": "top", "color": INK}
    figure.text(y=1 - 0.14 / height, s=f"{plain_text(a_name, 32)} against {plain_text(b_name, 32)}", size=11, **title)
    figure.text(y=1 - 0.38 / height, s=measures, size=8.5, **title)
    return save_figure(figure, path)


def scores_by_prompt(
    proxy: Reward, held_out: Reward, paths: Sequence[Path], prompts: Sequence[str], device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Score images, and return (P, K) of both rewards: K is the smallest number of images of a prompt.

    Raises InputError if a prompt has only one image.
    """
    rows = rows_by_prompt(prompts)
    samples = min(map(len, rows.values()))
    if samples < 2:
        alone = next(prompt for prompt, some in rows.items() if len(some) < 2)
        raise InputError(f"--images: {alone!r:.80} has one image: give at least 2, better 8, of each prompt")
    chosen = torch.tensor([some[:samples] for some in rows.values()])
    first, second = score_each((proxy, held_out), paths, prompts, device)
    return first[chosen], second[chosen]


def render_usefulness(point: Usefulness, proxy: str) -> str:
    """Render the point of usefulness, and the constraint that keeps a training there."""
    if point.rising:
        return (
            f"the held-out reward rises up to the best of {point.n}, {proxy} {point.proxy:.4g}: no bound is needed yet"
        )
    return (
        f"the held-out reward peaks at the best of {point.n}, {point.gain:+.4g} over one sample, where {proxy} is "
        f"{point.proxy:.4g} ({point.interval[0]:.4g} to {point.interval[1]:.4g})\n"
        f'constraints: {{{json.dumps(proxy)}: "<= {point.proxy:.4g}"}}'
    )


def render_reliability(shares: Mapping[str, float], keep: int) -> str:
    """Render R² of proxy and held-out reward by filter, the best first."""
    ranked = sorted(shares, key=lambda kind: -shares[kind])
    rows = [f"{kind:12} R² {shares[kind]:.3f}" for kind in ranked]
    return "\n".join([*rows, f"sample_filter: {ranked[0]}" + ("" if ranked[0] == "none" else f", filter_keep: {keep}")])


def render_check_results(check_results: Sequence[CheckResult]) -> str:
    """Render one line per check: ok, FAILED, or - if the check does not apply."""
    width = max(len(finding.name) for finding in check_results)
    marks = {True: "ok", False: "FAILED", None: "-"}
    return "\n".join(f"{marks[cell.passed]:6}  {cell.name:{width}}  {cell.detail}" for cell in check_results)


def render_consistency(consistency: Mapping[str, Consistency]) -> str:
    """Render a table: how often the prompt scores higher than a changed one, by the kind of change."""
    rows = [f"{'changed':8}  {'prompt preferred':>16}  {'pairs':>6}  {'mean margin':>11}"]
    for kind, cell in consistency.items():
        rows.append(f"{kind:8}  {cell.share:>16.1%}  {cell.pairs:>6}  {cell.margin:>11.3g}")
    return "\n".join(rows)


def render_agreement(agreement: Agreement) -> str:
    """Render the measures, one per line."""
    rows = (
        ("images", f"{agreement.n}"),
        ("Spearman", f"{agreement.spearman:.3f}"),
        ("Kendall", f"{agreement.kendall:.3f}"),
        ("pairs of one prompt ranked alike", f"{agreement.pairwise_agreement:.1%}"),
        ("STARC distance (0 same, 1 opposite)", f"{agreement.starc:.3f}"),
    )
    return "\n".join(f"{name:36}{value:>8}" for name, value in rows)
