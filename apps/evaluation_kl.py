"""How far finetuned weights went from the model they began as: KL of whole trajectories, in nats."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.apps.methods import Off
from steer.errors import InputError
from steer.guards import kl
from steer.pipelines.held_out import interval
from steer.pipelines.samples import rows_of
from steer.trajectory import Rows, Sampler, Trajectories
from steer.transition import Gaussian

Told = dict[str, Any]


def kl_told(
    pipe: Any, off: Off, prompts: Sequence[str], call: Mapping[str, Any], eta: float | None, seed: int, chunk: int
) -> Told:
    """KL of the pipeline from itself without its weights: {"nats": [mean, low, high], "by_prompt", "eta"}.

    eta  of the steps; None or 0, which have no density, stand for 1
    Where there is none to be had, {"skipped": why}.
    """
    noise = eta or 1.0
    rows = rows_of(prompts, 1, seed, "kl", shared_start=False)
    try:
        found = trajectory_kl(pipe, off, rows, call, noise, chunk)
    except InputError as error:  # no Gaussian kernel, or no step with noise: what it says is the reason
        return {"skipped": str(error)}
    return {"nats": interval(found), "by_prompt": found.tolist(), "eta": noise}


def trajectory_kl(pipe: Any, off: Off, rows: Rows, call: Mapping[str, Any], eta: float, chunk: int) -> Tensor:
    """KL(pθ ‖ p_ref) (N,) = Σ_t ‖μθ(x_t) − μ_ref(x_t)‖² / 2τ_t² in nats, along rollouts x of pθ: in the mean over them
    it is that of the trajectories.

    pθ     the pipeline as it is; p_ref the same inside `off()`
    chunk  rows drawn at a time
    Raises InputError where the solver has no Gaussian kernel, or no step has noise.
    """
    adapted = Sampler(pipe, call, eta)
    with off():
        reference = Sampler(pipe, call, eta)  # it has other texts, where an encoder was finetuned too
    found = []
    for some in rows.split(chunk):
        stored, _ = adapted.rollout(some)
        steps = _kernels(adapted, stored)
        with off():
            before = _kernels(reference, stored)
        found.append(torch.stack([kl(p, q) for p, q in zip(steps, before, strict=True)]).sum(0))
    return torch.cat(found)


def _kernels(sampler: Sampler, stored: Trajectories) -> list[Gaussian]:
    """p(· | x_t) of all stochastic steps, on the CPU."""
    found: list[Gaussian] = []

    def keep(t: int, kernel: Gaussian, x_s: Tensor) -> None:
        found.append(Gaussian(kernel.mean.cpu(), kernel.std.cpu()))

    sampler.replay(stored, keep)
    return found
