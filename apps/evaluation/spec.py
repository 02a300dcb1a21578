"""The specification of an evaluation, its contenders, and the folder of their results."""

import hashlib
import json
import logging
import platform
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from PIL import Image
from torch import Generator, Tensor

from steer import __version__
from steer.apps.errors import check_writable, named, wrap_errors
from steer.apps.expansion import is_text_model
from steer.apps.methods import METHODS, Job
from steer.apps.models import AdapterSum, FinetunedWeights, find_adapter
from steer.apps.plots import thumbnail
from steer.apps.processes import is_main_process
from steer.apps.scoring import score_in_batches
from steer.apps.settings import ALL_OPTIONS, METHOD_OPTIONS, SHARED, SamplingConfig, flags_of, methods_with
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.files import atomic_write, read_json, write_text
from steer.pipelines.base import Cost, SteeringOutput, route_eta
from steer.pipelines.training.evaluation import diversity
from steer.registry import choose, did_you_mean
from steer.reward import Reward, Scores

logger = logging.getLogger(__name__)

BASE_METHOD = "base"  # plain sampling without a reward: one image per run
# Settings of `steer sample` that contenders share; None is the default of each method.
_OF_A_CONTENDER = ("model", "lora", "method", "reward", "compare", "best_of")
DEFAULTS: dict[str, Any] = {
    name: SamplingConfig.field(name).default for name in SHARED if name not in (*_OF_A_CONTENDER, "expand", "original")
}
DEFAULTS |= dict.fromkeys(ALL_OPTIONS)
CONTENDER_KEYS = ("model", "lora", "method", "label")
OPTIONS_LISTED = "`steer evaluate --help` lists the options"


@dataclass(frozen=True)
class Contender:
    """A model, finetuned weights (or none), and a method.

    options  settings of this contender alone, such as {"particles": 8, "lam": 25.0}: fields of SamplingConfig
    label    name; by default built from all of the above
    """

    model: str = "scenes"
    lora: str | None = None
    method: str = BASE_METHOD
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return the contender of flat settings: model, lora, method, label, and its options. Raises InputError."""
        options = dict(settings)
        own = {name: options.pop(name) for name in CONTENDER_KEYS if name in options}
        for name, value in own.items():
            if not isinstance(value, str):
                raise InputError(f"{name} of a contender must be text, got {value!r:.60}")
        return cls(**own, options=options)

    @property
    def name(self) -> str:
        """Name, such as "scenes", "scenes + runs/prdp/final" or "scenes fk particles=8"."""
        if self.label is not None:
            return self.label
        words = [self.model, f"+ {self.lora}" if self.lora else "", "" if self.method == BASE_METHOD else self.method]
        return " ".join(word for word in (*words, *(f"{key}={value}" for key, value in self.options.items())) if word)


@dataclass(frozen=True)
class EvaluationSpec:
    """Specification: prompts (with a tag each, or none), rewards by name (the first one steers), seeds, options."""

    prompts: tuple[str, ...]
    tags: tuple[str, ...] | None
    rewards: Mapping[str, Reward]
    seeds: int
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("there are no prompts: give at least one")
        if self.tags is not None and len(self.tags) != len(self.prompts):
            raise InputError(f"one tag a prompt: got {len(self.tags)} for {len(self.prompts)} prompts")
        if not self.rewards:
            raise InputError("there are no rewards: give at least one, `steer rewards` lists names")
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")

    @property
    def first(self) -> str:
        """The reward that steers and picks."""
        return next(iter(self.rewards))

    @property
    def shared(self) -> dict[str, Any]:
        """Return all options that contenders share."""
        return DEFAULTS | dict(self.options)

    def identity(self) -> dict[str, Any]:
        """Collect the values that all results of a folder share, as plain values."""
        return {
            "prompts": list(self.prompts),
            "rewards": list(self.rewards),
            "seeds": self.seeds,
            "options": self.shared,
        }

    def run_seed(self, place: int, number: int) -> int:
        """Derive the seed of a run only from the index of its prompt and the number of the seed."""
        return derived_seed(self.shared["seed"], f"evaluate {place} {number}")


@dataclass(frozen=True)
class PreparedContender:
    """A contender with its settings and weights checked; the model is loaded later."""

    contender: Contender
    settings: SamplingConfig
    finetuned: FinetunedWeights | AdapterSum | None

    @property
    def particles(self) -> int:
        """K, the number of images of a run."""
        return self.settings.particles

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Fields that identify the contender, with a hash of its weights, as plain values."""
        one = self.contender
        data = {"name": one.name, "model": one.model, "lora": one.lora, "method": one.method}
        return data | {"options": dict(one.options), "weights": self.finetuned and self.finetuned.digest()}

    def groups(self, spec: EvaluationSpec, batch: int) -> list[range]:
        """Split the prompts into groups that are sampled and saved together: `batch` images, at least one prompt."""
        several = batch // (self.particles * spec.seeds) if METHODS[self.contender.method].is_independent else 1
        size, count = max(1, several), len(spec.prompts)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


def prepare_contenders(contenders: Sequence[Contender], spec: EvaluationSpec) -> list[PreparedContender]:
    """Check all contenders before any model is loaded; report options that none of them has. Raises InputError."""
    if not contenders:
        raise InputError("there are no contenders: give at least one model")
    names = [one.name for one in contenders]
    if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
        raise InputError(f"contender {repeated[0]!r} is repeated: give each contender once")
    _check_options(spec.options, "")
    prepared_contenders = [_prepare_contender(one, spec) for one in contenders]
    used = {*SHARED}.union(*(one.settings.option_names for one in prepared_contenders))
    for name in [name for name in spec.options if name not in used and is_main_process()]:
        flag = flags_of(name)[0].partition("/")[0]
        logger.warning("steer: %s belongs to --method %s: not used here", flag, " or ".join(methods_with(name)))
    return prepared_contenders


def _prepare_contender(one: Contender, spec: EvaluationSpec) -> PreparedContender:
    _check_options(one.options, f"contender {one.name!r}: ")
    if "seed" in one.options:
        raise InputError(f"contender {one.name!r}: seeds are the same for all; leave out seed")
    if is_text_model(one.model):
        raise InputError(
            f"contender {one.name!r}: {one.model} generates texts; evaluations are of images: leave it out"
        )
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


def _check_options(options: Mapping[str, Any], prefix: str) -> None:
    for name in options:
        if name not in DEFAULTS:
            known = [*DEFAULTS, *(CONTENDER_KEYS if prefix else ())]
            raise InputError(f"{prefix}unknown option {name!r}: {did_you_mean(name, known, OPTIONS_LISTED)}")


@dataclass(frozen=True)
class BatchedJob(Job):
    """Several runs as one call of a method, with a prompt and a seed each.

    Each image has its own generator: it does not depend on other images of the call, and the K images of a run start
    from the same noise as the first K images of a larger run.
    """

    prompt: Any  # one per run: pipelines take several
    seeds: tuple[int, ...] = ()

    @property
    def call(self) -> dict[str, Any]:
        """Arguments as for one prompt, with a generator per image; images as tensors."""
        images = [derived_seed(seed, f"image {k}") for seed in self.seeds for k in range(self.settings.particles)]
        own = {"generator": [Generator().manual_seed(seed) for seed in images], "output_type": "pt"}
        return super().call | own


def plain_call(job: Job) -> dict[str, Any]:
    """Select the job's arguments that the plain pipeline takes, without random numbers."""
    left_out = ("num_particles", "eta", "generator", "output_type")
    return {name: value for name, value in job.call.items() if name not in left_out}


RUNS, IMAGES, IDENTITY = "runs", "images", "spec.json"
Json = dict[str, Any]


@dataclass
class ContenderResults:
    """The results of a contender so far.

    runs       runs by index of the prompt, in the order of the seeds: see `ContenderRunner.make`
    diversity  diversity by index of the prompt; None for one seed
    kl         KL of finetuned weights, by the number of prompts
    environments  versions and devices
    """

    identity: Json
    runs: dict[int, list[Json]] = field(default_factory=dict)
    diversity: dict[int, float | None] = field(default_factory=dict)
    kl: Json = field(default_factory=dict)
    environments: list[Json] = field(default_factory=list)

    def text(self) -> str:
        """Serialize to JSON."""
        prompts = [{"place": n, "runs": self.runs[n], "diversity": self.diversity[n]} for n in sorted(self.runs)]
        data = {"contender": self.identity, "environments": self.environments, "kl": self.kl}
        return json.dumps(data | {"prompts": prompts}, ensure_ascii=False)

    def add(self, other: "ContenderResults") -> None:
        """Merge the results of another process."""
        self.runs |= other.runs
        self.diversity |= other.diversity
        self.kl |= other.kl
        self.environments += [one for one in other.environments if one not in self.environments]


def versions(device: torch.device) -> Json:
    """Collect the versions and the device, which determine results and times."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    packages = {"steer": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return packages | {"transformers": transformers.__version__, "device": named}


def file_key(name: str) -> str:
    """Turn a contender's name into a unique file name."""
    words = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-.")[-40:].lstrip("-.")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ResultStore:
    """The folder of an evaluation, with the results so far."""

    out: Path

    def open(self, spec: EvaluationSpec) -> None:
        """Create the folder, or resume it. Raises InputError for a folder of another evaluation."""
        check_writable(self.out)
        path, data = self.out / RUNS / IDENTITY, spec.identity()
        if not path.exists():
            write_text(path, json.dumps(data, indent=1, ensure_ascii=False))
            return
        old = read_json(path, "an evaluation of steer", "; choose another --out")
        if not isinstance(old.get("options"), dict):
            raise InputError(f"{path} is not an evaluation of steer; choose another --out")
        if old.get("prompts") != data["prompts"]:
            raise InputError(f"--out {self.out} holds an evaluation of other prompts; choose another --out")
        pairs = [(name, old.get(name), data[name]) for name in ("rewards", "seeds")]
        options = DEFAULTS | old["options"]
        pairs += [(name, options.get(name), value) for name, value in data["options"].items()]
        if changed := next((one for one in pairs if one[1] != one[2]), None):
            name, before, now = changed
            raise InputError(
                f"--out {self.out} holds an evaluation with {name} {before!r}, not {now!r}; choose another --out"
            )

    def read(self, prepared: PreparedContender, process: int | None = None) -> ContenderResults:
        """Read a contender's results, of all processes or one. Raises InputError for another contender of that name."""
        result = ContenderResults(prepared.identity)
        pattern = f"{file_key(prepared.contender.name)}.{'*' if process is None else process}.json"
        for path in sorted((self.out / RUNS).glob(pattern)):
            result.add(_load_results(path, prepared))
        return result

    def write(self, stored: ContenderResults, process: int) -> None:
        """Replace this process's results of a contender."""
        write_text(self.out / RUNS / f"{file_key(stored.identity['name'])}.{process}.json", stored.text())

    def search(self, name: str, place: int, number: int) -> Path:
        """Return the path of the checkpoint of an iterative run."""
        return self.out / RUNS / f"{file_key(name)}.{place}.{number}.safetensors"

    def image(self, name: str, place: int) -> Path:
        """Return the path of a contender's image for a prompt of the grid."""
        return self.out / IMAGES / file_key(name) / f"{place:04d}.png"

    def keep_images(self, name: str, images: Iterable[tuple[int, Image.Image]]) -> None:
        """Write images of the grid, by the index of their prompts."""
        for place, image in images:
            with atomic_write(self.image(name, place)) as new:
                image.save(new, format="PNG")


def _load_results(path: Path, prepared: PreparedContender) -> ContenderResults:
    data = read_json(path, "an evaluation of steer", "; choose another --out")
    name = prepared.contender.name
    identity = data.get("contender")
    if not isinstance(identity, dict) or not isinstance(data.get("prompts"), list):
        raise InputError(f"{path} is not an evaluation of steer; delete it, or choose another --out")
    for key, value in prepared.identity.items():
        if identity.get(key) != value:
            other = "its weights differ" if key == "weights" else f"it has {key} {identity.get(key)!r} there"
            raise InputError(f"{path.parent.parent} holds another contender {name!r}: {other}; choose another --out")
    result = ContenderResults(identity, kl=data.get("kl", {}), environments=data.get("environments", []))
    try:
        for one in data["prompts"]:
            result.runs[one["place"]], result.diversity[one["place"]] = one["runs"], one["diversity"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its runs are not as steer writes them ({error!r}): delete it") from error
    return result


@dataclass
class ContenderRunner:
    """Sampling and scoring of one contender.

    pipe         the pipeline, with the contender's weights
    batch        images per call, for methods with independent runs
    grid_places  indices of the prompts in the grid of images
    """

    spec: EvaluationSpec
    prepared: PreparedContender
    store: ResultStore
    pipe: Any
    batch: int
    grid_places: Collection[int]
    _picked: dict[int, list[Tensor]] = field(default_factory=dict)

    def make(self, group: range, stored: ContenderResults) -> None:
        """Sample a group of prompts with all seeds, and add the results to `stored`.

        A run is {"seed", "rewards": rewards of the K images by name, best first (`base` does not sort), and their
        "components" if a reward is composed; "stopped": the reason of an early stop or None; "cost": its share of the
        cost of its call}.
        """
        pending = [(place, number) for place in group for number in range(self.spec.seeds)]
        size, self._picked = self._runs_per_call(), {place: [] for place in group}
        runs: dict[int, list[Json]] = {place: [] for place in group}
        for start in range(0, len(pending), size):
            batch_runs = pending[start : start + size]
            for (place, _), run in zip(batch_runs, self._run_call(batch_runs), strict=True):
                runs[place].append(run)
        stored.runs |= runs
        for place, images in self._picked.items():
            stored.diversity[place] = diversity(torch.stack(images), len(images)) if len(images) > 1 else None
        self.store.keep_images(self._name, self._pictures())

    @property
    def _name(self) -> str:
        return self.prepared.contender.name

    def _runs_per_call(self) -> int:
        """Count the runs per call: one if the step hooks draw the noise of η, which the runs of a call share."""
        own_noise = route_eta(self.pipe, {}, self.prepared.settings.eta)[1] is None
        independent = METHODS[self.prepared.contender.method].is_independent and own_noise
        return max(1, self.batch // self.prepared.particles) if independent else 1

    def _run_call(self, batch_runs: Sequence[tuple[int, int]]) -> Iterator[Json]:
        """Call the method once, and yield its runs."""
        spec = self.spec
        prompts, seeds = [spec.prompts[n] for n, _ in batch_runs], tuple(spec.run_seed(n, s) for n, s in batch_runs)
        reward, file = spec.rewards[spec.first], self.store.search(self._name, *batch_runs[0])
        job = BatchedJob(self.pipe, reward, prompts, self.prepared.settings, file, seeds=seeds)
        with contender_errors(f"{self._name}, prompt {prompts[0]!r}"):
            output = METHODS[self.prepared.contender.method].run(job)
            scores = {spec.first: (output.rewards, dict(output.components))} | self._other_scores(output, prompts)
        file.unlink(missing_ok=True)
        flags = output.nsfw_content_detected
        size = output.rewards.shape[1]  # a particle schedule leaves fewer than `particles`
        for row, (place, _) in enumerate(batch_runs):
            self._picked[place].append(output.images[row * size].detach().float().cpu().clamp(0, 1))
            yield {
                "seed": seeds[row],
                "rewards": {name: totals[row].tolist() for name, (totals, _) in scores.items()},
                "components": {
                    name: {component: values[row].tolist() for component, values in components.items()}
                    for name, (_, components) in scores.items()
                    if components
                },
                "stopped": output.stopped,
                **({} if flags is None else {"nsfw_content_detected": flags[row].tolist()}),
                "cost": {name: spent / len(batch_runs) for name, spent in asdict(output.cost).items()},
            }

    def _other_scores(self, output: SteeringOutput, prompts: Sequence[str]) -> dict[str, Scores]:
        """Score the finished images by the other rewards and their components: (B, K) each."""
        size = output.rewards.shape[1]
        read = [prompt for prompt in prompts for _ in range(size)]
        scores = {}
        for name, reward in self.spec.rewards.items():
            if name != self.spec.first:
                totals, components = score_in_batches(reward, output.images, read)
                scores[name] = totals.view(-1, size), {key: one.view(-1, size) for key, one in components.items()}
        return scores

    def _pictures(self) -> Iterator[tuple[int, Image.Image]]:
        for place in set(self._picked) & set(self.grid_places):
            yield place, thumbnail(self._picked[place][0])


@contextmanager
def contender_errors(name: str) -> Iterator[None]:
    """Prefix the errors of a contender with its name."""
    hint = "a smaller --batch or fewer --particles need less"
    with wrap_errors(name, "finished prompts are kept", hint), named(name):
        yield


def missing(prepared: PreparedContender, stored: ContenderResults, spec: EvaluationSpec, batch: int) -> list[range]:
    """List the groups of prompts that are incomplete."""
    return [group for group in prepared.groups(spec, batch) if not all(place in stored.runs for place in group)]


def mean_cost(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average the cost of runs; older runs lack the newer fields of `Cost`."""
    return {cost.name: sum(run["cost"].get(cost.name, 0) for run in runs) / len(runs) for cost in fields(Cost)}
