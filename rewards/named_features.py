"""Rewards learned from a few hundred labels: a weighted sum, or a small network, of named rewards.

    r(x|p) = Σ_f w_f z_f(x, p),   z_f = (φ_f − mean_f) / std_f,   P(a ≻ b) = σ(r(a) − r(b))

The weights minimise the mean log loss of the pairs + l2/2 ‖w‖², subject to the configured signs; their intervals are
95 % bootstrap intervals over pairs.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from steer.files import atomic_write, atomic_write_with_checksums
from steer.reward import Reward, RewardError, score
from steer.rewards.analysis import preference_metrics
from steer.rewards.compose import CompositeReward
from steer.rewards.folders import CARD, Card, are_scales, read_card, write_card
from steer.rewards.grammar import COMMA, split
from steer.rewards.inputs import file_batches
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.parser import ParserState, read
from steer.rewards.preference_pairs import Pairs, Source, split_by_prompt
from steer.rewards.weights import linear_layers, load_weights, read_checkpoint

KIND = "features"
NETWORK = "network.safetensors"
MAX_FEATURES, MAX_HIDDEN = 100, 1024
RESAMPLES = 200
BATCH = 32  # images scored at a time
SIGNS: dict[str, tuple[float | None, float | None]] = {"+": (0.0, None), "-": (None, 0.0), "?": (None, None)}
STEPS = 500  # training steps of the network


@dataclass(frozen=True)
class FeatureConfig:
    """Configuration of a reward over named features.

    features  names of rewards, separated by ", "
    signs     one of + - ? for each feature: its weight is at least 0, at most 0, or free
    hidden    units of a network of one hidden layer in place of weights; 0: weights
    l2        coefficient of the penalty on the weights
    held_out  share of the prompts that accuracy and calibration are measured on
    """

    features: str
    signs: str = ""
    hidden: int = 0
    l2: float = 1e-3
    held_out: float = 0.1
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Return the names of the features. Raises RewardError."""
        names = split(self.features, COMMA)
        if not all(names) or len(names) > MAX_FEATURES:
            raise RewardError(f"--features {self.features!r:.80}: name 1 to {MAX_FEATURES} rewards, separated by ', '")
        return names

    @property
    def bounds(self) -> list[tuple[float | None, float | None]]:
        """Return the bounds of the weights by their signs. Raises RewardError."""
        signs = self.signs.split() or ["?"] * len(self.names)
        if len(signs) != len(self.names) or not set(signs) <= set(SIGNS):
            raise RewardError(f"--signs {self.signs!r:.40}: give + - or ? for each of {len(self.names)} features")
        if self.hidden and self.signs:
            raise RewardError("--signs are those of weights: leave out --hidden")
        if not 0 <= self.hidden <= MAX_HIDDEN:
            raise RewardError(f"--hidden must be from 0 to {MAX_HIDDEN}, got {self.hidden}")
        return [SIGNS[sign] for sign in signs]


@dataclass(frozen=True)
class FeatureCard(Card):
    """Contents of reward.json: features, their means and deviations, and the weights (empty for a network).

    scale  the deviation of the raw reward over the training images; scores are divided by it
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    scale: float
    hidden: int
    report: dict[str, Any] = field(default_factory=dict)
    kind: str = KIND

    @property
    def is_valid(self) -> bool:
        count = len(self.features)
        valid = self.kind == KIND and all(isinstance(name, str) for name in self.features)
        valid = valid and len(self.means) == count <= MAX_FEATURES and 0 <= self.hidden <= MAX_HIDDEN
        valid = valid and len(self.weights) == (0 if self.hidden else count) and all(map(math.isfinite, self.weights))
        return valid and are_scales(self.means, self.stds) and are_scales([0.0], [self.scale])


def network(features: int, hidden: int) -> nn.Sequential:
    """Return a network of one hidden layer."""
    return linear_layers((features, hidden, 1), (0, 2), nn.Tanh)


class FeatureReward(CompositeReward):
    """A reward over named features, in standard deviations; its components are the weighted z_f of the features.

    Differentiable if all features are. Raises RewardError for a folder without such a reward.
    """

    def __init__(self, folder: str) -> None:
        file = Path(folder) / NETWORK
        self.card = card = read_card(file.parent, FeatureCard, [file], "a reward over named features")
        super().__init__(_features(card.features), file.parent.name)
        self._network = None
        if card.hidden:
            with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
                self._network = network(len(card.features), card.hidden).requires_grad_(False)
            load_weights(self._network, read_checkpoint(file), str(file))

    def components(self, images: Tensor, prompts: Sequence[str], metadata: Any = None) -> dict[str, Tensor]:
        """Return z_f (N,) of every feature, times its weight if there is one."""
        raw, card = super().components(images, prompts, metadata), self.card
        weights = card.weights or (1.0,) * len(card.means)
        scales = zip(self._names, card.means, card.stds, weights, strict=True)
        return {name: weight * (raw[name] - mean) / std for name, mean, std, weight in scales}

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Compute the reward (N,) from its components."""
        parts = torch.stack([components[name] for name in self._names], -1)
        raw = parts.sum(-1) if self._network is None else self._network.to(parts)(parts)[:, 0]
        return raw / self.card.scale


def _features(names: Sequence[str]) -> list[Reward]:
    """Load named rewards. Raises RewardError, also for a reward over itself."""
    try:
        return [read(name, ParserState(named_only=True)) for name in names]
    except RecursionError as error:
        raise RewardError(f"features {', '.join(names)[:80]} contain themselves") from error


def train_on_features(
    pairs: Pairs, config: FeatureConfig, out: Path, work: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Fit the weights, or a network, to pairs, write the reward to `out` and return its report.

    The features are computed once and kept in `work`. Raises RewardError for a feature without spread.
    """
    names, bounds = config.names, config.bounds
    training_rows, held_rows = split_by_prompt(pairs.prompts, config.held_out, config.seed)
    values = pair_scores(names, pairs, work, device)  # (P, 2, F)
    chosen = values[training_rows].flatten(0, 1)
    means, stds = chosen.mean(0), chosen.std(0)
    if flat := [name for name, std in zip(names, stds.tolist(), strict=True) if not std > 0]:
        raise RewardError(f"feature {flat[0]} has one value on all images: leave it out")
    z, labels = (values - means) / stds, pairs.labels
    training = z[training_rows, 0] - z[training_rows, 1]
    fitted = None
    if config.hidden:
        fitted = fit_network(z[training_rows], labels[torch.tensor(training_rows)], config)
        raw = fitted(z.float())[..., 0].detach()
        weights, intervals = torch.zeros(0), []
    else:
        weights = fit_weights(training, labels.choice[training_rows], bounds, config.l2)
        intervals = bootstrap_intervals(training, labels.choice[training_rows], bounds, config)
        raw = z @ weights
    rows = torch.tensor(held_rows or training_rows)
    report = {
        "config": asdict(config),
        "pairs": {"trained": len(training_rows), "held_out": len(held_rows)},
        "ensemble": asdict(preference_metrics([raw[rows, 0].float(), raw[rows, 1].float()], labels[rows])),
        "weights": dict(zip(names, [round(weight, 4) for weight in weights.tolist()], strict=False)),
    }
    scale = raw[training_rows].std().item()
    scales = tuple(means.tolist()), tuple(stds.tolist())
    card = FeatureCard(tuple(names), *scales, tuple(weights.tolist()), tuple(intervals), scale, config.hidden, report)
    _save(out, card, fitted)
    return report


def fit_weights(
    difference: Tensor, choice: Tensor, bounds: Sequence[tuple[float | None, float | None]], l2: float
) -> Tensor:
    """Minimise the log loss of P(a ≻ b) = σ(w · Δz) with labels c, plus l2/2 ‖w‖², within bounds: (F,) in double."""
    delta, c = difference.double().numpy(), choice.double().numpy()

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = delta @ w
        value = np.logaddexp(0, logits) - c * logits
        gradient = delta.T @ (1 / (1 + np.exp(-logits)) - c) / len(c)
        return value.mean() + l2 / 2 * w @ w, gradient + l2 * w

    start = np.zeros(delta.shape[1])
    return torch.from_numpy(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=list(bounds)).x)


def bootstrap_intervals(
    difference: Tensor, choice: Tensor, bounds: Sequence[tuple[float | None, float | None]], config: FeatureConfig
) -> list[tuple[float, float]]:
    """Return the 2.5 % and 97.5 % quantiles of each weight over resampled pairs."""
    generator = torch.Generator().manual_seed(config.seed)
    count, weights = len(choice), []
    for _ in range(RESAMPLES):
        rows = torch.randint(count, (count,), generator=generator)
        weights.append(fit_weights(difference[rows], choice[rows], bounds, config.l2))
    low, high = torch.stack(weights).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    return [(round(a, 4), round(b, 4)) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def fit_network(z: Tensor, labels: PreferenceLabels, config: FeatureConfig) -> nn.Sequential:
    """Fit a network of one hidden layer to pairs (P, 2, F) of standardised features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fitted = network(z.shape[-1], config.hidden)
    optimiser = torch.optim.AdamW(fitted.parameters(), lr=0.01, weight_decay=config.l2)
    for _ in range(STEPS):
        raw = fitted(z.float())[..., 0]
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(raw[:, 0] - raw[:, 1], labels.choice).backward()
        optimiser.step()
    return fitted


@torch.no_grad()
def pair_scores(names: Sequence[str], pairs: Pairs, work: Path, device: str) -> Tensor:
    """Score both images of each pair by every named reward, once: (P, 2, F) in double; kept in `work`."""
    rewards = _features(names)
    cells = list(zip((*pairs.a, *pairs.b), (*pairs.prompts, *pairs.prompts), strict=True))
    digest = hashlib.sha256(repr([(name, _named_files(name)) for name in names]).encode())
    for source, prompt in cells:
        digest.update(hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).digest())
        digest.update(prompt.encode())
    path = work / f"features-{digest.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["scores"]
    distinct = {cell: row for row, cell in enumerate(dict.fromkeys(cells))}
    scores = torch.stack([_scores(reward, list(distinct), device) for reward in rewards], 1)
    values = scores[[distinct[cell] for cell in cells]].unflatten(0, (2, len(pairs))).transpose(0, 1).contiguous()
    with atomic_write(path) as new:
        save_file({"scores": values}, new)
    return values


def _named_files(name: str) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of the files and of the folders' files that the text of a reward names."""
    paths = [Path(text.strip()) for text in re.split(r"[:,=()]", name)]
    files = [file for path in paths for file in ([*path.iterdir()] if path.is_dir() else [path]) if file.is_file()]
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _scores(reward: Reward, cells: Sequence[tuple[Source, str]], device: str) -> Tensor:
    """Score N images of any sizes, each with its prompt: (N,) in double."""
    batches = file_batches([source for source, _ in cells], [prompt for _, prompt in cells], BATCH)
    return torch.cat([score(reward, images.to(device), texts) for images, texts in batches]).double().cpu()


def _save(out: Path, card: FeatureCard, fitted: nn.Module | None) -> None:
    with atomic_write_with_checksums(out, [CARD, *([NETWORK] if fitted else [])]) as new:
        if fitted:
            save_file({key: value.contiguous() for key, value in fitted.state_dict().items()}, new[NETWORK])
        write_card(new[CARD], card)
