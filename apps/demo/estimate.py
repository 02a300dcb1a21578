"""Cost of a run before it starts: denoiser evaluations from the settings, seconds from the pace of earlier runs."""

from collections.abc import Callable, Mapping
from typing import Any

from steer.apps.demo.progress import duration
from steer.apps.demo.steering import EARLY_PREVIEWS
from steer.apps.sampling import samples_base
from steer.apps.settings import SamplingConfig
from steer.pipelines.racing import default_rungs, race_cost

LOOKAHEAD = 2  # evaluations of a three-step look-ahead, besides the step itself
RESTART = 0.4  # share of the run at which renoise restarts


def _early(steps: int, *shares: float) -> int:
    """Return a particle's evaluations for look-aheads: early previews, and look-aheads at other shares of the run."""
    return LOOKAHEAD * len({round(share * steps) for share in (*EARLY_PREVIEWS, *shares)})


def _iterative(settings: SamplingConfig, images: int) -> int:
    """Return the evaluations of a search over the starting noise: its images, the best one once more, and the noise."""
    return settings.particles * ((settings.steps or 1) * (images + 1) + 1)


def _per_particle(own: Callable[[int], int]) -> Callable[[SamplingConfig], int]:
    """Make a function that counts evaluations for all particles from one that counts them for one, by the steps."""
    return lambda settings: settings.particles * own(settings.steps or 1)


def _rungs(settings: SamplingConfig) -> Mapping[int, int]:
    options = settings.options
    given: Mapping[int, int] | None = options.rungs
    if given is not None:
        return given
    return default_rungs(settings.particles, settings.steps or 1, options.branches, options.evaluations)


def _of_race(settings: SamplingConfig) -> int:
    steps, rungs = settings.steps or 1, _rungs(settings)
    race = race_cost(settings.particles, rungs, steps, settings.options.evaluations)
    return race + max([*rungs.values(), 1]) * _early(steps)


def _of_drafts(options: Any) -> int:
    return int(options.drafts * options.draft_steps)


EVALUATIONS: dict[str, Callable[[SamplingConfig], int]] = {
    "fk": _per_particle(lambda steps: steps + _early(steps)),
    "race": _of_race,
    "drafts": lambda one: _of_drafts(one.options) + one.particles * (one.steps or 1),
    "renoise": lambda one: (
        _of_drafts(one.options)
        + one.particles * ((one.steps or 1) - round(RESTART * (one.steps or 1)) + _early(one.steps or 1))
    ),
    "reno": lambda one: _iterative(one, one.options.iterations),
    "noise-search": lambda one: _iterative(one, 1 + (one.options.iterations - 1) * one.options.neighbours),
    "map-elites": lambda one: _iterative(one, one.options.iterations - 1 + one.options.first_batches),
}


def evaluations(settings: SamplingConfig) -> int:
    """Return the denoiser evaluations of a prompt by the settings, including the base images."""
    plain = _per_particle(lambda steps: steps)
    made = EVALUATIONS.get(settings.method, plain)(settings)
    if not samples_base(settings):
        return made
    rungs = _rungs(settings) if settings.method == "race" else {}
    return made + min([settings.particles, *rungs.values()]) * (settings.steps or 1)


class Paces:
    """Seconds per denoiser evaluation of the latest runs, including decoding and rewards."""

    def __init__(self) -> None:
        self._latest: dict[tuple[Any, ...], float] = {}

    def add(self, settings: SamplingConfig, evaluations: int, seconds: float) -> None:
        """Add a finished run."""
        if evaluations:
            self._latest[self._key(settings)] = seconds / evaluations

    def describe(self, settings: SamplingConfig, prompts: int) -> str:
        """Describe the cost of a run in a sentence, without seconds before the first run of the method and model."""
        count, pace = prompts * evaluations(settings), self._latest.get(self._key(settings))
        seconds = "" if pace is None else f", {duration(count * pace)} at the pace of the last run"
        return f"About {count:,} denoiser evaluations{seconds}."

    @staticmethod
    def _key(settings: SamplingConfig) -> tuple[Any, ...]:
        return settings.model, settings.method, settings.height, settings.width
