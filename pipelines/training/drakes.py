"""DRAKES (arXiv 2410.13643): a masked diffusion model finetuned by the gradient of a reward of texts."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch

from steer.arguments import argument
from steer.errors import InputError
from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.trainer import Trainer
from steer.rewards.text import SequenceScore
from steer.training.distributed import sum_over_processes
from steer.training.gradient import Batch, GradientOptions, before_last_call
from steer.training.guards import kl
from steer.training.losses import Metrics
from steer.training.rollout import Sampler
from steer.training.token_rollout import TokenSampler

# Fields for samples that several updates learn from, for log-probabilities, or for a reference other than the model.
UNUSED = (
    *("steps_per_generation", "num_iterations", "timestep_fraction", "skip_low_noise_steps"),
    *("reward_workers", "init_adapter"),
)


@dataclass(frozen=True)
class DRAKESConfig(TrainingConfig):
    """TrainingConfig with the options of DRAKES.

    kl_weight    α, in units of the reward per nat; the optimum is p_pre exp(r/α)
    last_steps   number of last steps that gradients and the KL are of; None: all
    temperature  τ of the Gumbel-softmax of a token; the smaller, the closer to a draw and the noisier the gradient
    """

    title: ClassVar[str] = "DRAKES"
    paper: ClassVar[tuple[str, str]] = (
        "Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications to DNA and Protein Design",
        "2410.13643",
    )

    train_batch_size: int = argument(32, "[1, inf]")
    num_generations: int = argument(1, "[1, inf]")
    micro_batch: int = argument(32, "[1, inf]")
    lora_rank: int = argument(0, "[0, inf]")
    kl_weight: float = 0.05
    last_steps: int | None = None
    temperature: float = argument(0.3, "(0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_steps is not None and not 1 <= self.last_steps <= self.num_inference_steps:
            raise InputError(
                f"last_steps must be from 1 to {self.num_inference_steps}, the steps of a run, got {self.last_steps}"
            )
        plain = TrainingConfig()
        if given := [name for name in UNUSED if getattr(self, name) != getattr(plain, name)]:
            raise InputError(
                f"{given[0]} does not apply to DRAKES, which differentiates texts of the present weights: leave it out"
            )


class DRAKESTrainer(Trainer[DRAKESConfig]):
    """Maximise E[r] − α KL(p_θ ‖ p_pre) of a masked diffusion model along the gradient of relaxed tokens.

    DRAKESTrainer(pipe, "says:blue", config=DRAKESConfig(kl_weight=0.3), train_prompts=["a red", "a"]).train()

    reward  a reward of texts, with gradients on relaxed tokens, such as says:WORD
    Raises InputError for another reward, and for a pipeline that is not a masked diffusion model.
    """

    config_class = DRAKESConfig
    log_probs: ClassVar[bool] = False
    trains_tokens: ClassVar[bool] = True
    reference: Any  # the denoiser as it was given

    def check(self) -> None:
        """Raise InputError for a reward without gradients on tokens, or for a pipeline of images."""
        if self.pipe is None:  # arguments are checked before a model is loaded
            return
        if not isinstance(self.pipe, MaskedDiffusionPipeline):
            raise InputError(
                f"{self.config.title} is for texts, and {type(self.pipe).__name__} is no MaskedDiffusionPipeline: use "
                "reward-backprop"
            )
        self.reference = copy.deepcopy(self.pipe.denoiser).requires_grad_(False).eval()
        one_hot = torch.nn.functional.one_hot(self.pipe.encode(""), self.pipe.mask_id + 1).float()
        self._relaxed_reward().relaxed(one_hot, [""])

    def evaluates_reference(self, update: int) -> bool:
        """Return False: the KL is computed on relaxed steps."""
        return False

    def _relaxed_reward(self) -> SequenceScore:
        return SequenceScore(self.reward, self.pipe.decode, self.pipe.tokenizer)

    def gradient(self, sampler: Sampler, batch: Batch, **options: Unpack[GradientOptions]) -> tuple[float, Metrics]:
        """Add ∇θ [α KL − mean reward] of relaxed texts of the batch's prompts; return the loss, and the KL in nats.

        α is kl_weight, or its present value if it is adapted. See `steer.training.drakes`.
        """
        assert isinstance(sampler, TokenSampler)
        config, context, reward = self.config, options["context"], self._relaxed_reward()
        weight, steps = options["penalties"].get(kl, 0.0), config.last_steps or config.num_inference_steps
        backward = before_last_call(options["backward"], len(batch.chunks), options["before_last"])
        count = sum(len(chunk.rows) for chunk in batch.chunks)  # of each process
        totals = [0.0, 0.0]
        for chunk in batch.chunks:
            options["on_chunk"]()
            run = sampler.relaxed(chunk.rows, self.reference, steps, config.temperature)
            rewards = reward.relaxed(run.tokens, chunk.rows.prompts).to(run.kl)
            loss = (weight * run.kl - rewards).sum() / count
            backward(loss)
            totals = [totals[0] + loss.item(), totals[1] + run.kl.sum().item() / count]
        value, nats = (one / context.world_size for one in sum_over_processes(context, totals))
        return value, {"kl": nats}
