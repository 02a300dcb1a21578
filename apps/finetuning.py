"""The job behind `steer finetune`: a configuration in, a folder of weights, records and pictures out."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import click
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from steer.apps.errors import named, wrap_errors
from steer.apps.models import check_device, load_pipeline
from steer.apps.processes import is_main_process, launch_context
from steer.apps.prompts import load_prompts
from steer.apps.reward_specs import resolve_reward
from steer.apps.yaml_text import read_yaml
from steer.assets import CONFIGS
from steer.errors import InputError
from steer.files import write_text
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.d3po_prdp import D3POTrainer, PRDPTrainer
from steer.pipelines.training.ddpo_grpo import DDPOTrainer, FilteredTrainer, GRPOTrainer
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import Record, TrainingResult
from steer.pipelines.training.preference_data import check_preferences, sampling_config_of
from steer.pipelines.training.reward_backprop import RewardBackpropTrainer
from steer.pipelines.training.state import LOG_FILES
from steer.pipelines.training.trainer import INTERRUPTED, Trainer
from steer.registry import choose, nearest
from steer.reward import Reward
from steer.training.checkpoint import Checkpoints
from steer.training.guards import KLControl
from steer.training.trainable import read_lora

METHODS: dict[str, type[Trainer]] = {
    "d3po": D3POTrainer,
    "prdp": PRDPTrainer,
    "ddpo": DDPOTrainer,
    "grpo": GRPOTrainer,
    "filtered": FilteredTrainer,
    "reward-backprop": RewardBackpropTrainer,
}


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained, on what, and where to: the keys beside `options` and those of TrainingConfig.

    method              a name in METHODS; `options` are the keyword arguments of its class
    reward              that is trained on (of choices, only what evaluations begin with), and
    eval_rewards        others, that judge the held-out prompts as well; the first decides which weights are best
    output_dir          the folder of the run
    model               an embedded model, a folder, or ORGANISATION/NAME
    variant             of the model's weights, such as fp16
    model_config_dir of a model in a single file: a folder of such a model in diffusers' format
    prompts             to learn from: an embedded list, a file, or a data set of the hub; or
    preferences             a folder of human choices, for d3po; what its samples were drawn with need not be said again
    eval_prompts        held out, from the same kinds of places as `prompts`
    eval_prompts_count  so many of them, evenly spaced; by default all
    prompt_column, eval_prompt_column  of a table; by default "prompt"
    device              by default the GPU if there is one
    dtype               of the model; by default float32 on the CPU, bfloat16 elsewhere
    """

    method: str
    output_dir: str
    reward: str | None = None
    model: str = "scenes"
    prompts: str | None = None
    preferences: str | None = None
    prompt_column: str | None = None
    eval_prompts: str | None = None
    eval_prompt_column: str | None = None
    eval_prompts_count: int | None = None
    eval_rewards: tuple[str, ...] = ()
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    model_config_dir: str | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.preferences is None):
            raise InputError("prompts or preferences, one of the two, must say what to learn from")
        if self.preferences is not None and not hasattr(METHODS[self.method], "train_on_preferences"):
            able = [name for name, cls in METHODS.items() if hasattr(cls, "train_on_preferences")]
            raise InputError(f"choices are learnt from by {', '.join(able)}, not by {self.method}: give prompts")
        if self.reward is None and self.preferences is None:
            raise InputError("reward is missing: say what to train on, `steer rewards` lists names")
        if self.eval_prompts_count is not None and self.eval_prompts_count < 1:
            raise InputError(f"eval_prompts_count must be at least 1, got {self.eval_prompts_count}")
        if self.eval_rewards and self.eval_prompts is None:
            raise InputError("eval_rewards judge images of eval_prompts, and there are none: give them too")
        if self.eval_prompts is not None and not (self.reward or self.eval_rewards):
            raise InputError("eval_prompts need eval_rewards to judge their images: give some")
        terms = {re.sub(r":[-+.0-9e]+$", "", term) for term in re.split(r"\s\+\s|,\s|[()]", self.reward or "")}
        if trained := [one for one in self.eval_rewards if one.strip() in {self.reward, *map(str.strip, terms)}]:
            raise InputError(
                f"eval_rewards hold {trained[0]!r}, which is trained on: a hold-out that is trained on holds nothing "
                "out, take another"
            )


DEFAULTS = {"log_with": ("tensorboard",)}  # where the command has another than TrainingConfig
NESTED = ("options", "call")  # keys that hold others: --options.beta
TYPES = {  # pydantic's kinds of error, in the words of a YAML file
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
    """Where keys came from, to say so: a configuration, and the keys that the command line changed."""

    name: str
    changed: frozenset[str] = frozenset()

    def key(self, key: str) -> str:
        """A key, or a place inside its value, as the user wrote it."""
        changed_keys = {key, key.partition(".")[0]} & self.changed
        return f"--{key.replace('_', '-')}" if changed_keys else f"{self.name}: {key}"

    def locate_error(self, error: InputError) -> InputError:
        """The error with the place of the key that its message begins with."""
        first, _, rest = str(error).partition(" ")
        known = next((key for key in (first, f"options.{first}") if key in self.changed), None)
        return InputError(f"{self.key(known)} {rest}" if known else f"{self.name}: {error}")


@dataclass(frozen=True)
class FinetuneConfig:
    """All that is known of a run before it begins."""

    job: FinetuneJob
    options: dict[str, Any]
    settings: TrainingConfig
    source: ConfigSource

    def plain(self) -> dict[str, Any]:
        """Every key with its value, as a configuration file holds them."""
        config_values = asdict(self.job) | {"options": self.options} | asdict(self.settings)
        return json.loads(json.dumps(config_values))

    def method(self, pipe: Any, reward: Any) -> Any:
        """The method, over a pipeline or, to look at the settings alone, over None."""
        return METHODS[self.job.method](pipe, reward, **self.options)


def read_config(name: str, overrides: Mapping[str, str] | None = None) -> FinetuneConfig:
    """The configuration of an embedded name or a file, with `overrides`, key → YAML, in place of what it says.

    Raises InputError, one line, for the first thing that is wrong.
    """
    overrides, source = dict(overrides or {}), ConfigSource(name, frozenset(overrides or {}))
    config_values = _read_file(name)
    given = overrides.pop("method", config_values.get("method"))
    if not isinstance(given, str):
        raise InputError(f"{source.key('method')} must be one of {', '.join(METHODS)}, got {json.dumps(given)}")
    with named(source.key("method")):
        choose("method", given, METHODS)
    schema = schema_of(given)
    config_values = _with_overrides(config_values, overrides, schema) | {"method": given}
    parsed = _validated(schema, _with_preference_defaults(config_values, source), source)
    components = {cls: {one.name: parsed[one.name] for one in fields(cls)} for cls in (FinetuneJob, TrainingConfig)}
    try:
        job, settings = FinetuneJob(**components[FinetuneJob]), TrainingConfig(**components[TrainingConfig])
    except InputError as error:
        raise source.locate_error(error) from error
    return FinetuneConfig(job, parsed["options"], settings, source)


@cache
def schema_of(method: str) -> type[BaseModel]:
    """The keys of a method's configuration, with types and defaults: those of the classes that take them."""
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    init = METHODS[method].__init__
    hints, taken = get_type_hints(init), inspect.signature(init).parameters.values()
    own: dict[str, Any] = {one.name: (hints[one.name], one.default) for one in taken if one.kind is one.KEYWORD_ONLY}
    options: Any = create_model(f"options of {method}", __config__=strict, **own)
    keys: dict[str, Any] = {"options": (options, Field(default_factory=options))}
    for cls in (FinetuneJob, TrainingConfig):
        hints = get_type_hints(cls)
        for one in fields(cls):
            factory = Field(default_factory=one.default_factory) if one.default_factory is not MISSING else None
            default = factory or (... if one.default is MISSING else DEFAULTS.get(one.name, one.default))
            keys[one.name] = (hints[one.name], default)
    return create_model(method, __config__=strict, **keys)


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
    """What the file says with the words of the command line in their places."""
    config_values = dict(config_values)
    for key, word in overrides.items():
        name, _, inner = key.partition(".")
        value = _value(key, word, schema)
        if name not in NESTED or not inner:
            config_values[key] = value
        elif isinstance(before := config_values.get(name, {}), dict):
            config_values[name] = before | {inner: value}
    return config_values


def _with_preference_defaults(config_values: Mapping[str, Any], source: ConfigSource) -> dict[str, Any]:
    """The keys with what human choices were drawn with, where there are any: it stands for what nobody says otherwise.

    Choices of the command line take the place of a file's prompts, and of what it says of sampling.
    """
    changed_keys = {key.partition(".")[0] for key in source.changed}
    asked = "preferences" in changed_keys and config_values.get("preferences") is not None
    config_values = {
        key: value for key, value in config_values.items() if not asked or key != "prompts" or key in changed_keys
    }
    if not isinstance(folder := config_values.get("preferences"), str) or config_values.get("prompts") is not None:
        return config_values
    with named(source.key("preferences")):
        drawn = sampling_config_of(folder)
    return drawn | {
        key: value for key, value in config_values.items() if not asked or key in changed_keys or key not in drawn
    }


def _value(key: str, word: str, schema: type[BaseModel]) -> Any:
    """A word of the command line as YAML; where text is asked for, it is the text as it stands."""
    asked = schema.model_fields[key].annotation if key in schema.model_fields else None
    text = asked is str or (asked == str | None and word != "null")
    return word if text else read_yaml(word, f"--{key.replace('_', '-')}")


def _validated(schema: type[BaseModel], config_values: Mapping[str, Any], source: ConfigSource) -> dict[str, Any]:
    try:
        # By the rules of JSON: a list is a tuple, an integer is a float, and a text is never a number.
        return schema.model_validate_json(json.dumps(config_values, default=str), strict=True).model_dump()
    except ValidationError as error:
        # An unknown key first: the key that is missing may be the one that was meant.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        raise InputError(_unknown(key, schema, source))
    if first["type"] == "missing":
        raise InputError(f"{source.name}: {key} is missing: give it there, or with --{key.replace('_', '-')}")
    asked = TYPES.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    raise InputError(f"{source.key(key)} must be {asked}, got {json.dumps(first['input'], ensure_ascii=False):.80}")


def _unknown(key: str, schema: type[BaseModel], source: ConfigSource) -> str:
    method, options = schema.__name__, _options_of(schema).model_fields
    outer, _, inner = key.partition(".")
    if key in options:
        return f"{source.key(key)}: unknown key, an option of {method}: write it under options, or --options.{key}"
    if outer == "options" and inner:
        return f"{source.key(key)}: unknown option of {method}: did you mean {nearest(inner, options)}?"
    return f"{source.key(key)}: unknown key, did you mean {nearest(key, schema.model_fields)}?"


def _options_of(schema: type[BaseModel]) -> Any:
    return schema.model_fields["options"].annotation


USAGE = {  # how exported weights are used, by the name of their file; other names are the denoiser's folder
    "pytorch_lora_weights.safetensors": "pipe.load_lora_weights({folder!r})",
    "adapter_model.safetensors": "peft, as README.md in {folder!r} shows",
}
RESUME_HINT = "checkpoints are kept, --resume goes on"
MEMORY_HINT = "a smaller micro_batch or gradient_checkpointing: true need less"
FULL_USAGE = "pipe.{name} = type(pipe.{name}).from_pretrained({path!r})"


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is judged by."""

    prompts: Sequence[str]
    eval_prompts: Sequence[str]
    reward: Reward | None  # None where humans choose
    eval_rewards: Sequence[Reward]

    @property
    def evaluation_rewards(self) -> list[Reward]:
        """The rewards of evaluations, in their order."""
        return [reward for reward in (self.reward, *self.eval_rewards) if reward is not None]


def finetune(config: FinetuneConfig, resume: bool = False) -> TrainingResult:
    """Trains, and writes beside what `train` writes: config.yaml, samples/, and at the end plots/ and README.md.

    Raises InputError for what cannot be, before any model is loaded.
    """
    from steer.apps.finetune_report import write_grid, write_report

    job, out, config_values = config.job, Path(config.job.output_dir), config.plain()
    here = launch_context(cpu=job.device == "cpu")
    with here.local_main_process_first():
        train_data = load_data(config, resume)
        pipe = load_pipeline(
            job.model, here.device(job.device), job.dtype, variant=job.variant, config=job.model_config_dir
        )
    method = config.method(pipe, train_data.reward)
    _check_call(config, method.pipe)

    @cache
    def write_once() -> None:  # once the folder is known to be this run's
        write_config(out, config_values)

    def on_evaluation(evaluated: EvalResult) -> None:
        write_once()
        write_grid(evaluated, out, config.settings.num_generations_eval)

    with wrap_errors(config.source.name, RESUME_HINT, MEMORY_HINT):
        result = learn(config, method, train_data, resume, config_values, lambda record: write_once(), on_evaluation)
        if here.is_main_process:
            write_once()
            if result.stopped != INTERRUPTED:
                write_report(out, config_values, result)
    return result


def learn(
    config: FinetuneConfig,
    method: Any,
    train_data: TrainingData,
    resume: bool,
    config_values: Mapping[str, Any],
    on_update: Callable[[Record], None],
    on_evaluation: Callable[[EvalResult], None],
) -> TrainingResult:
    """The training itself by `config.method`, from prompts or from choices.

    config_values  what the files of the run say of the configuration
    """
    preferences = config.job.preferences
    train = method.train if preferences is None else method.train_on_preferences
    result: TrainingResult = train(
        train_data.prompts if preferences is None else Path(preferences),
        Path(config.job.output_dir),
        config.settings,
        eval_prompts=train_data.eval_prompts,
        eval_rewards=train_data.eval_rewards,
        resume=resume,
        about=config_values,
        on_update=on_update,
        on_evaluation=on_evaluation,
    )
    return result


def write_config(out: Path, config_values: Mapping[str, Any]) -> None:
    """Writes config.yaml in the folder of a run."""
    write_text(out / "config.yaml", yaml.safe_dump(dict(config_values), sort_keys=False, allow_unicode=True, width=120))


def load_data(config: FinetuneConfig, resume: bool) -> TrainingData:
    """Looks at all that can be wrong without a model, the cheapest first, and loads prompts and rewards."""
    job, source = config.job, config.source
    out, whose = Path(job.output_dir), f"{source.key('output_dir')} {job.output_dir}"
    _check_run(out, whose, resume)
    _check_trackers(config)
    prompts, eval_prompts = _prompts(config)
    if job.preferences is not None:
        with named(source.key("preferences")):
            check_preferences(Path(job.preferences))
    check_device(job.device)
    with named(source.key("reward")):
        reward = None if job.reward is None else resolve_reward(job.reward)
    with named(source.key("eval_rewards")):
        train_data = TrainingData(prompts, eval_prompts, reward, [resolve_reward(spec) for spec in job.eval_rewards])
        names = [one.name for one in train_data.evaluation_rewards]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{min(twice)!r} is there twice, or is trained on: each reward must be another one")
    try:
        KLControl(config.settings.kl_weight, config.settings.kl_target, config.settings.kl_budget)
        config.method(None, reward).check(config.settings)
        if config.settings.init_adapter is not None:
            read_lora(config.settings.init_adapter)
    except InputError as error:
        raise source.locate_error(error) from error
    if is_main_process():
        _check_writable(out, whose)
    return train_data


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
            prompts = load_prompts(job.prompts, job.prompt_column)
    if job.eval_prompts is not None:
        with named(source.key("eval_prompts")):
            held_out = load_prompts(job.eval_prompts, job.eval_prompt_column)
        count = min(job.eval_prompts_count or len(held_out), len(held_out))
        held_out = [held_out[place * len(held_out) // count] for place in range(count)]
    trained_prompts = set(prompts)
    if is_main_process() and (both := [prompt for prompt in held_out if prompt in trained_prompts]):
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
    if not resume and (whole or skipped or (out / LOG_FILES["records"]).exists()):
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


def summary(config: FinetuneConfig, result: TrainingResult) -> str:
    """How a run ended, in one line."""
    job = config.job
    name, key = (job.reward, "reward") if job.preferences is None else ("accuracy", "accuracy")
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
    use = USAGE.get(name, FULL_USAGE).format(folder=str(result.weights.parent), name=name, path=path)
    return f"{line}; use the weights by {use}"
