"""The Gaussian step in linear form: x̂0 and the mean are sums of x_t and the model output with a weight each."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from steer.errors import InputError
from steer.precision import widest
from steer.schedule import Level
from steer.transition import split_noise

Wanted = Literal["x0", "mean", "x_s", "log_prob"]


@dataclass(frozen=True)
class LinearStep:
    """x̂0 = clip(a x_t + b o),  mean = c x_t + d x̂0,  x_s = mean + τ z, of a model output o.

    a, b, c, d, std (τ)  float64 on the CPU, scalars or one per row (N,)
    limit                bound on |x̂0|, infinite where it is not clipped
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    std: Tensor
    limit: float = math.inf

    def table(self, device: torch.device) -> Tensor:
        """a, b, c, d, τ, log τ in fp32, (1, 6) or (N, 6): one transfer for all."""
        columns = torch.broadcast_tensors(self.a, self.b, self.c, self.d, self.std, self.std.log())
        return torch.stack([column.reshape(-1) for column in columns], 1).float().to(device)


# (a, b) of x̂0 = a x_t + b o for each prediction type, from x_t = α x0 + σ ε, as steer.schedule.predict_x0 has it.
X0_WEIGHTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "original_sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "v_prediction": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2).sqrt()),
}


def linear_step(kind: str, before: Level, after: Level, eta: float, limit: float = math.inf) -> LinearStep:
    """The step of `steer.transition.gaussian_transition` and x̂0 of a prediction type, as weights.

    mean = α_s x̂0 + √(σ_s² − τ²) (x_t − α_t x̂0)/σ_t = c x_t + d x̂0,  c = √(σ_s² − τ²)/σ_t,  d = α_s − c α_t

    before, after  levels: float64 scalars, or one per row (N,)
    eta            η in [0, 1]

    Raises InputError for a prediction type that has no rule.
    """
    if kind not in X0_WEIGHTS:
        raise InputError(f"no rule for x̂0 from prediction_type {kind!r}: use one of {', '.join(X0_WEIGHTS)}")
    tau, rest = split_noise(before, after, eta)
    c = rest / before.sigma
    return LinearStep(*X0_WEIGHTS[kind](*before), c, after.alpha - c * before.alpha, tau, limit)


class Pass(Protocol):
    """One evaluation of a step: what is wanted of x̂0, mean, x_s (each shaped like x) and log p(x_s | x_t) (N,).

    x, output   x_t and the model output (N, …), of any floating dtype
    noise       z shaped like x: x_s is drawn from it, in `dtype`, and has been rounded to `storage` on the way
    x_s         in place of the noise: the sample whose density is asked for
    """

    def __call__(
        self,
        step: LinearStep,
        x: Tensor,
        output: Tensor,
        want: Collection[Wanted],
        noise: Tensor | None = None,
        x_s: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        storage: torch.dtype | None = None,
    ) -> dict[Wanted, Tensor]: ...


def plain_pass(
    step: LinearStep,
    x: Tensor,
    output: Tensor,
    want: Collection[Wanted],
    noise: Tensor | None = None,
    x_s: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
) -> dict[Wanted, Tensor]:
    """`Pass` in plain PyTorch: any device, gradients as usual. All but x_s is fp32; log-probs are summed in fp64."""
    check_pass(step, x, output, want, noise, x_s)
    columns = step.table(x.device).unbind(1)
    a, b, c, d, std, log_std = (column.view(-1, *[1] * (x.dim() - 1)) for column in columns)
    x0 = a * x.float() + b * output.float()
    if step.limit < math.inf:
        x0 = x0.clamp(-step.limit, step.limit)
    mean = c * x.float() + d * x0
    found: dict[Wanted, Tensor] = {"x0": x0, "mean": mean}
    if noise is not None:
        x_s = (mean + std * noise.float()).to(dtype).to(storage or dtype).to(dtype)
    if x_s is not None:
        found["x_s"] = x_s
    if x_s is not None and "log_prob" in want:
        z, log_std = ((x_s.float() - mean) / std).to(widest(x.device)), log_std.to(widest(x.device))
        terms = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
        found["log_prob"] = terms.reshape(len(x), -1).sum(1)
    return {name: found[name] for name in want}


def check_pass(
    step: LinearStep, x: Tensor, output: Tensor, want: Collection[Wanted], noise: Tensor | None, x_s: Tensor | None
) -> None:
    """Raises InputError where shapes differ, or where something is wanted that was not given what it needs."""
    given = {"output": output, "noise": noise, "x_s": x_s}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != x.shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, it must be that of x, {tuple(x.shape)}")
    if noise is not None and x_s is not None:
        raise InputError("noise and x_s are both given: a sample is either drawn or judged, give one of them")
    if {"x_s", "log_prob"} & set(want) and noise is None and x_s is None:
        raise InputError("x_s and its log_prob need noise to draw it from, or x_s itself: give one of them")
    if "log_prob" in want and not (step.std > 0).all():
        raise InputError("this step is deterministic (τ = 0): it has no log-probability. Use η > 0")
    rows = max(value.numel() for value in (step.a, step.b, step.c, step.d, step.std))
    if rows not in (1, len(x)):
        raise InputError(f"the step has weights for {rows} rows and x has {len(x)}: give one for all, or one per row")
