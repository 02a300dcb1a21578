"""One setting of steering changed at a time, on prompts like those of training: what the settings were chosen by."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer.apps.scenes.contenders import Contender, Samples
from steer.apps.scenes.evaluate import CALL, STEERING
from steer.apps.scenes.kept_runs import KeptRuns
from steer.pipelines import FKSteeringPipeline, SelectionPipeline

SIZE = 4  # K
STANDARD = "standard"
EARLY, LATE, EVERY = [4, 8, 12, 16], [14, 17], [*range(8, 19)]
READ = [8, 11, 14, 17]  # as FK does where nothing is said, of 20 steps

# What is changed of the standard settings, which stand under each factor for comparison, too.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "potential": {"difference": {}, **{name: {"potential": name} for name in ("max", "sum", "now")}},
    "λ": {"5": {"lam": 5.0}, "10": {"lam": 10.0}, "25": {}, "60": {"lam": 60.0}},
    "resampled": {"when ESS < K/2": {}, "at every reading": {"ess_threshold": 1.0}},
    "read at steps": {
        "4, 8, 12, 16": {"resample_steps": EARLY},
        "8, 11, 14, 17": {},
        "14, 17": {"resample_steps": LATE},
        "8, 9, …, 18": {"resample_steps": EVERY},
    },
    "η": {"0": {}, "1": {"eta": 1.0}},
}
# Of the controls that choose at every step.
SELECTIONS: dict[str, dict[str, Any]] = {
    "SVDD": {},
    "SVDD, η = 0": {"eta": 0.0},
    "SVDD, η = 0, at 8, 11, 14, 17": {"eta": 0.0, "select_steps": READ},
    "beam search": {"beams": 2},
    "beam search, η = 0, at 8, 11, 14, 17": {"beams": 2, "eta": 0.0, "select_steps": READ},
}


def variants(
    factors: Mapping[str, Mapping[str, dict[str, Any]]] = FACTORS,
    selections: Mapping[str, dict[str, Any]] = SELECTIONS,
) -> dict[str, dict[str, Contender]]:
    """Contenders by factor and value; the standard settings are one and the same."""
    standard = Contender(STANDARD, SIZE, FKSteeringPipeline, STEERING)

    def changed(factor: str, value: str, options: dict[str, Any]) -> Contender:
        full = STEERING | options
        return Contender(f"{factor} {value}", SIZE, FKSteeringPipeline, full) if options else standard

    others = {name: Contender(name, SIZE, SelectionPipeline, options) for name, options in selections.items()}
    return {
        "method": {"FK": standard, "best-of-4": Samples("best-of-n", SIZE, sizes=(SIZE,)), **others},
        **{
            factor: {value: changed(factor, value, options) for value, options in values.items()}
            for factor, values in factors.items()
        },
    }


def ablations(
    folder: Path,
    reward: str,
    prompts: Sequence[str],
    factors: Mapping[str, Mapping[str, Contender]],
    call: Mapping[str, Any] = CALL,
) -> dict[str, Any]:
    """A row for every value of every factor, with its difference from the standard settings; it goes on in `folder`."""
    once = list(dict.fromkeys(one for values in factors.values() for one in values.values()))
    found = KeptRuns(folder, reward, call).run(once, prompts)
    points = {one: one.points(result)[0] for one, result in zip(once, found, strict=True)}
    standard = next(point for one, point in points.items() if one.name == STANDARD)
    return {
        "prompts": len(prompts),
        "settings": {"reward": reward, "particles": SIZE, **STEERING, **call},
        "factors": {
            factor: {
                value: points[one].row()
                | {"standard": points[one] is standard, "minus_standard": points[one].minus(standard)}
                | {"options": dict(one.options)}
                for value, one in values.items()
            }
            for factor, values in factors.items()
        },
    }
