"""The job behind `steer evaluate`: contenders, prompts, rewards and seeds in; a folder of tables and figures out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.evaluation.report import figures, write_report
from steer.apps.evaluation.spec import (
    BatchedJob,
    Contender,
    ContenderRunner,
    EvaluationSpec,
    Json,
    PreparedContender,
    ResultStore,
    contender_errors,
    missing,
    plain_call,
    prepare_contenders,
    versions,
)
from steer.apps.methods import DisableAdapter
from steer.apps.models import check_device, load_pipeline
from steer.apps.plots import evenly_spaced
from steer.apps.processes import LaunchContext, launch_context
from steer.apps.prompts import call_arguments, check_size
from steer.apps.reward_specs import resolve_reward
from steer.errors import InputError
from steer.pipelines.training.evaluation import policy_divergence
from steer.pipelines.training.method import rows_of
from steer.reward import Reward
from steer.training.overoptimization import interval
from steer.training.rollout import Rows, Sampler

KLEstimate = dict[str, Any]


def estimate_kl(
    pipe: Any,
    off: DisableAdapter,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    eta: float | None,
    seed: int,
    chunk: int,
) -> KLEstimate:
    """Estimate the KL of finetuned weights from the base model: {"nats": [mean, low, high], "by_prompt", "eta"}.

    eta  noise of the steps; None and 0, which have no density, become 1
    Returns {"skipped": reason} for a solver without a Gaussian kernel.
    """
    noise = eta or 1.0
    rows = rows_of(prompts, 1, seed, "kl", shared_start=False)
    try:
        results = trajectory_kl(pipe, off, rows, call, noise, chunk)
    except InputError as error:  # no Gaussian kernel, or no step with noise
        return {"skipped": str(error)}
    return {"nats": interval(results), "by_prompt": results.tolist(), "eta": noise}


def trajectory_kl(
    pipe: Any, off: DisableAdapter, rows: Rows, call: Mapping[str, Any], eta: float, chunk: int
) -> Tensor:
    """Estimate KL(pθ ‖ p_ref) (N,) = Σ_t ‖μθ(x_t) − μ_ref(x_t)‖² / 2τ_t² in nats, along rollouts x of pθ.

    The mean over rollouts is the KL of the trajectories.

    pθ     the pipeline; p_ref the same inside `off()`
    chunk  rows per batch
    Raises InputError for a solver without a Gaussian kernel, or without noise.
    """
    adapted = Sampler(pipe, call, eta)
    with off():
        reference = Sampler(pipe, call, eta)  # text embeddings differ if an encoder was finetuned
    return torch.cat([policy_divergence(adapted, part, off, reference)[0] for part in rows.split(chunk)])


__all__ = ["Contender", "evaluate"]

MAX_GRID_PROMPTS = 6  # in the grid of images


@dataclass(frozen=True)
class PendingWork:
    """The missing work of a contender: groups of prompts by index, and its KL."""

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
    """Compare contenders on the same prompts and seeds, write everything to `out`, and return evaluation.json.

    rewards     the first reward steers and picks images, the others only score
    options     fields of SamplingConfig for all contenders; a contender's own options override them
    tags        a tag for each prompt, such as its task
    kl_prompts  number of evenly spaced prompts for the KL of finetuned weights; 0: no KL
    batch       images per call, for methods with independent runs
    The same call resumes an interrupted evaluation, with any number of processes; the main process writes the report,
    the others return {}. Raises InputError for invalid arguments before anything is sampled.
    """
    context, store = launch_context(), ResultStore(out)
    with context.local_main_process_first():
        check_device(device)
        if kl_prompts < 0 or batch < 1:
            raise InputError(f"--kl-prompts must be at least 0 and --batch at least 1, got {kl_prompts} and {batch}")
        loaded = _rewards(rewards, reward_timeout)
        spec = EvaluationSpec(tuple(prompts), None if tags is None else tuple(tags), loaded, seeds, options or {})
        prepared_contenders = prepare_contenders(contenders, spec)
    kl_places = evenly_spaced(len(prompts), kl_prompts) if kl_prompts else []
    pending = context.broadcast_from_main(lambda: _missing(store, prepared_contenders, spec, batch, len(kl_places)))
    evaluation_runner = EvaluationRunner(
        spec, store, context, PipelineCache(context, context.device(device)), batch, kl_places
    )
    evaluation_runner.check([prepared for prepared, work in zip(prepared_contenders, pending, strict=True) if work])
    for number, (prepared, work) in enumerate(zip(prepared_contenders, pending, strict=True)):
        if work:
            evaluation_runner.run(prepared, work, kl=work.kl and number % context.world_size == context.rank)
    context.wait_for_everyone()
    if not context.is_main_process:
        return {}
    stored = [store.read(prepared) for prepared in prepared_contenders]
    if any(missing(prepared, one, spec, batch) for prepared, one in zip(prepared_contenders, stored, strict=True)):
        raise InputError(f"--out {out}: results are missing: all processes must write to the same folder")
    report = figures(spec, [prepared.particles for prepared in prepared_contenders], stored, len(kl_places))
    with contender_errors(f"--out {out}"):
        write_report(report, store, evenly_spaced(len(prompts), MAX_GRID_PROMPTS))
    return report


def _rewards(rewards: Sequence[str | Reward], timeout: float | None) -> dict[str, Reward]:
    results: dict[str, Reward] = {}
    for one in rewards:
        name = one if isinstance(one, str) else one.name
        if name in results:
            raise InputError(f"reward {name!r} is repeated: give each reward once")
        results[name] = resolve_reward(one, timeout) if isinstance(one, str) else one
    return results


def _missing(
    store: ResultStore,
    prepared_contenders: Sequence[PreparedContender],
    spec: EvaluationSpec,
    batch: int,
    kl_prompts: int,
) -> list[PendingWork]:
    store.open(spec)
    results = []
    for prepared in prepared_contenders:
        stored = store.read(prepared)
        kl = prepared.finetuned is not None and kl_prompts > 0 and str(kl_prompts) not in stored.kl
        results.append(PendingWork(missing(prepared, stored, spec, batch), kl))
    return results


@dataclass
class PipelineCache:
    """A cache of one pipeline, the last one used."""

    context: LaunchContext
    device: str | None
    _key: tuple[Any, ...] | None = None
    _pipe: Any = None

    def get(self, model: str, dtype: str | None, loading: Mapping[str, str] | None = None) -> Any:
        """Load a pipeline, in all processes alike. Raises InputError if it cannot be loaded."""
        key, loading = (model, dtype, loading or {}), loading or {}
        if self._key != key:
            self._pipe = self._key = None  # frees the memory of the previous one
            with self.context.local_main_process_first():
                self._pipe = load_pipeline(model, self.device, dtype, **loading)
            self._pipe.set_progress_bar_config(disable=True)
            self._key = key
        return self._pipe


@dataclass
class EvaluationRunner:
    """Sampling and scoring of the contenders, one after the other."""

    spec: EvaluationSpec
    store: ResultStore
    context: LaunchContext
    models: PipelineCache
    batch: int
    kl_places: Sequence[int]  # indices of the prompts for KL
    kl_cache: dict[str, Json] = field(default_factory=dict)

    def check(self, prepared_contenders: Sequence[PreparedContender]) -> None:
        """Raise InputError for a model that cannot be loaded, or weights that do not match, before sampling any image.

        Contenders are checked in reverse order, so that the first model stays loaded.
        """
        distinct = {
            (one.contender.model, one.settings.dtype, one.identity["weights"], *one.settings.loading.items()): one
            for one in prepared_contenders
        }
        for prepared in reversed(distinct.values()):
            with self._loaded_pipeline(prepared) as (pipe, _):
                check_size(call_arguments(type(pipe), prepared.settings))

    def run(self, prepared: PreparedContender, work: PendingWork, kl: bool) -> None:
        """Do this process's share of the work; results are saved after each group."""
        name, process = prepared.contender.name, self.context.rank
        with self._loaded_pipeline(prepared) as (pipe, off):
            stored = self.store.read(prepared, process)
            if (environment := versions(pipe.device)) not in stored.environments:
                stored.environments.append(environment)
            runner = ContenderRunner(
                self.spec,
                prepared,
                self.store,
                pipe,
                self.batch,
                evenly_spaced(len(self.spec.prompts), MAX_GRID_PROMPTS),
            )
            share = [work.groups[n] for n in self.context.split_indices(len(work.groups))]
            disable = None if self.context.is_main_process else True
            with tqdm(desc=name, unit="prompt", total=sum(map(len, share)), disable=disable) as bar:
                for group in share:
                    runner.make(group, stored)
                    self.store.write(stored, process)
                    bar.update(len(group))
            if kl and off is not None:
                with contender_errors(f"{name}, KL"):
                    stored.kl[str(len(self.kl_places))] = self._kl(prepared, pipe, off)
                self.store.write(stored, process)

    def _kl(self, prepared: PreparedContender, pipe: Any, off: DisableAdapter) -> Json:
        settings, prompts = prepared.settings, [self.spec.prompts[place] for place in self.kl_places]
        reward = self.spec.rewards[self.spec.first]
        call = plain_call(BatchedJob(pipe, reward, prompts, settings, self.store.out))
        key = json.dumps([prepared.identity["model"], prepared.identity["weights"], call, settings.eta, settings.dtype])
        if key not in self.kl_cache:  # methods with the same weights share the KL
            self.kl_cache[key] = estimate_kl(pipe, off, prompts, call, settings.eta, settings.seed, self.batch)
        return self.kl_cache[key]

    @contextmanager
    def _loaded_pipeline(self, prepared: PreparedContender) -> Iterator[tuple[Any, DisableAdapter | None]]:
        pipe = self.models.get(prepared.contender.model, prepared.settings.dtype, prepared.settings.loading)
        with prepared.finetuned.applied_to(pipe) if prepared.finetuned else nullcontext() as off:
            yield pipe, off
