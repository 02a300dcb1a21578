"""What an evaluation is about: the contenders, and what all of them are asked and judged by."""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Generator, Tensor

from steer import __version__
from steer.apps.errors import named, wrap_errors
from steer.apps.methods import METHODS, Job
from steer.apps.models import FinetunedWeights, find_adapter
from steer.apps.plots import thumbnail
from steer.apps.settings import ALL_OPTIONS, METHOD_OPTIONS, SHARED, SamplingConfig
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.files import atomic_write, write_text
from steer.pipelines.base import Cost, SteeringOutput, route_eta
from steer.pipelines.training.evaluation import diversity
from steer.registry import choose, nearest
from steer.reward import Reward, mean_over_frames, score_components

BASE_METHOD = "base"  # the method that looks at no reward: it makes one image
# Methods in which runs of one call share no random numbers, so that several may be made at a time.
INDEPENDENT_METHODS = ("base", "best-of-n")
# Settings of `steer sample` that contenders share; None is the default of each method.
_OF_A_CONTENDER = ("model", "lora", "method", "reward", "compare")
DEFAULTS: dict[str, Any] = {name: SamplingConfig.field(name).default for name in SHARED if name not in _OF_A_CONTENDER}
DEFAULTS |= dict.fromkeys(ALL_OPTIONS)


@dataclass(frozen=True)
class Contender:
    """A model, finetuned weights that it wears (or none), and a method.

    options  settings of this one alone, such as {"particles": 8, "lam": 25.0}: fields of SampleSettings
    label    what it is called; by default told by all of the above
    """

    model: str = "scenes"
    lora: str | None = None
    method: str = BASE_METHOD
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @property
    def name(self) -> str:
        """Such as "scenes", "scenes + runs/prdp/final", "scenes fk particles=8"."""
        if self.label is not None:
            return self.label
        words = [self.model, f"+ {self.lora}" if self.lora else "", "" if self.method == BASE_METHOD else self.method]
        return " ".join(word for word in (*words, *(f"{key}={value}" for key, value in self.options.items())) if word)


@dataclass(frozen=True)
class EvaluationSpec:
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

    def run_seed(self, place: int, number: int) -> int:
        """Of one run: it follows from the prompt's place and the number of the seed, and from nothing else."""
        return derived_seed(self.shared["seed"], f"evaluate {place} {number}")


@dataclass(frozen=True)
class PreparedContender:
    """A contender with all that it needs but the model."""

    contender: Contender
    settings: SamplingConfig
    finetuned: FinetunedWeights | None

    @property
    def particles(self) -> int:
        """K, images of a run."""
        return self.settings.particles

    @cached_property
    def about(self) -> dict[str, Any]:
        """What it is, to the last byte of its weights, as plain values."""
        one = self.contender
        data = {"name": one.name, "model": one.model, "lora": one.lora, "method": one.method}
        return data | {"options": dict(one.options), "weights": self.finetuned and self.finetuned.digest()}

    def groups(self, spec: EvaluationSpec, batch: int) -> list[range]:
        """Places of prompts that are made and saved together: as many as fit `batch` images, at least one."""
        several = batch // (self.particles * spec.seeds) if self.contender.method in INDEPENDENT_METHODS else 1
        size, count = max(1, several), len(spec.prompts)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


def prepare_contenders(contenders: Sequence[Contender], spec: EvaluationSpec) -> list[PreparedContender]:
    """All contenders, looked at before any model is loaded. Raises InputError."""
    if not contenders:
        raise InputError("there is nobody to compare: give at least one model")
    names = [one.name for one in contenders]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise InputError(f"contender {twice[0]!r} is there twice")
    _check_options(spec.options, "")
    for method in set(METHODS) - {"beam"}:  # options without a contender too; beams need a number of particles
        _settings_of(Contender("", None, method), spec)
    return [_prepare_contender(one, spec) for one in contenders]


def _prepare_contender(one: Contender, spec: EvaluationSpec) -> PreparedContender:
    _check_options(one.options, f"contender {one.name!r}: ")
    if "seed" in one.options:
        raise InputError(f"contender {one.name!r}: seeds are the same for all; leave out seed")
    method = choose("method", one.method, METHODS)
    settings = _settings_of(one, spec)
    method.check(settings, spec.rewards[spec.first])
    return PreparedContender(one, settings, None if one.lora is None else find_adapter(one.lora))


def _settings_of(one: Contender, spec: EvaluationSpec) -> SamplingConfig:
    """Return the shared options that a contender's method has, with its own. Raises InputError."""
    others = set(ALL_OPTIONS) - set(METHOD_OPTIONS[one.method].names)
    shared = {name: value for name, value in spec.shared.items() if name not in others}
    plain = {"particles": 1} if one.method == BASE_METHOD else {}
    own: dict[str, Any] = {"model": one.model, "method": one.method, "reward": spec.first, "compare": False}
    return SamplingConfig.of(**shared | plain | dict(one.options) | own)


def _check_options(options: Mapping[str, Any], whose: str) -> None:
    for name in options:
        if name not in DEFAULTS:
            raise InputError(f"{whose}unknown option {name!r}: did you mean {nearest(name, DEFAULTS)}?")


@dataclass(frozen=True)
class BatchedJob(Job):
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


RUNS, IMAGES, IDENTITY = "runs", "images", "contest.json"
Json = dict[str, Any]


@dataclass
class ContenderResults:
    """What there is of one contender.

    runs       by place of the prompt, its runs in the order of the seeds: see `steer.apps.evaluation.spec`
    diversity  by place of the prompt; None for one seed
    kl         of finetuned weights, by the number of prompts
    made       with which versions, on what device
    """

    about: Json
    runs: dict[int, list[Json]] = field(default_factory=dict)
    diversity: dict[int, float | None] = field(default_factory=dict)
    kl: Json = field(default_factory=dict)
    made: list[Json] = field(default_factory=list)

    def text(self) -> str:
        """As a file holds it."""
        prompts = [{"place": n, "runs": self.runs[n], "diversity": self.diversity[n]} for n in sorted(self.runs)]
        data = {"contender": self.about, "made": self.made, "kl": self.kl}
        return json.dumps(data | {"prompts": prompts}, ensure_ascii=False)

    def add(self, other: "ContenderResults") -> None:
        """Takes in what another process had."""
        self.runs |= other.runs
        self.diversity |= other.diversity
        self.kl |= other.kl
        self.made += [one for one in other.made if one not in self.made]


def versions(device: torch.device) -> Json:
    """Of what decides numbers and seconds."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    packages = {"steer": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return packages | {"transformers": transformers.__version__, "device": named}


def file_key(name: str) -> str:
    """A contender's name as that of a file: no two have one."""
    words = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-.")[-40:].lstrip("-.")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ResultStore:
    """The folder of an evaluation."""

    out: Path

    def open(self, spec: EvaluationSpec) -> None:
        """Makes the folder, or goes on with it. Raises InputError where it cannot take this contest."""
        try:
            write_text(self.out / ".writable", "")
            (self.out / ".writable").unlink()
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from error
        path, data = self.out / RUNS / IDENTITY, spec.identity()
        if not path.exists():
            write_text(path, json.dumps(data, indent=1, ensure_ascii=False))
            return
        old = _read(path)
        if not isinstance(old.get("options"), dict):
            raise InputError(f"{path} is no evaluation of steer; choose another --out")
        if old.get("prompts") != data["prompts"]:
            raise InputError(f"--out {self.out} holds an evaluation of other prompts; choose another --out")
        both = [(name, old.get(name), data[name]) for name in ("rewards", "seeds")]
        there = DEFAULTS | old["options"]
        both += [(name, there.get(name), value) for name, value in data["options"].items()]
        if other := next((one for one in both if one[1] != one[2]), None):
            name, before, now = other
            raise InputError(
                f"--out {self.out} holds an evaluation with {name} {before!r}, not {now!r}; choose another --out"
            )

    def read(self, prepared: PreparedContender, process: int | None = None) -> ContenderResults:
        """What there is of a contender, from all processes or from one. Raises InputError for another of that name."""
        result = ContenderResults(prepared.about)
        pattern = f"{file_key(prepared.contender.name)}.{'*' if process is None else process}.json"
        for path in sorted((self.out / RUNS).glob(pattern)):
            result.add(_load_results(path, prepared))
        return result

    def write(self, stored: ContenderResults, process: int) -> None:
        """Replaces what this process had of a contender."""
        write_text(self.out / RUNS / f"{file_key(stored.about['name'])}.{process}.json", stored.text())

    def search(self, name: str, place: int, number: int) -> Path:
        """Where a run of a method that iterates keeps its state."""
        return self.out / RUNS / f"{file_key(name)}.{place}.{number}.safetensors"

    def image(self, name: str, place: int) -> Path:
        """Where the image of a contender for a prompt of the grid lies."""
        return self.out / IMAGES / file_key(name) / f"{place:04d}.png"

    def keep_images(self, name: str, images: Iterable[tuple[int, Image.Image]]) -> None:
        """Writes images of the grid, by the place of their prompts."""
        for place, image in images:
            with atomic_write(self.image(name, place)) as new:
                image.save(new, format="PNG")


def _load_results(path: Path, prepared: PreparedContender) -> ContenderResults:
    data, name = _read(path), prepared.contender.name
    about = data.get("contender")
    if not isinstance(about, dict) or not isinstance(data.get("prompts"), list):
        raise InputError(f"{path} is no evaluation of steer; delete it, or choose another --out")
    for what, value in prepared.about.items():
        if about.get(what) != value:
            other = "its weights have changed" if what == "weights" else f"it has {what} {about.get(what)!r} there"
            raise InputError(f"{path.parent.parent} holds another contender {name!r}: {other}; choose another --out")
    result = ContenderResults(about, kl=data.get("kl", {}), made=data.get("made", []))
    try:
        for one in data["prompts"]:
            result.runs[one["place"]], result.diversity[one["place"]] = one["runs"], one["diversity"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its runs are not as steer writes them ({error!r}); delete it") from error
    return result


def _read(path: Path) -> Json:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--out {path.parent.parent}: cannot read {path.name} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no evaluation of steer ({error}); choose another --out") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is no evaluation of steer; choose another --out")
    return data


SCORE_BATCH = 8  # images scored at a time


@dataclass
class ContenderRunner:
    """Where one contender makes its images.

    pipe     the pipeline that wears what it wears
    batch    images made at a time, where the method can
    shown    places of the prompts whose images are kept for the grid
    """

    spec: EvaluationSpec
    prepared: PreparedContender
    store: ResultStore
    pipe: Any
    batch: int
    shown: Collection[int]
    _picked: dict[int, list[Tensor]] = field(default_factory=dict)

    def make(self, group: range, stored: ContenderResults) -> None:
        """Makes the images of a group of prompts, all seeds, and adds what is known of them to `stored`.

        A run is {"seed", "rewards": by name those of the K images, as the method gives them: best first, but of
        `base`, which picks none; "stopped": why it ended before its time; "cost": its share of that of its call}.
        """
        todo = [(place, number) for place in group for number in range(self.spec.seeds)]
        size, self._picked = self._runs_per_call(), {place: [] for place in group}
        runs: dict[int, list[Json]] = {place: [] for place in group}
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            for (place, _), run in zip(some, self._run_call(some), strict=True):
                runs[place].append(run)
        stored.runs |= runs
        for place, images in self._picked.items():
            stored.diversity[place] = diversity(torch.stack(images), len(images)) if len(images) > 1 else None
        self.store.keep_images(self._name, self._pictures())

    @property
    def _name(self) -> str:
        return self.prepared.contender.name

    def _runs_per_call(self) -> int:
        """Runs in one call. Where η is the seam's own, the noise of the steps is shared by the runs of a call."""
        own_noise = route_eta(self.pipe, {}, self.prepared.settings.eta)[1] is None
        independent = self.prepared.contender.method in INDEPENDENT_METHODS and own_noise
        return max(1, self.batch // self.prepared.particles) if independent else 1

    def _run_call(self, some: Sequence[tuple[int, int]]) -> Iterator[Json]:
        """One call of the method, and its runs one by one."""
        spec = self.spec
        prompts, seeds = [spec.prompts[n] for n, _ in some], tuple(spec.run_seed(n, s) for n, s in some)
        reward, file = spec.rewards[spec.first], self.store.search(self._name, *some[0])
        job = BatchedJob(self.pipe, reward, prompts, self.prepared.settings, file, seeds=seeds)
        with contender_errors(f"{self._name}, prompt {prompts[0]!r}"):
            output = METHODS[self.prepared.contender.method].run(job)
            scores = {spec.first: output.rewards} | self._other_scores(output, prompts)
        file.unlink(missing_ok=True)
        flags = output.nsfw_content_detected
        size = output.rewards.shape[1]  # fewer than there were particles, where they got fewer
        for row, (place, _) in enumerate(some):
            self._picked[place].append(output.images[row * size].detach().float().cpu().clamp(0, 1))
            yield {
                "seed": seeds[row],
                "rewards": {name: values[row].tolist() for name, values in scores.items()},
                "stopped": output.stopped,
                **({} if flags is None else {"nsfw_content_detected": flags[row].tolist()}),
                "cost": {what: spent / len(some) for what, spent in asdict(output.cost).items()},
            }

    def _other_scores(self, output: SteeringOutput, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the other rewards say of the finished images: (B, K) each."""
        size = output.rewards.shape[1]
        read = [prompt for prompt in prompts for _ in range(size)]
        others = [name for name in self.spec.rewards if name != self.spec.first]
        return {name: score_in_batches(self.spec.rewards[name], output.images, read).view(-1, size) for name in others}

    def _pictures(self) -> Iterator[tuple[int, Image.Image]]:
        for place in set(self._picked) & set(self.shown):
            yield place, thumbnail(self._picked[place][0])


@torch.no_grad()
def score_in_batches(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Scores (N,) of images (N, 3, H, W), or of videos (N, F, 3, H, W)."""
    result = []
    for start in range(0, len(images), SCORE_BATCH):
        cut = slice(start, start + SCORE_BATCH)
        score: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] = partial(
            score_components, reward, prompts=prompts[cut]
        )
        result.append(mean_over_frames(images[cut].float().clamp(0, 1), score)[0])
    return torch.cat(result)


@contextmanager
def contender_errors(whose: str) -> Iterator[None]:
    """Whatever ends a contender says whose it is."""
    less = "a smaller --batch or fewer --particles need less"
    with wrap_errors(whose, "finished prompts are kept", less), named(whose):
        yield


def missing(prepared: PreparedContender, stored: ContenderResults, spec: EvaluationSpec, batch: int) -> list[range]:
    """The groups of prompts that are not whole yet."""
    return [group for group in prepared.groups(spec, batch) if not all(place in stored.runs for place in group)]


def mean_cost(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of one run, as `Cost` has it; older runs count nothing of what is younger."""
    return {cost.name: sum(run["cost"].get(cost.name, 0) for run in runs) / len(runs) for cost in fields(Cost)}
