"""The Finetune tab's view of a training: held-out images after each evaluation, curves, and all of it as a table."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from steer.apps.demo.charts import Series, line_chart, short, table
from steer.apps.demo.steering import Loading, data_uri
from steer.apps.demo.training import Evaluation, Trained, Update
from steer.apps.demo.worker import Waiting
from steer.apps.finetune_grids import grids, read_grid
from steer.apps.model_card import held_out_names
from steer.pipelines import FinetuneResult
from steer.pipelines.finetune_method import Record
from steer.pipelines.finetune_state import SERIES

NOTHING = "Images of prompts that the training never sees appear here, before the first update and after every few."
EVERY = 0.3  # seconds between two drawings of the curves
HIGH = 2  # place in [mean, low, high]
SIDE = 128  # most pixels of a picture's side
Points = list[tuple[float, float]]


@dataclass
class Story:
    """What there is to see of a training of `updates` updates, and the line that says how far it is.

    frames  the HTML of the pictures of every evaluation, by their files
    """

    updates: int
    records: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    frames: dict[Path, str] = field(default_factory=dict)
    trained: Trained | None = None
    line: str = "Starting …"
    _since: tuple[int, float] | None = None  # updates and time at the first one that was seen
    _told: float = 0.0

    @classmethod
    def of(cls, folder: Path, updates: int) -> "Story":
        """As the folder of a run tells it."""
        records, evaluations = records_of(folder)
        return cls(updates, records, evaluations, {path: _frame(path) for path in grids(folder)})

    @property
    def step(self) -> int:
        """Updates made."""
        return len(self.records)

    def after(self, event: Any) -> bool:
        """Takes an event in; whether there is something to draw."""
        match event:
            case Waiting() | Loading():
                self.line = str(event)
            case Evaluation(record, grid):
                self.evaluations.append(record)
                self.frames[grid] = _frame(grid)
                self.line = f"Update {min(self.step + 1, self.updates)} of {self.updates} is being made …"
            case Update(record):
                return self._updated(record)
            case Trained():
                self.trained = event
            case _:
                raise TypeError(f"no event of a training: {event!r}")
        return True

    def _updated(self, record: Record) -> bool:
        self.records.append(record)
        now = time.monotonic()
        since = self._since = self._since or (self.step - 1, now - record["seconds"])
        left = (self.updates - self.step) * (now - since[1]) / (self.step - since[0])
        reward = f", reward {short(record['reward'])}" if "reward" in record else ""
        self.line = f"Update {self.step} of {self.updates}{reward}, KL {short(record['kl'])}. {_about(left)}"
        if now - self._told < EVERY and self.step < self.updates:
            return False
        self._told = now
        return True

    def conclusion(self) -> str:
        """The last line: why it ended, and what came of it."""
        if self.trained is not None:
            return f"{_ended(self.trained.result)} {_became(self.trained.result)}".strip()
        if not self.step:
            return "Stopped before the first update."
        return (
            f"Stopped after {self.step} of {self.updates} updates. Nothing is lost: Go on continues, Finish here makes "
            "the weights of now ready to use."
        )


def records_of(out: Path) -> tuple[list[Record], list[Record]]:
    """The records of updates and of evaluations in the folder of a run, as far as it is."""
    paths = [out / name for name in SERIES.values()]
    lines = [path.read_text(encoding="utf-8").splitlines() if path.exists() else [] for path in paths]
    updates, evaluations = ([json.loads(line) for line in some] for some in lines)
    return updates, evaluations


def updates_made(out: Path) -> int:
    """How many updates the folder of a run tells of."""
    return len(records_of(out)[0])


def _about(seconds: float) -> str:
    """Time that is left, in words."""
    if seconds < 1:
        return "It is being finished …"
    return f"About {seconds:.0f} s left." if seconds < 90 else f"About {seconds / 60:.0f} min left."


def _ended(result: FinetuneResult) -> str:
    updates = "1 update" if result.step == 1 else f"{result.step} updates"
    seconds = sum(record["seconds"] for record in result.records)
    return f"Ended after {updates}: {result.stopped}." if result.stopped else f"Done: {updates} in {seconds:.0f} s."


def _became(result: FinetuneResult) -> str:
    """The rewards of the held-out prompts, from the first evaluation to the last, and what is odd about them."""
    names = held_out_names(result.evaluations)
    if len(result.evaluations) < 2:
        return ""
    first, last = (
        {name: one[f"eval/{name}"] for name in names} for one in (result.evaluations[0], result.evaluations[-1])
    )
    told = "; ".join(f"{name} {first[name][0]:.3f} → {last[name][0]:.3f}" for name in names)
    text = f"On prompts it never saw: {told}."
    rose, fell = last[names[0]][0] > first[names[0]][0], last[names[-1]][HIGH] < first[names[-1]][0]
    if rose and fell:
        text += " The trained reward rose and the held-out one fell: it may be learning the reward's faults."
    if result.best_step not in (None, 0, result.step):
        text += f" By {names[-1]} it was best after update {result.best_step}: those weights are in the zip as well."
    return text


def samples_view(story: Story, run: str) -> str:
    """The held-out images of every evaluation, of which run_view.js shows one; an invitation where there are none.

    run  another for each training
    """
    frames = [frame for _, frame in sorted(story.frames.items())]
    if not frames:
        return f'<section class="steer-run"><p class="steer-empty">{NOTHING}</p></section>'
    last, alone = len(frames) - 1, "true" if len(frames) == 1 else "false"
    shown = [frame.replace("<div ", '<div hidden="" ', 1) for frame in frames[:-1]] + frames[-1:]
    names = " · ".join(held_out_names(story.evaluations))
    return (
        f'<section class="steer-run" data-run="{escape(run, quote=True)}"><div class="steer-gallery">'
        '<h3>The same prompts and noise as it learns</h3><div class="steer-scrub" role="group"'
        ' aria-label="After how many updates">'
        f'<button type="button" data-move="-1" aria-label="Earlier" aria-disabled="{alone}">‹</button>'
        f'<input type="range" class="steer-scrubber" min="0" max="{last}" step="1" value="{last}"'
        ' aria-label="Updates"/>'
        '<button type="button" data-move="1" aria-label="Later" aria-disabled="true">›</button>'
        f'<span class="steer-reading" role="status"></span></div><div class="steer-frames">{"".join(shown)}</div>'
        f'<p class="steer-note">Below each image: {escape(names)}.</p></div></section>'
    )


def _frame(grid: Path) -> str:
    """The pictures of an evaluation, cut out of its grid, with prompts and rewards."""
    said = read_grid(grid) or {"step": 0, "cells": [], "boxes": []}
    cells = ""
    with Image.open(grid) as whole:
        pixels = whole.convert("RGB")
        for cell, box in zip(said["cells"], said["boxes"], strict=True):
            picture = pixels.crop(tuple(box))
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            rewards, prompt = " · ".join(map(short, cell["rewards"])), escape(cell["prompt"], quote=True)
            cells += (
                f'<figure class="steer-cell"><img src="{data_uri(picture)}" alt="{prompt}"/>'
                f"<figcaption><b>{rewards}</b><span>{prompt}</span></figcaption></figure>"
            )
    label = "before training" if said["step"] == 0 else f"after {said['step']} updates"
    return f'<div class="steer-frame steer-held" data-label="{label}">{cells}</div>'


def charts_view(story: Story, run: str) -> str:
    """Curves by update, and their numbers."""
    if not story.evaluations and not story.records:
        return '<section class="steer-run"></section>'
    span, names = (0.0, float(story.updates)), held_out_names(story.evaluations)
    judged = {name: _judged(story.evaluations, name) for name in names}
    drawn = _points(story.records, "reward")
    charts = ""
    if drawn:
        both = [Series("training samples", drawn)] + [judged[name] for name in names[:1]]
        charts = line_chart(f"Trained reward: {(names or ['reward'])[0]}", both, "update", x_range=span)
        names = names[1:]
    for name in names:
        charts += line_chart(f"Held-out reward: {name}", [judged[name]], "update", x_range=span)
    for key, title in (("kl", "KL from the base model, nats"), ("accuracy", "Pairs put in the right order")):
        if points := _points(story.records, key):
            charts += line_chart(title, [Series(title, points)], "update", x_range=span, y_from=0)
    return (
        f'<section class="steer-run" data-run="{escape(run, quote=True)}"><div class="steer-charts">{charts}</div>'
        f'<details class="steer-numbers"><summary>As a table</summary>{_table(story, [*judged])}</details></section>'
    )


def _judged(evaluations: Sequence[Record], name: str) -> Series:
    """A reward on the held-out prompts, with the 95 % interval of its mean."""
    told = [(float(one["step"]), *one[f"eval/{name}"]) for one in evaluations]
    band = [(step, low, high) for step, _, low, high in told] if len(told) > 1 else []
    return Series("held-out prompts, 95 %", [(step, mean) for step, mean, _, _ in told], band)


def _points(records: Sequence[Record], key: str) -> Points:
    return [(float(one["step"]), one[key]) for one in records if key in one]


def _table(story: Story, names: Sequence[str]) -> str:
    by_step = {one["step"]: one for one in story.evaluations}
    updates = {one["step"]: one for one in story.records}
    rows = []
    for step in sorted({*by_step, *updates}):
        made, seen = updates.get(step, {}), by_step.get(step, {})
        held = [seen[f"eval/{name}"][0] if seen else None for name in names]
        rows.append([step, made.get("reward"), made.get("kl"), made.get("accuracy"), *held])
    head = ["updates", "reward in training", "KL", "pairs right", *(f"held out: {name}" for name in names)]
    return table("Rewards and KL by update", head, rows)
