"""The gradient of the reward itself through the last k steps of a run (DRaFT-K, arXiv 2309.17400).

∇θ −E r(x0),   x_s = μθ(x_t) + τ z with the noise z of the rollout, for the last k steps; x_t before them is given
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from steer.batch import Batch, Reference
from steer.engine import Backward, Penalty, counted, divergence
from steer.errors import InputError
from steer.frames import over_frames
from steer.guards import kl
from steer.losses import Metrics
from steer.reward import Reward, score_parts
from steer.team import ALONE, Team, total
from steer.trajectory import Sampler
from steer.transition import Gaussian


def reward_gradient(
    sampler: Sampler,
    batch: Batch,
    reward: Reward,
    last_steps: int,
    *,
    penalties: Mapping[Penalty, float],
    unchanged: bool,
    backward: Backward,
    before_each: Callable[[], None],
    before_last: Callable[[], None] = lambda: None,
    team: Team = ALONE,
) -> tuple[float, Metrics]:
    """Adds ∇θ [−mean reward + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    The sums go over the batch's steps, at their stored x_t: a penalty is about where the policy is, not about how it
    came there. Returns −mean reward, and the penalties of these steps with `kl`, in nats. The graph holds k denoiser
    calls and the decoder. The options are those of `steer.engine.two_pass_gradient`.

    Raises InputError where the weights are not those that drew the batch any more.
    """
    if not unchanged:
        raise InputError("reward backpropagation learns from samples of the present weights alone: draw a new round")
    count, steps = sum(len(chunk.rows) for chunk in batch.chunks), list(batch.steps)  # of each process
    weights: dict[Penalty, float] = {kl: 0.0, **penalties}
    value, found = 0.0, dict.fromkeys(weights, 0.0)
    backward = counted(backward, len(batch.chunks) * (1 + len(steps) * bool(penalties)), before_last)
    for chunk, told in zip(batch.chunks, batch.references, strict=True):
        before_each()
        images = sampler.finish(chunk, last_steps)
        rewards, _ = over_frames(images, partial(score_parts, reward, prompts=chunk.rows.prompts))
        value -= rewards.sum().item() / count
        backward(-rewards.sum().to(images.device) / count)

        def back(t: int, p: Gaussian, x_s: Tensor, told: Reference = told) -> None:
            costs = {one: divergence(one, p, x_s, told, steps.index(t)).sum() / count for one in weights}
            for penalty, cost in costs.items():
                found[penalty] += cost.item()
            if penalties:
                backward(torch.stack([weights[penalty] * cost for penalty, cost in costs.items()]).sum())

        sampler.replay(chunk, back, steps, grad=bool(penalties))
    value, *costs = (one / team.count for one in total(team, [value, *found.values()]))
    told_all = {penalty.__name__: cost for penalty, cost in zip(weights, costs, strict=True)}
    return value, told_all | {"kl_per_step": told_all[kl.__name__] / len(steps)}
