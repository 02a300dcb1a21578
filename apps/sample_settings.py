"""What decides the images of a run of `steer sample`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from steer.choices import choose
from steer.errors import InputError
from steer.noise import OPTIMISERS
from steer.pipelines.noise_gradient import GRADIENTS
from steer.pipelines.noise_search import Neighbours
from steer.pipelines.plan import CHOICES, Plan
from steer.pipelines.population import DRAWS
from steer.pipelines.reno import Ascent
from steer.potentials import POTENTIALS, TEMPERINGS
from steer.resampling import RESAMPLERS

# The λ of each method where the user says nothing; None: without limit.
STRENGTHS: dict[str, float | None] = {
    "fk": 10.0,
    "svdd": None,
    "beam": 10.0,
    "best-of-n": 10.0,
    "base": 10.0,
    "reno": 10.0,
    "noise-search": 10.0,
}
TABLES: dict[str, Mapping[str, Any]] = {
    "method": STRENGTHS,
    "potential": POTENTIALS,
    "resampler": RESAMPLERS,
    "tempering": TEMPERINGS,
    "optimiser": OPTIMISERS,
    "gradient": GRADIENTS,
    "narrow_choice": CHOICES,
    "draw": DRAWS,
}


@dataclass(frozen=True)
class SampleSettings:
    """What decides the images. Saved in the report, and compared when a run goes on.

    A setting with a default is younger than the first reports: where one lacks it, the default is what was done.
    variant and model_config belong to model: see `steer.apps.models`.
    lam None stands for the method's own; lora is where finetuned weights lie that the model wears.
    """

    model: str
    method: str
    reward: str
    particles: int
    steps: int | None
    guidance: float | None
    lam: float | None
    potential: str
    resampler: str
    tempering: str
    ess_threshold: float
    eta: float | None
    seed: int
    compare: bool
    dtype: str | None
    reward_guidance: float = 0.0
    iterations: int = 50
    optimiser: str = "sgd"
    lr: float | None = None
    regularisation: float = 0.01
    gradient: str = "backprop"
    patience: int | None = None
    restarts: int = 0
    neighbours: int = 4
    distance: float = 0.5
    beams: int = 2
    lora: str | None = None
    narrow: str = ""
    narrow_choice: str = "drawn"
    target: float | None = None
    overlap: bool = False
    preview: str = "full"
    start_candidates: int | None = None
    start_steps: int = 4
    variant: str | None = None
    model_config: str | None = None
    draw: str = "best"

    def __post_init__(self) -> None:
        if self.lam is None and self.method in STRENGTHS:
            object.__setattr__(self, "lam", STRENGTHS[self.method])

    @property
    def loading(self) -> dict[str, str]:
        """Arguments of `load_pipeline` beside model, device and dtype, where any are given."""
        given = {"variant": self.variant, "config": self.model_config}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def strength(self) -> float:
        """λ, infinite where it has no limit."""
        return math.inf if self.lam is None else self.lam

    @property
    def schedule(self) -> dict[int, int]:
        """{solver step: particles that go on from it}, of words like "8:4,14:2". Raises InputError."""
        pairs = [part.split(":") for part in self.narrow.split(",") if self.narrow.strip()]
        try:
            found = {int(step): int(count) for step, count in pairs}
        except ValueError as error:
            raise InputError(f"--narrow: write STEP:PARTICLES,… such as 8:4,14:2, got {self.narrow!r}") from error
        if len(found) < len(pairs):
            raise InputError(f"--narrow: a step is there twice in {self.narrow!r}")
        return found

    def check(self) -> None:
        """Raises InputError for a name or number that cannot be, before any model is loaded."""
        for kind, table in TABLES.items():
            choose(kind, getattr(self, kind), table)
        counts = {"particles": self.particles, "steps": self.steps, "iterations": self.iterations}
        for name, count in (counts | {"start-steps": self.start_steps}).items():
            if count is not None and count < 1:
                raise InputError(f"--{name} must be at least 1, got {count}")
        if self.start_candidates is not None and self.start_candidates < self.particles:
            raise InputError(f"--start-candidates must be at least the particles, {self.particles}")
        if not 0 < self.ess_threshold <= 1:
            raise InputError(f"--ess-threshold must be above 0 and at most 1, got {self.ess_threshold}")
        for name, number in (("lam", self.lam), ("guidance", self.guidance), ("target", self.target)):
            if number is not None and not math.isfinite(number):
                raise InputError(f"--{name} must be a finite number, got {number}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"--eta must be from 0 to 1, got {self.eta}")
        searches = self.method != "fk" or Plan(None, self.schedule, self.narrow_choice, self.target).searches
        if self.draw != "best" and searches:
            raise InputError(
                f"--draw {self.draw} needs the weights of --method fk, which --target and --narrow-choice best do not "
                "leave: use --draw best"
            )
        if self.overlap and self.reward_guidance:
            raise InputError("--overlap: with --reward-guidance the step needs the gradient: leave one of them out")
        if not 0 <= self.reward_guidance < math.inf:
            raise InputError(f"--reward-guidance must be at least 0 and finite, got {self.reward_guidance}")
        rule = OPTIMISERS[self.optimiser]
        rule = rule if self.lr is None else replace(rule, lr=self.lr)
        try:  # what moves the noise knows its own limits, and names what is beyond them as the options do
            Ascent(GRADIENTS[self.gradient], rule, self.regularisation, patience=self.patience, restarts=self.restarts)
            Neighbours(self.neighbours, self.distance)
            Plan(narrow=self.schedule).check_size(self.particles)
        except InputError as error:
            raise InputError(f"--{str(error).removeprefix('--')}") from error
