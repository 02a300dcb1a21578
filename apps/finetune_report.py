"""What a finetuning leaves to be looked at: curves, held-out images before and after, and a model card."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from steer.apps.plots import COLORMAP, FAINT, INK, draw_before_after, grids, shown, write_grid
from steer.files import atomic_write, write_text
from steer.pipelines.training.method import TrainingResult
from steer.pipelines.training.model_card import held_out_names, model_card
from steer.pipelines.training.trainer import Trainer

__all__ = ["write_grid", "write_report"]

Numbers = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
Panel = Callable[[Axes], None]
TRAINED_COLOR, HELD_OUT_COLOR, SAMPLES_COLOR = (
    colormaps[COLORMAP](place) for place in (0.12, 0.5, 0.78)
)  # apart in grey too
SMOOTH_FROM = 10  # values, below which a smoothed line says nothing more
FAR_FACTOR = 3  # times the highest value
LOG_SCALE_RATIO = 30  # largest by smallest value from which a scale is logarithmic


def write_report(trainer: Trainer[Any], result: TrainingResult) -> None:
    """Write plots/*.png and README.md, a model card, in the output folder of a trainer."""
    out = Path(trainer.config.output_dir)
    _save(out / "plots" / "rewards.png", rewards_panels(result), result)
    _save(out / "plots" / "divergence.png", divergence_panels(result, vars(trainer.config)), result)
    _save(out / "plots" / "training.png", training_panels(result), result)
    draw_before_after(out)
    card = model_card(out, trainer.pipe, trainer.config, result, trainer.describe(), grids(out))
    write_text(out / "README.md", card)


def _save(path: Path, panels: Sequence[Panel], result: TrainingResult) -> None:
    """One picture of the panels; without any there is none, not even one of before."""
    path.unlink(missing_ok=True)
    if not panels:
        return
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), dpi=120, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(places, panels, strict=False):
        axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(axis="y", color=FAINT, lw=0.4, alpha=0.6)
        panel(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    with atomic_write(path) as new:
        figure.savefig(new, format="png")


def rewards_panels(result: TrainingResult) -> list[Panel]:
    """The trained reward, every one held out, and the first of these against it."""
    names = held_out_names(result.evaluations)
    trained = names[0] if names else None
    panels: list[Panel] = []
    if trained or len(_series(result.records, "reward")[0]):
        panels.append(lambda axes: _reward(axes, result, trained))
    panels += [_held_out(result, name) for name in names[1:]]
    if len(names) > 1 and len(result.evaluations) > 1:
        panels.append(lambda axes: _against(axes, result, names[0], names[1]))
    return panels


def _reward(axes: Axes, result: TrainingResult, name: str | None) -> None:
    _curve(axes, result.records, "reward", "training samples", SAMPLES_COLOR)
    if name:
        _band(axes, result.evaluations, name, TRAINED_COLOR)
    _best(axes, result)
    _finish(axes, f"reward that was trained{': ' + shown(name, 32) if name else ''}", legend=True)


def _held_out(result: TrainingResult, name: str) -> Panel:
    def panel(axes: Axes) -> None:
        _band(axes, result.evaluations, name, HELD_OUT_COLOR)
        _best(axes, result)
        _finish(axes, f"held-out reward: {shown(name, 38)}", legend=True)

    return panel


def _band(axes: Axes, evaluations: Records, name: str, color: Any) -> None:
    """Means with their 95 % intervals over the prompts."""
    step_values = [(one["step"], *one[f"eval/{name}"]) for one in evaluations if f"eval/{name}" in one]
    steps, mean, low, high = np.array(step_values, dtype=float).T
    axes.fill_between(steps, low, high, color=color, alpha=0.18, lw=0, label="95 % interval of the mean")
    axes.plot(steps, mean, color=color, lw=2.2, marker="o", ms=4, label="held-out prompts", zorder=3)
    if len(steps) == 1:  # a band of no width cannot be seen
        axes.errorbar(steps, mean, [mean - low, high - mean], color=color, capsize=3, alpha=0.5)


def _best(axes: Axes, result: TrainingResult) -> None:
    if result.best_step is not None:
        axes.axvline(result.best_step, color=INK, lw=0.9, ls=":", zorder=1, label=f"best: {result.best_step} updates")


def _against(axes: Axes, result: TrainingResult, trained: str, held_out: str) -> None:
    """A path from evaluation to evaluation: where it goes right and down, the reward is being fooled."""
    both = [one for one in result.evaluations if f"eval/{trained}" in one and f"eval/{held_out}" in one]
    x, y = (np.array([one[f"eval/{name}"][0] for one in both]) for name in (trained, held_out))
    axes.plot(x, y, color=FAINT, lw=1.2, zorder=1)
    shades = colormaps[COLORMAP](np.linspace(0, 0.85, len(both)))
    axes.scatter(x, y, c=shades, s=30, zorder=2, edgecolors=INK, linewidths=0.5)
    axes.margins(0.18)
    marked = {0: f"{both[0]['step']}", len(both) - 1: f"{both[-1]['step']}"}
    for number, one in enumerate(both):
        if one["step"] == result.best_step:
            marked[number] = f"{one['step']}, best"
            axes.scatter(x[number], y[number], s=110, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=3)
    style: dict[str, Any] = {
        "size": 8,
        "ha": "center",
        "color": INK,
        "path_effects": [withStroke(linewidth=2.5, foreground="white")],
    }
    for number, text in marked.items():
        axes.annotate(text, (x[number], y[number]), (0, 9), textcoords="offset points", **style)
    _finish(axes, "held out against trained, by updates")
    axes.set_xlabel(f"trained: {shown(trained, 38)}", size=8, color=INK)
    axes.set_ylabel(f"held out: {shown(held_out, 34)}", size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def divergence_panels(result: TrainingResult, config: Mapping[str, Any]) -> list[Panel]:
    """How far the model went from where it began, what that cost it, and how unlike its images still are."""
    divergence_plots = _lines_of(result.records, {"kl": "KL from the start, nats a trajectory"}, config)
    if any(record.get("kl_weight") for record in result.records):
        divergence_plots += _lines_of(result.records, {"kl_weight": "price of KL, β"}, {})
    divergence_plots += _lines_of(result.records, {"chi_square": "χ² from the start"}, {})
    # One sample of each prompt has no diversity, and is recorded as 0.
    if any(one.get("eval/diversity") for one in result.evaluations):
        divergence_plots.append(lambda axes: _diversity(axes, result))
    return divergence_plots


def _diversity(axes: Axes, result: TrainingResult) -> None:
    axes.plot(*_series(result.evaluations, "eval/diversity"), color=HELD_OUT_COLOR, lw=2.2, marker="o", ms=4)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    _finish(axes, "diversity of a prompt's images, 0 to 1")


def training_panels(result: TrainingResult) -> list[Panel]:
    """Whether the optimisation itself is in order."""
    titles = {"loss": "loss", "accuracy": "pairs ordered rightly, share", "grad_norm": "gradient norm, before clipping"}
    return _lines_of(result.records, titles | {"images_per_second": "images per second, updates included"}, {})


def _lines_of(records: Records, titles: Mapping[str, str], config: Mapping[str, Any]) -> list[Panel]:
    """A panel for each series that holds a number; with the configured target and budget of it, where there are any."""

    def panel(name: str, title: str) -> Panel:
        def draw(axes: Axes) -> None:
            _curve(axes, records, name, "each update", TRAINED_COLOR)
            values = _series(records, name)[1]
            for word, style in (("target", "--"), ("budget", ":")):
                if (level := config.get(f"{name}_{word}")) is not None:
                    _level(axes, level, values.max(), style, f"{word}: {level:g} nats")
            if name == "accuracy":
                _level(axes, 0.5, 1, ":", "chance")
            wide = values.min() > 0 and values.max() > LOG_SCALE_RATIO * values.min()
            _finish(axes, title, legend=True)
            if wide:
                axes.set_yscale("log")

        return draw

    return [panel(name, title) for name, title in titles.items() if len(_series(records, name)[0])]


def _level(axes: Axes, level: float, highest: float, style: str, label: str) -> None:
    """A horizontal line; one far above the curve would flatten it, and is only named."""
    if level > FAR_FACTOR * highest:
        axes.plot([], [], color=INK, lw=0.9, ls=style, label=f"{label}, above")
    else:
        axes.axhline(level, color=INK, lw=0.9, ls=style, label=label)


def _series(records: Records, name: str) -> tuple[Numbers, Numbers]:
    """Steps and finite values. PRDP's accuracy is NaN where a batch had no pair, a loss may overflow."""
    step_values = [(one["step"], one[name]) for one in records if one.get(name) is not None and np.isfinite(one[name])]
    steps, values = np.array(step_values, dtype=float).reshape(-1, 2).T
    return steps, values


def _curve(axes: Axes, records: Records, name: str, label: str, color: Any) -> None:
    """The values thin, and their moving mean bold, where it is a mean of so many; dots where there are few."""
    steps, values = _series(records, name)
    if len(values) < SMOOTH_FROM:
        axes.plot(steps, values, color=color, lw=1.2, marker="o", ms=3.5, label=label)
        return
    reach = max(2, len(values) // 20)
    means = np.convolve(values, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")
    axes.plot(steps, values, color=color, lw=0.8, alpha=0.45, label=label)
    axes.plot(steps[reach:-reach], means, color=color, lw=2.0, label=f"moving mean of {2 * reach + 1}", zorder=2)


def _finish(axes: Axes, title: str, legend: bool = False) -> None:
    axes.set_title(title, size=9, loc="left", color=INK)
    axes.set_xlabel("updates", size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter("{x:.6g}")  # no power of ten in a corner
    if legend and len(axes.get_legend_handles_labels()[0]) > 1:
        # Below, where it hides no curve; no wider than the panel, which would shrink for it.
        letters = sum(map(len, axes.get_legend_handles_labels()[1]))
        below: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (-0.02, -0.15),
            "ncols": 3 if letters < 45 else 2,
        }
        axes.legend(frameon=False, fontsize=7, labelcolor=INK, borderaxespad=0, **below)
