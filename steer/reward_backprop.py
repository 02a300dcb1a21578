"""The gradient of the reward itself through the last k steps of a run (DRaFT-K, arXiv 2309.17400).

∇θ −E r(x0),   x_s = μθ(x_t) + τ z with the noise z of the rollout, for the last k steps; x_t before them is given
"""

from collections.abc import Callable, Mapping

from steer.engine import Backward, Batch, Penalty
from steer.guards import kl
from steer.losses import Metrics
from steer.reward import Reward, score
from steer.trajectory import Sampler


def reward_gradient(
    sampler: Sampler,
    batch: Batch,
    reward: Reward,
    last_steps: int,
    *,
    penalties: Mapping[Penalty, float],
    backward: Backward,
    before_each: Callable[[], None],
) -> tuple[float, Metrics]:
    """Adds ∇θ [−mean reward + Σ_p w_p · mean over samples of Σ_t p(pθ, p_ref)] to the weights' .grad.

    The sums go over those of the last k steps that are stochastic. Returns −mean reward, and the penalties of these
    steps with `kl`, nats. The graph holds k denoiser calls and the decoder.

    Call it where the weights are those that drew the batch.
    """
    count = sum(len(chunk.rows) for chunk in batch.chunks)
    weights: dict[Penalty, float] = {kl: 0.0}
    weights.update(penalties)
    total, found = 0.0, dict.fromkeys(weights, 0.0)
    for chunk, told in zip(batch.chunks, batch.references, strict=True):
        before_each()
        images, kernels = sampler.finish(chunk, last_steps)
        loss = -score(reward, images, chunk.rows.prompts).sum().to(images.device) / count
        total += loss.item()
        for t, p in kernels.items():
            other = told.kernel(list(batch.steps).index(t), p.mean)
            for penalty, weight in weights.items():
                cost = penalty(p, other).sum() / count
                found[penalty] += cost.item()
                loss = loss + weight * cost if weight else loss
        backward(loss)
    return total, {penalty.__name__: cost for penalty, cost in found.items()}
