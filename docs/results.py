"""The tables of measurements in the pages of docs/, from the JSON files that commands wrote.

    python docs/results.py keep out/search/evaluation.json docs/studies/search.json   # what a page needs of a study
    python docs/results.py                                                   # writes all tables and figures again

`keep` adds to the contenders that a study already has, with the same prompts and seeds.

A page has a table between two comments, the first with its kind (a function below), its file and its options:

    <!-- results search studies/search.json {rows: [base, best-of-8], against: best-of-8} -->
    <!-- end -->

`make docs` builds the pages with tables from the files, whatever the pages say; a test holds the two equal.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from datetime import date
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from steer.apps.bench.report import draw as draw_bench
from steer.apps.bench.report import spread
from steer.apps.evaluation import foresight
from steer.apps.evaluation.report import MARKERS
from steer.apps.plots import COLORMAP, DPI, INK, save_figure, set_title, style_axes
from steer.apps.scenes.finetuning import curves_table, draw_finetuning_curves
from steer.training.overoptimization import interval

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"<!-- results (\w+) (\S+)(?: (\{.*?\}))? -->\n.*?<!-- end -->", re.DOTALL)
DIGITS = 4  # of a reward
DECODING = 1.2  # evaluations of scenes' denoiser that decoding an image and its reward cost, measured on one core
# FLOPs of an evaluation, in those of a guided pair of scenes
EVALUATION = {"scenes": 1.0, "scenes-turbo": 0.5, "scenes-large": 2.66, "scenes-flow": 6.26}
PARTS: dict[str, Callable[[list[float]], float]] = {  # of the rewards of a run's images, the picked one first
    "picked": itemgetter(0),
    "two": lambda values: fmean(values[:2]),
    "all": fmean,
    "highest": max,
}
NAMES = {"steer.apps.scenes.world:right": "right"}
Json = dict[str, Any]


# ---- What is kept of a study ----


def kept(report: Json) -> Json:
    """Keep of an evaluation.json the rewards of each prompt, of the picked image, all and the best, and the costs."""
    count = len(report["prompts"])
    contenders = []
    for one in report["contenders"]:
        rewards = {name: {part: [0.0] * count for part in PARTS} for name in report["rewards"]}
        for run in one["runs"]:
            for name, values in run["rewards"].items():
                for part, value in PARTS.items():
                    rewards[name][part][run["prompt"]] += value(values) / report["seeds"]
        rounded = {
            NAMES.get(name, name): {part: [round(value, DIGITS) for value in values] for part, values in parts.items()}
            for name, parts in rewards.items()
        }
        own = {key: one[key] for key in ("name", "model", "method", "options", "particles", "cost", "diversity")}
        seconds_of_runs = [round(run["cost"]["seconds"], DIGITS) for run in one["runs"]]
        contenders.append(own | {"seconds": seconds_of_runs, "rewards": rounded})
    first = report["contenders"][0]["environments"][0]
    return {
        "measured": date.today().isoformat(),
        "environment": first,
        "prompts": count,
        "seeds": report["seeds"],
        "tags": [one.get("tag") for one in report["prompts"]],
        "contenders": contenders,
    }


# ---- Tables ----


def search(study: Json, rows: Sequence[str] = (), steers: str = "scene-soft") -> str:
    """Tabulate searches by cost.

    Right are: the picked image, the first two by reward (their share), any of all (what a perfect judge could pick).
    """
    columns = {"best image right": ("right", "picked"), f"its {steers}": (steers, "picked")}
    columns |= {"first two right": ("right", "two"), "any right": ("right", "highest")}
    lines = [["search", "cost", *columns]]
    for one in chosen(study, rows):
        cells = [shown(interval(values_of(one, *place))) if has(one, place) else "–" for place in columns.values()]
        lines.append([one["name"], f"{relative_cost(study, one):.1f}", *cells])
    return table(lines)


def equal_cost(study: Json, rows: Sequence[str] = (), steers: str = "scene-soft") -> str:
    """Tabulate the paired differences of searches from best-of-n at their own cost, best reward first."""
    lines = [["search", "cost", "best image right", f"its {steers}", "first two right"]]
    places = (("right", "picked"), (steers, "picked"), ("right", "two"))
    for one in compared(study, rows, steers):
        cells = [shown(interval(excess(study, one, *place)), True) if has(one, place) else "–" for place in places]
        lines.append([one["name"], f"{relative_cost(study, one):.1f}", *cells])
    return table(lines)


def seconds(study: Json, rows: Sequence[str] = ()) -> str:
    """Tabulate the median seconds of a run of one prompt, and their ratio to one plain image, beside the cost."""
    base = median(study["contenders"][0]["seconds"])
    lines = [["search", "cost", "seconds", "in plain images"]]
    for one in chosen(study, rows):
        taken = median(one["seconds"])
        lines.append([one["name"], f"{relative_cost(study, one):.1f}", f"{taken:.2f}", f"{taken / base:.1f}"])
    return table(lines)


def accuracy(study: Json, rows: Sequence[str] = ()) -> str:
    """Tabulate the share of right images by model, steps and task."""
    tags = list(dict.fromkeys(study["tags"]))
    lines = [["model", "steps", "all prompts", *(f"{tag} ({study['tags'].count(tag)})" for tag in tags)]]
    for one in chosen(study, rows):
        right = torch.tensor(one["rewards"]["right"]["all"])
        groups = [right[[place for place, other in enumerate(study["tags"]) if other == tag]] for tag in tags]
        cells = [shown(interval(values)) for values in (right, *groups)]
        lines.append([one["model"], f"{one['cost']['nfe']:g}", *cells])
    return table(lines)


def ratios(report: Json) -> str:
    """Tabulate the ratios of a bench.json: seconds, with the quartiles over turns, FLOPs and peak memory."""
    lines = [["ratio", "seconds", "quartiles", "FLOPs", "peak memory"]]
    for name, ratio in report["ratios"].items():
        low, high = spread(report["runs"][name])
        others = (report[kind].get(name) for kind in ("flop_ratios", "memory_ratios"))
        others = ("" if one is None else f"{one:.2f}" for one in others)
        lines.append([f"`{name}`", f"{ratio:.2f}", f"{low:.2f}–{high:.2f}", *others])
    return table(lines)


TABLES: dict[str, Callable[..., str]] = {
    one.__name__: one for one in (search, equal_cost, seconds, accuracy, ratios)
} | {
    "agreement": foresight.table,  # of a foresight.json
    "curves": curves_table,  # of the JSON of `apps.scenes finetuning`
}


def by_name(study: Json) -> dict[str, Json]:
    return {one["name"]: one for one in study["contenders"]}


def chosen(study: Json, rows: Sequence[str]) -> list[Json]:
    """All contenders, or those of the given names in their order."""
    return [by_name(study)[name] for name in rows] if rows else study["contenders"]


def cost(one: Json) -> float:
    """Denoiser evaluations of a run, in those of `scenes`, with what its decodings, rewards and gradients are worth.

    An image differentiated costs two more of each: a backward pass is twice the forward pass.
    """
    nfe, decodes = one["cost"]["nfe"] * EVALUATION[one["model"]], one["cost"]["decodes"]
    backward: float = 2 * one["cost"].get("gradients", 0) / max(decodes, 1)
    return (1 + backward) * (nfe + DECODING * decodes)


def relative_cost(study: Json, one: Json) -> float:
    """Cost of a run in those of the study's first contender, one plain image."""
    return cost(one) / cost(study["contenders"][0])


def has(one: Json, place: tuple[str, str]) -> bool:
    """Return whether a search has what a column shows: one image has no second one."""
    reward, part = place
    return part != "two" or one["rewards"][reward]["two"] != one["rewards"][reward]["picked"]


def values_of(one: Json, reward: str, part: str) -> Tensor:
    """Return a reward of each prompt."""
    return torch.tensor(one["rewards"][reward][part], dtype=torch.float64)


def best_of_n(study: Json) -> list[tuple[float, Json]]:
    """Return the plain image and best-of-n of the study's first model, with their costs, cheapest first."""
    model = study["contenders"][0]["model"]
    some = [one for one in study["contenders"] if one["method"] in ("base", "best-of-n") and one["model"] == model]
    plain = [one for one in some if one["options"].keys() <= {"particles", "steps"}]
    return sorted(((relative_cost(study, one), one) for one in plain), key=itemgetter(0))


def excess(study: Json, one: Json, reward: str, part: str) -> Tensor:
    """Return what a search has above best-of-n at the same cost, for each prompt.

    Between two numbers n, best-of-n is interpolated linearly in the logarithm of the cost.
    """
    controls, at = best_of_n(study), relative_cost(study, one)
    above = next(place for place, (other, _) in enumerate(controls) if other >= at)
    (low, left), (high, right) = controls[max(above - 1, 0)], controls[above]
    share = 1.0 if high == low else math.log(at / low) / math.log(high / low)
    return values_of(one, reward, part) - torch.lerp(
        values_of(left, reward, part), values_of(right, reward, part), share
    )


def compared(study: Json, rows: Sequence[str], reward: str) -> list[Json]:
    """Return the searches other than best-of-n whose cost is within the range of best-of-n, the best reward first."""
    controls = best_of_n(study)
    some = [one for one in chosen(study, rows) if all(one is not other for _, other in controls)]
    inside = [one for one in some if relative_cost(study, one) <= controls[-1][0]]
    return sorted(inside, key=lambda one: -float(excess(study, one, reward, "picked").mean()))


def shown(values: Sequence[float], signed: bool = False) -> str:
    """Write [mean, low, high] as ".782 [.725, .839]"."""
    mean, low, high = (f"{value:{'+' * signed}.3f}".replace("0.", ".", 1).replace("-", "−") for value in values)
    return f"{mean} [{low.removeprefix('+')}, {high.removeprefix('+')}]"


def table(lines: Sequence[Sequence[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- Figures ----


def draw_search(study: Json, path: Path) -> None:
    """Draw how often the picked image is right over the cost, and what each search has above best-of-n at its cost."""
    rows = compared(study, (), "scene-soft")
    figure = Figure(figsize=(12.5, max(4.3, 0.24 * len(rows) + 1)), dpi=DPI, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _draw_over_cost(study, left)
    for axes, reward, title in ((middle, "right", "best image right"), (right, "scene-soft", "its scene-soft")):
        mean, low, high = zip(*(interval(excess(study, one, reward, "picked")) for one in rows), strict=True)
        for place, row in enumerate(zip(low, high, strict=True)):
            axes.plot(row, [place, place], color=colormaps[COLORMAP](0.45), lw=1.4, alpha=0.6)
        axes.plot(mean, range(len(rows)), "o", color=colormaps[COLORMAP](0.2), ms=4.5)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yticks(range(len(rows)), [one["name"] for one in rows] if axes is middle else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("minus best-of-n at the same cost", color=INK, size=8)
        set_title(axes, title)
        style_axes(axes)
    save_figure(figure, path)


def _draw_over_cost(study: Json, axes: Axes) -> None:
    """Draw the share of right picked images over the cost; a line joins the numbers of particles of one method."""
    families: dict[str, list[Json]] = {}
    for one in study["contenders"]:
        families.setdefault(family(one), []).append(one)
    lines = {name: some for name, some in families.items() if len(some) > 1}
    for number, (name, some) in enumerate(lines.items()):
        rows = sorted((relative_cost(study, one), *interval(values_of(one, "right", "picked"))) for one in some)
        x, mean, low, high = zip(*rows, strict=True)
        color = colormaps[COLORMAP](0.9 * number / max(len(lines) - 1, 1))
        if number == 0:
            axes.fill_between(x, low, high, color=color, alpha=0.1, lw=0)
        axes.plot(x, mean, label=name, color=color, marker=MARKERS[number % len(MARKERS)], ms=5, lw=1.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("cost, in plain images", color=INK, size=8)
    set_title(axes, f"best image right, {study['prompts']} held-out prompts")
    style_axes(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def family(one: Json) -> str:
    """Name the line of a contender: race of "race 12", "fk, m = 3" of "fk 4, m = 3", best-of-n of "best-of-8"."""
    if one["method"] == "base":
        return "best-of-n" if one["name"] == "base" else f"{one['name']}, best-of-n"
    numbered = re.fullmatch(r"((?:[a-z-]+, )?[a-z-]+?)([- ])\d+(, m = \d)?", one["name"])
    return one["name"] if numbered is None else numbered[1] + "-n" * (numbered[2] == "-") + (numbered[3] or "")


FIGURES: dict[str, tuple[Callable[[Json, Path], None], str]] = {
    "search.png": (draw_search, "studies/search.json"),
    "foresight.png": (foresight.draw, "studies/foresight.json"),
    "benchmark.png": (draw_bench, "studies/bench.json"),
    "finetuning-methods.png": (draw_finetuning_curves, "studies/finetuning-methods.json"),
    "finetuning-prompts.png": (draw_finetuning_curves, "studies/finetuning-prompts.json"),
    "finetuning-guards.png": (draw_finetuning_curves, "studies/finetuning-guards.json"),
}


# ---- Pages ----


def filled(text: str) -> str:
    """Return a page with all of its tables made from their files."""

    def block(match: re.Match[str]) -> str:
        kind, file, options = match.groups()
        head = match.group(0).partition("\n")[0]
        made = TABLES[kind](json.loads((DOCS / file).read_text()), **yaml.safe_load(options or "{}"))
        return f"{head}\n\n{made}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Pages with a table."""
    return [path for path in sorted(DOCS.glob("*.md")) if "<!-- results " in path.read_text()]


def added(old: Json, new: Json) -> Json:
    """Return a study whose contenders are replaced by those of a new part, in their place, or followed by them."""
    shared = ("prompts", "seeds", "tags")
    if [old[key] for key in shared] != [new[key] for key in shared]:
        raise SystemExit("the study at hand has other prompts or seeds: remove its file first")
    return new | {"contenders": [*(by_name(old) | by_name(new)).values()]}


def main(arguments: Sequence[str]) -> None:
    if arguments:
        report, study = map(Path, arguments[1:])
        new = kept(json.loads(report.read_text()))
        whole = added(json.loads(study.read_text()), new) if study.exists() else new
        study.write_text(json.dumps(whole, ensure_ascii=False) + "\n")
    for path in pages():
        path.write_text(filled(path.read_text()))
    for name, (draw, file) in FIGURES.items():
        draw(json.loads((DOCS / file).read_text()), DOCS / name)


if __name__ == "__main__":
    main(sys.argv[1:])
