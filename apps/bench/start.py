"""From the words of the command line to what is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from steer.apps.bench.models import RealSize, build
from steer.apps.bench.sizes import REAL_SIZES
from steer.apps.bench.subject import Subject
from steer.apps.models import load_pipeline, precision
from steer.choices import choose
from steer.errors import InputError

EMBEDDED = "scenes"
STEPS = {True: 6, False: 20}  # of a quick run, and of another
ITERATIONS = {True: 2, False: 5}
PAIRS = {True: 1, False: 2}  # of samples in an update of D3PO
GUIDANCE = 4.0


@dataclass(frozen=True)
class Asked:
    """What the user said of all models.

    dtype       by default float32 on the CPU and bfloat16 elsewhere
    resolution  pixels of a side; by default the model's own
    """

    device: str
    dtype: str | None = None
    particles: int = 8
    steps: int | None = None
    resolution: int | None = None
    quick: bool = False

    def call(self, guidance: float) -> dict[str, Any]:
        """Arguments of the pipelines' calls."""
        call: dict[str, Any] = {"num_inference_steps": self.steps or STEPS[self.quick], "guidance_scale": guidance}
        if self.resolution is not None:
            call |= {"height": self.resolution, "width": self.resolution}
        return call


def subjects_of(models: Sequence[str], asked: Asked) -> list[tuple[str, Callable[[], Subject]]]:
    """A name for each model, and how it is made when its turn comes.

    Raises InputError for a model that is not known, and a resolution that does not fit.
    """
    if asked.resolution is not None and (asked.resolution < 64 or asked.resolution % 64):
        raise InputError(f"--resolution must be a multiple of 64, got {asked.resolution}")
    made: list[tuple[str, Callable[[], Subject]]] = []
    for name in dict.fromkeys(models):
        maker = choose("--model", name, {EMBEDDED: embedded} | {size: partial(real, size) for size in REAL_SIZES})
        made.append((name, partial(maker, asked)))
    return made


def embedded(asked: Asked) -> Subject:
    """The embedded model, with its one-step sister."""

    def load(name: str) -> Any:
        pipe = load_pipeline(name, asked.device, asked.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Subject(
        EMBEDDED,
        load(EMBEDDED),
        asked.call(GUIDANCE),
        asked.particles,
        one_step=load("scenes-turbo"),
        learner=partial(load, EMBEDDED),
        iterations=ITERATIONS[asked.quick],
        pairs=PAIRS[asked.quick],
        preview="tiny",
    )


def real(name: str, asked: Asked) -> Subject:
    """A model of real size and random weights."""
    return of_size(name, REAL_SIZES[name], asked)


def of_size(name: str, size: RealSize, asked: Asked) -> Subject:
    """Whatever its size; it is its own one-step model, and as new for training."""
    make = partial(build, size, asked.device, precision(asked.device, asked.dtype))
    pipe = make()
    return Subject(
        name,
        pipe,
        asked.call(size.guidance),
        asked.particles,
        one_step=pipe,
        learner=make,
        iterations=ITERATIONS[asked.quick],
        pairs=PAIRS[asked.quick],
    )
