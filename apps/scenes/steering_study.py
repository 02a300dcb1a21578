"""Steering beside its controls on held-out prompts, at equal evaluations and at equal seconds."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.apps.scenes.contenders import Contender, Found, Point, Samples, Search
from steer.apps.scenes.evaluate import CALL, STEERING
from steer.apps.scenes.kept_runs import KeptRuns, logger
from steer.assets import MODELS
from steer.pipelines import BestOfNPipeline, FKSteeringPipeline, SelectionPipeline

SIZES = (1, 2, 4, 8, 16)
PART = 64  # prompts of the dearest contenders
# Chosen on scenes-tuning (`ablations`), never on the held-out prompts, as FK's own settings were: the solver's own way
# but where children part, and choices only at the steps at which FK reads rewards.
SVDD: dict[str, Any] = {"eta": 0.0, "select_steps": [8, 11, 14, 17]}
BEAM: dict[str, Any] = SVDD | {"beams": 2}
PLAIN = "best-of-n"


def contenders(sizes: Sequence[int] = SIZES, part: int = PART, large: str = "scenes-large") -> list[Contender]:
    """Everything of the study but the large model, where there is none of that name."""
    most = max(sizes)
    found: list[Contender] = [Samples(PLAIN, most, sizes=sizes)]
    for size in sizes:
        found.append(Contender("FK", size, FKSteeringPipeline, STEERING, prompts=part if size > 8 else None))
    for size in (size for size in sizes if 4 <= size <= 8):
        found.append(Contender("SVDD", size, SelectionPipeline, SVDD, prompts=part))
        found.append(Contender("beam search", size, SelectionPipeline, BEAM, prompts=part))
    if 4 in sizes:
        found.append(Contender("SVDD, as published", 4, SelectionPipeline, prompts=part))
    found.append(Search("zero-order search", 1 + most // 4, prompts=part))
    folder = MODELS.get(large, Path(large))
    if (folder / "model_index.json").exists():
        found.append(Samples(Path(large).name, 4, BestOfNPipeline, model=large, sizes=(1, 2, 4)))
    else:
        logger.info("no model %s: its row is left out; the same command adds it when there is one", large)
    return found


def steering_study(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    rivals: Sequence[Contender],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """Accuracy of what each contender picks, its cost, and differences over the same prompts; it goes on in `folder`.

    The first contender is best-of-n with the small model, which all others are compared with. Under "panels" the
    contenders that had all prompts, and all contenders on the prompts that each of them had.
    """
    runs = dict(zip(rivals, KeptRuns(folder, reward, call).run(rivals, prompts), strict=True))
    fewest = min(len(found.proxy) for found in runs.values())
    whole = {one: found for one, found in runs.items() if len(found.proxy) == len(prompts)}
    part = {one: found.first(fewest) for one, found in runs.items()}
    panels = {str(len(prompts)): whole} | ({str(fewest): part} if fewest < len(prompts) else {})
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, **call, "contenders": [{"name": one.name} | one.about() for one in rivals]},
        "panels": {count: _curves(some) for count, some in panels.items()},
        "differences": {count: list(_differences(some)) for count, some in panels.items()},
    }


def _curves(runs: Mapping[Contender, Found]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of the method."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for one, found in runs.items():
        curves.setdefault(one.name, []).extend(point.row() for point in one.points(found))
    return curves


def _differences(runs: Mapping[Contender, Found]) -> Iterator[dict[str, Any]]:
    """Of every point: from the base, from best-of-n at equal evaluations and at equal seconds, from FK with as many
    particles, from the other models unsteered."""
    plain, *others = runs
    assert isinstance(plain, Samples)
    base = plain.best_of(runs[plain], 1)
    named = [(one, point) for one in others for point in one.points(runs[one])]
    steered = {point.size: point for one, point in named if one.name == "FK"}
    larger = {one.name: point for one, point in named if one.model != plain.model and point.size == 1}
    for one, point in named:
        rivals: dict[str, Point | None] = {"base": base}
        if one.model == plain.model:
            rivals["best-of-n, equal evaluations"] = plain.at_evaluations(runs[plain], point.spent.evaluations)
            rivals |= {f"{name}, unsteered": rival for name, rival in larger.items()}
        rivals["best-of-n, equal seconds"] = plain.at_seconds(runs[plain], point.spent.seconds)
        if one.name != "FK" and not isinstance(one, Samples | Search):
            rivals[f"FK, K = {one.size}"] = steered.get(one.size)
        for name, rival in rivals.items():
            if rival is not None:
                sizes = {"size": round(point.size, 2), "against_size": round(rival.size, 2)}
                yield {"of": one.name, **sizes, "against": name, **point.minus(rival)}
