"""The training, from top to bottom: Trainer (its arguments and its output), the run, its loop and one update."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar, Unpack

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from steer.diffusion.precision import Precision
from steer.diffusion.seeds import derived_seed, get_random_state, set_random_state
from steer.diffusion.views import plain_values
from steer.errors import InputError
from steer.files import write_text
from steer.pipelines.base import RewardedPipeline
from steer.pipelines.training.asking import REFUSED, UNANSWERED, OnQuestion, ask, question_of
from steer.pipelines.training.config import LossConfig, ParetoConfig, SignalConfig, TrainingConfig
from steer.pipelines.training.distributed import AccelerateContext, main_first
from steer.pipelines.training.evaluation import Evaluator
from steer.pipelines.training.events import Events, Stopped, StopRequest, read_callbacks, stop_request
from steer.pipelines.training.identity import check_identity, identity_of
from steer.pipelines.training.method import (
    ConfigT,
    Record,
    Scored,
    TrainingMethod,
    TrainingResult,
    check_tokens,
    half_precision,
    process_shard,
    sampler_of,
)
from steer.pipelines.training.model_card import base_model, model_card
from steer.pipelines.training.preference_data import NoReward, PreferenceDataset, sampling_config_of
from steer.pipelines.training.preference_files import read_preferences
from steer.pipelines.training.preparation import accelerator_of, trainable_of
from steer.pipelines.training.prompts import check_conditions, prompts_of, rows_by_prompt
from steer.pipelines.training.rollouts import OnlineRollouts, RolloutBuffer, RolloutSource
from steer.pipelines.training.signals import RewardSignal, check_pareto
from steer.pipelines.training.state import RunFolder, RunState, checkpoint_to_resume
from steer.pipelines.training.tracking import log_samples, scalars, trackers
from steer.pipelines.training.workers import worker_processes
from steer.reward import Reward, warn_if_pipeline_truncates, with_metadata
from steer.rewards.compose import plain_rewards, with_media_rates
from steer.rewards.parser import load_reward
from steer.training.distributed import DistributedContext
from steer.training.gradient import Batch, GradientOptions, Penalty, two_pass_gradient
from steer.training.guards import EarlyStopping, check_replay, check_rounding, chi_square, kl
from steer.training.losses import Metrics
from steer.training.optimisers import optimiser_class
from steer.training.rollout import Sampler, Trajectories, blocks
from steer.training.signals import kept_samples
from steer.training.trainable import Trainable, whole

INTERRUPTED = "interrupted"
PAUSED = (INTERRUPTED, UNANSWERED)  # reasons to end a run that is to be resumed: nothing is exported
SignalConfigT = TypeVar("SignalConfigT", bound=SignalConfig)
LossConfigT = TypeVar("LossConfigT", bound=LossConfig)


class Trainer(TrainingMethod[ConfigT]):
    """A method that trains the denoiser of `pipe` on `reward`; afterwards `pipe` is the trained pipeline.

    trainer = GRPOTrainer(pipe, "hpsv2.1", config=GRPOConfig(max_steps=200), train_prompts=["a red circle"])
    trainer.train()
    trainer.save_pretrained("lora")  # for pipe.load_lora_weights("lora")

    reward         the trained reward; None with preferences annotated by people
    config         the method's own, such as GRPOConfig, or a TrainingConfig with the method's options at their defaults
    preferences    replaces train_prompts. For DPO: a table of pairs of images, as for `steer rewards train`. For D3PO:
                   a folder of human comparisons (`preference_data.PreferenceFolder`). Samples without stored
                   trajectories are sampled again by `pipe` and must give the same pixels. The configuration of their
                   sampling is the default.
    train_prompts  prompts; for an unconditional pipeline a count, or texts for the reward
    eval_prompts   held-out prompts; without them nothing is evaluated
    eval_rewards   held-out rewards; early stopping monitors the first; without them the trained reward on the
                   eval_prompts chooses best/
    metadata, eval_metadata  one mapping per prompt, for rewards that accept `metadata`
    conditions, eval_conditions  one mapping per prompt of arguments of the pipeline's call, like {"image": source};
                   they are part of the metadata
    callbacks      `transformers.TrainerCallback`s, or objects with some of its methods: on_train_begin, on_step_end,
                   on_log (`logs`: the metrics of an update), on_evaluate (`metrics`, and `evaluation`: an EvalResult
                   with images), on_save, on_train_end. Classes are called without arguments. Events are called in every
                   process, and may set should_training_stop, should_save and should_evaluate of their TrainerControl.
    on_question    answers the questions of `config.ask` (`asking.OnQuestion`); without it, a question ends the run with
                   a checkpoint, and is asked again when the run is resumed
    run_config     plain values that describe the run, in its checkpoints and model card

    Raises InputError for arguments that do not fit.
    """

    other_names: ClassVar[Mapping[str, str]] = {  # of transformers and TRL
        **RewardedPipeline.other_names,
        "args": "config",
        "train_dataset": "train_prompts",
        "eval_dataset": "eval_prompts",
    }
    config_class: ClassVar[type[TrainingConfig]]
    takes_preferences: ClassVar[bool] = False
    trains_tokens: ClassVar[bool] = False  # by another method than log-probabilities
    read_reward = staticmethod(load_reward)

    def __init__(
        self,
        pipe: Any,
        reward: Any = None,
        config: TrainingConfig | None = None,
        *,
        preferences: str | Path | None = None,
        train_prompts: Sequence[str] | int = (),
        eval_prompts: Sequence[str] | int = (),
        eval_rewards: Sequence[Any] = (),
        metadata: Sequence[Mapping[str, Any]] | None = None,
        eval_metadata: Sequence[Mapping[str, Any]] | None = None,
        conditions: Sequence[Mapping[str, Any]] | None = None,
        eval_conditions: Sequence[Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] = (),
        on_question: OnQuestion | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        if preferences is not None and not self.takes_preferences:
            raise InputError(
                f"preferences are for methods that learn from them, such as D3PO, not {self.config_class.title}: "
                "give prompts and a reward"
            )
        if preferences is not None and (conditions or eval_conditions):
            raise InputError("conditions are for samples of train_prompts, not for preferences: leave them out")
        if reward is None and preferences is None:
            raise InputError("reward is missing: give one to train on, or preferences (D3PO, DPO)")
        if config is None and preferences is not None:
            config = self.config_class(**self.preference_defaults(preferences))
        super().__init__(pipe, NoReward() if reward is None else self.read_reward(reward))
        self.config = self._own_config(config)
        if preferences is not None and self.config.evaluates_by_ode:
            raise InputError(
                "window and dynamics are for samples of the present policy: preferences were sampled with noise in all "
                "steps, so leave both out"
            )
        if preferences is not None and self.config.asynchronous_rewards:
            raise InputError("asynchronous_rewards score samples of train_prompts, not preferences: leave it out")
        self.preferences = None if preferences is None else Path(preferences)
        self.train_prompts, self.eval_prompts = train_prompts, eval_prompts
        self.eval_rewards = tuple(load_reward(one) for one in eval_rewards)
        self.metadata, self.eval_metadata = metadata, eval_metadata
        self.conditions, self.eval_conditions = conditions, eval_conditions
        self.callbacks, self.on_question, self.run_config = read_callbacks(callbacks), on_question, run_config
        self._run: FinetuningRun | None = None
        names, trained = [one.name for one in self.eval_rewards], plain_rewards(self.reward).keys()
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise InputError(f"eval_rewards: {twice[0]!r} is given twice: take another one")
        if shared := [one.name for one in self.eval_rewards if plain_rewards(one).keys() & trained]:
            raise InputError(
                f"eval_rewards hold {shared[0]!r}, which is trained on: take one that is not part of the reward"
            )
        check_tokens(pipe, self.config, self.can_train_tokens())
        self.check()

    @classmethod
    def can_train_tokens(cls) -> bool:
        """Return whether the method can train text models: by log-probabilities or relaxed tokens."""
        return cls.trains_tokens or (cls.log_probs and issubclass(cls.config_class, LossConfig))

    def _own_config(self, config: TrainingConfig | None) -> Any:
        own = self.config_class
        if config is None or isinstance(config, own):
            return config or own()
        if type(config) is not TrainingConfig:
            raise InputError(
                f"config must be a {own.__name__} or a TrainingConfig, got {type(config).__name__}: "
                "it holds options of another method"
            )
        return own(**{one.name: getattr(config, one.name) for one in fields(config)})

    def train(self, resume_from_checkpoint: bool = False) -> TrainingResult:
        """Train, and write metrics, evaluations, checkpoints and weights (final/, best/) to `config.output_dir`.

        resume_from_checkpoint  continue from the newest whole checkpoint there; start where there is none

        Ctrl-C and SIGTERM end it with a checkpoint. Raises InputError for bad arguments before anything is sampled.
        """
        rewards = (self.reward, *self.eval_rewards)
        self.reward, *others = (with_media_rates(one, self.pipe, self.config.call_kwargs) for one in rewards)
        self.eval_rewards = tuple(others)
        source = self.rollout_source()  # with the conditions of its prompts, which workers get
        with worker_processes(self):
            self._run = FinetuningRun(self, source, self.evaluator(), resume_from_checkpoint)
            return self._run.train()

    def rollout_source(self) -> RolloutSource:
        """The source of training samples. Raises InputError for prompts that do not fit the pipeline."""
        if self.preferences is not None:
            with main_first(self.pipe.device.type == "cpu"):
                return self.preference_source(self.preferences)
        prompts, held_out = prompts_of(self.pipe, self.train_prompts, "train_prompts"), self.held_out()
        if not prompts:
            raise InputError("train_prompts: at least one is needed")
        metadata = rows_by_prompt("metadata", (prompts, self.metadata), (held_out, self.eval_metadata))
        given = (prompts, self.conditions), (held_out, self.eval_conditions)
        conditions = self.conditions_by_prompt = rows_by_prompt("conditions", *given)
        check_conditions(self.pipe, conditions)
        both = {one: {**conditions.get(one, {}), **metadata.get(one, {})} for one in conditions | metadata}
        self.attach_metadata(both or None)
        warn_if_pipeline_truncates(self.pipe, (*prompts, *held_out), self.config.call)
        return OnlineRollouts(prompts, self)

    def attach_metadata(self, rows: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Attach metadata by prompt to all rewards."""
        self.reward = with_metadata(self.reward, rows)
        self.eval_rewards = tuple(with_metadata(one, rows) for one in self.eval_rewards)

    @classmethod
    def preference_defaults(cls, preferences: str | Path) -> dict[str, Any]:
        """The fields of the configuration that preferences determine, unless given."""
        return sampling_config_of(preferences)

    @classmethod
    def check_preferences(cls, preferences: Path, config: Mapping[str, Any]) -> None:
        """Raise InputError for preferences that cannot be read."""
        read_preferences(preferences)

    def preference_source(self, preferences: Path) -> RolloutSource:
        """The preferences to learn from."""
        return PreferenceDataset.of(preferences, self.pipe, self.config)

    def held_out(self) -> tuple[str, ...]:
        """The evaluation prompts as texts."""
        return prompts_of(self.pipe, self.eval_prompts, "eval_prompts")

    def evaluator(self) -> Evaluator:
        """The evaluator by the trained reward, if any, and the held-out rewards.

        Raises InputError if there are no rewards, or if early stopping has no held-out reward to compare.
        """
        rewards = self._rewards()
        if self.eval_prompts and not rewards:
            raise InputError("eval_prompts need a reward to evaluate their images: give eval_rewards")
        first, *others = rewards or [self.reward]
        if self.config.early_stopping_patience and not (self.eval_prompts and others):
            raise InputError(
                "early_stopping_patience compares a held-out reward: give eval_prompts and eval_rewards, or "
                "early_stopping_patience 0"
            )
        if self.config.ask and not (self.eval_prompts and others):
            raise InputError("ask compares several rewards: give eval_prompts and eval_rewards, or leave it out")
        return Evaluator(self.held_out(), first, others, self.draw, self.conditions_by_prompt)

    def _rewards(self) -> list[Reward]:
        both = (self.reward, *self.eval_rewards)
        return [one for one in both if not isinstance(one, NoReward)]

    def describe(self) -> dict[str, Any]:
        """The run as plain values: `run_config`, or the model, the reward and the configuration."""
        if self.run_config is not None:
            return dict(self.run_config)
        names = {"model": base_model(self.pipe), "reward": self.reward.name}
        values = {name: value for name, value in asdict(self.config).items() if name != "output_dir"}  # may be moved
        return names | {"eval_rewards": [one.name for one in self.eval_rewards]} | plain_values(values)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the trained weights in diffusers' format, and a model card; return the folder.

        A LoRA loads with `pipe.load_lora_weights(folder)`, all weights with the denoiser's `from_pretrained`. In a
        distributed run every process must call this method.
        """
        run, folder = self._run, Path(folder)
        if run is None or (result := run.result) is None:
            raise InputError("nothing is trained yet: call train() before save_pretrained() or push_to_hub()")
        weights = run.state.trainable.state()
        if run.context.is_main_process:
            result = replace(result, weights=run.state.trainable.write(weights, folder))
            write_text(folder / "README.md", model_card(folder, self.pipe, self.config, result, self.describe()))
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the output of `save_pretrained` to a repository on the Hugging Face hub; return its address.

        repo_id  ORGANISATION/NAME, created where it does not exist
        """
        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if self._run is not None and not self._run.context.is_main_process:
                return ""
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"{self.config.title} with steer"
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        return str(repository)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the diffusers pipeline itself."""
        return self.pipe(*args, **kwargs)


class SignalTrainer(Trainer[SignalConfigT]):
    """A method whose signal, computed from rewards, compares the samples of a prompt."""

    @cached_property
    def reward_signal(self) -> RewardSignal:
        """The mixed reward, with the multipliers of constraints so far."""
        return RewardSignal(self.reward, self.config)

    def check(self) -> None:
        """Raise InputError for options that do not fit the reward."""
        own = self.config.constraints or self.config.normalize_components or self.config.sample_filter != "none"
        if own and isinstance(self.reward, NoReward):
            raise InputError(
                "constraints, normalize_components and sample_filter are for rewards, and preferences have none"
            )
        self.reward_signal  # noqa: B018  reads its options

    def scored_reward(self) -> Reward:
        return self.reward_signal.scored_reward(self.reward)

    def signal(self, scored: Scored) -> Tensor:
        """The mixed reward (B, K)."""
        return self.reward_signal(scored)

    def select(
        self, scored: Scored, signal: Tensor, name: str, context: DistributedContext
    ) -> tuple[Sequence[Trajectories], Tensor]:
        """The chunks and the signal of the samples that `sample_filter` keeps, in chunks of `micro_batch` rows."""
        kind, size = self.config.sample_filter, self.config.micro_batch
        if kind == "none":
            return scored.chunks, signal
        seed = derived_seed(self.config.seed, f"{name} filter")
        kept = kept_samples(scored.rewards, kind, self.config.kept_generations, seed)
        mask = torch.zeros_like(scored.rewards, dtype=torch.bool).scatter(1, kept, True).flatten()
        own = mask[list(process_shard(range(mask.numel()), context))].nonzero().flatten().tolist()
        stored = Trajectories.concatenate(scored.chunks).at(own)
        chunks = [stored.at(block) for block in blocks(range(len(own)), size)]
        return chunks, signal[torch.arange(len(kept))[:, None], kept]

    def metrics(self) -> dict[str, float]:
        return self.reward_signal.constraints.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self.reward_signal.constraints.state() if self.config.constraints else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.config.constraints:
            self.reward_signal.constraints = self.reward_signal.constraints.load_state(state)

    def attach_metadata(self, rows: Mapping[str, Mapping[str, Any]] | None) -> None:
        super().attach_metadata(rows)
        self.reward_signal.attach_metadata(rows)


class LossTrainer(SignalTrainer[LossConfigT]):
    """A method with a loss of log-probabilities and of the signal."""

    def check(self) -> None:
        """Raise InputError for options that do not fit the reward."""
        if isinstance(self.config, ParetoConfig) and self.config.pareto:
            check_pareto(self.reward)
        super().check()

    def signal(self, scored: Scored) -> Tensor:
        """Mixed rewards (B, K), or objectives (B, K, M) with `pareto`."""
        pareto = isinstance(self.config, ParetoConfig) and self.config.pareto
        return self.reward_signal.objectives(scored) if pareto else super().signal(scored)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss, a penalty or the KL control depends on the reference policy."""
        return self.config.loss().uses_reference or self.config.needs_divergence

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Add the gradient of one update; see `steer.training.gradient.two_pass_gradient`."""
        return two_pass_gradient(sampler, batch, self.config.loss(), **options)


class FinetuningRun:
    """One training of one trainer, in its output folder.

    result  the outcome, once the training has ended
    """

    def __init__(self, trainer: Trainer[Any], source: RolloutSource, evaluator: Evaluator, resume: bool) -> None:
        config, folder = trainer.config, Path(trainer.config.output_dir)
        self.trainer, self.source, self.evaluator, self.config = trainer, source, evaluator, config
        self.accelerator = accelerator_of(config, folder, trainer.pipe.device.type == "cpu")
        self.context = AccelerateContext(self.accelerator)
        self.context.check(config)
        identity, resumable = identity_of(trainer, source, evaluator)
        self.folder = RunFolder(folder, identity, trainer.describe(), config, self.context, resumable)
        self.resume_from = checkpoint_to_resume(folder, resume)
        if self.resume_from is not None:
            check_identity(self.folder.identity, self.resume_from)
        self.context.wait()  # no process writes before all have read
        with self.context.translate_connection_errors():
            self.state = self._create_state(trainable_of(trainer.pipe, config))
        self.sampler = self._sampler()
        self.stopped: str | None = None
        self.result: TrainingResult | None = None
        self.events = Events(trainer.callbacks, config, self.state, self.context)

    def _create_state(self, trainable: Trainable) -> RunState:
        config = self.config
        given = list(trainable.parameters.values())
        optimiser = optimiser_class(config.optim)(given, lr=config.learning_rate, weight_decay=config.weight_decay)
        if len(trainable.denoisers) > 1 and self.context.world_size > 1:
            raise InputError("several processes train one denoiser, not two: use one process, or name one as denoiser")
        *prepared, self.optimiser = self.accelerator.prepare(*trainable.denoisers.values(), optimiser)
        self.prepared = dict(zip(trainable.denoisers, prepared, strict=True))
        parameters = list(trainable.parameters.values())  # FSDP replaces them by its shards
        ema = EMAModel(parameters, config.ema_decay) if config.ema_decay else None
        old = EMAModel(parameters, 0.0) if self.trainer.averages_policy else None
        lengths = config.warmup_steps, config.max_steps, config.lr_num_cycles, config.lr_power
        return RunState(
            method=self.trainer,
            trainable=trainable,
            optimiser=optimiser,
            schedule=get_scheduler(config.lr_scheduler_type, optimiser, None, *lengths),
            scaler=self.accelerator.scaler,
            ema=ema,
            old=old,
            control=config.kl_control(),
            early_stopping=EarlyStopping(config.early_stopping_patience),
        )

    def train(self) -> TrainingResult:
        """Resume, update until the last step, a guard, a callback or a signal; then export the weights."""
        # Some pipelines draw from the global generator.
        with self.context.translate_connection_errors(), torch.random.fork_rng():
            torch.manual_seed(self.config.seed + self.context.rank)
            self.folder.open(self.state, self.resume_from)
            try:
                self.events.call("on_train_begin")
                self._training_loop()
                self.result = self._export_result()
                self.events.call("on_train_end")
                return self.result
            except Exception:
                # A failing reward does not lose the weights; one of several processes cannot save them alone.
                if self.state.step and self.context.world_size == 1:
                    self.folder.save(self.state)
                raise
            finally:
                # The user's denoiser computes in its own precision again.
                for prepared in self.prepared.values():
                    self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)

    def _training_loop(self) -> None:
        state, last = self.state, self.config.max_steps
        hidden, name = None if self.context.is_main_process else True, type(self.trainer).__name__
        bar = tqdm(total=last, initial=state.step, unit="update", disable=hidden, desc=name)
        with stop_request(self.context.any) as request, bar, trackers(self.accelerator, self.config):
            try:
                while True:
                    self._evaluate_if_due(request)
                    self._stop_if_overoptimized()
                    self._ask_if_uncertain(request)
                    asked = self.events.asked("should_save")
                    if asked or (state.step and state.step % self.config.save_steps == 0):
                        self._save()
                    if self.stopped or state.step >= last:
                        break
                    if (record := self._update(request)) is not None:
                        self.events.call("on_step_end")
                        self.events.call("on_log", logs=dict(record))  # transformers' callbacks remove keys
                        if self.events.asked("should_training_stop"):
                            self.stopped = "a callback asked for it"
                        self.accelerator.log(scalars(record), state.step)
                        bar.update()
                        bar.set_postfix(_progress_metrics(record))
            except Stopped:
                self.stopped = INTERRUPTED
            self._save()

    def _save(self) -> None:
        self.folder.save(self.state)
        self.events.call("on_save")

    def _update(self, request: StopRequest) -> Record | None:
        """Make one update: collect a rollout if none is left, then gradient, optimiser step and metrics.

        Returns the metrics; None if the KL budget is spent.
        """
        started, state = time.monotonic(), self.state
        self.optimiser.zero_grad()  # gradients of an interrupted update
        scored = 0.0
        if state.rollout is None:
            state.rollout = self._draw(request)
            scored = state.rollout.reward_seconds
        drawn = time.monotonic() - started
        with self.context.no_sync(*self.prepared.values()) as exchange:
            loss, metrics = self.trainer.gradient(
                self.sampler,
                state.rollout.batch,
                penalties=self._penalties(),
                on_policy=state.rollout.on_policy,
                backward=self.accelerator.backward,
                on_chunk=request.check,
                before_last=exchange,
                context=self.context,
            )
        kl_nats = metrics.get("kl", math.nan)  # measured wherever the control depends on it
        if state.control.is_exhausted(kl_nats):
            self.stopped = f"the KL budget is spent: {kl_nats:.3g} of {state.control.budget:g} nats a trajectory"
            return None
        rate = state.schedule.get_last_lr()[0]
        norm = self._step(loss)
        state.step += 1
        record = {"step": state.step, "rollout": state.num_rollouts, "loss": loss, **state.rollout.record(), **metrics}
        record |= {"kl_weight": state.control.weight, "grad_norm": norm, "learning_rate": rate}
        images = self.config.train_batch_size * self.config.num_generations
        record |= throughput(images, time.monotonic() - started, drawn, scored)
        record |= {"processes": self.context.world_size}
        # Accuracy is NaN without pairs; a gradient scaler can meet infinite gradients.
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        state.rollout = state.rollout.next_batch()
        if state.rollout is None:
            state.average_policy(self.trainer.old_decay(state.num_rollouts))
        state.control = state.control.after(kl_nats)
        state.records.append(record)
        self.folder.log("records", record)
        return record

    def _step(self, loss: float) -> float:
        """Make the optimiser step; return the gradient norm. Raises InputError where it is not finite."""
        state = self.state
        norm = float(whole(self.accelerator.clip_grad_norm_(state.parameters, self.config.max_grad_norm)))
        if not (math.isfinite(loss) and (math.isfinite(norm) or state.scaler)):
            raise InputError(
                f"the loss of update {state.step + 1} is {loss:g}, its gradient as long as {norm:g}: lower "
                "learning_rate, raise kl_weight, or fix a reward whose gradient is not finite"
            )
        self.optimiser.step()
        state.schedule.step()
        if state.ema:
            state.ema.step(state.parameters)
        return norm

    def _penalties(self) -> dict[Penalty, float]:
        penalties: dict[Penalty, float] = {kl: self.state.control.weight, chi_square: self.config.chi_square_weight}
        return {penalty: weight for penalty, weight in penalties.items() if weight}

    def _draw(self, request: StopRequest) -> RolloutBuffer:
        """Collect the next rollout and verify the first by its replay. An interrupted rollout changes no state."""
        before, random = self.trainer.state_dict(), get_random_state()
        self.sampler = self._sampler()  # its cached text embeddings last for a rollout
        try:
            with self.state.old_policy():
                buffer = self.source.collect(
                    self.state.num_rollouts, self.sampler, self.state.trainable, request.check, self.context
                )
            if self.state.num_rollouts == 0 and self.trainer.log_probs:
                self._check(buffer.batch)
        except BaseException:
            self.trainer.load_state_dict(before)
            set_random_state(random)
            raise
        self.state.num_rollouts += 1
        return buffer

    def _sampler(self, precision: Precision | None = None) -> Sampler:
        trainer = self.trainer
        return sampler_of(trainer.pipe, self.config, self.prepared, precision, trainer.conditions_by_prompt)

    def _check(self, batch: Batch) -> None:
        """Raise InputError where a replay gives other log-probabilities, or rounding dominates them."""
        dtype = half_precision(self.state.trainable.denoiser, self.config)
        as_model = self.config.log_prob_precision == "model"
        # Samples that a filter keeps are replayed in batches of another shape than they were drawn in.
        factor = 10.0 if self.config.kept_generations < self.config.num_generations else 1.0
        check_replay(self.sampler, batch.chunks[0], (dtype if as_model else None) or torch.float32, factor)
        if as_model and (dtype or self.trainer.pipe.device.type == "cuda"):  # where TF32 may be on
            exact = self._sampler("float32")
            check_rounding(self.sampler, exact, self.state.trainable.parameters, batch.chunks[0], batch.steps)

    def _stop_if_overoptimized(self) -> None:
        early_stopping = self.state.early_stopping
        if early_stopping.stop() and not self.stopped:
            self.stopped = (
                f"the trained reward rose while the held-out one fell, {early_stopping.num_overoptimized} evaluations "
                f"in a row: the weights of update {early_stopping.best_step} are kept"
            )

    def _ask_if_uncertain(self, request: StopRequest) -> None:
        """Ask after an evaluation whose rewards disagree, also when resuming there."""
        if not self.stopped and (question := question_of(self.state, self.config)) is not None:
            self._save()  # an answer may take long
            self.stopped = ask(question, self.trainer.on_question, request, self.context)

    def _evaluate_if_due(self, request: StopRequest) -> None:
        """Evaluate at the start, every `eval_steps`, at the end and when a callback requests it."""
        state, every = self.state, self.config.eval_steps
        due = state.step % every == 0 or state.step >= self.config.max_steps or self.stopped
        due = self.events.asked("should_evaluate") or due
        if not self.evaluator.prompts or not due or (state.evaluations and state.evaluations[-1]["step"] == state.step):
            return
        with state.ema_weights():
            pipe, check = self.trainer.pipe, request.check
            given = (pipe, self.config, state.step, self.prepared, check, self.context, state.trainable.reference)
            result = self.evaluator.evaluate(*given)
            record = result.record()
            self.events.call("on_evaluate", metrics=record, evaluation=result)
            state.early_stopping = state.early_stopping.after(state.step, *result.means())
            best = state.early_stopping.best_step == state.step
            if best:
                self.folder.export(state, "best")
        state.evaluations.append(record)
        if best:
            self._save()  # pinned: it is never rotated away
        self.folder.log("evaluations", record)
        self.accelerator.log(scalars(record), state.step)
        if self.context.is_main_process:
            log_samples(self.accelerator.trackers, result)

    def _export_result(self) -> TrainingResult:
        """Export the weights of the last update, or the best weights if these are to be kept; none for a paused run."""
        state, weights, weights_step = self.state, None, None
        best, records, evaluations = state.early_stopping.best_step, tuple(state.records), tuple(state.evaluations)
        if self.stopped not in PAUSED:
            weights_step = state.step
            if best is not None and (self.stopped == REFUSED or state.early_stopping.stop()):
                weights_step = best
                self.folder.load_best(state)
            elif state.ema:
                state.ema.copy_to(state.parameters)  # the pipeline computes with the exported weights
            weights = self.folder.export(state, "final")
        return TrainingResult(state.step, self.stopped, weights, best, records, evaluations, weights_step)


def throughput(images: int, seconds: float, drawn: float, scored: float) -> Record:
    """Return the images per second of an update of `seconds`, and the shares of its phases, which sum to 1.

    drawn   seconds of the rollout, rewards included
    scored  seconds that the rollout waited for rewards
    """
    shares = {"rollout": drawn - scored, "reward": scored, "update": seconds - drawn}
    timing = {"seconds": seconds, "images_per_second": images / seconds}
    return timing | {f"{phase}_share": spent / seconds for phase, spent in shares.items()}


def _progress_metrics(record: Record) -> dict[str, str]:
    names = {"reward": "reward", "kl": "kl", "accuracy": "acc", "images_per_second": "img/s"}
    return {short: f"{record[name]:.3g}" for name, short in names.items() if name in record}
