"""Finetuning by the forward process: DiffusionNFT, AWM and RAM from rewards, Diffusion-DPO from pairs of images."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Unpack

from torch import Tensor

from steer.arguments import argument
from steer.diffusion.precision import Precision
from steer.diffusion.schedules import PUBLISHED_ETA
from steer.errors import InputError
from steer.pipelines.training.config import SignalConfig, TrainingConfig, loss_of
from steer.pipelines.training.image_pairs import ImagePairs, read_image_pairs
from steer.pipelines.training.method import Scored
from steer.pipelines.training.preference_data import NoReward
from steer.pipelines.training.rollouts import RolloutSource
from steer.pipelines.training.state import RunState
from steer.pipelines.training.trainer import SignalTrainer, Trainer
from steer.training.forward import forward_gradient
from steer.training.gradient import Batch, GradientOptions
from steer.training.losses import Metrics, group_advantages
from steer.training.losses.forward import AWM, NFT, RAM, DiffusionDPO, ForwardLoss, Weighting
from steer.training.rollout import Rows, Sampler, StepWindow, Trajectories
from steer.training.trainable import TOKEN, token_encoders

OF_DENOISERS = (
    *("lora_rank", "lora_alpha", "lora_target_modules", "init_adapter", "use_dora", "use_rslora", "denoiser"),
)
PATH_PENALTIES = ("kl_weight", "kl_target_nats", "kl_budget_nats", "chi_square_weight")


@dataclass(frozen=True)
class ForwardConfig(TrainingConfig):
    """TrainingConfig of a method of the forward process, which samples by the pipeline's own solver.

    eta               noise of the trajectories of eval_kl, as `dynamics`, their law; refused without eval_kl
    guidance_scale    guidance scale in training and evaluation: none (1) as published; None: the pipeline's default
    log_prob_precision  precision of the denoiser: the model's is enough, since no differences of large sums are taken
    reference_weight  β of ‖o_θ − o_ref‖², the mean squared difference of the denoiser's outputs, in place of kl_weight
    """

    loss_class: ClassVar[Any]
    min_generations: ClassVar[int] = 2
    samples_with_eta: ClassVar[bool] = False

    guidance_scale: float | None = argument(1.0, "(-inf, inf)")
    log_prob_precision: Precision = "model"
    reference_weight: float = argument(0.0, "[0, inf)")

    def loss(self) -> ForwardLoss:
        """The loss with the options of this configuration."""
        loss: ForwardLoss = loss_of(self.loss_class, self)
        return loss

    def old_decay(self, rollouts: int) -> float:
        """Decay of the averaged weights that draw the samples, after this many rollouts; 0: no average."""
        return 0.0

    @property
    def evaluates_by_ode(self) -> bool:
        """Return False: evaluations use the pipeline's own solver, as the samples do."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss()
        usual = {"dynamics": "ddim", "eta": PUBLISHED_ETA[self.dynamics]}
        noise = [name for name, value in usual.items() if getattr(self, name) != value]
        if noise and not self.eval_kl:
            raise InputError(
                f"{noise[0]} is the noise of eval_kl alone in {self.title}, which samples by the pipeline's own "
                f"solver, got {getattr(self, noise[0])}: set eval_kl: true, or leave {noise[0]} out"
            )
        if given := [name for name in PATH_PENALTIES if getattr(self, name)]:
            raise InputError(
                f"{given[0]} is for methods with log-probabilities, got {getattr(self, given[0]):g}: give "
                f"{self.title} a reference_weight"
            )


ForwardConfigT = TypeVar("ForwardConfigT", bound=ForwardConfig)


class ForwardTrainer(Trainer[ForwardConfigT]):
    """A method of the forward process: samples from the pipeline's own solver, and a loss of their noised latents.

    The policy that draws the samples is an average of the trained weights if the loss compares with that policy.
    """

    log_probs: ClassVar[bool] = False

    @property
    def averages_policy(self) -> bool:
        """Whether the weights that draw the samples are kept beside the trained weights."""
        return self.config.loss().uses_old

    def old_decay(self, rollouts: int) -> float:
        return self.config.old_decay(rollouts)

    def evaluates_reference(self, update: int) -> bool:
        """Return False: the reference is evaluated on noisy latents within the update, not on samples."""
        return False

    def num_learned_steps(self, total: int) -> int:
        """Return the number of noise levels without `skip_low_noise_steps`, whatever the precision."""
        return max(1, total - (self.config.skip_low_noise_steps or 0))

    @staticmethod
    def draw(sampler: Sampler, rows: Rows, window: StepWindow | None = None) -> tuple[Trajectories, Tensor]:
        """Draw samples by the pipeline's own solver, without a window of noise."""
        return sampler.sample(rows)

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Add the gradient of one update; see `steer.training.forward.forward_gradient`."""
        state, loss = self.state, self.config.loss()
        logged = self.config.logs_divergence(state.step)
        reference = loss.uses_reference or self.config.reference_weight > 0 or logged
        drew_batch = options["on_policy"] and self.old_decay(state.num_rollouts - 1) == 0
        return forward_gradient(
            sampler,
            batch,
            loss,
            old=None if drew_batch or state.old is None else state.old_policy,
            reference=state.trainable.reference if reference else None,
            reference_weight=self.config.reference_weight,
            backward=options["backward"],
            on_chunk=options["on_chunk"],
            before_last=options["before_last"],
            context=options["context"],
        )

    @property
    def state(self) -> RunState:
        """The state of the present run. Raises InputError where there is no run yet."""
        if self._run is None:
            raise InputError("no run has begun: call train()")
        return self._run.state


@dataclass(frozen=True)
class OnlineForwardConfig(ForwardConfig, SignalConfig):
    """ForwardConfig of a method that learns from rewards of its own samples."""


OnlineForwardConfigT = TypeVar("OnlineForwardConfigT", bound=OnlineForwardConfig)


class OnlineForwardTrainer(SignalTrainer[OnlineForwardConfigT], ForwardTrainer[OnlineForwardConfigT]):
    """A method of the forward process that learns from rewards of its own samples."""

    def signal(self, scored: Scored) -> Tensor:
        """Advantages (B, K) of the mixed rewards, within all samples of each prompt."""
        return group_advantages(super().signal(scored), scale=True)


@dataclass(frozen=True)
class NFTConfig(OnlineForwardConfig):
    """TrainingConfig with the options of DiffusionNFT.

    beta            β of the positive and the negative policy; published 1 and 0.1
    advantage_clip  A_max, the advantage of an optimality of 1
    old_decay_rate  the weights that draw the samples are an average with decay min(rate · rollouts, old_decay_max)
    old_decay_max   largest decay, below 1
    """

    loss_class: ClassVar[Any] = NFT
    title: ClassVar[str] = "DiffusionNFT"
    paper: ClassVar[tuple[str, str]] = (
        "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        "2509.16117",
    )

    beta: float = NFT.beta
    advantage_clip: float = NFT.advantage_clip
    reference_weight: float = argument(1e-4, "[0, inf)")
    old_decay_rate: float = argument(0.001, "[0, inf)")
    old_decay_max: float = argument(0.5, "[0, 1)")

    def old_decay(self, rollouts: int) -> float:
        return min(self.old_decay_rate * rollouts, self.old_decay_max)


class NFTTrainer(OnlineForwardTrainer[NFTConfig]):
    """DiffusionNFT (arXiv 2509.16117): good samples teach the model, bad ones its mirror image about the old policy.

    NFTTrainer(pipe, "hpsv2.1", NFTConfig(max_steps=200), train_prompts=prompts).train()
    """

    config_class = NFTConfig


@dataclass(frozen=True)
class AWMConfig(OnlineForwardConfig):
    """TrainingConfig with the options of AWM.

    clip            ε of the ratio of matching losses
    advantage_clip  advantages are clipped to ± this
    weighting       weights of noise levels: uniform, noise (t) or noise-squared (t²), with t = σ/(α + σ); huber: t
                    times the root of the matching loss
    """

    loss_class: ClassVar[Any] = AWM
    title: ClassVar[str] = "AWM"
    paper: ClassVar[tuple[str, str]] = (
        "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        "2509.25050",
    )

    clip: float = AWM.clip
    advantage_clip: float = AWM.advantage_clip
    weighting: Weighting = AWM.weighting


class AWMTrainer(OnlineForwardTrainer[AWMConfig]):
    """Advantage-weighted matching (arXiv 2509.25050): PPO's objective with the matching loss as a log-probability."""

    config_class = AWMConfig


@dataclass(frozen=True)
class RAMConfig(OnlineForwardConfig):
    """TrainingConfig with the options of RAM.

    scale           scale of the advantages, by which the reference's output is moved along the residual
    advantage_clip  advantages are clipped to ± this
    """

    loss_class: ClassVar[Any] = RAM
    title: ClassVar[str] = "RAM"
    paper: ClassVar[tuple[str, str]] = (
        "Reinforce Adjoint Matching: Scaling RL Post-Training of Diffusion and Flow-Matching Models",
        "2605.10759",
    )

    scale: float = RAM.scale
    advantage_clip: float = RAM.advantage_clip


class RAMTrainer(OnlineForwardTrainer[RAMConfig]):
    """Reinforce adjoint matching (arXiv 2605.10759): regression on the reference's output moved along the residual."""

    config_class = RAMConfig


@dataclass(frozen=True)
class DPOConfig(ForwardConfig):
    """TrainingConfig with the options of Diffusion-DPO. One update learns from `train_batch_size` pairs.

    beta    β, for squared errors averaged over elements; published 2000 (SD 1.5) and 5000 (SDXL)
    images  folder that image paths of the preferences are relative to; by default the table's folder
    context  train a token before every prompt, OPPO's context z*, in place of weights of the denoiser; for pipelines
             whose text encoders are all CLIP's (`steer.training.trainable.ContextToken`)
    """

    loss_class: ClassVar[Any] = DiffusionDPO
    title: ClassVar[str] = "Diffusion-DPO"
    paper: ClassVar[tuple[str, str]] = ("Diffusion Model Alignment Using Direct Preference Optimization", "2311.12908")

    num_generations: int = argument(2, "[2, 2]")
    beta: float = DiffusionDPO.beta
    images: str | None = None
    context: bool = False

    @property
    def trained_part(self) -> str:
        return "textual inversion" if self.context else super().trained_part

    @property
    def prompt_prefix(self) -> str:
        return f"{TOKEN} " if self.context else ""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {one.name: one.default for one in fields(self)}
        given = [name for name in OF_DENOISERS if getattr(self, name) != defaults[name]]
        if self.context and given:
            raise InputError(
                f"{given[0]} is for weights of the denoiser, got {getattr(self, given[0])!r}, and context trains a "
                "token: leave one of them out"
            )
        if self.micro_batch % 2:
            raise InputError(f"micro_batch must be even, got {self.micro_batch}: the images of a pair go together")


class DPOTrainer(ForwardTrainer[DPOConfig]):
    """Diffusion-DPO (arXiv 2311.12908): learn from pairs of images of one prompt, of any origin.

    DPOTrainer(pipe, preferences="pairs.jsonl", eval_prompts=prompts, eval_rewards=["hpsv2.1"]).train()
    """

    config_class = DPOConfig
    takes_preferences: ClassVar[bool] = True

    def check(self) -> None:
        if self.preferences is None and not isinstance(self.reward, NoReward):
            raise InputError(f"{self.config.title} learns from pairs of images: give preferences, a table of them")
        if self.config.context and self.pipe is not None:  # arguments are checked before a model is loaded
            token_encoders(self.pipe)

    @classmethod
    def preference_defaults(cls, preferences: str | Path) -> dict[str, Any]:
        """Return no fields: the method learns from images of any size and origin."""
        return {}

    @classmethod
    def check_preferences(cls, preferences: Path, config: Mapping[str, Any]) -> None:
        """Read the table. Raises InputError for a table that cannot be read or has no preference."""
        read_image_pairs(preferences, config.get("images"))

    def preference_source(self, preferences: Path) -> RolloutSource:
        return ImagePairs.of(preferences, self.pipe, self.config, self.config.images)
