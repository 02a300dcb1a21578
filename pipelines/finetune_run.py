"""A finetuning run: rounds of samples, updates, evaluations, guards and checkpoints."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from steer.engine import Penalty
from steer.guards import HoldOutWatch, KLControl, check_replay, chi_square, kl
from steer.pipelines.finetune import FinetuneResult, FinetuningPipeline, Record
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.finetune_state import RunFolder
from steer.pipelines.held_out import Evaluated, Exam
from steer.pipelines.rounds import Round, Source
from steer.pipelines.samples import sampler_of
from steer.pipelines.stopping import Stopped, StopRequest, stop_request
from steer.trainable import Full, LoRA, Trainable


class FinetuneRun:
    """Everything that changes while a method trains; `RunFolder` writes it down and reads it back."""

    def __init__(
        self,
        method: FinetuningPipeline,
        source: Source,
        exam: Exam,
        settings: FinetuneSettings,
        folder: Path,
        about: dict[str, Any],
    ) -> None:
        self.method, self.source, self.exam, self.settings = method, source, exam, settings
        self.folder = RunFolder(folder, about)
        pipe = method.pipe
        self.trainable: Trainable = (
            LoRA(pipe, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
            if settings.lora_rank
            else Full(pipe)
        )
        if settings.gradient_checkpointing:
            self.trainable.denoiser.enable_gradient_checkpointing()
        self.parameters = list(self.trainable.parameters.values())
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=list(settings.log_with) or None,
            project_dir=folder,
            cpu=pipe.device.type == "cpu",
        )
        optimiser = torch.optim.AdamW(self.parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        self.schedule = get_constant_schedule_with_warmup(optimiser, settings.warmup_steps)
        self.prepared, self.optimiser = self.accelerator.prepare(self.trainable.denoiser, optimiser)
        self.ema = EMAModel(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.control = KLControl(settings.kl_weight, settings.kl_target, settings.kl_budget)
        self.watch = HoldOutWatch(settings.patience)
        self.step = self.rounds = 0  # updates made, rounds drawn
        self.round: Round | None = None  # the one that is being learnt from
        self.records: list[Record] = []
        self.evaluations: list[Record] = []
        self.stopped: str | None = None

    def open(self, resume: bool) -> None:
        """Takes the output folder, and what is to be gone on from in it."""
        self.folder.open(self, resume)

    def train(self, on_update: Callable[[Record], None], on_evaluation: Callable[[Evaluated], None]) -> FinetuneResult:
        """Updates until the last one, a guard or a signal; then exports the weights."""
        bar = tqdm(total=self.settings.max_steps, initial=self.step, unit="update", disable=None, desc="finetune")
        with stop_request() as request, bar, self._tracked():
            try:
                while True:
                    self._evaluate(request, on_evaluation)
                    self._checkpoint()
                    if self.stopped or self.step >= self.settings.max_steps:
                        break
                    self._update(request)
                    on_update(self.records[-1])
                    self.accelerator.log(_numbers(self.records[-1]), self.step)
                    bar.update()
                    bar.set_postfix(_shown(self.records[-1]))
            except Stopped:
                self.stopped = "interrupted"
            self.folder.save(self)
        return self._finished()

    def _update(self, request: StopRequest) -> None:
        """One update: samples where none are left, the gradient, the optimiser, the records."""
        started = time.monotonic()
        drawn_now = self.round is None
        if self.round is None:
            self.round = self._draw(request)
        batch = self.round.batch
        sampler = sampler_of(self.method.pipe, self.settings, self.prepared)
        penalties: dict[Penalty, float] = {kl: self.control.weight, chi_square: self.settings.chi_square_weight}
        self.optimiser.zero_grad()
        loss, metrics = self.method.gradient(
            sampler,
            batch,
            {penalty: weight for penalty, weight in penalties.items() if weight},
            self.round.untouched,
            self.accelerator.backward,
            request.check,
        )
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimiser.step()
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters)
        self.step += 1
        told = {"step": self.step, "round": self.rounds, "loss": loss, **self.round.record(), **metrics}
        steps = batch.chunks[0].log_probs.shape[1]
        told |= {"kl_per_step": metrics["kl"] / steps, "kl_weight": self.control.weight}
        told |= {"grad_norm": float(norm), "learning_rate": rate}
        self.round = self.round.following()
        self.control = self.control.after(metrics["kl"])
        if self.control.spent(metrics["kl"]):
            self.stopped = (
                f"KL of {metrics['kl']:.3g} nats a trajectory: the budget of {self.control.budget:g} is spent"
            )
        seconds = time.monotonic() - started
        images = self.settings.prompts_per_step * self.settings.samples_per_prompt
        images *= self.settings.steps_per_round if drawn_now else 0
        self._note(self.records, told | {"seconds": seconds, "images_per_second": images / seconds})

    def _draw(self, request: StopRequest) -> Round:
        sampler = sampler_of(self.method.pipe, self.settings, self.prepared)
        drew = self.source.round(self.rounds, sampler, self.trainable, request.check)
        if self.rounds == 0:
            check_replay(sampler, drew.batch.chunks[0], self._dtype())
        self.rounds += 1
        return drew

    def _dtype(self) -> torch.dtype:
        by_precision = {"fp16": torch.float16, "bf16": torch.bfloat16}
        return by_precision.get(self.settings.mixed_precision, self.trainable.denoiser.dtype)

    def _evaluate(self, request: StopRequest, on_evaluation: Callable[[Evaluated], None]) -> None:
        """Where one is due, and was not made before: at the start, every so often, and at the end."""
        due = self.step % self.settings.eval_every == 0 or self.step >= self.settings.max_steps or self.stopped
        if not self.exam.prompts or not due or (self.evaluations and self.evaluations[-1]["step"] == self.step):
            return
        with self.averaged():
            found = self.exam.take(self.method.pipe, self.settings, self.step, self.prepared, request.check)
            on_evaluation(found)
            self._note(self.evaluations, found.record())
            self.accelerator.log(_numbers(found.record()), self.step)
            proxy, held_out = found.means()
            self.watch = self.watch.after(self.step, proxy, held_out)
            if self.watch.best_step == self.step:
                self.folder.export(self, "best")
                self.folder.save(self)
        if self.watch.stop() and not self.stopped:
            self.stopped = (
                f"the trained reward rises while the held-out one falls, {self.watch.fooled} evaluations in a row: the "
                f"weights of update {self.watch.best_step} are kept"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their average, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _checkpoint(self) -> None:
        if self.step and self.step % self.settings.checkpoint_every == 0:
            self.folder.save(self)

    def _note(self, series: list[Record], record: Record) -> None:
        series.append(record)
        self.folder.note(self)

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        if not self.settings.log_with:
            yield
            return
        self.accelerator.init_trackers("steer")
        try:
            yield
        finally:
            self.accelerator.end_training()

    def _finished(self) -> FinetuneResult:
        weights = None
        if self.stopped != "interrupted":
            if self.watch.stop() and self.watch.best_step is not None:
                self.folder.load_weights(self, self.watch.best_step)
            with self.averaged() if not self.watch.stop() else nullcontext():
                weights = self.folder.export(self, "final")
        return FinetuneResult(
            self.step, self.stopped, weights, self.watch.best_step, tuple(self.records), tuple(self.evaluations)
        )


def _numbers(record: Record) -> dict[str, float]:
    """What trackers can draw; of [mean, low, high] the mean."""
    return {name: value[0] if isinstance(value, list) else value for name, value in record.items()}


def _shown(record: Record) -> dict[str, str]:
    names = {"reward": "reward", "kl": "kl", "accuracy": "acc", "images_per_second": "img/s"}
    return {short: f"{record[name]:.3g}" for name, short in names.items() if name in record}
