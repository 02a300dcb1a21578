"""The job of `steer finetune`: read a configuration, train, and write weights, metrics and pictures to a folder."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import click
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from steer.apps.asking import TerminalAnswers
from steer.apps.errors import check_writable, named, wrap_errors
from steer.apps.expansion import is_text_model
from steer.apps.models import check_device, is_cpu, load_pipeline
from steer.apps.processes import is_main_process, launch_context
from steer.apps.prompts import PromptRow, evenly_chosen, load_rows, metadata_of
from steer.apps.reward_specs import resolve_reward
from steer.arguments import field_help
from steer.assets import CONFIGS
from steer.errors import InputError
from steer.files import IMAGE_SUFFIXES, read_image, write_text
from steer.pipelines.particle_batch import as_type
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import TrainingResult
from steer.pipelines.training.methods import METHODS
from steer.pipelines.training.state import checkpoint_to_resume
from steer.pipelines.training.trainer import PAUSED, Trainer
from steer.registry import choose, did_you_mean, nearest
from steer.training.trainable import SECOND_DENOISER, read_lora
from steer.yaml_text import read_yaml


@dataclass(frozen=True)
class FinetuneJob:
    """Model, rewards and data of a run: the keys of a configuration that are not fields of the method's TrainingConfig.

    method              training method, such as grpo
    reward              reward to train on; with preferences, only the first reward of evaluations
    judge               judge of pairs of images, as `steer.load_judge` reads it, in place of reward: the method learns
                        from each sample's win rate against the others of its prompt, as from reward tournament(JUDGE)
    eval_rewards        held-out rewards, evaluated on eval_prompts too; the first decides which weights are best
    model               an embedded model, a folder, or ORGANISATION/NAME
    variant             variant of the model's weights, such as fp16
    model_config_dir    for a model in a single file: a folder of such a model in diffusers' format
    prompts             prompts to learn from: an embedded list, a file, or a dataset of the hub
    preferences         in place of prompts: a folder of human comparisons, for d3po, which also sets the arguments of
                        sampling; or a table of pairs of images, for dpo, as `steer rewards train` reads it
    eval_prompts        held-out prompts, from the same kinds of sources as `prompts`
    eval_prompts_count  number of them, evenly spaced; by default all
    prompt_column, eval_prompt_column  columns of the prompts in a table; by default "prompt"
    metadata_columns    columns of the prompt tables, for rewards that take metadata
    condition_columns   columns of the prompt tables: arguments of the pipeline's call for each prompt, such as image,
                        mask_image or control_image; paths of images are relative to the table
    device              by default the GPU if there is one
    dtype               precision of the model; by default float32 on the CPU, bfloat16 elsewhere
    """

    method: str
    reward: str | None = None
    judge: str | None = None
    model: str = "scenes"
    prompts: str | None = None
    preferences: str | None = None
    prompt_column: str | None = None
    eval_prompts: str | None = None
    eval_prompt_column: str | None = None
    eval_prompts_count: int | None = None
    metadata_columns: tuple[str, ...] = ()
    condition_columns: tuple[str, ...] = ()
    eval_rewards: tuple[str, ...] = ()
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    model_config_dir: str | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.preferences is None):
            raise InputError("prompts or preferences: give one of the two to learn from")
        if self.reward is not None and self.judge is not None:
            raise InputError("reward and judge: give one of the two to train on")
        if self.trained_reward is None and self.preferences is None:
            raise InputError("reward is missing: say what to train on, `steer rewards` lists names")
        if self.eval_prompts_count is not None and self.eval_prompts_count < 1:
            raise InputError(f"eval_prompts_count must be at least 1, got {self.eval_prompts_count}")
        if self.eval_rewards and self.eval_prompts is None:
            raise InputError("eval_rewards need eval_prompts, and there are none: give both")
        if self.eval_prompts is not None and not (self.reward or self.eval_rewards):
            raise InputError("eval_prompts need a reward to evaluate their images: give eval_rewards")

    @property
    def trained_reward(self) -> str | None:
        """The text of the reward, or of the judge's tournament."""
        return self.reward if self.judge is None else f"tournament({self.judge})"


DEFAULTS = {"log_with": ("tensorboard",), "output_dir": ...}  # defaults of the command that differ from TrainingConfig
NESTED = "call"  # the key with nested keys: --call.height
TYPES = {  # pydantic's kinds of error, in the terms of a YAML file
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number (1e9 does for no limit)",
    "bool_type": "true or false",
    "string_type": "text (a number in quotes is one)",
    "tuple_type": "a list, like [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
}


@dataclass(frozen=True)
class ConfigSource:
    """The origin of keys, for error messages: a configuration, and the keys that the command line changed."""

    name: str
    changed: frozenset[str] = frozenset()

    def key(self, key: str) -> str:
        """Return a key, or a place inside its value, as the user wrote it."""
        changed_keys = {key, key.partition(".")[0]} & self.changed
        return f"--{key.replace('_', '-')}" if changed_keys else f"{self.name}: {key}"

    def locate_error(self, error: InputError) -> InputError:
        """Return the error with the origin of the key that its message begins with."""
        first = re.match(r"\w*", str(error))[0]  # type: ignore[index]
        changed = first in self.changed
        return InputError(f"{self.key(first)}{str(error)[len(first) :]}" if changed else f"{self.name}: {error}")


@dataclass(frozen=True)
class FinetuneConfig:
    """A run of `steer finetune`: the job, and the configuration of its method."""

    job: FinetuneJob
    training: TrainingConfig
    source: ConfigSource

    def plain(self) -> dict[str, Any]:
        """Return every key with its value, in the form of a configuration file."""
        return json.loads(json.dumps(asdict(self.job) | asdict(self.training)))

    def trainer(self, pipe: Any, **data: Any) -> Trainer[Any]:
        """Create the trainer over a pipeline, or over None to check the arguments before a model is loaded."""
        return METHODS[self.job.method](pipe, config=self.training, preferences=self.job.preferences, **data)


def read_config(name: str, overrides: Mapping[str, str] | None = None) -> FinetuneConfig:
    """Read an embedded configuration or a YAML file, with `overrides` (key → YAML) in place of its values.

    Raises InputError, in one line, for the first error.
    """
    overrides, source = dict(overrides or {}), ConfigSource(name, frozenset(overrides or {}))
    config_values = _read_file(name)
    given = overrides.pop("method", config_values.get("method"))
    if not isinstance(given, str):
        raise InputError(f"{source.key('method')} must be one of {', '.join(METHODS)}, got {json.dumps(given)}")
    with named(source.key("method")):
        choose("method", given, METHODS)
    schema, config_class = schema_of(given), METHODS[given].config_class
    config_values = _with_overrides(config_values, overrides, schema) | {"method": given}
    parsed = _validated(schema, _with_preference_defaults(config_values, source), source)
    try:
        job = FinetuneJob(**{one.name: parsed[one.name] for one in fields(FinetuneJob)})
        training = config_class(**{one.name: parsed[one.name] for one in fields(config_class)})
    except InputError as error:
        raise source.locate_error(error) from error
    return FinetuneConfig(job, training, source)


def describe_keys(name: str) -> list[tuple[str, str]]:
    """Return the keys of a configuration, as options of the command, with their help and their values in it."""
    config = read_config(name)
    texts = field_help(FinetuneJob) | config.training.help()
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in config.plain().items()}
    return [(f"--{key.replace('_', '-')}", f"{texts[key]} [{value}]") for key, value in values.items()]


@cache
def schema_of(method: str) -> type[BaseModel]:
    """Return the schema of a method's configuration: the fields of FinetuneJob and of its config dataclass."""
    keys: dict[str, Any] = {}
    for cls in (FinetuneJob, METHODS[method].config_class):
        hints = get_type_hints(cls)
        for one in fields(cls):
            default = ... if one.default is MISSING else DEFAULTS.get(one.name, one.default)
            if one.default_factory is not MISSING:
                default = Field(default_factory=one.default_factory)
            keys[one.name] = (hints[one.name], default)
    return create_model(method, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **keys)


def _read_file(name: str) -> dict[str, Any]:
    path = CONFIGS.get(name, Path(name))
    try:
        config_values = read_yaml(path.read_text(encoding="utf-8-sig"), name)
    except FileNotFoundError as error:
        raise InputError(f"unknown configuration {name!r}: use {nearest(name, CONFIGS)}, or a YAML file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from error
    if not isinstance(config_values, dict):
        raise InputError(f"{name}: expected lines of `key: value`, as in {nearest(name, CONFIGS)}")
    return config_values


def _with_overrides(
    config_values: dict[str, Any], overrides: Mapping[str, str], schema: type[BaseModel]
) -> dict[str, Any]:
    """Override values of the file by values of the command line: YAML, or text if the key takes text."""
    config_values = dict(config_values)
    for key, word in overrides.items():
        name, _, inner = key.partition(".")
        asked = schema.model_fields[key].annotation if key in schema.model_fields else None
        text = asked is str or (asked == str | None and word != "null")
        value = word if text else read_yaml(word, f"--{key.replace('_', '-')}")
        if name != NESTED or not inner:
            config_values[key] = value
        elif isinstance(before := config_values.get(name, {}), dict):
            config_values[name] = before | {inner: value}
    return config_values


def _with_preference_defaults(config_values: Mapping[str, Any], source: ConfigSource) -> dict[str, Any]:
    """Fill in the sampling arguments of a preference dataset if the configuration has none.

    Preferences given on the command line override the prompts and the sampling arguments of the file.
    """
    changed_keys = {key.partition(".")[0] for key in source.changed}
    asked = "preferences" in changed_keys and config_values.get("preferences") is not None
    config_values = {
        key: value for key, value in config_values.items() if not asked or key != "prompts" or key in changed_keys
    }
    if not isinstance(folder := config_values.get("preferences"), str) or config_values.get("prompts") is not None:
        return config_values
    with named(source.key("preferences")):
        drawn = METHODS[config_values["method"]].preference_defaults(folder)
    return drawn | {
        key: value for key, value in config_values.items() if not asked or key in changed_keys or key not in drawn
    }


def _validated(schema: type[BaseModel], config_values: Mapping[str, Any], source: ConfigSource) -> dict[str, Any]:
    try:
        # By the rules of JSON: a list may be a tuple and an integer a float, but text is never a number.
        return schema.model_validate_json(json.dumps(config_values, default=str), strict=True).model_dump()
    except ValidationError as error:
        # An unknown key first: it may be a typo of a missing key.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        if holders := [method for method in METHODS if key in schema_of(method).model_fields]:
            owners = ", ".join(holders)
            raise InputError(f"{source.key(key)}: {schema.__name__} has no such option, it is one of {owners}")
        listed = f"`steer finetune {source.name} --help` lists the keys"
        hint = did_you_mean(key, schema.model_fields, listed, TrainingConfig.other_names)
        raise InputError(f"{source.key(key)}: unknown key, {hint}")
    if first["type"] == "missing":
        raise InputError(f"{source.name}: {key} is missing: give it there, or with --{key.replace('_', '-')}")
    asked = TYPES.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    raise InputError(f"{source.key(key)} must be {asked}, got {json.dumps(first['input'], ensure_ascii=False):.80}")


USAGE = {  # how to load exported weights, by the name of their file; other names are folders of a denoiser
    "pytorch_lora_weights.safetensors": "pipe.load_lora_weights({folder!r})",
    "learned_embeds.safetensors": "diffusers, as README.md in {folder!r} shows",
    "adapter_model.safetensors": "peft, as README.md in {folder!r} shows",
}
RESUME_HINT = "checkpoints are kept: resume with --resume"
MEMORY_HINT = "a smaller micro_batch or gradient_checkpointing: true need less"
FULL_USAGE = "pipe.{name} = type(pipe.{name}).from_pretrained({path!r})"


def finetune(
    config: FinetuneConfig, resume: bool = False, agreed: bool = False, callbacks: Sequence[Any] = ()
) -> TrainingResult:
    """Train, and add config.yaml, samples/ and, at the end, plots/ and README.md to the output folder.

    agreed     answer the first question of `ask` with yes
    callbacks  further callbacks of the trainer

    Raises InputError for bad arguments, before any model is loaded.
    """
    from steer.apps import finetune_report

    job, out = config.job, Path(config.training.output_dir)
    here = launch_context(cpu=is_cpu(job.device))
    with here.local_main_process_first():
        data = load_data(config, resume)
        pipe = load_pipeline(
            job.model, here.device(job.device), job.dtype, variant=job.variant, config=job.model_config_dir
        )
    _check_call(config, pipe)
    values = config.plain()
    files, answers = RunFiles(out, values), TerminalAnswers(out, agreed)
    trainer = config.trainer(pipe, **data, callbacks=[files, *callbacks], on_question=answers, run_config=values)
    with wrap_errors(config.source.name, RESUME_HINT, MEMORY_HINT):
        result = trainer.train(resume_from_checkpoint=resume)
        if here.is_main_process:
            write_config(out, values)
            if result.stopped not in PAUSED:
                finetune_report.write_report(trainer, result)
    return result


class RunFiles:
    """Callback that writes config.yaml and the pictures of evaluations, after the trainer has checked the folder."""

    def __init__(self, out: Path, config_values: Mapping[str, Any]) -> None:
        self.out, self.config_values = out, config_values

    def on_train_begin(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Write config.yaml."""
        if state.is_world_process_zero:
            write_config(self.out, self.config_values)

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        """Write the held-out images or texts."""
        from steer.apps import finetune_report

        if state.is_world_process_zero:
            finetune_report.write_samples(details["evaluation"], self.out, args.num_generations_eval)


def write_config(out: Path, config_values: Mapping[str, Any]) -> None:
    """Write config.yaml in the folder of a run."""
    write_text(out / "config.yaml", yaml.safe_dump(dict(config_values), sort_keys=False, allow_unicode=True, width=120))


def load_data(config: FinetuneConfig, resume: bool) -> dict[str, Any]:
    """Return prompts and rewards by the names of the trainer's arguments.

    All arguments are checked before a model is loaded, the cheapest first.
    """
    job, source, folder = config.job, config.source, config.training.output_dir
    out = Path(folder)
    with named(source.key("output_dir")):
        checkpoint_to_resume(out, resume, lambda line: click.echo(f"steer: {line}", err=True))
    _check_trackers(config)
    prompts, held_out = _prompts(config)
    if job.preferences is not None:
        with named(source.key("preferences")):
            METHODS[job.method].check_preferences(Path(job.preferences), vars(config.training))
    check_device(job.device)
    with named(source.key("reward" if job.judge is None else "judge")):
        reward = None if job.trained_reward is None else resolve_reward(job.trained_reward)
    with named(source.key("eval_rewards")):
        eval_rewards = [resolve_reward(spec) for spec in job.eval_rewards]
    data: dict[str, Any] = {
        "train_prompts": [row.prompt for row in prompts],
        "eval_prompts": [row.prompt for row in held_out],
    }
    data |= {"reward": reward, "eval_rewards": eval_rewards}
    if names := job.metadata_columns:
        with named(source.key("metadata_columns")):
            data |= {"metadata": metadata_of(prompts, names), "eval_metadata": metadata_of(held_out, names)}
    if names := job.condition_columns:
        with named(source.key("condition_columns")):
            data["conditions"] = conditions_of(prompts, names, job.prompts)
            data["eval_conditions"] = conditions_of(held_out, names, job.eval_prompts)
    try:
        config.trainer(None, **data)
        if config.training.init_adapter is not None:
            read_lora(config.training.init_adapter)
    except InputError as error:
        raise source.locate_error(error) from error
    if is_main_process():
        check_writable(out, f"{source.key('output_dir')} {folder}")
    return data


def _check_call(config: FinetuneConfig, pipe: Any) -> None:
    """Raise InputError for an argument that the loaded pipeline's call does not have."""
    known = [*inspect.signature(type(pipe).__call__).parameters][1:]  # without self
    if unknown := [name for name in config.training.call if name not in known]:
        key = config.source.key(f"call.{unknown[0]}")
        hint = did_you_mean(unknown[0], known, f"see the arguments of {type(pipe).__name__}.__call__")
        raise InputError(f"{key}: {type(pipe).__name__} has no such argument, {hint}")


def _prompts(config: FinetuneConfig) -> tuple[list[PromptRow], list[PromptRow]]:
    """Load the rows of training and held-out prompts; warn about prompts that are both."""
    job, source = config.job, config.source
    prompts, held_out = list[PromptRow](), list[PromptRow]()
    used = (*job.metadata_columns, *job.condition_columns)
    if job.prompts is not None:
        with named(source.key("prompts")):
            prompts = load_rows(job.prompts, job.prompt_column, used)
    if job.eval_prompts is not None:
        with named(source.key("eval_prompts")):
            held_out = load_rows(job.eval_prompts, job.eval_prompt_column, used)
        held_out = evenly_chosen(held_out, job.eval_prompts_count)
    trained_prompts = {row.prompt for row in prompts}
    if is_main_process() and (both := [row.prompt for row in held_out if row.prompt in trained_prompts]):
        click.echo(
            f"steer: {len(both)} of {len(held_out)} eval_prompts are trained on too, such as {both[0]!r}: evaluations "
            "measure generalisation less",
            err=True,
        )
    return prompts, held_out


def conditions_of(rows: Sequence[PromptRow], names: Sequence[str], source: str | None) -> list[dict[str, Any]]:
    """Return the named columns as arguments of the call for each prompt; paths of images become images.

    source  source of the rows; paths are relative to its folder
    Raises InputError for a row without one of the columns, and for a file that is not an image.
    """
    result = metadata_of(rows, names)
    for row, values in zip(rows, result, strict=True):
        if missing := [name for name in names if name not in values]:
            raise InputError(f"prompt {row.prompt!r:.60} has no {missing[0]!r}: every prompt needs one")
        for name, value in values.items():
            if isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES):
                values[name] = as_type(read_image(Path(source or "").parent / value)[None], "pil")[0]
    return result


def _check_trackers(config: FinetuneConfig) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known, here = ({one.value for one in some} - {"all"} for some in (LoggerType, get_available_trackers()))
    with named(config.source.key("log_with")):
        for name in config.training.log_with:
            choose("tracker", name, dict.fromkeys(known))
            if name not in here:
                raise InputError(f"{name} is not installed: pip install {name}, or use another tracker, [] for none")


PHASES = {"rollout_share": "rollouts", "reward_share": "rewards", "update_share": "updates"}


def _throughput(config: FinetuneConfig, result: TrainingResult) -> str:
    """Describe images or texts per second and the shares of the phases, if the records have them."""
    records = [record for record in result.records if PHASES.keys() <= record.keys()]
    if not (seconds := sum(record["seconds"] for record in records)):
        return ""
    images = len(records) * config.training.train_batch_size * config.training.num_generations
    shares = {title: sum(one["seconds"] * one[name] for one in records) / seconds for name, title in PHASES.items()}
    unit = "texts" if is_text_model(config.job.model) else "images"
    return f" ({images / seconds:.3g} {unit}/s: {', '.join(f'{title} {share:.0%}' for title, share in shares.items())})"


def summary(config: FinetuneConfig, result: TrainingResult) -> str:
    """Summarise a run in one line."""
    job = config.job
    name, key = (job.trained_reward, "reward") if job.preferences is None else ("accuracy", "accuracy")
    title, means = f"{name} in training", [record[key] for record in result.records]
    if result.evaluations:
        trained = next(name for name, value in result.evaluations[0].items() if isinstance(value, list))
        title = f"{trained.removeprefix('eval/')} on held-out prompts"
        means = [record[trained][0] for record in result.evaluations]
    seconds = sum(record["seconds"] for record in result.records)
    line = f"{job.method}: {result.step} updates in {seconds:.0f} s{_throughput(config, result)}"
    line += f", {title} {means[0]:.3f} → {means[-1]:.3f}" if means else ""
    line += f"; stopped because {result.stopped}" if result.stopped else ""
    if result.weights is None:
        return line
    name, path = result.weights.name, str(result.weights)
    use = USAGE.get(name, FULL_USAGE).format(folder=str(result.weights.parent), name=name, path=path)
    if result.weights.parent.name == SECOND_DENOISER or (result.weights.parent / SECOND_DENOISER).is_dir():
        use += f", that of {SECOND_DENOISER} with load_into_transformer_2=True"
    return f"{line}; load the weights by {use}"
