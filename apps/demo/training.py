"""The job of the Finetune tab: train an embedded model, with events, a stop and a resume."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer.apps.demo.image_labels import TABLE, copy_table
from steer.apps.demo.labels import label_files
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import ARCHIVE_NAME, LARGEST_SEED, Studio, Ticket, Weights, number, whole, write_zip
from steer.apps.errors import wrap_errors
from steer.apps.finetune_report import write_grid, write_report
from steer.apps.finetuning import FinetuneConfig, load_data, read_config, write_config
from steer.apps.models import load_pipeline
from steer.errors import InputError
from steer.pipelines.training.asking import Question
from steer.pipelines.training.method import Record, TrainingResult
from steer.pipelines.training.preference_data import sampling_config_of
from steer.pipelines.training.preference_files import PREFERENCES
from steer.pipelines.training.state import LOG_FILES
from steer.pipelines.training.trainer import PAUSED
from steer.training.trainable import get_denoiser

CONFIGURATIONS = {
    "backprop": "reward-backprop-scenes",
    "d3po": "d3po-scenes",
    "prdp": "prdp-scenes",
    "choices": "d3po-scenes",
    "pairs": "dpo-scenes",
}
FROM_LABELS = {"choices": PREFERENCES, "pairs": TABLE}  # methods that learn from the Label tab, and the tab's file
MODELS = ("scenes", "scenes-flow", "scenes-large")  # embedded models; one-step models have no steps to learn from
# Changes to these configurations for visitors' runs: on a CPU an update takes seconds.
DEMO_CHANGES = {
    "train_batch_size": "4",
    "num_generations": "4",
    "micro_batch": "16",
    "eval_prompts_count": "16",
    "num_generations_eval": "1",
    "save_steps": "5",
    "log_with": "[]",
}
PREFERENCE_CHANGES = {"train_batch_size": "8", "num_generations": "2"}  # with preferences: the same number of images
EVALUATIONS = 8  # evaluations of a run, after the first
MIN_EVAL_STEPS = 5  # updates between two evaluations
MAX_UPDATES, MAX_RANK = 200, 64
ANSWER_TIMEOUT = 300.0  # seconds that a run waits for an answer: other visitors wait for the worker
CHOICES_COPY = "choices"  # folder of a run with a copy of its preferences
CHECKPOINT_HINT, MEMORY_HINT = "a checkpoint is kept: Resume continues", "a LoRA of a lower rank needs less"


@dataclass(frozen=True)
class TrainingRequest:
    """A visitor's request.

    method    from a reward: backprop, d3po or prdp; from labels: choices (d3po on a preference folder) or pairs (dpo on
              images)
    reward    reward that is trained on;  held_out: another reward, only for evaluation
    choices   the folder of labels; None with a reward
    ask       ask the visitor when the two rewards disagree about an evaluation
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
    ask: bool = False

    def __post_init__(self) -> None:
        if self.method not in CONFIGURATIONS or (self.choices is None) == (self.method in FROM_LABELS):
            raise InputError(f"method {self.method!r:.40}: choose {', '.join(CONFIGURATIONS)}")
        if self.model not in MODELS:
            raise InputError(f"model {self.model!r:.80} cannot be finetuned here: choose {' or '.join(MODELS)}")
        for name, least, most in (("updates", 1, MAX_UPDATES), ("rank", 1, MAX_RANK), ("seed", 0, LARGEST_SEED)):
            object.__setattr__(self, name, value := whole(name, getattr(self, name)))
            if not least <= value <= most:
                raise InputError(f"{name} must be {least} to {most} in this app, got {value}")
        if not 0 < number("learning rate", self.learning_rate) <= 1:
            raise InputError(f"the learning rate must be above 0 and at most 1, got {self.learning_rate}")
        if number("KL weight", self.kl_weight) < 0:
            raise InputError(f"the KL weight must be at least 0, got {self.kl_weight}")
        for name in ("reward", "held_out"):
            object.__setattr__(self, name, str(getattr(self, name) or "").strip())
        if self.choices is None and self.held_out == self.reward:
            raise InputError("the held-out reward equals the training reward: choose another one")


@dataclass(frozen=True)
class Update:
    """An event: an update was made."""

    record: Record


@dataclass(frozen=True)
class Evaluation:
    """An event: an evaluation; `grid` is a file in the form of `steer.apps.plots`."""

    record: Record
    grid: Path


@dataclass(frozen=True)
class Asked:
    """An event: the run waits for the answer to a question, by `Ticket.answer`."""

    question: Question


@dataclass(frozen=True)
class Trained:
    """An event: the end of the training; `archive` has the weights, the model card and the logs as a zip."""

    result: TrainingResult
    weights: Weights
    archive: Path


def configured(request: TrainingRequest, folder: Path, studio: Studio) -> FinetuneConfig:
    """Make the configuration of a request. Raises InputError."""
    changes = DEMO_CHANGES | {
        "output_dir": str(folder),
        "model": request.model,
        "eval_rewards": json.dumps([request.held_out]),
        "max_steps": str(request.updates),
        "eval_steps": str(max(MIN_EVAL_STEPS, math.ceil(request.updates / EVALUATIONS))),
        "learning_rate": json.dumps(request.learning_rate),
        "lora_rank": str(request.rank),
        "kl_weight": json.dumps(request.kl_weight),
        "seed": str(request.seed),
        "ask": json.dumps(bool(request.ask)),
        "device": studio.device or "null",
        "dtype": studio.dtype or "null",
    }
    if request.choices is None:
        return read_config(CONFIGURATIONS[request.method], changes | {"reward": request.reward})
    own = folder / CHOICES_COPY  # exists after the run has begun
    source = own if own.exists() else request.choices
    if not (source / FROM_LABELS[request.method]).exists():
        raise InputError("nothing has been labelled yet: choose between some images in the Label tab first")
    if request.method == "pairs":
        table = {"preferences": str(own / TABLE)}  # a copy, written when the run begins
        return read_config(CONFIGURATIONS[request.method], changes | PREFERENCE_CHANGES | table)
    stored_settings = {key: json.dumps(value) for key, value in sampling_config_of(source).items()}
    changes |= stored_settings | PREFERENCE_CHANGES | {"reward": "null", "prompts": "null", "preferences": str(source)}
    config = read_config(CONFIGURATIONS[request.method], changes)
    return replace(config, job=replace(config.job, preferences=str(own)))


def training(request: TrainingRequest, folder: Path, studio: Studio, resume: bool) -> Callable[[Ticket], None]:
    """Make the job of a request, in a folder beside those of the visitor's other trainings. Raises InputError.

    Only the latest training can be resumed: the checkpoints of the others are removed. Preferences are copied when the
    training begins.
    """
    config = configured(request, folder, studio)

    def work(ticket: Ticket) -> None:
        if request.choices is not None and not resume:
            copy = copy_table if request.method == "pairs" else _copy_choices
            copy(request.choices, folder / CHOICES_COPY)
        data = load_data(config, resume)  # raises before anything is removed
        for other in folder.parent.glob("*/checkpoints"):
            if other.parent != folder:
                shutil.rmtree(other, ignore_errors=True)
        train(config, data, resume, ticket)

    return work


def _copy_choices(source: Path, to: Path) -> None:
    """Copy a preference folder, even during writes to it."""
    for one in label_files(source):
        copy = to / one.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one, copy)


def train(config: FinetuneConfig, data: dict[str, Any], resume: bool, ticket: Ticket) -> None:
    """Train in the folder of the configuration; send Loading, Evaluation, Update and, unless stopped, Trained events.

    A question of `ask` is an Asked event. Without an answer within ANSWER_TIMEOUT the run ends with a checkpoint.
    A stop acts within one call of the denoiser and leaves a checkpoint; `resume` leads to the same weights as an
    uninterrupted training. Raises InputError; the latest checkpoint is kept.
    """
    job = config.job
    ticket.say(Loading(job.model))
    pipe = load_pipeline(job.model, job.device, job.dtype)  # not the shared one: training changes it
    get_denoiser(pipe)[1].register_forward_pre_hook(lambda module, given: ticket.check())
    out, config_dict = Path(config.training.output_dir), _public_config(config)
    write_config(out, config_dict)

    def on_question(question: Question, check: Callable[[], None]) -> bool | None:
        return ticket.ask(Asked(question), ANSWER_TIMEOUT)  # the ticket has the stop of this run

    data |= {"callbacks": [Progress(ticket, out)], "on_question": on_question}
    trainer = config.trainer(pipe, **data, run_config=config_dict)
    with wrap_errors("the training", CHECKPOINT_HINT, MEMORY_HINT):
        result = trainer.train(resume_from_checkpoint=resume)
    if result.stopped not in PAUSED:
        write_report(trainer, result)
        ticket.say(Trained(result, _weights(config, result), _write_archive(out)))


class Progress:
    """Callback that shows updates and evaluations to the visitor."""

    def __init__(self, ticket: Ticket, out: Path) -> None:
        self.ticket, self.out = ticket, out

    def on_log(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        self.ticket.say(Update(details["logs"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        grid = write_grid(details["evaluation"], self.out, args.num_generations_eval)
        self.ticket.say(Evaluation(details["metrics"], grid))


def _weights(config: FinetuneConfig, result: TrainingResult) -> Weights:
    """Copy the final weights to a folder that a resumed training does not change."""
    job, settings, out = config.job, config.training, Path(config.training.output_dir)
    folder = out / f"final-{result.weights_step}"
    shutil.copytree(out / "final", folder, dirs_exist_ok=True)
    source = f"on {job.reward}" if job.preferences is None else "on choices"
    label = f"{job.model}, {job.method.upper()} {source}, {result.weights_step} updates"
    guidance = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    return Weights(job.model, folder, label, job.reward, settings.num_inference_steps, guidance)


def _public_config(config: FinetuneConfig) -> dict[str, Any]:
    """Return the configuration for the files of the run, without paths on the owner's disk."""
    config_dict = config.plain() | {"output_dir": ARCHIVE_NAME}
    return config_dict | ({} if config.job.preferences is None else {"preferences": CHOICES_COPY})


def _write_archive(out: Path) -> Path:
    """Write finetuned-RUN.zip in a run's folder: weights, model card with its pictures, configuration, logs."""
    inside = [out / name for name in ("README.md", "config.yaml", *LOG_FILES.values())]
    for name in ("final", "best", "plots", "samples"):
        inside += sorted(one for one in (out / name).rglob("*") if one.is_file())
    return write_zip(out / f"{ARCHIVE_NAME}-{out.name}.zip", out, inside, ARCHIVE_NAME)
