"""Finetuning methods: a diffusers pipeline whose denoiser learns from a reward."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from steer.diffusion.step_hooks import plain_values
from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext
from steer.pipelines.training.evaluation import EvalResult, Evaluator
from steer.pipelines.training.method import Record, TrainingMethod, TrainingResult, half_precision, sampler_of
from steer.pipelines.training.rollouts import OnlineRollouts, RolloutBuffer, RolloutSource
from steer.pipelines.training.state import RunFolder, RunState
from steer.reward import warn_if_pipeline_truncates, with_metadata
from steer.rewards.parser import load_reward
from steer.training.gradient import Batch, GradientOptions, Penalty, two_pass_gradient
from steer.training.guards import EarlyStopping, KLControl, check_replay, check_rounding, chi_square, kl
from steer.training.losses import Loss, Metrics
from steer.training.rollout import Sampler, takes_prompts
from steer.training.trainable import FullFinetuning, LoRA, Trainable, fingerprint, get_denoiser, whole

# What may differ when a run is resumed: logged where it does.
RESUMABLE_FIELDS = {
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "micro_batch",
    "gradient_checkpointing",
    "eval_steps",
    "patience",
    "save_steps",
    "save_total_limit",
    "kl_budget",
    "log_with",
}


def accelerator_of(settings: TrainingConfig, folder: Path, cpu: bool) -> Accelerator:
    """Raises InputError for a precision or a tracker that there is not here."""
    if cpu and settings.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 needs a GPU: on the CPU use bf16 or no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.mixed_precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=list(settings.log_with) or None,
            project_dir=folder,
            cpu=cpu,
            device_placement=False,  # the pipeline is where its owner put it
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"log_with {', '.join(settings.log_with)}: {str(error).splitlines()[0]}") from error
    return accelerator


def trainable_of(pipe: Any, settings: TrainingConfig) -> Trainable:
    """A LoRA in the denoiser, or all of it; everything else is frozen."""
    if settings.gradient_checkpointing:
        get_denoiser(pipe)[1].enable_gradient_checkpointing()
    if settings.lora_rank == 0:
        return FullFinetuning(pipe)
    lora = LoRA(pipe, settings.lora_rank, settings.lora_alpha, settings.lora_target_modules, settings.seed)
    if settings.init_adapter is not None:
        lora.load_initial_adapter(settings.init_adapter)
    return lora


def resumable_of(settings: TrainingConfig) -> dict[str, Any]:
    """Settings that may differ when the run is resumed, as plain values."""
    return {name: plain_values(value) for name, value in asdict(settings).items() if name in RESUMABLE_FIELDS}


def identity_of(
    method: TrainingMethod, source: RolloutSource, evaluator: Evaluator, settings: TrainingConfig
) -> dict[str, Any]:
    """What makes a run this run, as plain values."""
    pipe = method.pipe
    fixed = {name: value for name, value in asdict(settings).items() if name not in RESUMABLE_FIELDS}
    return {
        **method.config_dict(),
        **source.config_dict(),
        **evaluator.config_dict(),
        # By its own name, wherever it lies: a run goes on after its folder, or the checkout, was moved.
        "model": f"{type(pipe).__name__} {Path(getattr(pipe.config, '_name_or_path', '')).name}".strip(),
        "weights": fingerprint(pipe),
        "scheduler": pipe.scheduler.to_json_string(),
        **{name: plain_values(value) for name, value in fixed.items()},
    }


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_INTERVAL = 1.0  # seconds between two signals of one wish


class Stopped(Exception):
    """Ends a run between two things that belong together."""


class StopRequest:
    """Whether somebody asked for the end.

    any_process  of several processes, whether one of them was asked: a signal reaches each at another time
    """

    def __init__(self, any_process: Callable[[bool], bool] = bool) -> None:
        self.requested, self._agreed, self._first = False, any_process, 0.0

    def check(self) -> None:
        """Raises Stopped once somebody asked."""
        if self._agreed(self.requested):
            raise Stopped

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C a second time: at once. Launchers send signals twice, but not so far apart.
        if self.requested and number == signal.SIGINT and time.monotonic() - self._first > SIGNAL_INTERVAL:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, time.monotonic()


@contextmanager
def stop_request(any_process: Callable[[bool], bool] = bool) -> Iterator[StopRequest]:
    """Inside, the signals of the main thread are taken as a request; the handlers of before come back."""
    request = StopRequest(any_process)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python


INTERRUPTED = "interrupted"


class TrainingRun:
    """One training of one method, in one folder."""

    def __init__(
        self,
        method: TrainingMethod,
        source: RolloutSource,
        evaluator: Evaluator,
        settings: TrainingConfig,
        folder: Path,
        config_dict: dict[str, Any],
        resume: bool,
    ) -> None:
        self.method, self.source, self.evaluator, self.settings = method, source, evaluator, settings
        self.accelerator = accelerator_of(settings, folder, method.pipe.device.type == "cpu")
        self.context = AccelerateContext(self.accelerator)
        self.context.check(settings)
        identity, resumable = identity_of(method, source, evaluator, settings), resumable_of(settings)
        self.folder = RunFolder(folder, identity, config_dict, settings, self.context, resumable)
        self.eval_result = self.folder.find(resume)
        self.context.wait()  # nobody writes before all have looked
        with self.context.together():
            self.state = self._create_state(trainable_of(method.pipe, settings))
        self.sampler = self._sampler()
        self.stopped: str | None = None

    def _create_state(self, trainable: Trainable) -> RunState:
        settings = self.settings
        parameters = trainable.parameters.values()
        optimiser = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        self.prepared, self.optimiser = self.accelerator.prepare(trainable.denoiser, optimiser)
        ema = EMAModel(list(trainable.parameters.values()), settings.ema_decay) if settings.ema_decay else None
        return RunState(
            method=self.method,
            trainable=trainable,
            optimiser=optimiser,
            schedule=get_constant_schedule_with_warmup(optimiser, settings.warmup_steps),
            scaler=self.accelerator.scaler,
            ema=ema,
            control=KLControl(settings.kl_weight, settings.kl_target, settings.kl_budget),
            early_stopping=EarlyStopping(settings.early_stopping_patience),
        )

    def train(self, on_update: Callable[[Record], None], on_evaluation: Callable[[EvalResult], None]) -> TrainingResult:
        """Goes on from what is there, updates until the last one, a guard or a signal; then exports the weights."""
        with self.context.together(), torch.random.fork_rng():  # for pipelines that draw beside the generators
            torch.manual_seed(self.settings.seed + self.context.index)
            self.folder.open(self.state, self.eval_result)
            try:
                self._training_loop(on_update, on_evaluation)
                return self._export_result()
            except Exception:
                # What was learnt is not lost with a reward that fails; of several processes one alone cannot save it.
                if self.state.step and self.context.count == 1:
                    self.folder.save(self.state)
                raise
            finally:
                # The user's denoiser computes in its own precision again.
                self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)

    def _training_loop(self, on_update: Callable[[Record], None], on_evaluation: Callable[[EvalResult], None]) -> None:
        state, last = self.state, self.settings.max_steps
        hidden, name = None if self.context.is_main_process else True, type(self.method).__name__
        bar = tqdm(total=last, initial=state.step, unit="update", disable=hidden, desc=name)
        with stop_request(self.context.any) as request, bar, self._trackers():
            try:
                while True:
                    self._evaluate(request, on_evaluation)
                    if state.step and state.step % self.settings.save_steps == 0:
                        self.folder.save(state)
                    if self.stopped or state.step >= last:
                        break
                    if (record := self._update(request)) is not None:
                        if self.context.is_main_process:
                            on_update(record)
                        self.accelerator.log(_scalars(record), state.step)
                        bar.update()
                        bar.set_postfix(_progress_metrics(record))
            except Stopped:
                self.stopped = INTERRUPTED
            self.folder.save(state)

    def _update(self, request: StopRequest) -> Record | None:
        """One update: samples where none are left, the gradient, the optimiser, the record; None where the KL budget
        is spent."""
        started, state = time.monotonic(), self.state
        self.optimiser.zero_grad()  # of an update that was broken off
        state.rollout = state.rollout or self._draw(request)
        with self.context.no_sync(self.prepared) as exchange:
            loss, metrics = self.method.gradient(
                self.sampler,
                state.rollout.batch,
                penalties=self._penalties(),
                on_policy=state.rollout.on_policy,
                backward=self.accelerator.backward,
                on_chunk=request.check,
                before_last=exchange,
                context=self.context,
            )
        if state.control.is_exhausted(metrics["kl"]):
            self.stopped = f"the KL budget is spent: {metrics['kl']:.3g} of {state.control.budget:g} nats a trajectory"
            return None
        rate = state.schedule.get_last_lr()[0]
        norm = self._step(loss)
        state.step += 1
        record = {"step": state.step, "round": state.num_rollouts, "loss": loss, **state.rollout.record(), **metrics}
        record |= {"kl_weight": state.control.weight, "grad_norm": norm, "learning_rate": rate}
        seconds, images = time.monotonic() - started, self.settings.train_batch_size * self.settings.num_generations
        record |= {"seconds": seconds, "images_per_second": images / seconds, "processes": self.context.count}
        # No pairs, no accuracy; and a scaler tries its way with infinite gradients.
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        state.rollout = state.rollout.next_batch()
        state.control = state.control.after(metrics["kl"])
        state.records.append(record)
        self.folder.note("records", record)
        return record

    def _step(self, loss: float) -> float:
        """The optimiser's step; the gradient's norm. Raises InputError before the step where that is no number."""
        state = self.state
        norm = float(whole(self.accelerator.clip_grad_norm_(state.parameters, self.settings.max_grad_norm)))
        if not (math.isfinite(loss) and (math.isfinite(norm) or state.scaler)):
            raise InputError(
                f"the loss of update {state.step + 1} is {loss:g}, its gradient as long as {norm:g}: lower "
                "learning_rate, raise kl_weight, or mend a reward whose gradient is not finite"
            )
        self.optimiser.step()
        state.schedule.step()
        if state.ema:
            state.ema.step(state.parameters)
        return norm

    def _penalties(self) -> dict[Penalty, float]:
        penalties: dict[Penalty, float] = {kl: self.state.control.weight, chi_square: self.settings.chi_square_weight}
        return {penalty: weight for penalty, weight in penalties.items() if weight}

    def _sampler(self) -> Sampler:
        return sampler_of(self.method.pipe, self.settings, self.prepared)

    def _draw(self, request: StopRequest) -> RolloutBuffer:
        """The next round; the first one is also held against its replay. One that is broken off leaves no trace."""
        before, random = self.method.state(), torch.get_rng_state()
        self.sampler = self._sampler()  # what it remembers of texts lasts for a round
        try:
            buffer = self.source.round(
                self.state.num_rollouts, self.sampler, self.state.trainable, request.check, self.context
            )
            if self.state.num_rollouts == 0:
                self._check(buffer.batch)
        except BaseException:
            self.method.restore(before)
            torch.set_rng_state(random)
            raise
        self.state.num_rollouts += 1
        return buffer

    def _check(self, batch: Batch) -> None:
        """Raises InputError where log-probabilities are not those of the samples, or are rounding."""
        dtype = half_precision(self.state.trainable.denoiser, self.settings)
        as_model = self.settings.log_prob_precision == "model"
        check_replay(self.sampler, batch.chunks[0], (dtype if as_model else None) or torch.float32)
        if as_model and (dtype or self.method.pipe.device.type == "cuda"):  # where TF32 may be on
            exact = sampler_of(self.method.pipe, self.settings, self.prepared, "float32")
            check_rounding(self.sampler, exact, self.state.trainable.parameters, batch.chunks[0], batch.steps)

    def _evaluate(self, request: StopRequest, on_evaluation: Callable[[EvalResult], None]) -> None:
        """Where one is due, and was not made before: at the start, every so often, and at the end."""
        self._evaluate_if_due(request, on_evaluation)
        early_stopping = self.state.early_stopping
        if early_stopping.stop() and not self.stopped:
            self.stopped = (
                f"the trained reward rose while the held-out one fell, {early_stopping.num_overoptimized} evaluations "
                f"in a row: the weights of update {early_stopping.best_step} are kept"
            )

    def _evaluate_if_due(self, request: StopRequest, on_evaluation: Callable[[EvalResult], None]) -> None:
        state, every = self.state, self.settings.eval_steps
        due = state.step % every == 0 or state.step >= self.settings.max_steps or self.stopped
        if not self.evaluator.prompts or not due or (state.evaluations and state.evaluations[-1]["step"] == state.step):
            return
        with state.ema_weights():
            pipe, check = self.method.pipe, request.check
            eval_result = self.evaluator.evaluate(pipe, self.settings, state.step, self.prepared, check, self.context)
            if self.context.is_main_process:
                on_evaluation(eval_result)
            state.early_stopping = state.early_stopping.after(state.step, *eval_result.means())
            best = state.early_stopping.best_step == state.step
            if best:
                self.folder.export(state, "best")
        state.evaluations.append(eval_result.record())
        if best:
            self.folder.save(state)  # pinned, whatever comes
        self.folder.note("evaluations", eval_result.record())
        self.accelerator.log(_scalars(eval_result.record()), state.step)

    @contextmanager
    def _trackers(self) -> Iterator[None]:
        if self.settings.log_with:
            self.accelerator.init_trackers("steer")
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:  # end_training would part the processes as well
                tracker.finish()

    def _export_result(self) -> TrainingResult:
        state, weights, of = self.state, None, None
        if self.stopped != INTERRUPTED:
            num_overoptimized = state.early_stopping.stop() and state.early_stopping.best_step is not None
            of = state.early_stopping.best_step if num_overoptimized else state.step
            if num_overoptimized:
                self.folder.load_best(state)
            elif state.ema:
                state.ema.copy_to(state.parameters)  # the pipeline stays what is evaluated and exported
            weights = self.folder.export(state, "final")
        records, evaluations, best = tuple(state.records), tuple(state.evaluations), state.early_stopping.best_step
        return TrainingResult(state.step, self.stopped, weights, best, records, evaluations, of)


def _scalars(record: Record) -> dict[str, float]:
    """What trackers can draw; of [mean, low, high] the mean."""
    return {name: value[0] if isinstance(value, list) else value for name, value in record.items()}


def _progress_metrics(record: Record) -> dict[str, str]:
    names = {"reward": "reward", "kl": "kl", "accuracy": "acc", "images_per_second": "img/s"}
    return {short: f"{record[name]:.3g}" for name, short in names.items() if name in record}


class Trainer(TrainingMethod):
    """A method that trains `pipe`'s denoiser on `reward`; afterwards `pipe` is the trained one."""

    def train(
        self,
        prompts: Sequence[str] | int,
        output_dir: str | Path,
        settings: TrainingConfig | None = None,
        *,
        eval_prompts: Sequence[str] | int = (),
        eval_rewards: Sequence[Any] = (),
        metadata: Sequence[Mapping[str, Any]] | None = None,
        eval_metadata: Sequence[Mapping[str, Any]] | None = None,
        resume: bool = False,
        config_dict: Mapping[str, Any] | None = None,
        on_update: Callable[[Record], None] | None = None,
        on_evaluation: Callable[[EvalResult], None] | None = None,
    ) -> TrainingResult:
        """Trains, and writes to `output_dir`: metrics.jsonl, evaluations.jsonl, checkpoints/, final/ and best/ weights.

        prompts        to learn from; of a pipeline without prompts (unconditional) a count, or what the reward reads
        eval_prompts   held out; without them nothing is evaluated
        metadata, eval_metadata  one mapping for each of these, for rewards that accept `metadata`
        eval_rewards   kept apart from the trained reward; the first is what EarlyStopping watches (without any, the
                       trained reward on the held-out prompts)
        resume         go on from the newest whole checkpoint, or begin where there is none
        config_dict          plain values that are saved with every checkpoint
        on_update, on_evaluation  observers

        Ctrl-C and SIGTERM end it with a checkpoint. Raises InputError for what does not fit, before anything is drawn.
        """
        settings = settings or TrainingConfig()
        train_prompts, held_out = (
            prompts_of(self.pipe, prompts, "prompts"),
            prompts_of(self.pipe, eval_prompts, "eval_prompts"),
        )
        if not train_prompts:
            raise InputError("prompts: at least one is needed")
        rows = metadata_table((train_prompts, metadata), (held_out, eval_metadata))
        self.reward = with_metadata(self.reward, rows)
        self.check(settings)
        warn_if_pipeline_truncates(self.pipe, (*train_prompts, *held_out), settings.call or {})
        source = OnlineRollouts(train_prompts, self, settings)
        evaluation_rewards = tuple(with_metadata(load_reward(reward), rows) for reward in eval_rewards)
        evaluator = Evaluator(held_out, self.reward, evaluation_rewards)
        return self._run(source, evaluator, settings, output_dir, resume, config_dict, on_update, on_evaluation)

    def _run(
        self,
        source: RolloutSource,
        evaluator: Evaluator,
        settings: TrainingConfig,
        output_dir: str | Path,
        resume: bool,
        config_dict: Mapping[str, Any] | None,
        on_update: Callable[[Record], None] | None,
        on_evaluation: Callable[[EvalResult], None] | None,
    ) -> TrainingResult:
        """What a training is, wherever its samples come from."""
        evaluator.check(settings.early_stopping_patience)
        run = TrainingRun(self, source, evaluator, settings, Path(output_dir), dict(config_dict or {}), resume)
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


class LossTrainer(Trainer):
    """A method that is a loss of log-probabilities and of the signal that `signal` makes of rewards."""

    def __init__(self, pipe: Any, reward: Any, loss: Loss) -> None:
        super().__init__(pipe, reward)
        self.loss = loss

    def check(self, settings: TrainingConfig) -> None:
        """Raises InputError for settings that this method can do nothing with."""
        if self.loss.whole_trajectory and settings.timestep_fraction < 1:
            raise InputError(
                f"timestep_fraction must be 1, got {settings.timestep_fraction}: the loss of {type(self).__name__} "
                "ties all steps of a trajectory together"
            )
        if settings.num_generations < 2:
            raise InputError(
                f"num_generations must be at least 2, got {settings.num_generations}: "
                f"{type(self).__name__} compares the samples of a prompt"
            )

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Adds the gradient of one update to the weights' .grad; see `steer.training.gradient.two_pass_gradient`."""
        return two_pass_gradient(sampler, batch, self.loss, **options)

    def config_dict(self) -> dict[str, Any]:
        return super().config_dict() | {"loss": type(self.loss).__name__, **asdict(self.loss)}  # type: ignore[call-overload]
