"""What an evaluation is about: the contenders, and what all of them are asked and judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

from torch import Generator

from steer.apps.adapters import Finetuned, find_finetuned
from steer.apps.methods import METHODS, Job
from steer.apps.sample_settings import SampleSettings
from steer.choices import choose, nearest
from steer.errors import InputError
from steer.reward import Reward
from steer.seeds import derived_seed

PLAIN = "base"  # the method that looks at no reward: it makes one image
# Methods in which runs of one call share no random numbers, so that several may be made at a time.
APART = ("base", "best-of-n")
# As in `steer sample`; λ None is each method's own.
DEFAULTS: dict[str, Any] = {
    "particles": 4,
    "steps": None,
    "guidance": None,
    "lam": None,
    "potential": "difference",
    "resampler": "systematic",
    "tempering": "constant",
    "ess_threshold": 0.5,
    "eta": None,
    "seed": 0,
    "dtype": None,
}
YOUNGER = {one.name: one.default for one in fields(SampleSettings) if one.default is not MISSING}
DEFAULTS |= {name: value for name, value in YOUNGER.items() if name != "lora"}  # which makes a contender of its own


@dataclass(frozen=True)
class Contender:
    """A model, finetuned weights that it wears (or none), and a method.

    options  settings of this one alone, such as {"particles": 8, "lam": 25.0}: fields of SampleSettings
    label    what it is called; by default told by all of the above
    """

    model: str = "scenes"
    lora: str | None = None
    method: str = PLAIN
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @property
    def name(self) -> str:
        """Such as "scenes", "scenes + runs/prdp/final", "scenes fk particles=8"."""
        if self.label is not None:
            return self.label
        words = [self.model, f"+ {self.lora}" if self.lora else "", "" if self.method == PLAIN else self.method]
        return " ".join(word for word in (*words, *(f"{key}={value}" for key, value in self.options.items())) if word)


@dataclass(frozen=True)
class Contest:
    """Prompts (and a tag for each, or none), rewards by name, the steering one first, seeds, and sampling options."""

    prompts: tuple[str, ...]
    tags: tuple[str, ...] | None
    rewards: Mapping[str, Reward]
    seeds: int
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there are no prompts to evaluate on: give some")
        if self.tags is not None and len(self.tags) != len(self.prompts):
            raise InputError(f"one tag a prompt: got {len(self.tags)} for {len(self.prompts)} prompts")
        if not self.rewards:
            raise InputError("there is no reward to judge by: give at least one, `steer rewards` lists names")
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")

    @property
    def first(self) -> str:
        """The reward that steers and picks."""
        return next(iter(self.rewards))

    @property
    def shared(self) -> dict[str, Any]:
        """All options that contenders share."""
        return DEFAULTS | dict(self.options)

    def identity(self) -> dict[str, Any]:
        """What all results of a folder have in common, as plain values."""
        return {
            "prompts": list(self.prompts),
            "rewards": list(self.rewards),
            "seeds": self.seeds,
            "options": self.shared,
        }

    def seed_of(self, place: int, number: int) -> int:
        """Of one run: it follows from the prompt's place and the number of the seed, and from nothing else."""
        return derived_seed(self.shared["seed"], f"evaluate {place} {number}")


@dataclass(frozen=True)
class Entrant:
    """A contender with all that it needs but the model."""

    contender: Contender
    settings: SampleSettings
    finetuned: Finetuned | None

    @property
    def particles(self) -> int:
        """K, images of a run."""
        return self.settings.particles

    @cached_property
    def about(self) -> dict[str, Any]:
        """What it is, to the last byte of its weights, as plain values."""
        one = self.contender
        told = {"name": one.name, "model": one.model, "lora": one.lora, "method": one.method}
        return told | {"options": dict(one.options), "weights": self.finetuned and self.finetuned.digest()}

    def groups(self, contest: Contest, batch: int) -> list[range]:
        """Places of prompts that are made and saved together: as many as fit `batch` images, at least one."""
        several = batch // (self.particles * contest.seeds) if self.contender.method in APART else 1
        size, count = max(1, several), len(contest.prompts)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


def enter(contenders: Sequence[Contender], contest: Contest) -> list[Entrant]:
    """All contenders, looked at before any model is loaded. Raises InputError."""
    if not contenders:
        raise InputError("there is nobody to compare: give at least one model")
    names = [one.name for one in contenders]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise InputError(f"contender {twice[0]!r} is there twice")
    _check_options(contest.options, "")
    given: dict[str, Any] = {"model": "", "method": PLAIN, "reward": contest.first, "compare": False}
    SampleSettings(**(contest.shared | given)).check()  # also what no contender may use
    return [_entered(one, contest) for one in contenders]


def _entered(one: Contender, contest: Contest) -> Entrant:
    _check_options(one.options, f"contender {one.name!r}: ")
    if "seed" in one.options:
        raise InputError(f"contender {one.name!r}: seeds are the same for all; leave out seed")
    method = choose("method", one.method, METHODS)
    own: dict[str, Any] = {"model": one.model, "method": one.method, "reward": contest.first, "compare": False}
    plain = {"particles": 1} if one.method == PLAIN else {}
    settings = SampleSettings(**(contest.shared | plain | dict(one.options) | own))
    settings.check()
    method.check(settings, contest.rewards[contest.first])
    return Entrant(one, settings, None if one.lora is None else find_finetuned(one.lora))


def _check_options(options: Mapping[str, Any], whose: str) -> None:
    for name in options:
        if name not in DEFAULTS:
            raise InputError(f"{whose}unknown option {name!r}: did you mean {nearest(name, DEFAULTS)}?")


@dataclass(frozen=True)
class Together(Job):
    """Several runs as one call of a method: a prompt and a seed for each of them.

    Every image has a generator of its own, so that it does not depend on the others in its call, and K images of a
    run begin as the first K of a larger one do.
    """

    prompt: Any  # a text for each run: what the methods call takes several
    seeds: tuple[int, ...] = ()

    @property
    def call(self) -> dict[str, Any]:
        """As for one prompt, but for the random numbers; images as tensors."""
        images = [derived_seed(seed, f"image {k}") for seed in self.seeds for k in range(self.settings.particles)]
        own = {"generator": [Generator().manual_seed(seed) for seed in images], "output_type": "pt"}
        return super().call | own


def plain_call(job: Job) -> dict[str, Any]:
    """Of a job's arguments those that the plain pipeline's own call knows, without random numbers."""
    left_out = ("num_particles", "eta", "generator", "output_type")
    return {name: value for name, value in job.call.items() if name not in left_out}
