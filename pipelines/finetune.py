"""Finetuning methods: a diffusers pipeline whose denoiser learns from a reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from steer.batch import Batch
from steer.contract import with_metadata
from steer.engine import GradientOptions, two_pass_gradient
from steer.errors import InputError
from steer.losses import Loss, Metrics
from steer.pipelines.finetune_method import FinetuneResult, FinetuningMethod, Record
from steer.pipelines.finetune_run import FinetuneRun
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.held_out import Evaluated, Exam
from steer.pipelines.rounds import OnlineSamples, Source
from steer.reward import load_reward
from steer.trajectory import Sampler, takes_prompts
from steer.truncation import note_cut_by_pipeline


class FinetuningPipeline(FinetuningMethod):
    """A method that trains `pipe`'s denoiser on `reward`; afterwards `pipe` is the trained one."""

    def train(
        self,
        prompts: Sequence[str] | int,
        output_dir: str | Path,
        settings: FinetuneSettings | None = None,
        *,
        eval_prompts: Sequence[str] | int = (),
        eval_rewards: Sequence[Any] = (),
        metadata: Sequence[Mapping[str, Any]] | None = None,
        eval_metadata: Sequence[Mapping[str, Any]] | None = None,
        resume: bool = False,
        about: Mapping[str, Any] | None = None,
        on_update: Callable[[Record], None] | None = None,
        on_evaluation: Callable[[Evaluated], None] | None = None,
    ) -> FinetuneResult:
        """Trains, and writes to `output_dir`: metrics.jsonl, evaluations.jsonl, checkpoints/, final/ and best/ weights.

        prompts        to learn from; of a pipeline without prompts (unconditional) a count, or what the reward reads
        eval_prompts   held out; without them nothing is evaluated
        metadata, eval_metadata  one mapping for each of these, for rewards that accept `metadata`
        eval_rewards   kept apart from the trained reward; the first is what HoldOutWatch watches (without any, the
                       trained reward on the held-out prompts)
        resume         go on from the newest whole checkpoint, or begin where there is none
        about          plain values that are saved with every checkpoint
        on_update, on_evaluation  observers

        Ctrl-C and SIGTERM end it with a checkpoint. Raises InputError for what does not fit, before anything is drawn.
        """
        settings = settings or FinetuneSettings()
        learnt, held_out = (
            prompts_of(self.pipe, prompts, "prompts"),
            prompts_of(self.pipe, eval_prompts, "eval_prompts"),
        )
        if not learnt:
            raise InputError("prompts: at least one is needed")
        rows = metadata_table((learnt, metadata), (held_out, eval_metadata))
        self.reward = with_metadata(self.reward, rows)
        self.check(settings)
        note_cut_by_pipeline(self.pipe, (*learnt, *held_out), settings.call or {})
        source = OnlineSamples(learnt, self, settings)
        judges = tuple(with_metadata(load_reward(reward), rows) for reward in eval_rewards)
        exam = Exam(held_out, self.reward, judges)
        return self._run(source, exam, settings, output_dir, resume, about, on_update, on_evaluation)

    def _run(
        self,
        source: Source,
        exam: Exam,
        settings: FinetuneSettings,
        output_dir: str | Path,
        resume: bool,
        about: Mapping[str, Any] | None,
        on_update: Callable[[Record], None] | None,
        on_evaluation: Callable[[Evaluated], None] | None,
    ) -> FinetuneResult:
        """What a training is, wherever its samples come from."""
        exam.check(settings.patience)
        run = FinetuneRun(self, source, exam, settings, Path(output_dir), dict(about or {}), resume)
        return run.train(on_update or (lambda record: None), on_evaluation or (lambda evaluated: None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the diffusers pipeline itself."""
        return self.pipe(*args, **kwargs)


def prompts_of(pipe: Any, prompts: Sequence[str] | int, name: str) -> tuple[str, ...]:
    """The prompts as texts. Raises InputError for empty ones and for a count, where the pipeline takes prompts."""
    conditional = takes_prompts(pipe)
    if isinstance(prompts, int):
        if conditional:
            raise InputError(f"{name} must be texts, got {prompts}: a count is for pipelines without prompts")
        if prompts < 0:
            raise InputError(f"{name} must be at least 0, got {prompts}")
        return ("",) * prompts
    if isinstance(prompts, str):
        raise InputError(f"{name} must be a list of texts, got one text: {prompts[:40]!r}")
    if conditional and not all(prompts):
        raise InputError(f"{name}: none may be empty")
    return tuple(prompts)


Rows = Sequence[Mapping[str, Any]] | None


def metadata_table(*given: tuple[Sequence[str], Rows]) -> dict[str, Mapping[str, Any]] | None:
    """Metadata by prompt, None where none is given. Raises InputError where it does not fit the prompts, is no plain
    data, or where one prompt has two different rows."""
    table: dict[str, Mapping[str, Any]] = {}
    for prompts, rows in given:
        if rows is not None and len(rows) != len(prompts):
            raise InputError(
                f"metadata must be one mapping for each prompt, got {len(rows)} of them and {len(prompts)} prompts"
            )
        for prompt, row in zip(prompts, rows or (), strict=rows is not None):
            if not isinstance(row, Mapping):
                raise InputError(f"metadata must be one mapping for each prompt, got {type(row).__name__}")
            if table.setdefault(prompt, row) != row:
                raise InputError(f"metadata: prompt {prompt[:60]!r} has two different rows: leave one of them out")
    return None if all(rows is None for _, rows in given) else table


class LossPipeline(FinetuningPipeline):
    """A method that is a loss of log-probabilities and of the signal that `signal` makes of rewards."""

    def __init__(self, pipe: Any, reward: Any, loss: Loss) -> None:
        super().__init__(pipe, reward)
        self.loss = loss

    def check(self, settings: FinetuneSettings) -> None:
        """Raises InputError for settings that this method can do nothing with."""
        if self.loss.whole_trajectory and settings.timestep_fraction < 1:
            raise InputError(
                f"timestep_fraction must be 1, got {settings.timestep_fraction}: the loss of {type(self).__name__} "
                "ties all steps of a trajectory together"
            )
        if settings.samples_per_prompt < 2:
            raise InputError(
                f"samples_per_prompt must be at least 2, got {settings.samples_per_prompt}: "
                f"{type(self).__name__} compares the samples of a prompt"
            )

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Adds the gradient of one update to the weights' .grad; see `steer.engine.two_pass_gradient`."""
        return two_pass_gradient(sampler, batch, self.loss, **options)

    def about(self) -> dict[str, Any]:
        return super().about() | {"loss": type(self.loss).__name__, **asdict(self.loss)}  # type: ignore[call-overload]
