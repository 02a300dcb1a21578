"""Training of a learned value on runs of the pipeline itself: latents of all steps, and rewards of the final images."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from steer.diffusion.step_hooks import SolverStep
from steer.diffusion.value import (
    VERSION,
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
from steer.rewards.compose import Term, linear_terms
from steer.rewards.parser import load_reward
from steer.training.supervised import TrainingRun, batch_at

PROMPTS_PER_CALL = 8
EVALUATIONS = 40  # of the held-out runs in a training
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

    reward  as for the steering pipelines; a sum has one head for each of its rewards, in that reward's own unit
    out     folder of value.json, the weights, and the rollouts
    call    arguments of the pipeline's call, with the number of steps and the guidance of the later use
    about   further entries of value.json

    Rollouts and the state of the training are kept in `out`: the same call resumes. Raises InputError for a folder of
    another run, without prompts, and for a sum that has a reward twice.
    """
    config, call, reward, out = config or ValueConfig(), dict(call or {}), load_reward(reward), Path(out)
    if not prompts:
        raise InputError("prompts: the list is empty, give at least one")
    numbers, heads = rollout_prompts(len(prompts), config), _heads_of(reward)
    _check_folder(out, prompts, call, config, list(heads))
    shards = []
    for number, places in enumerate(tqdm(numbers, "rollouts", unit="call", disable=None)):
        path = out / ROLLOUTS / f"{number:05d}.safetensors"
        if not path.exists():
            some = [prompts[place] for place in places]
            with atomic_write(path) as new:
                save_file(_rollout(pipe, reward, heads, some, config, number, call), new)
        shards.append(_read_shard(path))
    texts = [prompts[place] for places in numbers for place in places for _ in range(config.num_particles)]
    features, rewards = (
        torch.cat([one[name] for one in shards], dim) for name, dim in (("features", 1), ("rewards", 0))
    )
    runs = Runs(features, shards[0]["log_ratio"], rewards, [hashed_words(text) for text in texts])
    held_out = max(round(config.held_out * len(rewards)), 4)
    train, choose, measure = runs.split(len(rewards) - held_out, len(rewards) - held_out // 2)
    net, updates = fit(train, choose, config, out)
    r2 = [[round(one, 4) for one in numbers] for numbers in (1 - measure.unexplained(net)).tolist()]
    entries = {"version": VERSION, "reward": reward.name, "heads": list(heads)}
    entries |= {"weights": [term.weight for term in heads.values()], "r2": dict(zip(heads, r2, strict=True))}
    entries |= {"channels": features.shape[2], "width": config.width, "rollouts": len(rewards), "updates": updates}
    entries |= {"call": call, "use": use_of(pipe, call)}
    value = LearnedValue(net, dict(about or {}) | entries)
    save_value(out, value, model_fingerprint(pipe))
    return value


def rollout_prompts(count: int, config: ValueConfig) -> list[list[int]]:
    """Return the numbers of the prompts of each call, in turn, until there are enough images."""
    needed = -(-config.rollouts // config.num_particles)
    places = [number % count for number in range(needed)]
    return [places[start : start + PROMPTS_PER_CALL] for start in range(0, needed, PROMPTS_PER_CALL)]


def _heads_of(reward: Reward) -> dict[str, Term]:
    """Return the terms of a reward by name. Raises InputError where two have the same name."""
    terms = linear_terms(reward)
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"reward {twice[0]!r} is in the sum twice, but its value has one head: give it once")
    return dict(zip(names, terms, strict=True))


def _check_folder(
    out: Path, prompts: Sequence[str], call: Mapping[str, Any], config: ValueConfig, heads: Sequence[str]
) -> None:
    """Raise InputError for a folder with rollouts of other rewards, prompts, calls or settings."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    record = {"heads": heads, "prompts": digest, "call": dict(call), **config.plain()}
    run = json.dumps(record, indent=1, default=str) + "\n"
    path = out / RUN
    if path.exists() and path.read_bytes() != run.encode():
        raise InputError(f"--out {out} holds a value of other rewards, prompts or settings; choose another --out")
    write_text(path, run)


@torch.no_grad()
def _rollout(
    pipe: Any,
    reward: Reward,
    heads: Mapping[str, Term],
    prompts: Sequence[str],
    config: ValueConfig,
    number: int,
    call: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Sample images of some prompts: features (T, N, …) in half precision, log-ratios (T,), rewards of heads (N, H)."""
    generator = Generator().manual_seed(config.seed * 1_000_003 + number)
    batch = ParticleBatch(pipe, reward, list(prompts), config.num_particles, {**call, "generator": generator})
    features: list[Tensor] = []
    ratios: list[float] = []

    def record(solver_step: SolverStep) -> None:
        planes, ratio = value_features(solver_step)
        features.append(planes.half().cpu())
        ratios.append(ratio)

    rewards, components = batch.score(batch.sample(record))
    columns = [components[term.component] if term.component else rewards for term in heads.values()]
    if len(features) < 2:
        raise InputError("a run of one step has no value: give --steps at least 2")
    return {
        "features": torch.stack(features),
        "log_ratio": torch.tensor(ratios),
        "rewards": torch.stack([one.flatten().float().cpu() for one in columns], 1),
    }


def _read_shard(path: Path) -> Shard:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is corrupt; delete it, and run the command again") from error


@dataclass(frozen=True)
class Runs:
    """Runs of a pipeline: inputs of the network at all steps, and the rewards of the finished images.

    features  (T, N, 2C, H, W) of `value_features`, with log(σ/α) of each step as ratios (T,)
    rewards   (N, H), with the words of each prompt (`hashed_words`)
    """

    features: Tensor
    ratios: Tensor
    rewards: Tensor
    words: Sequence[Tensor]

    def split(self, *places: int) -> list["Runs"]:
        """Return the parts between consecutive places."""
        ends = [0, *places, len(self.rewards)]
        return [
            Runs(self.features[:, low:high], self.ratios, self.rewards[low:high], self.words[low:high])
            for low, high in itertools.pairwise(ends)
        ]

    @torch.no_grad()
    def unexplained(self, net: ValueNet) -> Tensor:
        """Return 1 − R² = Σ(V − r)²/Σ(r − r̄)² by head and step (H, T)."""
        spread = (self.rewards - self.rewards.mean(0)).square().sum(0).clamp(min=1e-12)
        residuals = [
            (net(planes.float(), ratio.expand(len(planes)), self.words) - self.rewards).square().sum(0)
            for planes, ratio in zip(self.features, self.ratios, strict=True)
        ]
        return (torch.stack(residuals, 1) / spread[:, None]).double()


class BestWeights:
    """The weights of the least 1 − R² on held-out runs, looked at every few updates (early stopping).

    A few thousand images are soon known by heart, above all where the reward is about what a prompt asks for.
    """

    def __init__(self, net: ValueNet, held_out: Runs, every: int) -> None:
        self.net, self.held_out, self.every = net, held_out, every
        self.updates, self.least, self.best, self.weights = 0, math.inf, 0, dict[str, Tensor]()

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count an update, and keep its weights where they are the best so far."""
        self.updates += 1
        if self.updates % self.every == 0:
            error = float(self.held_out.unexplained(self.net).mean())
            if error < self.least:
                self.least, self.best = error, self.updates
                self.weights = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("updates", "least", "best", "weights")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def fit(train: Runs, choose: Runs, config: ValueConfig, folder: Path) -> tuple[ValueNet, int]:
    """Fit a network by least squares on random steps and runs.

    Return it with the weights that are best on the runs `choose`, and the number of their updates; `folder` holds the
    state of the training.
    """
    features, rewards = train.features, train.rewards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = ValueNet(features.shape[2], config.width, rewards.shape[1])
    sample = features[:, :: max(features.shape[1] // 512, 1)].float().flatten(0, 1)
    net.mean.copy_(sample.mean((0, 2, 3))[:, None, None])
    net.std.copy_(sample.std((0, 2, 3))[:, None, None].clamp(min=1e-6))
    net.reward.copy_(torch.stack([rewards.mean(0), rewards.std(0).clamp(min=1e-6)]))
    steps, count = features.shape[:2]

    def loss_at(step: int) -> Tensor:
        rows = batch_at(step, config.batch_size, steps * count, config.seed)
        at, which = rows // count, rows % count
        values = net(features[at, which].float(), train.ratios[at], [train.words[one] for one in which])
        return ((values - rewards[which]) / net.reward[1]).square().mean()

    best = BestWeights(net, choose, max(config.updates // EVALUATIONS, 1))
    run = TrainingRun(folder, config.updates, config.learning_rate, warmup=min(100, config.updates))
    run.train([net], loss_at, best)
    if not best.weights:
        raise InputError(f"the value has no finite error: lower --learning-rate, {config.learning_rate:g}")
    net.load_state_dict(best.weights)
    return net.eval(), best.best
