"""The job behind `steer grid`: one prompt and seed with every pair of values of two settings, as one picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from steer.apps.errors import check_writable, wrap_errors
from steer.apps.expansion import is_text_model
from steer.apps.methods import METHODS, DisableAdapter, Job
from steer.apps.models import pipeline_type
from steer.apps.plots import BELOW, GAP, SIDE, TOP, Canvas, fit, open_image, plain_text, save_figure
from steer.apps.prompts import argument_names, check_prompt
from steer.apps.recipes import Recipe, make_recipe, read_metadata, write_png
from steer.apps.reward_specs import resolve_reward
from steer.apps.sampling import MEMORY_HINT, check_model_settings, opened_model, output_errors
from steer.apps.settings import ALL_OPTIONS, METHOD_OPTIONS, SHARED, SamplingConfig, kinds_of
from steer.errors import InputError
from steer.files import write_text
from steer.registry import did_you_mean
from steer.reward import Reward

PROMPT, DEFAULT = "prompt", "default"  # an axis of prompts; the value that leaves a setting at its default
FIXED = ("compare", "best_of")  # settings that no axis varies
LABEL_WIDTH = 130  # pixels of the row labels
MAX_CELLS = 400


@dataclass(frozen=True)
class Axis:
    """A setting, an argument of the pipeline's call, or the prompt, with its values."""

    name: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Axis":
        """Read NAME=VALUE,VALUE,… or, for values with commas, NAME=VALUE|VALUE|… Raises InputError."""
        name, equals, tail = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        values = tuple(value.strip() for value in tail.split("|" if "|" in tail else ","))
        if not equals or not name.isidentifier() or "" in values:
            raise InputError(f"axis {text!r:.60}: write NAME=VALUE,VALUE,… such as lam=5,10,20")
        if repeated := [value for place, value in enumerate(values) if value in values[:place]]:
            raise InputError(f"axis {name}: the value {repeated[0]!r:.60} is repeated: give it once")
        return cls(name, values)

    def settings(self, value: str) -> dict[str, Any]:
        """Return the flat settings of a value; arguments of the call are in `call`. Raises InputError."""
        if self.name == PROMPT or value == DEFAULT:
            return {}
        if self.name not in (*SHARED, *ALL_OPTIONS):
            return {"call": {self.name: value}}
        if str in kinds_of(self.name):
            return {self.name: value}
        try:
            return {self.name: json.loads(value.lower())}
        except ValueError as error:
            raise InputError(f"axis {self.name}: {value!r:.60} is no value of it") from error


@dataclass(frozen=True)
class Cell:
    """One image of the grid: the values of both axes, and all settings of its sampling."""

    x: str
    y: str | None
    path: Path
    prompt: str
    settings: SamplingConfig

    @property
    def model(self) -> str:
        """All settings that decide what is loaded, as text."""
        one = self.settings
        return repr((one.model, one.dtype, sorted(one.loading.items()), one.lora))

    def finished(self) -> Recipe | None:
        """Return the recipe of the image if it exists already with the same settings."""
        try:
            recipe = read_metadata(self.path)
        except InputError:
            return None
        return recipe if (recipe.prompt, recipe.settings) == (self.prompt, self.settings) else None


def plan_cells(prompt: str | None, x: Axis, y: Axis | None, given: Mapping[str, Any], out: Path) -> list[Cell]:
    """Return the cells row by row, all settings checked as far as possible without loading a model.

    given  flat settings of all cells; options that a method on an axis does not have are left out for that method
    Raises InputError.
    """
    axes = [axis for axis in (x, y) if axis is not None]
    _check_axes(prompt, axes, given)
    cells = []
    for row, second in enumerate(y.values if y is not None else (None,)):
        for column, first in enumerate(x.values):
            pairs = list(zip(axes, (first, second), strict=False))
            settings = _settings_of(given, [axis.settings(str(value)) for axis, value in pairs])
            text = next((str(value) for axis, value in pairs if axis.name == PROMPT), prompt or "")
            check_prompt(text, "prompt")
            cells.append(Cell(first, second, out / f"{row:02d}-{column:02d}.png", text, settings))
    if len(cells) > MAX_CELLS:
        raise InputError(f"{len(cells)} images: a grid has at most {MAX_CELLS}; give fewer values")
    for cell in cells:
        if is_text_model(cell.settings.model):
            raise InputError(f"model {cell.settings.model!r} makes texts, and a grid shows images: leave it out")
        check_model_settings(cell.settings)
    return cells


def _settings_of(given: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> SamplingConfig:
    """Merge the settings of all cells with the settings of one cell's values."""
    values = dict(given)
    for one in own:
        values |= {**one, "call": {**(values.get("call") or {}), **one["call"]}} if "call" in one else one
    if any("method" in one for one in own):
        others = set(ALL_OPTIONS) - set(METHOD_OPTIONS.get(values["method"], METHOD_OPTIONS["fk"]).names)
        values = {name: value for name, value in values.items() if name not in others}
    return SamplingConfig.of(**{name: value for name, value in values.items() if value is not None}, compare=False)


def _check_axes(prompt: str | None, axes: Sequence[Axis], given: Mapping[str, Any]) -> None:
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise InputError(f"both axes vary {names[0]}: choose two settings")
    if (PROMPT in names) == bool(prompt):
        raise InputError("give the prompt as a word, or as an axis: prompt=a red star|a blue cross")
    known = [PROMPT, *(name for name in (*SHARED, *ALL_OPTIONS) if name not in FIXED)]
    for name in names:
        if name in known:
            if given.get(name) is not None:
                raise InputError(f"{name} is an axis and an option: leave out the option")
            continue
        kind = pipeline_type(str(given.get("model") or SamplingConfig.field("model").default))
        arguments = argument_names(kind) if kind is not None else {name: None}  # a model on the hub is checked later
        if name not in arguments or name in FIXED:
            hint = did_you_mean(name, [*known, *arguments], "`steer sample --help` lists the settings")
            raise InputError(f"axis {name!r} is no setting: {hint}")


def sample_grid(
    prompt: str | None,
    x: Axis,
    y: Axis | None,
    given: Mapping[str, Any],
    out: Path,
    device: str | None = None,
    reward_timeout: float | None = None,
) -> dict[str, Any]:
    """Sample the best image of every cell, write images with recipes, grid.png and grid.json; return the latter.

    The same call resumes an interrupted run: images of the same settings are kept. Models are loaded once each.
    """
    cells = plan_cells(prompt, x, y, given, out)
    rewards = rewards_of(cells, lambda spec: resolve_reward(spec, reward_timeout))

    with tqdm(desc="grid", total=len(cells), unit="image", disable=None) as bar:
        opened = partial(opened_model, device=device)
        return write_grid(x, y, cells, rewards, opened, out, on_image=lambda: bar.update())


def rewards_of(cells: Sequence[Cell], resolve: Callable[[str], Reward]) -> dict[str, Reward]:
    """Load each reward once. Raises InputError for a reward that the method of its cell cannot use."""
    rewards = {spec: resolve(spec) for spec in {cell.settings.reward for cell in cells}}
    for cell in cells:
        METHODS[cell.settings.method].check(cell.settings, rewards[cell.settings.reward])
    return rewards


def write_grid(
    x: Axis,
    y: Axis | None,
    cells: Sequence[Cell],
    rewards: Mapping[str, Reward],
    opened: Callable[[SamplingConfig], AbstractContextManager[tuple[Any, DisableAdapter]]],
    out: Path,
    on_image: Callable[[], object],
    on_step: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Sample the planned cells that `out` lacks, and write the grid.

    opened   yields the pipeline with the settings' adapter, and a context without it; called once for each model
    on_step  observes solver steps and iterations; an exception from it ends the grid, and finished images are kept
    """
    check_writable(out)
    recipes = {cell.path: recipe for cell in cells if (recipe := cell.finished()) is not None}
    missing = sorted((cell for cell in cells if cell.path not in recipes), key=lambda cell: cell.model)
    for _ in recipes:
        on_image()
    for _, group in groupby(missing, key=lambda cell: cell.model):
        same = list(group)
        with opened(same[0].settings) as (pipe, off):
            for cell in same:
                job = Job(pipe, rewards[cell.settings.reward], cell.prompt, cell.settings, None, on_step, on_step)
                recipes[cell.path] = _sample_cell(cell, replace(job, adapter_disabled=off))
                on_image()
    with output_errors(out):
        report = _report(x, y, [(cell, recipes[cell.path]) for cell in cells])
        write_text(out / "grid.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        draw(report, out)
    return report


def _sample_cell(cell: Cell, job: Job) -> Recipe:
    """Write the image of a cell, and return its recipe."""
    where = cell.x if cell.y is None else f"{cell.x}, {cell.y}"
    with wrap_errors(f"image {where!r:.60}", "finished images are kept", MEMORY_HINT):
        output = job.run()
        recipe = make_recipe(job, output, 0, base=False)
    with output_errors(cell.path.parent):
        write_png(output.images[0], cell.path, recipe)
    return recipe


def _report(x: Axis, y: Axis | None, cells: Sequence[tuple[Cell, Recipe]]) -> dict[str, Any]:
    rows = [
        {"x": cell.x, "y": cell.y, "image": cell.path.name}
        | {"reward": recipe.reward, "settings": recipe.settings.plain()}
        | {"prompt": cell.prompt, "components": dict(recipe.components)}
        for cell, recipe in cells
    ]
    return {"x": asdict(x), "y": None if y is None else asdict(y), "cells": rows}


def draw(report: Mapping[str, Any], out: Path) -> Path:
    """Write grid.png: values of x above the columns, values of y beside the rows, rewards below the images."""
    columns = len(report["x"]["values"])
    rows = [report["cells"][start : start + columns] for start in range(0, len(report["cells"]), columns)]
    pictures = [[fit(open_image(out / cell["image"]), SIDE) for cell in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in pictures]
    left = GAP + (LABEL_WIDTH if report["y"] is not None else 0)
    size = (left + columns * (SIDE + GAP), TOP + BELOW + sum(heights) + (BELOW + GAP) * len(rows))
    names = [report[axis]["name"] for axis in ("x", "y") if report[axis] is not None]
    prompt = "" if PROMPT in names else report["cells"][0]["prompt"]
    rewards = sorted({cell["settings"]["reward"] for cell in report["cells"]})
    canvas = Canvas(*size, plain_text(" × ".join(names)), plain_text(f"{prompt}  {' · '.join(rewards)}".strip(), 150))
    for column, value in enumerate(report["x"]["values"]):
        canvas.text(plain_text(value, 30), left + column * (SIDE + GAP) + SIDE / 2, TOP, size=8, ha="center")
    top = TOP + BELOW
    for row, shown, height in zip(rows, pictures, heights, strict=True):
        if row[0]["y"] is not None:
            canvas.text(plain_text(row[0]["y"], 20), GAP, top + height / 2, size=8, va="center")
        for column, (cell, picture) in enumerate(zip(row, shown, strict=True)):
            canvas.cell(picture, [cell["reward"]], left + column * (SIDE + GAP), top, height)
        top += height + BELOW + GAP
    return save_figure(canvas.figure, out / "grid.png")
