"""Training of a learned value on runs of the pipeline itself: latents of all steps, and rewards of the final images."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm.auto import tqdm

from steer.diffusion.step_hooks import SolverStep
from steer.diffusion.value import (
    LearnedValue,
    ValueNet,
    hashed_words,
    model_fingerprint,
    save_value,
    use_of,
    value_features,
)
from steer.errors import InputError
from steer.files import atomic_write, write_text
from steer.pipelines.particle_batch import ParticleBatch
from steer.pipelines.settings import ValueConfig as ValueConfig
from steer.reward import Reward
from steer.rewards.parser import load_reward
from steer.training.supervised import TrainingRun, batch_at

PROMPTS_PER_CALL = 8
RUN, ROLLOUTS = "run.json", "rollouts"
Shard = Mapping[str, Tensor]


def train_value(
    pipe: Any,
    reward: Any,
    prompts: Sequence[str],
    out: str | PathLike[str],
    config: ValueConfig | None = None,
    call: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> LearnedValue:
    """Train V(x_t) = E[r(x0) | x_t] by least squares on rollouts of `pipe` (arXiv 2404.09656); save and return it.

    reward  as for the steering pipelines
    out     folder of value.json, the weights, and the rollouts
    call    arguments of the pipeline's call, with the number of steps and the guidance of the later use
    about   further entries of value.json

    Rollouts and the state of the training are kept in `out`: the same call resumes. Raises InputError for a folder of
    another run, or without prompts.
    """
    config, call, reward, out = config or ValueConfig(), dict(call or {}), load_reward(reward), Path(out)
    if not prompts:
        raise InputError("prompts: the list is empty, give at least one")
    numbers = rollout_prompts(len(prompts), config)
    _check_folder(out, prompts, call, config)
    shards = []
    for number, places in enumerate(tqdm(numbers, "rollouts", unit="call", disable=None)):
        path = out / ROLLOUTS / f"{number:05d}.safetensors"
        if not path.exists():
            some = [prompts[place] for place in places]
            with atomic_write(path) as new:
                save_file(_rollout(pipe, reward, some, config, number, call), new)
        shards.append(_read_shard(path))
    texts = [prompts[place] for places in numbers for place in places for _ in range(config.num_particles)]
    features, ratios = torch.cat([one["features"] for one in shards], 1), shards[0]["log_ratio"]
    rewards = torch.cat([one["rewards"] for one in shards])
    first_held_out = len(rewards) - max(round(config.held_out * len(rewards)), 2)
    net = fit(features[:, :first_held_out], ratios, rewards[:first_held_out], texts[:first_held_out], config, out)
    r2 = held_out_r2(net, features[:, first_held_out:], ratios, rewards[first_held_out:], texts[first_held_out:])
    entries = {"reward": reward.name, "channels": features.shape[2], "width": config.width, "rollouts": len(rewards)}
    entries |= {"call": call, "use": use_of(pipe, call), "r2": [round(one, 4) for one in r2]}
    value = LearnedValue(net, dict(about or {}) | entries)
    save_value(out, value, model_fingerprint(pipe))
    return value


def rollout_prompts(count: int, config: ValueConfig) -> list[list[int]]:
    """Return the numbers of the prompts of each call, in turn, until there are enough images."""
    needed = -(-config.rollouts // config.num_particles)
    places = [number % count for number in range(needed)]
    return [places[start : start + PROMPTS_PER_CALL] for start in range(0, needed, PROMPTS_PER_CALL)]


def _check_folder(out: Path, prompts: Sequence[str], call: Mapping[str, Any], config: ValueConfig) -> None:
    """Raise InputError for a folder with rollouts of other prompts, calls or settings."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    run = json.dumps({"prompts": digest, "call": dict(call), **config.plain()}, indent=1, default=str) + "\n"
    path = out / RUN
    if path.exists() and path.read_bytes() != run.encode():
        raise InputError(f"--out {out} holds a value of other prompts or settings; choose another --out")
    write_text(path, run)


@torch.no_grad()
def _rollout(
    pipe: Any, reward: Reward, prompts: Sequence[str], config: ValueConfig, number: int, call: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Sample images of some prompts: features (T − 1, N, …) in half precision, log-ratios (T − 1,) and rewards (N,)."""
    generator = Generator().manual_seed(config.seed * 1_000_003 + number)
    batch = ParticleBatch(pipe, reward, list(prompts), config.num_particles, {**call, "generator": generator})
    features: list[Tensor] = []
    ratios: list[float] = []

    def record(solver_step: SolverStep) -> None:
        if solver_step.k < solver_step.total - 1:  # at the last step the reward itself is known
            planes, ratio = value_features(solver_step)
            features.append(planes.half().cpu())
            ratios.append(ratio)

    rewards, _ = batch.score(batch.sample(record))
    if not features:
        raise InputError("a run of one step has no value: give --steps at least 2")
    return {
        "features": torch.stack(features),
        "log_ratio": torch.tensor(ratios),
        "rewards": rewards.flatten().float().cpu(),
    }


def _read_shard(path: Path) -> Shard:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is corrupt; delete it, and run the command again") from error


def fit(
    features: Tensor, ratios: Tensor, rewards: Tensor, texts: Sequence[str], config: ValueConfig, folder: Path
) -> ValueNet:
    """Fit a network by least squares on random steps and rollouts.

    features  (T, N, 2C, H, W) of `value_features`, with log(σ/α) of each step as ratios (T,)
    rewards   (N,) of the images, with their prompts as texts
    folder    folder of the state of the training
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = ValueNet(features.shape[2], config.width)
    sample = features[:, :: max(features.shape[1] // 512, 1)].float().flatten(0, 1)
    net.mean.copy_(sample.mean((0, 2, 3))[:, None, None])
    net.std.copy_(sample.std((0, 2, 3))[:, None, None].clamp(min=1e-6))
    net.reward.copy_(torch.stack([rewards.mean(), rewards.std().clamp(min=1e-6)]))
    words = [hashed_words(text) for text in texts]
    steps, count = features.shape[:2]

    def loss_at(step: int) -> Tensor:
        rows = batch_at(step, config.batch_size, steps * count, config.seed)
        at, which = rows // count, rows % count
        values = net(features[at, which].float(), ratios[at], [words[one] for one in which])
        return ((values - rewards[which]) / net.reward[1]).square().mean()

    run = TrainingRun(folder, config.updates, config.learning_rate, warmup=min(100, config.updates))
    run.train([net], loss_at)
    return net.eval()


@torch.no_grad()
def held_out_r2(
    net: ValueNet, features: Tensor, ratios: Tensor, rewards: Tensor, texts: Sequence[str]
) -> Iterator[float]:
    """Yield R² = 1 − Σ(V − r)²/Σ(r − r̄)² at each step on held-out rollouts; features, ratios, rewards as in `fit`."""
    words = [hashed_words(text) for text in texts]
    spread = (rewards - rewards.mean()).square().sum().clamp(min=1e-12)
    for planes, ratio in zip(features, ratios, strict=True):
        residual = net(planes.float(), ratio.expand(len(planes)), words) - rewards
        yield float(1 - residual.square().sum() / spread)
