"""The configuration of a training: the arguments that all methods share, each defined once.

Python (`TrainingConfig`, `GRPOConfig` …), the YAML files and options of `steer finetune`, the model card and the app
derive from these dataclasses. Names are as in TRL, transformers and accelerate where they mean the same.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch

from steer.arguments import Settings, argument
from steer.diffusion.precision import Precision
from steer.diffusion.schedules import PUBLISHED_ETA, Dynamics
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.training.constraints import read_bounds
from steer.training.guards import KLControl
from steer.training.losses import Loss
from steer.training.optimisers import OptimiserName, ScheduleName, optimiser_class
from steer.training.rollout import StepWindow, WindowKind
from steer.training.signals import SampleFilter
from steer.training.trainable import ATTENTION

# The last steps, of lowest noise: most of a trajectory's KL and gradient (docs/finetuning-reference.md), though the
# composition is settled long before; in half precision they cause nearly all of the rounding errors.
LOW_NOISE_STEPS = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Arguments that all methods share. One update learns from `train_batch_size` prompts × `num_generations` samples.

    output_dir           folder of metrics.jsonl, evaluations.jsonl, checkpoints/, best/ and final/
    max_steps            number of updates
    seed                 seed of every random number of the run
    train_batch_size     B, prompts per update, over all processes
    num_generations      K, samples per prompt
    steps_per_generation  updates per rollout, whose samples are drawn together, by one policy
    num_iterations       passes over the samples of a rollout
    micro_batch          rows per call of the denoiser; the gradients of an update's micro-batches are accumulated
    num_inference_steps  solver steps, in training and evaluation
    guidance_scale       guidance scale in training and evaluation; None: the default of the pipeline
    eta                  η of every step, above 0 and at most 1; for flow-sde, dance and cps the noise level a. None:
                         the published one of `dynamics` (ddim 1, flow-sde 0.7, dance 0.3, cps 0.8), which the new
                         configuration then holds
    dynamics             law of the noise: ddim, for any model; flow-sde, dance, cps, for flow matching alone (see
                         `steer.diffusion.schedules.split_flow_noise`). Evaluations then use the ODE
    skip_low_noise_steps  number of last stochastic steps (lowest τ) that loss, KL and penalties leave out, for new, old
                         and reference policy alike; None: 2, but at most half of the steps; in full precision 0
                         for texts, for windows, and where a second denoiser has the last steps
    log_prob_precision   precision of the denoiser for log-probabilities and KL: float32, whatever the dtype of the
                         weights and mixed_precision; or model, the model's (checked before the first update)
    timestep_fraction    share of the remaining steps that an update learns from; the others cost no denoiser call
    latents_dtype        dtype of stored latents, and of the reference residuals where a penalty needs them
    call                 further arguments of the pipeline's call
    lora_rank            rank of the adapter; 0 trains all weights of the denoiser
    lora_alpha           alpha of the adapter; None: the rank
    denoiser             name of the one denoiser of Wan 2.2 to train (transformer: high noise, transformer_2: low
                         noise); None: both
    lora_target_modules  suffixes of the names of the layers that get an adapter
    init_adapter         trained LoRA of the same rank, alpha and targets to start from: a folder such as RUN/final or
                         its .safetensors file; the reference is then the model with this LoRA
    use_dora             peft's weight-decomposed adapter (DoRA, arXiv 2402.09353), whose norms are trained too
    use_rslora           peft's rank-stabilised scale α/√r (arXiv 2312.03732) in place of α/r
    gradient_checkpointing  recompute the blocks of the denoiser in the backward pass
    mixed_precision      no, fp16 or bf16, as in accelerate; for log-probabilities see log_prob_precision
    optim                optimiser, by its name in transformers: adamw_torch, sgd; from bitsandbytes, with 8-bit
                         moments, adamw_8bit, paged_adamw_8bit, lion_8bit
    learning_rate        highest rate, after the warmup
    lr_scheduler_type    schedule of the learning rate up to max_steps, by its name in diffusers
    lr_num_cycles        restarts of cosine_with_restarts
    lr_power             power of the polynomial schedule
    weight_decay         weight decay of the optimiser
    warmup_steps         updates of linear warmup
    max_grad_norm        gradients are clipped to this norm
    ema_decay            decay of an exponential moving average of the weights, evaluated and exported in their place;
                         0: none
    kl_weight            β of the KL to the reference, per nat summed over the elements and steps of a trajectory
    kl_target_nats       KL that β is adapted to, see `steer.training.guards.KLControl`; nats per trajectory, summed
                         over its elements and steps
    kl_budget_nats       KL at which the training ends, in the same unit
    kl_every             updates between measurements of the KL for the log, where neither the loss nor a KL weight,
                         target or budget nor chi_square_weight needs the reference; also measured in the first update
                         and in the last one before each evaluation; 0: never. Elsewhere every update
    chi_square_weight    weight of `steer.training.guards.chi_square`, which has no unit, summed over the steps of a
                         trajectory
    eval_steps           updates between evaluations; there is also one before the first update and one after the last
    num_generations_eval  images per held-out prompt
    eval_kl              measure `eval/kl` in evaluations, with any method: KL of one batch of trajectories with noise,
                         in nats per trajectory, by a rollout and two replays
    early_stopping_patience  evaluations in a row with a higher trained and a lower held-out reward that end the
                         training, see `steer.training.guards.EarlyStopping`; 0: never
    ask                  ask whether to continue where the rewards of an evaluation disagree about its gain over the
                         best earlier one, if asking is worth more than ask_cost; no: the best weights are kept. A run
                         with nobody to ask ends with a checkpoint
    ask_cost             cost of asking in standard deviations of the rewards among the images of the first evaluation,
                         see `steer.pipelines.disagreement.value_of_asking`
    save_steps           updates between checkpoints
    save_total_limit     newest checkpoints to keep; the best by the held-out reward is kept as well
    log_with             trackers, as in accelerate: tensorboard, wandb, trackio …; samples of evaluations are images
                         in tensorboard and a table in wandb
    asynchronous_rewards  score a micro-batch in the background while the next ones of the rollout are sampled; a
                         rollout needs several micro-batches for it
    rollout_workers      Ray actors per process that draw the samples in place of the process; 0: none
    reward_workers       Ray actors that compute a reward, by the name of the reward or component: {imagereward: 2}
    """

    title: ClassVar[str] = "Finetuning"  # name of the method
    paper: ClassVar[tuple[str, str]] = ("", "")  # title and arXiv number of the paper
    other_names: ClassVar[Mapping[str, str]] = {  # of transformers and TRL; where a method has the name, it is its own
        "beta": "kl_weight",
        "epsilon": "clip",
        "per_device_train_batch_size": "train_batch_size",
        "num_train_epochs": "max_steps",
        "fp16": "mixed_precision",
        "bf16": "mixed_precision",
        "report_to": "log_with",
        "lora_r": "lora_rank",
        "lr": "learning_rate",
    }

    output_dir: str = "trainer_output"
    max_steps: int = argument(100, "[1, inf]")
    seed: int = argument(0, "[0, 9223372036854775807]")
    train_batch_size: int = argument(8, "[1, inf]")
    num_generations: int = argument(4, "[1, inf]")
    steps_per_generation: int = argument(1, "[1, inf]")
    num_iterations: int = argument(1, "[1, inf]")
    micro_batch: int = argument(16, "[1, inf]")
    num_inference_steps: int = argument(20, "[1, inf]")
    guidance_scale: float | None = argument(None, "(-inf, inf)")
    eta: float | None = argument(None, "(0, 1]")
    dynamics: Dynamics = "ddim"
    skip_low_noise_steps: int | None = None
    log_prob_precision: Precision = "float32"
    timestep_fraction: float = argument(1.0, "(0, 1]")
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    call: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = argument(16, "[0, inf]")
    lora_alpha: float | None = None
    denoiser: str | None = None
    lora_target_modules: tuple[str, ...] = ATTENTION
    init_adapter: str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    optim: OptimiserName = "adamw_torch"
    learning_rate: float = argument(1e-4, "(0, inf)")
    lr_scheduler_type: ScheduleName = "constant_with_warmup"
    lr_num_cycles: int = argument(1, "[1, inf]")
    lr_power: float = argument(1.0, "(0, inf)")
    warmup_steps: int = argument(0, "[0, inf]")
    weight_decay: float = argument(1e-4, "[0, inf)")
    max_grad_norm: float = argument(1.0, "(0, inf)")
    ema_decay: float = argument(0.0, "[0, 1)")
    kl_weight: float = 0.0
    kl_target_nats: float | None = None
    kl_budget_nats: float | None = None
    kl_every: int = argument(10, "[0, inf]")
    chi_square_weight: float = argument(0.0, "[0, inf)")
    eval_steps: int = argument(20, "[1, inf]")
    num_generations_eval: int = argument(1, "[1, inf]")
    eval_kl: bool = False
    early_stopping_patience: int = argument(0, "[0, inf]")
    ask: bool = False
    ask_cost: float = argument(0.05, "[0, inf)")
    save_steps: int = argument(20, "[1, inf]")
    save_total_limit: int = argument(2, "[1, inf]")
    log_with: tuple[str, ...] = ()
    asynchronous_rewards: bool = False
    rollout_workers: int = argument(0, "[0, inf]")
    reward_workers: Mapping[str, int] = field(default_factory=dict)

    min_generations: ClassVar[int] = 1  # samples of a prompt that the method compares
    samples_with_eta: ClassVar[bool] = True  # else by the pipeline's own solver: `eta` and `dynamics` are of eval_kl

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eta", self.noise_level)  # config.yaml, checkpoints and cards say what is used
        if self.num_generations < self.min_generations:
            raise InputError(
                f"num_generations must be at least {self.min_generations}, got {self.num_generations}: {self.title} "
                "compares the samples of a prompt"
            )
        if not 0 <= (self.skip_low_noise_steps or 0) < self.num_inference_steps:
            raise InputError(
                f"skip_low_noise_steps must be from 0 to num_inference_steps - 1, got {self.skip_low_noise_steps}"
            )
        if self.init_adapter is not None and self.lora_rank == 0:
            raise InputError("init_adapter starts from a LoRA, and lora_rank 0 trains all weights: leave one out")
        if (self.use_dora or self.use_rslora) and self.lora_rank == 0:
            raise InputError("use_dora and use_rslora are for a LoRA, and lora_rank 0 trains all weights")
        if self.denoiser is not None and self.lora_rank == 0:
            raise InputError("denoiser chooses where a LoRA goes, and lora_rank 0 trains all weights: leave one out")
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise InputError(
                "lr_scheduler_type constant has no warmup, got warmup_steps "
                f"{self.warmup_steps}: use constant_with_warmup"
            )
        optimiser_class(self.optim)
        counts = self.reward_workers.items()
        if bad := [f"{name}: {count!r}" for name, count in counts if type(count) is not int or count < 1]:
            raise InputError(f"reward_workers must map names of rewards to counts from 1, got {bad[0]}")
        if (self.rollout_workers or self.reward_workers) and find_spec("ray") is None:
            raise InputError("rollout_workers and reward_workers need Ray: pip install 'steer-diffusion[ray]'")
        self.kl_control()

    @property
    def noise_level(self) -> float:
        """η of every step, or the noise level a of `dynamics`: `eta`, by default the published one."""
        return PUBLISHED_ETA[self.dynamics] if self.eta is None else self.eta

    def kl_control(self) -> KLControl:
        """The control of the KL weight before the first update. Raises InputError for values out of range."""
        return KLControl(self.kl_weight, self.kl_target_nats, self.kl_budget_nats)

    @property
    def needs_divergence(self) -> bool:
        """Whether anything depends on the KL or χ² to the reference, so that it is computed instead of estimated."""
        return bool(self.kl_weight or self.kl_budget_nats or self.chi_square_weight)

    def logs_divergence(self, update: int) -> bool:
        """Whether the divergence from the reference is measured for the log in an update, numbered from 0.

        In the first update, every kl_every updates, and in the last one before an evaluation, whose gain is drawn
        against the KL.
        """
        done = update + 1
        evaluated = done % self.eval_steps == 0 or done == self.max_steps
        return self.kl_every > 0 and (update == 0 or done % self.kl_every == 0 or evaluated)

    def step_window(self, update: int, half: bool = False) -> StepWindow | None:
        """The solver steps with noise in an update's rollout; None: all. `half`: whether weights are half precision."""
        return None

    @property
    def evaluates_by_ode(self) -> bool:
        """Whether evaluations are without noise, as the finished model is used."""
        return self.dynamics != "ddim" or self.step_window(0) is not None

    @property
    def trained_part(self) -> str:
        """The name of what is trained, in model cards."""
        return "LoRA" if self.lora_rank else "full finetuning"

    @property
    def prompt_prefix(self) -> str:
        """Text before every prompt whose embedding is trained in place of the denoiser; empty: none."""
        return ""

    @property
    def kept_generations(self) -> int:
        """Samples of a prompt that losses take."""
        return self.num_generations

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; objects in `call` as their text."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, the same for every row."""
        sampling = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return dict(self.call) | {name: value for name, value in sampling.items() if value is not None}


@dataclass(frozen=True)
class SignalConfig(TrainingConfig):
    """TrainingConfig of a method whose signal compares the rewards of a prompt's samples.

    normalize_components  standardise each component of a weighted sum of rewards among the samples of a prompt before
                     the sum (`steer.training.signals.normalized_sum`); the signal then has no unit
    constraints      bounds on means of rewards with learned multipliers, {"clip:scenes": ">= 0.2"}: of components of
                     the trained reward, the trained reward, or others (`steer.training.constraints`)
    dual_rate        step size of the multipliers, per update
    sample_filter    none; best, best-random, best-worst: learn from `filter_keep` of a prompt's samples, by reward
                     (`steer.training.signals.kept_samples`); the other samples cost no update
    filter_keep      samples of a prompt to learn from; None: half

    Raises InputError for bounds that cannot be read, or more samples to keep than there are.
    """

    min_generations: ClassVar[int] = 2

    normalize_components: bool = False
    constraints: Mapping[str, str] = field(default_factory=dict)
    dual_rate: float = argument(0.05, "(0, inf)")
    sample_filter: SampleFilter = "none"
    filter_keep: int | None = None

    @property
    def kept_generations(self) -> int:
        if self.sample_filter == "none":
            return self.num_generations
        return self.num_generations // 2 if self.filter_keep is None else self.filter_keep

    def __post_init__(self) -> None:
        super().__post_init__()
        read_bounds(self.constraints)
        if not self.min_generations <= self.kept_generations <= self.num_generations and self.sample_filter != "none":
            raise InputError(
                f"filter_keep must be from {self.min_generations} to num_generations = {self.num_generations}, got "
                f"{self.kept_generations}"
            )


def loss_of(loss_class: Any, config: TrainingConfig) -> Any:
    """Create a loss from the fields of a configuration with the names of its own."""
    names = [one.name for one in fields(loss_class) if hasattr(config, one.name)]
    return loss_class(**{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class LossConfig(SignalConfig):
    """SignalConfig of a method that minimises a loss of log-probabilities and rewards.

    window           first, random or sliding: noise, loss and replays only in a window of solver steps, the ODE
                     elsewhere, evaluations included (`steer.training.rollout.StepWindow`); None: all steps
    window_size      number of steps of the window
    window_interval  updates until a sliding window moves by one step

    Raises InputError for arguments that the loss cannot use.
    """

    window: WindowKind | None = argument(None, choices=("first", "random", "sliding"))  # noqa: RUF009
    window_size: int = argument(3, "[1, inf]")
    window_interval: int = argument(25, "[1, inf]")

    def step_window(self, update: int, half: bool = False) -> StepWindow | None:
        if self.window is None:
            return None
        number = update // self.window_interval
        if self.window == "random":
            number = derived_seed(self.seed, f"window of update {update}")
        skip = self.skip_low_noise_steps
        skip = (LOW_NOISE_STEPS if half else 0) if skip is None else skip
        return StepWindow(self.window, self.window_size, number, skip)

    loss_class: ClassVar[Any]

    def loss(self) -> Loss:
        """The loss with the options of this configuration."""
        loss: Loss = loss_of(self.loss_class, self)
        return loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss().whole_trajectory and self.timestep_fraction < 1:
            raise InputError(
                f"timestep_fraction must be 1, got {self.timestep_fraction}: the loss of {self.title} ties all steps "
                "of a trajectory together"
            )


@dataclass(frozen=True)
class ParetoConfig(LossConfig):
    """LossConfig of a method that can compare the components of a weighted sum.

    pareto  with a weighted sum of rewards, only the Pareto front of a prompt's samples has a gradient; its advantage is
            the sum of standardised components (`steer.training.signals.pareto_advantages`)

    Raises InputError for options that have no effect with it.
    """

    without_pareto: ClassVar[tuple[str, ...]] = ("normalize_components",)  # options that pareto replaces

    pareto: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {one.name: one.default for one in fields(self)}
        given = [name for name in self.without_pareto if getattr(self, name) != defaults[name]]
        if self.pareto and given:
            raise InputError(f"{given[0]} has no effect with pareto: leave one of them out")
