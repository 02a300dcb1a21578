"""The job behind `steer evaluate`: contenders, prompts, rewards and seeds in; a folder of figures and pictures out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.evaluation.contest import (
    Bench,
    Contender,
    Contest,
    Entrant,
    Json,
    Store,
    Together,
    blamed,
    enter,
    missing,
    plain_call,
    versions,
)
from steer.apps.evaluation.report import figures, write_report
from steer.apps.methods import Off
from steer.apps.models import check_device, load_pipeline
from steer.apps.plots import evenly
from steer.apps.processes import Processes, processes
from steer.apps.reward_specs import reward_here
from steer.diffusion.schedules import Gaussian
from steer.errors import InputError
from steer.pipelines.training.evaluation import interval
from steer.pipelines.training.method import rows_of
from steer.reward import Reward
from steer.training.guards import kl
from steer.training.rollout import Rows, Sampler, Trajectories

Told = dict[str, Any]


def kl_told(
    pipe: Any, off: Off, prompts: Sequence[str], call: Mapping[str, Any], eta: float | None, seed: int, chunk: int
) -> Told:
    """KL of the pipeline from itself without its weights: {"nats": [mean, low, high], "by_prompt", "eta"}.

    eta  of the steps; None or 0, which have no density, stand for 1
    Where there is none to be had, {"skipped": why}.
    """
    noise = eta or 1.0
    rows = rows_of(prompts, 1, seed, "kl", shared_start=False)
    try:
        found = trajectory_kl(pipe, off, rows, call, noise, chunk)
    except InputError as error:  # no Gaussian kernel, or no step with noise: what it says is the reason
        return {"skipped": str(error)}
    return {"nats": interval(found), "by_prompt": found.tolist(), "eta": noise}


def trajectory_kl(pipe: Any, off: Off, rows: Rows, call: Mapping[str, Any], eta: float, chunk: int) -> Tensor:
    """KL(pθ ‖ p_ref) (N,) = Σ_t ‖μθ(x_t) − μ_ref(x_t)‖² / 2τ_t² in nats, along rollouts x of pθ: in the mean over them
    it is that of the trajectories.

    pθ     the pipeline as it is; p_ref the same inside `off()`
    chunk  rows drawn at a time
    Raises InputError where the solver has no Gaussian kernel, or no step has noise.
    """
    adapted = Sampler(pipe, call, eta)
    with off():
        reference = Sampler(pipe, call, eta)  # it has other texts, where an encoder was finetuned too
    found = []
    for some in rows.split(chunk):
        stored, _ = adapted.rollout(some)
        steps = _kernels(adapted, stored)
        with off():
            before = _kernels(reference, stored)
        found.append(torch.stack([kl(p, q) for p, q in zip(steps, before, strict=True)]).sum(0))
    return torch.cat(found)


def _kernels(sampler: Sampler, stored: Trajectories) -> list[Gaussian]:
    """p(· | x_t) of all stochastic steps, on the CPU."""
    found: list[Gaussian] = []

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        found.append(Gaussian(kernel.mean.cpu(), kernel.std.cpu()))

    sampler.replay(stored, keep)
    return found


__all__ = ["Contender", "evaluate"]

SHOWN = 6  # prompts in the grid of images


@dataclass(frozen=True)
class Work:
    """What is still to be done for one contender: groups of prompts, by their places, and its KL."""

    groups: list[range]
    kl: bool

    def __bool__(self) -> bool:
        return bool(self.groups or self.kl)


def evaluate(
    contenders: Sequence[Contender],
    prompts: Sequence[str],
    rewards: Sequence[str | Reward],
    seeds: int,
    out: Path,
    options: Mapping[str, Any] | None = None,
    *,
    tags: Sequence[str] | None = None,
    kl_prompts: int = 16,
    batch: int = 8,
    device: str | None = None,
    reward_timeout: float | None = None,
) -> Json:
    """Compares contenders on the same prompts and seeds, writes everything to `out`, and returns evaluation.json.

    rewards     the first one steers and picks, the others only judge
    options     fields of SampleSettings for all contenders; each one's own go before them
    tags        a word for each prompt, such as its task
    kl_prompts  so many, evenly spaced, for the KL of finetuned weights; 0: none
    batch       images made in one call, where the method can
    The same call again does only what is missing, in any number of processes, of which the main one writes the report
    (the others return {}). Raises InputError for what cannot be, before anything is made.
    """
    here, store = processes(), Store(out)
    with here.main_first():
        check_device(device)
        if kl_prompts < 0 or batch < 1:
            raise InputError(f"--kl-prompts must be at least 0 and --batch at least 1, got {kl_prompts} and {batch}")
        loaded = _rewards(rewards, reward_timeout)
        contest = Contest(tuple(prompts), None if tags is None else tuple(tags), loaded, seeds, options or {})
        entrants = enter(contenders, contest)
    asked = evenly(len(prompts), kl_prompts) if kl_prompts else []
    todo = here.from_main(lambda: _missing(store, entrants, contest, batch, len(asked)))
    hall = Hall(contest, store, here, Models(here, here.device(device)), batch, asked)
    hall.check([entrant for entrant, work in zip(entrants, todo, strict=True) if work])
    for number, (entrant, work) in enumerate(zip(entrants, todo, strict=True)):
        if work:
            hall.run(entrant, work, kl=work.kl and number % here.count == here.index)
    here.wait()
    if not here.is_main:
        return {}
    stored = [store.read(entrant) for entrant in entrants]
    if any(missing(entrant, one, contest, batch) for entrant, one in zip(entrants, stored, strict=True)):
        raise InputError(f"--out {out}: not all is there: the processes must write to the same folder")
    report = figures(contest, [entrant.particles for entrant in entrants], stored, len(asked))
    with blamed(f"--out {out}"):
        write_report(report, store, evenly(len(prompts), SHOWN))
    return report


def _rewards(rewards: Sequence[str | Reward], timeout: float | None) -> dict[str, Reward]:
    found: dict[str, Reward] = {}
    for one in rewards:
        name = one if isinstance(one, str) else one.name
        if name in found:
            raise InputError(f"reward {name!r} is there twice")
        found[name] = reward_here(one, timeout) if isinstance(one, str) else one
    return found


def _missing(store: Store, entrants: Sequence[Entrant], contest: Contest, batch: int, kl_prompts: int) -> list[Work]:
    store.open(contest)
    found = []
    for entrant in entrants:
        stored = store.read(entrant)
        kl = entrant.finetuned is not None and kl_prompts > 0 and str(kl_prompts) not in stored.kl
        found.append(Work(missing(entrant, stored, contest, batch), kl))
    return found


@dataclass
class Models:
    """The pipeline that was used last; another one takes its place."""

    here: Processes
    device: str | None
    _key: tuple[Any, ...] | None = None
    _pipe: Any = None

    def get(self, model: str, dtype: str | None, loading: Mapping[str, str] | None = None) -> Any:
        """Raises InputError where it cannot be loaded. To be called by all processes alike."""
        key, loading = (model, dtype, loading or {}), loading or {}
        if self._key != key:
            self._pipe = self._key = None  # frees the memory of the one before
            with self.here.main_first():
                self._pipe = load_pipeline(model, self.device, dtype, **loading)
            self._pipe.set_progress_bar_config(disable=True)
            self._key = key
        return self._pipe


@dataclass
class Hall:
    """Where contenders are called up, one after the other."""

    contest: Contest
    store: Store
    here: Processes
    models: Models
    batch: int
    asked: Sequence[int]  # places of the prompts for KL
    measured: dict[str, Json] = field(default_factory=dict)

    def check(self, entrants: Sequence[Entrant]) -> None:
        """Raises InputError for a model that cannot be loaded, or weights that do not fit, before any image is made.

        From the last to the first: what is needed first is then loaded already.
        """
        told = {(one.contender.model, one.settings.dtype, one.about["weights"]): one for one in entrants}
        for entrant in reversed(told.values()):
            with self._worn(entrant):
                pass

    def run(self, entrant: Entrant, work: Work, kl: bool) -> None:
        """This process's share of the work; saved after each group."""
        name, process = entrant.contender.name, self.here.index
        with self._worn(entrant) as (pipe, off):
            stored = self.store.read(entrant, process)
            if (made := versions(pipe.device)) not in stored.made:
                stored.made.append(made)
            bench = Bench(self.contest, entrant, self.store, pipe, self.batch, evenly(len(self.contest.prompts), SHOWN))
            share = [work.groups[n] for n in self.here.share(len(work.groups))]
            quiet = None if self.here.is_main else True
            with tqdm(desc=name, unit="prompt", total=sum(map(len, share)), disable=quiet) as bar:
                for group in share:
                    bench.make(group, stored)
                    self.store.write(stored, process)
                    bar.update(len(group))
            if kl and off is not None:
                with blamed(f"{name}, KL"):
                    stored.kl[str(len(self.asked))] = self._kl(entrant, pipe, off)
                self.store.write(stored, process)

    def _kl(self, entrant: Entrant, pipe: Any, off: Off) -> Json:
        settings, prompts = entrant.settings, [self.contest.prompts[place] for place in self.asked]
        reward = self.contest.rewards[self.contest.first]
        call = plain_call(Together(pipe, reward, prompts, settings, self.store.out))
        key = json.dumps([entrant.about["model"], entrant.about["weights"], call, settings.eta, settings.dtype])
        if key not in self.measured:  # of several methods with the same weights it is one
            self.measured[key] = kl_told(pipe, off, prompts, call, settings.eta, settings.seed, self.batch)
        return self.measured[key]

    @contextmanager
    def _worn(self, entrant: Entrant) -> Iterator[tuple[Any, Off | None]]:
        pipe = self.models.get(entrant.contender.model, entrant.settings.dtype, entrant.settings.loading)
        with entrant.finetuned.applied_to(pipe) if entrant.finetuned else nullcontext() as off:
            yield pipe, off
