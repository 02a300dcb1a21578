"""DRAKES (arXiv 2410.13643): a masked diffusion model finetuned by the gradient of a reward of texts."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from steer.errors import InputError
from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline
from steer.rewards.parser import load_reward
from steer.rewards.text import SequenceScore
from steer.training.drakes import relaxed_run

__all__ = ["DRAKESTrainer"]


class DRAKESTrainer:
    """Maximise E[r] − α KL(p_θ ‖ p_pre) of a masked diffusion model; its denoiser is trained in place.

    trainer = DRAKESTrainer(pipe, "says:blue", kl_weight=0.05)
    trainer.train(["a red", "a"], updates=200)

    reward               of texts, with gradients on relaxed tokens, such as says:WORD
    kl_weight            α, in units of the reward per nat; the optimum is p_pre exp(r/α)
    num_inference_steps  T of a rollout
    last_steps           steps that gradients flow through, from the end; by default all
    temperature          τ of the Gumbel-softmax of a token; the smaller, the nearer to a draw and the noisier
    learning_rate        of Adam
    train_batch_size     texts of an update
    max_grad_norm        norm to which gradients are clipped
    Raises InputError for a reward without gradients on tokens, and for values out of range.
    """

    def __init__(
        self,
        pipe: MaskedDiffusionPipeline,
        reward: Any,
        kl_weight: float = 0.05,
        num_inference_steps: int = 20,
        last_steps: int | None = None,
        temperature: float = 0.3,
        learning_rate: float = 1e-4,
        train_batch_size: int = 32,
        max_grad_norm: float = 1.0,
    ) -> None:
        last_steps = num_inference_steps if last_steps is None else last_steps
        if not 1 <= last_steps <= num_inference_steps:
            raise InputError(
                f"last_steps must be from 1 to {num_inference_steps}, the steps of a run, got {last_steps}"
            )
        positive = {"temperature": temperature, "learning_rate": learning_rate, "train_batch_size": train_batch_size}
        if wrong := [name for name, value in positive.items() if not 0 < value < math.inf]:
            raise InputError(f"{wrong[0]} must be above 0 and finite, got {positive[wrong[0]]}")
        if not 0 <= kl_weight < math.inf:
            raise InputError(f"kl_weight must be at least 0 and finite, got {kl_weight}")
        self.pipe, self.kl_weight, self.temperature = pipe, kl_weight, temperature
        self.steps, self.last_steps = num_inference_steps, last_steps
        self.batch, self.max_grad_norm = train_batch_size, max_grad_norm
        self.reward = SequenceScore(load_reward(reward), pipe.decode, pipe.tokenizer)
        one_hot = torch.nn.functional.one_hot(pipe.encode(""), pipe.mask_id + 1).float()
        self.reward.relaxed(one_hot, [""])  # refuses a reward without gradients before anything is trained
        self.reference = copy.deepcopy(pipe.denoiser).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(pipe.denoiser.parameters(), lr=learning_rate)

    def train(self, prompts: Sequence[str], updates: int, generator: Generator | None = None) -> list[dict[str, float]]:
        """Make `updates` updates on batches of the prompts, in turn: mean reward and KL (nats) of each."""
        history = []
        for update in range(updates):
            texts = [prompts[(update * self.batch + row) % len(prompts)] for row in range(self.batch)]
            history.append(self._update(texts, generator))
        return history

    def _update(self, texts: list[str], generator: Generator | None) -> dict[str, float]:
        run = relaxed_run(
            lambda p: _logits(self.pipe.denoiser, p),
            lambda p: _logits(self.reference, p),
            self.pipe.encode(texts),
            self.pipe.mask_id,
            self.steps,
            self.last_steps,
            self.temperature,
            generator,
        )
        rewards = self.reward.relaxed(run.tokens, texts)
        loss = (self.kl_weight * run.kl - rewards.to(run.kl)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [p for p in self.pipe.denoiser.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if not norm.isfinite():
            raise InputError(f"the gradient of {self.reward.name!r} is not finite: lower learning_rate or last_steps")
        self.optimizer.step()
        return {"reward": rewards.mean().item(), "kl": run.kl.mean().item(), "grad_norm": norm.item()}


def _logits(denoiser: Any, p: Tensor) -> Tensor:
    logits: Tensor = denoiser(p).sample
    return logits
