"""A user's own diffusers pipeline whose denoiser is exact, so that what steering must give is known in closed form."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from soft_rewards import Soft
from torch import Generator, Tensor

from steer import FKSteeringPipeline
from steer.pipelines.base import SteeringOutput

LAM, GROUPS, BATCH = 3.0, 1200, 100


# r = Σ over the 3 elements of x.
TOTAL = Soft(lambda images, prompts: images.sum((1, 2, 3)), "total")


def steered_gaussians(
    pipe: "GaussianPipeline", size: int, reward: Any = TOTAL, **options: Any
) -> Iterator[SteeringOutput]:
    """FK's answers by TOTAL, or an equal reward, for GROUPS groups of `size` particles, BATCH at a time; λ = LAM."""
    for seed in range(GROUPS // BATCH):
        yield FKSteeringPipeline(pipe, reward)(
            num_particles=size,
            reward_prompt=[""] * BATCH,
            eta=1.0,
            chunk_size=BATCH * size,
            generator=Generator().manual_seed(seed),
            output_type="pt",
            **{"lam": LAM, "ess_threshold": 0.9} | options,
        )


def check_tilted(outs: Sequence[SteeringOutput], mean: float, std: float) -> None:
    """Holds weights and normalisers against p exp(λ r), whose mean is m + λ v, and Z = exp(3 (λ m + λ² v / 2))."""
    z = torch.cat([out.log_normaliser.double().exp() for out in outs])
    values = torch.cat([out.images.double().sum((1, 2, 3)).view_as(out.log_weights) for out in outs])
    weights = torch.cat([out.log_weights.double().softmax(1) for out in outs])
    pooled = z * (weights * (values - 3 * (mean + LAM * std**2))).sum(1)
    truth = math.exp(3 * (LAM * mean + LAM**2 * std**2 / 2))
    assert abs(z.mean() - truth) <= 4 * z.std() / len(z) ** 0.5
    assert abs(pooled.mean()) <= 4 * pooled.std() / len(z) ** 0.5


class GaussianPipeline(DiffusionPipeline):
    """Samples of N(mean, std² I), shaped (N, 3, 1, 1): latents and images are the same thing."""

    def __init__(self, scheduler: DDIMScheduler | None = None, mean: float = 0.5, std: float = 0.1) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
        self.register_to_config(mean=mean, std=std)
        self.set_progress_bar_config(disable=True)

    def epsilon(self, x: Tensor, timestep: int) -> Tensor:
        """E[ε | x] for x = α x0 + σ ε and x0 ~ N(mean, std²)."""
        alpha, sigma = self.level(timestep)
        gain, shift = self.posterior_mean(timestep)
        return (x - alpha * (gain * x + shift)) / sigma

    def level(self, timestep: int) -> tuple[float, float]:
        """α and σ at a timestep, a negative one being the end."""
        cumulative = float(self.scheduler.alphas_cumprod[timestep]) if timestep >= 0 else 1.0
        return math.sqrt(cumulative), math.sqrt(1 - cumulative)

    def posterior_mean(self, timestep: int) -> tuple[float, float]:
        """(a, b) of E[x0 | x] = a x + b."""
        alpha, sigma = self.level(timestep)
        gain = alpha * self.config.std**2 / (alpha**2 * self.config.std**2 + sigma**2)
        return gain, self.config.mean * (1 - gain * alpha)

    def transitions(self, steps: int, eta: float) -> list[tuple[float, float, float]]:
        """(a, b, τ) of every DDIM step x_s = a x_t + b + τ z of a run of so many steps."""
        self.scheduler.set_timesteps(steps)
        step_moments = []
        for timestep in self.scheduler.timesteps.tolist():
            (alpha_t, sigma_t), (alpha_s, sigma_s) = map(self.level, (timestep, timestep - 1000 // steps))
            tau = eta * sigma_s / sigma_t * math.sqrt(max(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, 0))
            rest = math.sqrt(max(sigma_s**2 - tau**2, 0)) / sigma_t
            gain, shift = self.posterior_mean(timestep)
            step_moments.append((alpha_s * gain + rest * (1 - alpha_t * gain), (alpha_s - rest * alpha_t) * shift, tau))
        return step_moments

    def distribution(self, steps: int, eta: float) -> tuple[float, float]:
        """Mean and standard deviation of what a run of so many steps really draws from: N(0, 1) pushed through it."""
        mean, variance = 0.0, 1.0
        for gain, shift, tau in self.transitions(steps, eta):
            mean, variance = gain * mean + shift, gain**2 * variance + tau**2
        return mean, math.sqrt(variance)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 10,
        generator: Generator | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Tensor]:
        if latents is None:
            latents = randn_tensor((batch_size, 3, 1, 1), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            output = self.epsilon(latents, int(timestep))
            latents = self.scheduler.step(output, timestep, latents, eta=eta, generator=generator).prev_sample
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)
