"""Gradients of losses of the forward process: one denoiser call and one backward pass per chunk and noise level.

x_t = α_t x0 + σ_t ε at the noise levels of the pipeline's own solver steps. The denoiser is called by the pipeline
itself, so that prompts, conditions and guidance are the same as in sampling. Only one call has a graph at a time: the
memory does not depend on the number of levels.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from steer.diffusion.schedules import level, x0_weights
from steer.diffusion.step_hooks import SolverStep
from steer.training.distributed import SINGLE_PROCESS, DistributedContext, sum_over_processes
from steer.training.gradient import Backward, Batch, before_last_call, past_untrained
from steer.training.losses import Metrics
from steer.training.losses.forward import ForwardLoss, NoisyPredictions, mean_square
from steer.training.rollout import Sampler, Trajectories

Policy = Callable[[], AbstractContextManager[None]]  # a context in which the denoiser has the weights of a policy
DISTANCE = "reference_distance"


def predictions_of(solver_step: SolverStep, x0: Tensor) -> NoisyPredictions:
    """Return the denoiser's output at a solver step (N, …) fp32, as a prediction of clean latents (N, …).

    A learned variance is left out; where a pipeline computes x̂0 itself, x̂0 is taken as the output.
    """
    x, scheduler = solver_step.x.float(), solver_step.scheduler
    before = level(scheduler, solver_step.t, solver_step.index)
    noise = float(before.sigma / (before.alpha + before.sigma))
    if solver_step.own_x0 is not None:
        return NoisyPredictions(x0, x, 0.0, 1.0, noise, solver_step.own_x0.float())
    output = solver_step.output.float()
    output = output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
    a, b = (float(value) for value in x0_weights(scheduler, before))
    return NoisyPredictions(x0, x, a, b, noise, output)


def policy_outputs(sampler: Sampler, stored: Trajectories, steps: Sequence[int], policy: Policy) -> list[Tensor]:
    """Return the outputs of a policy at the chosen noise levels, without a graph."""
    outputs: list[Tensor] = []
    with policy():
        sampler.noised(stored, lambda t, solver_step, x0: outputs.append(predictions_of(solver_step, x0).new), steps)
    return outputs


def forward_gradient(
    sampler: Sampler,
    batch: Batch,
    loss: ForwardLoss,
    *,
    old: Policy | None = None,
    reference: Policy | None = None,
    reference_weight: float = 0.0,
    backward: Backward = Tensor.backward,
    on_chunk: Callable[[], None] = lambda: None,
    before_last: Callable[[], None] = lambda: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> tuple[float, Metrics]:
    """Add ∇θ of the mean over samples and noise levels of [loss + w ‖o_θ − o_ref‖²] to the weights' .grad.

    Returns the loss without the penalty, and the means of its metrics; also `reference_distance`, ‖o_θ − o_ref‖², if
    the reference is evaluated.

    batch      chunks of clean latents (`Sampler.sample`), with their signal (B, K) as rewards and noise levels as steps
    old        the policy that drew the samples; None: the present weights
    reference  the reference policy; None: not evaluated
    backward, on_chunk, before_last, context  as in `steer.training.gradient.two_pass_gradient`
    """
    steps = list(batch.steps)
    share = 1 / (batch.rewards.shape[:2].numel() * len(steps))
    backward = past_untrained(before_last_call(backward, len(batch.chunks) * len(steps), before_last), sampler)
    policies = {"old": old if loss.uses_old else None, "reference": reference}
    totals: Metrics = {}
    for chunk, signal in zip(batch.chunks, batch.local_rows(batch.rewards[..., None], context), strict=True):
        on_chunk()
        others = {
            name: policy_outputs(sampler, chunk, steps, policy)
            for name, policy in policies.items()
            if policy is not None
        }

        def backward_step(
            t: int,
            solver_step: SolverStep,
            x0: Tensor,
            others: dict[str, list[Tensor]] = others,
            signal: Tensor = signal,
        ) -> None:
            before, base = (others[name][steps.index(t)] if name in others else None for name in ("old", "reference"))
            predictions = replace(predictions_of(solver_step, x0), old=before, reference=base)
            values, metrics = loss(predictions, signal[:, 0].to(x0))
            objective, metrics = values, {"loss": values.detach(), **metrics}
            if predictions.reference is not None:
                distance = mean_square(predictions.new - predictions.reference)
                objective, metrics[DISTANCE] = values + reference_weight * distance, distance.detach()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + share * value.sum().item()
            backward(context.world_size * share * objective.sum())

        sampler.noised(chunk, backward_step, steps, grad=True)
    means = dict(zip(totals, sum_over_processes(context, list(totals.values())), strict=True))
    return means.pop("loss"), means
