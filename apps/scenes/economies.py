"""Fewer and cheaper evaluations for the same reward: what each economy of FK steering saves, and what it loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer.apps.pictures import FAINT, INK
from steer.apps.preview_words import preview_named
from steer.apps.scenes.contenders import Contender, Found, Point
from steer.apps.scenes.evaluate import CALL, STEERING, interval
from steer.apps.scenes.kept_runs import SIDE_BY_SIDE, KeptRuns
from steer.apps.scenes.steering_pictures import COSTS
from steer.pipelines import FKSteeringPipeline

STANDARD = "8 particles"  # that the others are to be as good as


@dataclass(frozen=True, eq=False)
class Alone(Contender):
    """Steers one prompt a call, as `steer sample` does, and keeps the image that it picks: there may be any number.

    preview  what decodes x̂0, by a word of `steer sample`
    """

    preview: str = "full"

    @property
    def images(self) -> int:
        return SIDE_BY_SIDE

    def about(self) -> dict[str, Any]:
        return super().about() | ({} if self.preview == "full" else {"preview": self.preview})

    def run(self, pipe: Any, reward: str, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Found:
        """Judges the best image."""
        decoder = preview_named(self.preview, pipe)
        found = super().run(pipe, reward, prompts, seed, {**call, "preview": decoder})
        return replace(found, proxy=found.proxy[:, :1], exact=found.exact[:, :1])

    def points(self, found: Found) -> list[Point]:
        """One; of the images beside the picked one nothing is known."""
        return [replace(point, all_right=None) for point in super().points(found)]


BEST = {"narrow_choice": "best"}
HALF, QUARTER, LATE, LAST = {8: 4}, {8: 4, 14: 2}, {14: 2}, {17: 1}
VARIANTS: dict[str, tuple[int, dict[str, Any], str]] = {  # particles, options, previews
    STANDARD: (8, {}, "full"),
    "4 particles": (4, {}, "full"),
    "2 particles": (2, {}, "full"),
    "8, from step 8 on 4": (8, {"narrow": HALF}, "full"),
    "8, from step 8 on 4, from 14 on 2": (8, {"narrow": QUARTER}, "full"),
    "16, from step 8 on 4": (16, {"narrow": HALF}, "full"),
    "8, from step 8 on the best 4": (8, {"narrow": HALF} | BEST, "full"),
    "8, from step 8 on the best 4, from 14 on 2": (8, {"narrow": QUARTER} | BEST, "full"),
    "8, from step 14 on the best 2": (8, {"narrow": LATE} | BEST, "full"),
    "8, from step 17 on the best": (8, {"narrow": LAST} | BEST, "full"),
    "12, from step 8 on the best 4, from 14 on 2": (12, {"narrow": QUARTER} | BEST, "full"),
    "8, until x̂0 has 0.8": (8, {"target_reward": 0.8}, "full"),
    "8, tiny previews": (8, {}, "tiny"),
    "8, linear previews": (8, {}, "linear"),
    "8, from step 8 on the best 4, from 14 on 2, tiny": (8, {"narrow": QUARTER} | BEST, "tiny"),
    "12, from step 8 on the best 4, from 14 on 2, tiny": (12, {"narrow": QUARTER} | BEST, "tiny"),
}


def variants() -> dict[str, Alone]:
    """By name; the first is the standard."""
    return {
        name: Alone(name, size, FKSteeringPipeline, STEERING | options, preview=preview)
        for name, (size, options, preview) in VARIANTS.items()
    }


def economies(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    some: Mapping[str, Contender],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """A row for every variant, with its difference from the first over the same prompts; it goes on in `folder`."""
    found = KeptRuns(folder, reward, call).run(list(some.values()), prompts)
    points = {name: one.points(result)[0] for (name, one), result in zip(some.items(), found, strict=True)}
    first = next(iter(points.values()))
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, **STEERING, **call},
        "rows": {
            name: point.row()
            | {"minus_standard": {"proxy": interval((point.proxy - first.proxy).float()), **point.minus(first)}}
            | {"options": dict(some[name].options)}
            for name, point in points.items()
        },
    }


def draw_economies(found: dict[str, Any], path: Path) -> None:
    """The reward of what is picked, and whether it is right, against evaluations and against seconds."""
    figure = Figure(figsize=(11, 8.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    titles = {"proxy": f"{found['settings']['reward']} of the picked image", "right": "picked image right"}
    for line, (field, title) in zip(grid, titles.items(), strict=True):
        for axes, (cost, name) in zip(line, COSTS.items(), strict=True):
            _scatter(axes, found["rows"], field, cost)
            axes.set_title(title, size=10, loc="left", color=INK)
            axes.set_xlabel(name, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)


def _scatter(axes: Axes, rows: Mapping[str, Mapping[str, Any]], field: str, cost: str) -> None:
    for place, (name, row) in enumerate(rows.items()):
        mean, low, high = row[field]
        colour, mark = f"C{place % 10}", "os^D"[place // 10] if place else "*"
        axes.plot([row[cost]] * 2, [low, high], color=colour, alpha=0.25, lw=1.5, zorder=1)
        axes.plot(row[cost], mean, mark, ms=7 if place else 12, color=colour, label=name, zorder=2)
    axes.set_xlim(left=0)
    axes.grid(color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
