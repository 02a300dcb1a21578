"""The scheduler of masked diffusion: z_t → z_s with the SUBS parameterisation."""

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Generator, Tensor

from steer.diffusion.masked import OPENINGS, MaskedKernel, subs
from steer.registry import choose


class SubsScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Masked diffusion with α_t = 1 − t from t = 1, all masked, to t = 0 (MDLM, arXiv 2406.07524).

    mask_token_id  id of the masked token
    opening        rule that draws the places to open in a step: independent (as published), each with probability
                   (t − s)/t; or balanced, the expected number, and at most one in a step if there are enough steps
    """

    config_name = "scheduler_config.json"
    order = 1
    timesteps: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, mask_token_id: int, opening: str = "balanced") -> None:
        choose("opening", opening, OPENINGS)
        self.set_timesteps(20)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set T equal steps from t = 1 to 0."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, 0, -1, device=device) / num_inference_steps

    def kernel(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor) -> MaskedKernel:
        """Return p(z_s | z_t) at t = `timestep` for logits (N, L, V) and z_t = `sample` (N, L)."""
        left = max(round(float(timestep) * self.num_inference_steps), 1)  # steps until t = 0: (t − s)/t = 1/left
        mask_id = self.config.mask_token_id
        return MaskedKernel(sample, subs(model_output, sample, mask_id), 1 / left, mask_id, self.config.opening)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Draw z_s from logits (N, L, V) at t = `timestep` and z_t = `sample` (N, L)."""
        z_s = self.kernel(model_output, timestep, sample).sample(generator)
        return SchedulerOutput(z_s) if return_dict else (z_s,)
