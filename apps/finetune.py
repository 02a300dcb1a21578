"""The job behind `steer finetune`: a configuration in, a folder of weights, records and pictures out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

from steer.apps.finetune_config import FinetuneConfig
from steer.apps.models import check_device, load_pipeline
from steer.apps.named_errors import errors_named, named
from steer.apps.processes import processes, speaks
from steer.apps.prompts import find_prompts
from steer.apps.specs import reward_here
from steer.checkpoint import Checkpoints
from steer.choices import choose, nearest
from steer.errors import InputError
from steer.guards import KLControl
from steer.pipelines import FinetuneResult
from steer.pipelines.choices import check_choices
from steer.pipelines.finetune_method import Record
from steer.pipelines.finetune_run import INTERRUPTED
from steer.pipelines.finetune_state import SERIES
from steer.pipelines.held_out import Evaluated
from steer.reward import Reward
from steer.staged import write_text
from steer.trainable import read_lora

USES = {  # how exported weights are used, by the name of their file; other names are the denoiser's folder
    "pytorch_lora_weights.safetensors": "pipe.load_lora_weights({folder!r})",
    "adapter_model.safetensors": "peft, as README.md in {folder!r} shows",
}
KEPT = "checkpoints are kept, --resume goes on"
LESS = "a smaller micro_batch or gradient_checkpointing: true need less"
FULL = "pipe.{name} = type(pipe.{name}).from_pretrained({path!r})"


@dataclass(frozen=True)
class Material:
    """What a run learns from and is judged by."""

    prompts: Sequence[str]
    eval_prompts: Sequence[str]
    reward: Reward | None  # None where humans choose
    eval_rewards: Sequence[Reward]

    @property
    def judges(self) -> list[Reward]:
        """The rewards of evaluations, in their order."""
        return [reward for reward in (self.reward, *self.eval_rewards) if reward is not None]


def finetune(config: FinetuneConfig, resume: bool = False) -> FinetuneResult:
    """Trains, and writes beside what `train` writes: config.yaml, samples/, and at the end plots/ and README.md.

    Raises InputError for what cannot be, before any model is loaded.
    """
    from steer.apps.finetune_report import write_grid, write_report

    job, out, told = config.job, Path(config.job.output_dir), config.plain()
    here = processes(cpu=job.device == "cpu")
    with here.main_first():
        material = gather(config, resume)
        pipe = load_pipeline(
            job.model, here.device(job.device), job.dtype, variant=job.variant, config=job.model_config_folder
        )
    method = config.method(pipe, material.reward)
    _check_call(config, method.pipe)

    @cache
    def write_once() -> None:  # once the folder is known to be this run's
        write_config(out, told)

    def on_evaluation(evaluated: Evaluated) -> None:
        write_once()
        write_grid(evaluated, out, config.settings.eval_samples)

    with errors_named(config.source.name, KEPT, LESS):
        result = learn(config, method, material, resume, told, lambda record: write_once(), on_evaluation)
        if here.is_main:
            write_once()
            if result.stopped != INTERRUPTED:
                write_report(out, told, result)
    return result


def learn(
    config: FinetuneConfig,
    method: Any,
    material: Material,
    resume: bool,
    told: Mapping[str, Any],
    on_update: Callable[[Record], None],
    on_evaluation: Callable[[Evaluated], None],
) -> FinetuneResult:
    """The training itself by `config.method`, from prompts or from choices.

    told  what the files of the run say of the configuration
    """
    choices = config.job.choices
    train = method.train if choices is None else method.train_on_choices
    result: FinetuneResult = train(
        material.prompts if choices is None else Path(choices),
        Path(config.job.output_dir),
        config.settings,
        eval_prompts=material.eval_prompts,
        eval_rewards=material.eval_rewards,
        resume=resume,
        about=told,
        on_update=on_update,
        on_evaluation=on_evaluation,
    )
    return result


def write_config(out: Path, told: Mapping[str, Any]) -> None:
    """Writes config.yaml in the folder of a run."""
    write_text(out / "config.yaml", yaml.safe_dump(dict(told), sort_keys=False, allow_unicode=True, width=120))


def gather(config: FinetuneConfig, resume: bool) -> Material:
    """Looks at all that can be wrong without a model, the cheapest first, and loads prompts and rewards."""
    job, source = config.job, config.source
    out, whose = Path(job.output_dir), f"{source.key('output_dir')} {job.output_dir}"
    _check_run(out, whose, resume)
    _check_trackers(config)
    prompts, eval_prompts = _prompts(config)
    if job.choices is not None:
        with named(source.key("choices")):
            check_choices(Path(job.choices))
    check_device(job.device)
    with named(source.key("reward")):
        reward = None if job.reward is None else reward_here(job.reward)
    with named(source.key("eval_rewards")):
        material = Material(prompts, eval_prompts, reward, [reward_here(spec) for spec in job.eval_rewards])
        names = [one.name for one in material.judges]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{min(twice)!r} is there twice, or is trained on: each reward must be another one")
    try:
        KLControl(config.settings.kl_weight, config.settings.kl_target, config.settings.kl_budget)
        config.method(None, reward).check(config.settings)
        if config.settings.init_adapter is not None:
            read_lora(config.settings.init_adapter)
    except InputError as error:
        raise source.blame(error) from error
    if speaks():
        _check_writable(out, whose)
    return material


def _check_call(config: FinetuneConfig, pipe: Any) -> None:
    """Raises InputError for an argument that this pipeline's call does not know: only the loaded one can tell."""
    known = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in config.settings.call if name not in known]:
        key = config.source.key(f"call.{unknown[0]}")
        raise InputError(
            f"{key}: {type(pipe).__name__} has no such argument, did you mean {nearest(unknown[0], known)}?"
        )


def _prompts(config: FinetuneConfig) -> tuple[list[str], list[str]]:
    """Prompts to learn from and held-out ones. Those that are both are told, not refused: seen ones count too."""
    job, source = config.job, config.source
    prompts, held_out = [], []
    if job.prompts is not None:
        with named(source.key("prompts")):
            prompts = find_prompts(job.prompts, job.prompt_column)
    if job.eval_prompts is not None:
        with named(source.key("eval_prompts")):
            held_out = find_prompts(job.eval_prompts, job.eval_prompt_column)
        count = min(job.eval_prompts_count or len(held_out), len(held_out))
        held_out = [held_out[place * len(held_out) // count] for place in range(count)]
    seen = set(prompts)
    if speaks() and (both := [prompt for prompt in held_out if prompt in seen]):
        click.echo(
            f"steer: {len(both)} of {len(held_out)} eval_prompts are trained on too, such as {both[0]!r}: evaluations "
            "tell less of prompts that were never seen",
            err=True,
        )
    return prompts, held_out


def _check_trackers(config: FinetuneConfig) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, here = ({one.value for one in some} - {"all"} for some in (LoggerType, get_available_trackers()))
    with named(config.source.key("log_with")):
        for name in config.settings.log_with:
            choose("tracker", name, dict.fromkeys(known))
            if name not in here:
                raise InputError(f"{name} is not installed: pip install {name}, or use another tracker, [] for none")


def _check_run(out: Path, named: str, resume: bool) -> None:
    """Raises InputError for a folder with a run that this one must not go over, or cannot go on with."""
    whole, skipped = Checkpoints(out / "checkpoints").latest()
    if not resume and (whole or skipped or (out / SERIES["records"]).exists()):
        raise InputError(f"{named} holds a run: go on with it by --resume, or choose another folder")
    if skipped and not whole:
        raise InputError(f"{named}: no checkpoint there is whole ({skipped[0]}); choose another folder")
    for line in skipped:
        click.echo(f"steer: skipped a checkpoint: {line}", err=True)


def _check_writable(out: Path, named: str) -> None:
    try:
        write_text(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(f"{named}: cannot write there ({error.strerror})") from error


def summary(config: FinetuneConfig, result: FinetuneResult) -> str:
    """How a run ended, in one line."""
    job = config.job
    name, key = (job.reward, "reward") if job.choices is None else ("accuracy", "accuracy")
    what, means = f"{name} in training", [record[key] for record in result.records]
    if result.evaluations:
        trained = next(name for name, value in result.evaluations[0].items() if isinstance(value, list))
        what = f"{trained.removeprefix('eval/')} on held-out prompts"
        means = [record[trained][0] for record in result.evaluations]
    seconds = sum(record["seconds"] for record in result.records)
    line = f"{job.method}: {result.step} updates in {seconds:.0f} s"
    line += f", {what} {means[0]:.3f} → {means[-1]:.3f}" if means else ""
    line += f"; stopped because {result.stopped}" if result.stopped else ""
    if result.weights is None:
        return line
    name, path = result.weights.name, str(result.weights)
    use = USES.get(name, FULL).format(folder=str(result.weights.parent), name=name, path=path)
    return f"{line}; use the weights by {use}"
