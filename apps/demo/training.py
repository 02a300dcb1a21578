"""What the Finetune tab starts: a training of an embedded model that says how far it is, stops and goes on."""

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer.apps.demo.labels import kept_files
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import LARGEST_SEED, PACKED, Studio, Ticket, Weights
from steer.apps.errors import errors_named
from steer.apps.finetune_report import write_grid, write_report
from steer.apps.finetuning import FinetuneConfig, gather, learn, read_config, write_config
from steer.apps.models import load_pipeline
from steer.errors import InputError
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.method import Record, TrainingResult
from steer.pipelines.training.preference_data import settings_of
from steer.pipelines.training.preference_files import CHOICES
from steer.pipelines.training.state import SERIES
from steer.pipelines.training.trainer import INTERRUPTED
from steer.training.trainable import denoiser_of

CONFIGURATIONS = {"d3po": "d3po-scenes", "prdp": "prdp-scenes", "choices": "d3po-scenes"}
MODELS = ("scenes", "scenes-large")  # embedded, and of several steps: one step leaves nothing to learn from
# What runs of visitors have otherwise than these configurations: on a CPU an update takes seconds.
SCALE = {
    "train_batch_size": "4",
    "num_generations": "4",
    "micro_batch": "16",
    "eval_prompts_count": "16",
    "eval_samples": "1",
    "checkpoint_every": "5",
    "log_with": "[]",
}
PAIRS = {"train_batch_size": "8", "num_generations": "2"}  # of choices: as many images
EVALUATIONS = 8  # of a run, beside the first
MOST_UPDATES, MOST_RANK = 200, 64
OWN = "choices"  # folder of a run with a copy of those that it learns from
KEPT, LESS = "a checkpoint is kept: Go on continues", "a LoRA of a lower rank needs less"


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for.

    method    d3po or prdp, from a reward; choices: d3po from those of a folder
    reward    that is trained on; held_out: another one, that only judges
    choices   the folder; None where a reward is trained on
    """

    method: str
    model: str
    reward: str
    held_out: str
    updates: int
    learning_rate: float
    rank: int
    kl_weight: float
    seed: int
    choices: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in CONFIGURATIONS or (self.choices is None) == (self.method == "choices"):
            raise InputError(f"method {self.method!r:.40}: choose {', '.join(CONFIGURATIONS)}")
        if self.model not in MODELS:
            raise InputError(f"model {self.model!r:.80} cannot be finetuned here: choose {' or '.join(MODELS)}")
        whole = {"updates": (1, MOST_UPDATES), "rank": (1, MOST_RANK), "seed": (0, LARGEST_SEED)}
        for name, (least, most) in whole.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} must be {least} to {most} in this app, got {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"the learning rate must be above 0 and at most 1, got {self.learning_rate}")
        if not 0 <= self.kl_weight < math.inf:
            raise InputError(f"the KL weight must be at least 0, got {self.kl_weight}")
        if self.choices is None and self.held_out == self.reward:
            raise InputError("the held-out reward is the one that is trained on: choose another one to judge by")


@dataclass(frozen=True)
class Update:
    """An update was made."""

    record: Record


@dataclass(frozen=True)
class Evaluation:
    """The held-out prompts were drawn and judged; `grid` as `steer.apps.plots` writes it."""

    record: Record
    grid: Path


@dataclass(frozen=True)
class Trained:
    """The end; `archive`: the weights, the model card and the records as a zip."""

    result: TrainingResult
    weights: Weights
    archive: Path


def configured(asked: Asked, folder: Path, studio: Studio) -> FinetuneConfig:
    """The run that is asked for, in a folder. Raises InputError."""
    changes = SCALE | {
        "output_dir": str(folder),
        "model": asked.model,
        "eval_rewards": json.dumps([asked.held_out]),
        "max_steps": str(asked.updates),
        "eval_every": str(max(5, math.ceil(asked.updates / EVALUATIONS))),
        "learning_rate": json.dumps(asked.learning_rate),
        "lora_rank": str(asked.rank),
        "kl_weight": json.dumps(asked.kl_weight),
        "seed": str(asked.seed),
        "device": studio.device or "null",
        "dtype": studio.dtype or "null",
    }
    if asked.choices is None:
        return read_config(CONFIGURATIONS[asked.method], changes | {"reward": asked.reward})
    own = folder / OWN  # not there before it begins
    source = own if own.exists() else asked.choices
    if not (source / CHOICES).exists():
        raise InputError("nothing has been labelled yet: choose between some images in the Label tab first")
    drawn = {key: json.dumps(value) for key, value in settings_of(source).items()}
    changes |= drawn | PAIRS | {"reward": "null", "prompts": "null", "choices": str(source)}
    config = read_config(CONFIGURATIONS[asked.method], changes)
    return replace(config, job=replace(config.job, choices=str(own)))


def training(asked: Asked, folder: Path, studio: Studio, resume: bool) -> Callable[[Ticket], None]:
    """The work that is asked for, in a folder beside those of the visitor's other trainings. Raises InputError.

    Only the latest one can be gone on with: the checkpoints of the others make room. Choices are learnt from as they
    are when it begins, whatever is chosen meanwhile.
    """
    config = configured(asked, folder, studio)

    def work(ticket: Ticket) -> None:
        for other in folder.parent.glob("*/checkpoints"):
            if other.parent != folder:
                shutil.rmtree(other, ignore_errors=True)
        if asked.choices is not None and not resume:
            _copy_choices(asked.choices, folder / OWN)
        train(config, resume, ticket)

    return work


def _copy_choices(source: Path, to: Path) -> None:
    """A folder of choices as it is now, while it may be written to."""
    for one in kept_files(source):
        copy = to / one.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one, copy)


def train(config: FinetuneConfig, resume: bool, ticket: Ticket) -> None:
    """Trains in the folder of the configuration; says Loading, Evaluation, Update and, if nobody stopped it, Trained.

    A stop acts within one call of the denoiser and leaves a checkpoint: with `resume` it goes on from there, to the
    same weights as if nobody had. Raises InputError; what was learnt until then is in a checkpoint.
    """
    job, out = config.job, Path(config.job.output_dir)
    material = gather(config, resume)
    ticket.say(Loading(job.model))
    pipe = load_pipeline(job.model, job.device, job.dtype)  # of its own: training changes it
    denoiser_of(pipe)[1].register_forward_pre_hook(lambda module, given: ticket.check())
    method, told = config.method(pipe, material.reward), _told(config)
    write_config(out, told)

    def on_update(record: Record) -> None:
        ticket.say(Update(record))

    def on_evaluation(found: EvalResult) -> None:
        ticket.say(Evaluation(found.record(), write_grid(found, out, config.settings.eval_samples)))

    with errors_named("the training", KEPT, LESS):
        result = learn(config, method, material, resume, told, on_update, on_evaluation)
    if result.stopped != INTERRUPTED:
        write_report(out, told, result)
        ticket.say(Trained(result, _weights(config, result), _write_zip(out)))


def _weights(config: FinetuneConfig, result: TrainingResult) -> Weights:
    """Those of the end, in a folder that stays as it is when the training goes on."""
    job, settings, out = config.job, config.settings, Path(config.job.output_dir)
    folder = out / f"final-{result.weights_step}"
    shutil.copytree(out / "final", folder, dirs_exist_ok=True)
    source = f"on {job.reward}" if job.choices is None else "on choices"
    label = f"{job.model}, {job.method.upper()} {source}, {result.weights_step} updates"
    guidance = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    return Weights(job.model, folder, label, job.reward, settings.num_inference_steps, guidance)


def _told(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration as the files of the run tell it: without places on the owner's disk."""
    told = config.plain() | {"output_dir": PACKED}
    return told | ({} if config.job.choices is None else {"choices": OWN})


def _write_zip(out: Path) -> Path:
    """Writes finetuned-RUN.zip in a run's folder: weights, model card with its pictures, configuration, records."""
    path = out / f"{PACKED}-{out.name}.zip"
    inside = [out / name for name in ("README.md", "config.yaml", *SERIES.values())]
    for name in ("final", "best", "plots", "samples"):
        inside += sorted(one for one in (out / name).rglob("*") if one.is_file())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for one in inside:
            file.write(one, f"{PACKED}/{one.relative_to(out)}")
    return path
