"""A finetuning run: rounds of samples, updates, evaluations, guards and checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from steer.batch import Batch
from steer.engine import Penalty
from steer.errors import InputError
from steer.guards import HoldOutWatch, KLControl, check_replay, check_rounding, chi_square, kl
from steer.pipelines.finetune_method import FinetuneResult, FinetuningMethod, Record
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.finetune_setup import accelerator_of, changeable_of, identity_of, trainable_of
from steer.pipelines.finetune_state import RunFolder, RunState
from steer.pipelines.held_out import Evaluated, Exam
from steer.pipelines.rounds import Round, Source
from steer.pipelines.samples import half_precision, sampler_of
from steer.pipelines.stopping import Stopped, StopRequest, stop_request
from steer.pipelines.team import AcceleratedTeam
from steer.sharded import whole
from steer.trainable import Trainable
from steer.trajectory import Sampler

INTERRUPTED = "interrupted"


class FinetuneRun:
    """One training of one method, in one folder."""

    def __init__(
        self,
        method: FinetuningMethod,
        source: Source,
        exam: Exam,
        settings: FinetuneSettings,
        folder: Path,
        about: dict[str, Any],
        resume: bool,
    ) -> None:
        self.method, self.source, self.exam, self.settings = method, source, exam, settings
        self.accelerator = accelerator_of(settings, folder, method.pipe.device.type == "cpu")
        self.team = AcceleratedTeam(self.accelerator)
        self.team.check(settings)
        identity, changeable = identity_of(method, source, exam, settings), changeable_of(settings)
        self.folder = RunFolder(folder, identity, about, settings, self.team, changeable)
        self.found = self.folder.find(resume)
        self.team.wait()  # nobody writes before all have looked
        with self.team.together():
            self.state = self._started(trainable_of(method.pipe, settings))
        self.sampler = self._sampler()
        self.stopped: str | None = None

    def _started(self, trainable: Trainable) -> RunState:
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
            watch=HoldOutWatch(settings.patience),
        )

    def train(self, on_update: Callable[[Record], None], on_evaluation: Callable[[Evaluated], None]) -> FinetuneResult:
        """Goes on from what is there, updates until the last one, a guard or a signal; then exports the weights."""
        with self.team.together(), torch.random.fork_rng():  # for pipelines that draw beside the generators
            torch.manual_seed(self.settings.seed + self.team.index)
            self.folder.open(self.state, self.found)
            try:
                self._updates(on_update, on_evaluation)
                return self._finished()
            except Exception:
                # What was learnt is not lost with a reward that fails; of several processes one alone cannot save it.
                if self.state.step and self.team.count == 1:
                    self.folder.save(self.state)
                raise
            finally:
                # The user's denoiser computes in its own precision again.
                self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)

    def _updates(self, on_update: Callable[[Record], None], on_evaluation: Callable[[Evaluated], None]) -> None:
        state, last = self.state, self.settings.max_steps
        hidden, name = None if self.team.is_main else True, type(self.method).__name__
        bar = tqdm(total=last, initial=state.step, unit="update", disable=hidden, desc=name)
        with stop_request(self.team.any) as request, bar, self._tracked():
            try:
                while True:
                    self._evaluate(request, on_evaluation)
                    if state.step and state.step % self.settings.checkpoint_every == 0:
                        self.folder.save(state)
                    if self.stopped or state.step >= last:
                        break
                    if (record := self._update(request)) is not None:
                        if self.team.is_main:
                            on_update(record)
                        self.accelerator.log(_numbers(record), state.step)
                        bar.update()
                        bar.set_postfix(_shown(record))
            except Stopped:
                self.stopped = INTERRUPTED
            self.folder.save(state)

    def _update(self, request: StopRequest) -> Record | None:
        """One update: samples where none are left, the gradient, the optimiser, the record; None where the KL budget
        is spent."""
        started, state = time.monotonic(), self.state
        self.optimiser.zero_grad()  # of an update that was broken off
        state.round = state.round or self._draw(request)
        with self.team.accumulating(self.prepared) as exchange:
            loss, metrics = self.method.gradient(
                self.sampler,
                state.round.batch,
                penalties=self._penalties(),
                unchanged=state.round.untouched,
                backward=self.accelerator.backward,
                before_each=request.check,
                before_last=exchange,
                team=self.team,
            )
        if state.control.spent(metrics["kl"]):
            self.stopped = f"the KL budget is spent: {metrics['kl']:.3g} of {state.control.budget:g} nats a trajectory"
            return None
        rate = state.schedule.get_last_lr()[0]
        norm = self._step(loss)
        state.step += 1
        record = {"step": state.step, "round": state.rounds, "loss": loss, **state.round.record(), **metrics}
        record |= {"kl_weight": state.control.weight, "grad_norm": norm, "learning_rate": rate}
        seconds, images = time.monotonic() - started, self.settings.prompts_per_step * self.settings.samples_per_prompt
        record |= {"seconds": seconds, "images_per_second": images / seconds, "processes": self.team.count}
        # No pairs, no accuracy; and a scaler tries its way with infinite gradients.
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        state.round = state.round.following()
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

    def _draw(self, request: StopRequest) -> Round:
        """The next round; the first one is also held against its replay. One that is broken off leaves no trace."""
        before, random = self.method.state(), torch.get_rng_state()
        self.sampler = self._sampler()  # what it remembers of texts lasts for a round
        try:
            drew = self.source.round(self.state.rounds, self.sampler, self.state.trainable, request.check, self.team)
            if self.state.rounds == 0:
                self._check(drew.batch)
        except BaseException:
            self.method.restore(before)
            torch.set_rng_state(random)
            raise
        self.state.rounds += 1
        return drew

    def _check(self, batch: Batch) -> None:
        """Raises InputError where log-probabilities are not those of the samples, or are rounding."""
        dtype = half_precision(self.state.trainable.denoiser, self.settings)
        as_model = self.settings.log_prob_precision == "model"
        check_replay(self.sampler, batch.chunks[0], (dtype if as_model else None) or torch.float32)
        if as_model and (dtype or self.method.pipe.device.type == "cuda"):  # where TF32 may be on
            exact = sampler_of(self.method.pipe, self.settings, self.prepared, "float32")
            check_rounding(self.sampler, exact, self.state.trainable.parameters, batch.chunks[0], batch.steps)

    def _evaluate(self, request: StopRequest, on_evaluation: Callable[[Evaluated], None]) -> None:
        """Where one is due, and was not made before: at the start, every so often, and at the end."""
        self._take(request, on_evaluation)
        watch = self.state.watch
        if watch.stop() and not self.stopped:
            self.stopped = (
                f"the trained reward rose while the held-out one fell, {watch.fooled} evaluations in a row: the "
                f"weights of update {watch.best_step} are kept"
            )

    def _take(self, request: StopRequest, on_evaluation: Callable[[Evaluated], None]) -> None:
        state, every = self.state, self.settings.eval_every
        due = state.step % every == 0 or state.step >= self.settings.max_steps or self.stopped
        if not self.exam.prompts or not due or (state.evaluations and state.evaluations[-1]["step"] == state.step):
            return
        with state.averaged():
            pipe, check = self.method.pipe, request.check
            found = self.exam.take(pipe, self.settings, state.step, self.prepared, check, self.team)
            if self.team.is_main:
                on_evaluation(found)
            state.watch = state.watch.after(state.step, *found.means())
            best = state.watch.best_step == state.step
            if best:
                self.folder.export(state, "best")
        state.evaluations.append(found.record())
        if best:
            self.folder.save(state)  # pinned, whatever comes
        self.folder.note("evaluations", found.record())
        self.accelerator.log(_numbers(found.record()), state.step)

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        if self.settings.log_with:
            self.accelerator.init_trackers("steer")
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:  # end_training would part the processes as well
                tracker.finish()

    def _finished(self) -> FinetuneResult:
        state, weights, of = self.state, None, None
        if self.stopped != INTERRUPTED:
            fooled = state.watch.stop() and state.watch.best_step is not None
            of = state.watch.best_step if fooled else state.step
            if fooled:
                self.folder.load_best(state)
            elif state.ema:
                state.ema.copy_to(state.parameters)  # the pipeline stays what is evaluated and exported
            weights = self.folder.export(state, "final")
        records, evaluations, best = tuple(state.records), tuple(state.evaluations), state.watch.best_step
        return FinetuneResult(state.step, self.stopped, weights, best, records, evaluations, of)


def _numbers(record: Record) -> dict[str, float]:
    """What trackers can draw; of [mean, low, high] the mean."""
    return {name: value[0] if isinstance(value, list) else value for name, value in record.items()}


def _shown(record: Record) -> dict[str, str]:
    names = {"reward": "reward", "kl": "kl", "accuracy": "acc", "images_per_second": "img/s"}
    return {short: f"{record[name]:.3g}" for name, short in names.items() if name in record}
