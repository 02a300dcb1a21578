"""Finetuning by comparing samples of one prompt: D3PO (arXiv 2311.13231) and PRDP (arXiv 2402.08714)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.errors import InputError
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.distributed import main_first
from steer.pipelines.training.evaluation import EvalResult, Evaluator
from steer.pipelines.training.method import Record, Scored, TrainingResult
from steer.pipelines.training.preference_data import NoReward, PreferenceDataset, sampling_config_of
from steer.pipelines.training.trainer import LossTrainer
from steer.reward import Composite
from steer.rewards.parser import load_reward
from steer.training.losses import D3PO, PRDP, D3POTrajectory


class D3POTrainer(LossTrainer):
    """Direct preference optimisation of denoising steps: of two samples from one x_T the better one becomes likelier.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    D3POTrainer(pipe, reward="hpsv2.1").train(prompts, "out/d3po")
    D3POTrainer(pipe).train_on_preferences("choices", "out/d3po")  # of humans

    reward      None where humans choose
    beta        β of the implicit reward β log pθ/p_ref, for log-probabilities per latent element (published: 0.1)
    trajectory  one comparison of whole trajectories in place of one for each step
    pareto      of a reward made of others: prefer what is better by one part and worse by none; the rest is dropped
    """

    shared_start: ClassVar[bool] = True

    def __init__(
        self, pipe: Any, reward: Any = None, *, beta: float = 0.1, trajectory: bool = False, pareto: bool = False
    ) -> None:
        loss = (D3POTrajectory if trajectory else D3PO)(beta=beta)
        super().__init__(pipe, NoReward() if reward is None else reward, loss)
        self.pareto = pareto

    def check(self, settings: TrainingConfig) -> None:
        super().check(settings)
        if self.pareto and not isinstance(self.reward, Composite):
            raise InputError(
                f"pareto compares the components of a reward, and {self.reward.name!r} has none: leave it out"
            )

    def config_dict(self) -> dict[str, Any]:
        return super().config_dict() | {"pareto": self.pareto}

    def signal(self, scored: Scored) -> Tensor:
        """Rewards (B, K), or those of the components (B, K, M)."""
        return torch.stack(list(scored.components.values()), -1) if self.pareto else scored.rewards

    def train_on_preferences(
        self,
        folder: str | Path,
        output_dir: str | Path,
        settings: TrainingConfig | None = None,
        *,
        eval_prompts: Sequence[str] = (),
        eval_rewards: Sequence[Any] = (),
        resume: bool = False,
        config_dict: Mapping[str, Any] | None = None,
        on_update: Callable[[Record], None] | None = None,
        on_evaluation: Callable[[EvalResult], None] | None = None,
    ) -> TrainingResult:
        """Trains on human choices in place of a reward; an update learns from `train_batch_size` of them.

        folder    of choices, as `preference_files.PreferenceFolder` writes it; samples without stored trajectories are
                  drawn again by `pipe`, which must be what it was, and must then give the same pixels
        settings  by default what the samples were drawn with, see `preference_data.sampling_config_of`
        The others are those of `train`; evaluations are by the method's reward first, where it has one.

        Raises InputError for what does not fit, before training begins.
        """
        settings = settings or TrainingConfig(**sampling_config_of(folder))
        self.check(settings)
        evaluation_rewards = [] if isinstance(self.reward, NoReward) else [self.reward]
        evaluation_rewards += [load_reward(reward) for reward in eval_rewards]
        if eval_prompts and not evaluation_rewards:
            raise InputError("eval_prompts are judged by rewards, and there are none: give eval_rewards")
        evaluator = Evaluator(
            tuple(eval_prompts),
            evaluation_rewards[0] if evaluation_rewards else self.reward,
            tuple(evaluation_rewards[1:]),
        )
        with main_first(self.pipe.device.type == "cpu"):
            source = PreferenceDataset.of(Path(folder), self.pipe, settings, Path(output_dir))
        return self._run(source, evaluator, settings, output_dir, resume, config_dict, on_update, on_evaluation)


class PRDPTrainer(LossTrainer):
    """Regression of reward differences on those of log pθ/p_ref, with proximal updates: stable on many prompts.

    beta  of the optimum pθ ∝ p_ref · exp(r/β), in units of the reward per nat; start from a tenth of its spread
    clip  ε, how far log pθ/p_ref of a step may go from where the samples were drawn, in nats
    """

    def __init__(self, pipe: Any, reward: Any, *, beta: float = 0.1, clip: float = 0.1) -> None:
        super().__init__(pipe, reward, PRDP(beta=beta, clip=clip))
