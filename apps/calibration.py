"""Statistics of rewards, lower bounds of a truth, and common errors of ensembles: `calibrate`, `herding`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from steer.apps.reward_specs import resolve_reward
from steer.apps.scoring import images_with_prompts, score_all, score_each
from steer.rewards.compose import Calibration, read_calibration, reward_statistics
from steer.rewards.conformal import describe, fit_lower_bound
from steer.rewards.herding import herding, render_herding


def calibrate_rewards(
    rewards: Sequence[str], images: Path, prompt: str | None, out: Path, device: str
) -> Iterator[str]:
    """Measure the statistics of each reward, add them to the calibration `out`, and yield a line about each.

    Raises RewardError for a reward that gives every image the same score.
    """
    paths, prompts = images_with_prompts(images, prompt)
    scales = dict(read_calibration(out).scales) if out.exists() else {}
    for reward in map(resolve_reward, rewards):
        scale = reward_statistics(score_all(reward, paths, prompts, device=device), prompts)
        scales[reward.name] = scale
        Calibration(scales, {"images": images.name, "count": len(paths)}).save(out)
        yield f"{reward.name}: mean {scale.mean:.4g}, std {scale.std:.4g} over {scale.count} images"


def calibrate_bound(
    rewards: Sequence[str],
    truth: str,
    level: float,
    optimised: Path | None,
    images: Path,
    prompt: str | None,
    out: Path,
    device: str,
) -> Iterator[str]:
    """Fit and save a lower bound of the reward `truth` by others, and yield a line about it.

    optimised  images that were optimised by these rewards: a second line has the share on which the bound holds
    Raises InputError, see `fit_lower_bound`.
    """
    members = [resolve_reward(one) for one in (*rewards, truth)]
    paths, prompts = images_with_prompts(images, prompt)
    (*names, name), scores = [one.name for one in members], score_each(members, paths, prompts, device)
    bound = fit_lower_bound(names, scores[:-1], scores[-1], prompts, name, level)
    bound.save(out)
    yield f"{describe(bound)} → {out}"
    if optimised is not None:
        scores = score_each(members, *images_with_prompts(optimised, prompt), device)
        holds = (scores[-1] >= bound.of(scores[:-1].double())).double().mean().item()
        yield f"it holds on {holds:.0%} of {scores.shape[1]} optimised images: optimisation voids the level"


def measure_herding(rewards: Sequence[str], images: Path, prompt: str | None, device: str) -> str:
    """Measure common errors of rewards on the images of a folder, and render them."""
    paths, prompts = images_with_prompts(images, prompt)
    scores = score_each(map(resolve_reward, rewards), paths, prompts, device)
    return f"{images}: {len(prompts)} images\n{render_herding(herding(rewards, scores, prompts))}"
