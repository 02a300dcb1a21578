"""The Gaussian step in one pass over memory: Triton on CUDA, plain PyTorch elsewhere."""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from steer.diffusion.schedules import (
    Dynamics,
    Gaussian,
    Level,
    LinearStep,
    Scheduler,
    clip_limit,
    plain_pass,
    weighted_step,
    x0_weights,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def has_kernel(*tensors: Tensor) -> bool:
    """Return whether a step of these tensors runs in Triton: on CUDA, at most fp32, no graph, triton installed."""
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    fits = all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors)
    return fits and not graph and find_spec("triton") is not None


def one_pass(step: LinearStep, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the mean of a step or a sample as `plain_pass` does, by the kernel where there is one.

    Raises InputError where shapes differ.
    """
    if has_kernel(*(tensor for tensor in (x, output, noise) if tensor is not None)):
        from steer.diffusion.triton_kernels import triton_pass  # triton is optional

        return triton_pass(step, x, output, noise)
    return plain_pass(step, x, output, noise)


class FusedGaussian(Gaussian):
    """A `Gaussian` whose mean is computed within the pass that draws x_s, and stored only on access.

    x, output  x_t and the model output (N, …); no graph is built
    """

    def __init__(self, step: LinearStep, x: Tensor, output: Tensor) -> None:
        vars(self).update(_step=step, _x=x, _output=output)  # the base is frozen

    def _run(self, noise: Tensor | None = None) -> Tensor:
        step, x, output = (vars(self)[name] for name in ("_step", "_x", "_output"))
        return one_pass(step, x, output, noise)

    @functools.cached_property
    def mean(self) -> Tensor:
        return self._run()

    @functools.cached_property
    def std(self) -> Tensor:
        x = vars(self)["_x"]
        return vars(self)["_step"].std.to(device=x.device, dtype=torch.float32)

    def noise(self, generator: torch.Generator | None) -> Tensor:
        return Gaussian(vars(self)["_x"], self.std).noise(generator)

    def sample(self, generator: torch.Generator | None) -> Tensor:
        return self._run(self.noise(generator))


def fused_gaussian(
    scheduler: Scheduler,
    x: Tensor,
    output: Tensor,
    before: Level,
    after: Level,
    eta: float,
    dynamics: Dynamics = "ddim",
) -> FusedGaussian:
    """Return `gaussian_transition` of a scheduler's step without computing x̂0; not for thresholding schedulers.

    x, output      (N, C, …); the output may have the channels of a learned variance after its own
    before, after  the levels of the step (`steer.diffusion.schedules.step_levels`)
    """
    step = weighted_step(x0_weights(scheduler, before), before, after, eta, clip_limit(scheduler), dynamics)
    return FusedGaussian(step, x, output[:, : x.shape[1]])
