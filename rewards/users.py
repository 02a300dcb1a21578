"""Rewards of several users whose preferences differ: groups of users (PAL), or a latent vector of each user (VPL).

groups (PAL, arXiv 2406.08469)    r_u(x|p) = e^t cos(f(x, p), Σ_k w_uk g_k(p)),  w_u = softmax(W_u)
latent (VPL, arXiv 2408.10075)    r(x|p, z),  q(z | the pairs of u) = N(μ, σ²) by a set encoder,
                                  minimise −log σ(Δ) + β KL(q ‖ N(0, I))

Features come from a frozen CLIP. A user without pairs has the mean weights of all users, or z = 0.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from steer.files import atomic_write_with_checksums
from steer.reward import RewardError
from steer.rewards.analysis import preference_metrics
from steer.rewards.clip import load_backbone
from steer.rewards.folders import CARD, Card, are_scales, read_card, write_card
from steer.rewards.images import in_micro_batches
from steer.rewards.inputs import takes_any_images
from steer.rewards.learned import (
    MAX_WIDTH,
    features_of,
    joined,
    mlp,
    raw_statistics,
    rows_of,
    scaled,
    write_run_config,
)
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.preference_pairs import Pairs, read_pairs, split_by_prompt
from steer.rewards.training_config import RewardTrainingConfig
from steer.rewards.weights import cast, load_weights, read_checkpoint, to_module_device
from steer.training.supervised import TrainingRun, batch_at

KIND, WEIGHTS = "users", "users.safetensors"
HIDDEN, DIMENSIONS = 64, 32
MAX_USERS, MAX_GROUPS = 1_000_000, 1000
CONTEXT = 16  # pairs of a user that the set encoder sees in a training step
KL_WEIGHT = 0.02
PRIOR_PAIRS = 0.5  # weight of the mean user, in pairs, when the weights of a new user are fitted
FIT_STEPS = 200


class Groups(nn.Module):
    """K groups, and the logits W (U, K) of the users' weights. A profile is a row of weights (K,)."""

    def __init__(self, width: int, size: int, users: int) -> None:
        super().__init__()
        self.image = mlp(3 * width, HIDDEN, DIMENSIONS)
        self.text = mlp(width, HIDDEN, size * DIMENSIONS)
        self.logits = nn.Parameter(0.1 * torch.randn(users, size))
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, image: Tensor, text: Tensor, profile: Tensor) -> Tensor:
        """Score images (N,) for profiles (N, K), in nats."""
        groups = self.text(scaled(text)).unflatten(-1, (profile.shape[-1], DIMENSIONS))
        wanted = (profile[..., None] * groups).sum(-2)
        return self.log_scale.exp() * F.cosine_similarity(self.image(joined(image, text)), wanted, dim=-1)

    def loss(self, users: Tensor, a: Tensor, b: Tensor, text: Tensor, choice: Tensor) -> Tensor:
        """Return the log loss of pairs, given the indices of their users."""
        profile = self.logits.softmax(-1)[users]
        return F.binary_cross_entropy_with_logits(self(a, text, profile) - self(b, text, profile), choice)

    def profiles(self, a: Tensor, b: Tensor, text: Tensor, choice: Tensor, users: Tensor) -> Tensor:
        """Return the weights (U, K) of the training users."""
        return self.logits.softmax(-1)

    def prior(self, profiles: Tensor) -> Tensor:
        """Return the weights of a user without pairs."""
        return profiles.mean(0)

    def fit(self, prior: Tensor, a: Tensor, b: Tensor, text: Tensor, choice: Tensor) -> Tensor:
        """Fit the weights (K,) of a new user to their pairs: Σ log σ(Δ) + PRIOR_PAIRS Σ_k prior_k log w_k."""
        logits = prior.clamp(min=1e-6).log().clone().requires_grad_(True)
        optimiser, rows = torch.optim.Adam([logits], lr=0.1), len(choice)
        with torch.enable_grad():
            for _ in range(FIT_STEPS):
                profile = logits.softmax(-1).expand(rows, -1)
                delta = self(a, text, profile) - self(b, text, profile)
                loss = F.binary_cross_entropy_with_logits(delta, choice, reduction="sum")
                loss = loss - PRIOR_PAIRS * (prior * logits.log_softmax(-1)).sum()
                (logits.grad,) = torch.autograd.grad(loss, [logits])
                optimiser.step()
        return logits.detach().softmax(-1)


class Latents(nn.Module):
    """A latent vector z of each user, encoded from their pairs. A profile is z (L,)."""

    def __init__(self, width: int, size: int, users: int) -> None:
        super().__init__()
        self.encoder = mlp(4 * width, HIDDEN, HIDDEN)
        self.moments = nn.Linear(HIDDEN, 2 * size)
        self.decoder = mlp(3 * width + size, HIDDEN, HIDDEN, 1)
        self.size = size

    def forward(self, image: Tensor, text: Tensor, profile: Tensor) -> Tensor:
        """Score images (N,) for profiles (N, L), in nats."""
        return self.decoder(torch.cat([joined(image, text), profile], -1))[:, 0]

    def encode(self, a: Tensor, b: Tensor, text: Tensor, choice: Tensor, users: Tensor, count: int) -> Tensor:
        """Return μ and log σ² (U, 2 L) of users numbered 0 … U − 1, from the mean over the pairs of each."""
        a, b, text = map(scaled, (a, b, text))
        difference = (2 * choice - 1)[:, None] * (a - b)
        hidden = F.gelu(self.encoder(torch.cat([difference, a + b, text, difference * text], -1)))
        sums = hidden.new_zeros(count, HIDDEN).index_add(0, users, hidden)
        return self.moments(sums / torch.bincount(users, minlength=count).clamp(min=1)[:, None])

    def loss(self, users: Tensor, a: Tensor, b: Tensor, text: Tensor, choice: Tensor) -> Tensor:
        """Return −log σ(Δ) + β KL: every second pair of a user is context, all are predicted."""
        present, own = users.unique(return_inverse=True)
        even = torch.arange(len(users), device=users.device) % 2 == 0
        moments = self.encode(a[even], b[even], text[even], choice[even], own[even], len(present))
        mean, log_variance = moments.chunk(2, -1)
        z = (mean + (log_variance / 2).exp() * torch.randn_like(mean))[own]
        kl = ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).sum(-1).mean()
        delta = self(a, text, z) - self(b, text, z)
        return F.binary_cross_entropy_with_logits(delta, choice) + KL_WEIGHT * kl

    def profiles(self, a: Tensor, b: Tensor, text: Tensor, choice: Tensor, users: Tensor) -> Tensor:
        """Return μ (U, L) of the training users."""
        return self.encode(a, b, text, choice, users, int(users.max()) + 1)[:, : self.size]

    def prior(self, profiles: Tensor) -> Tensor:
        """Return z = 0."""
        return torch.zeros(self.size)

    def fit(self, prior: Tensor, a: Tensor, b: Tensor, text: Tensor, choice: Tensor) -> Tensor:
        """Encode the pairs of a new user: μ (L,)."""
        if not len(choice):
            return prior
        users = torch.zeros(len(choice), dtype=torch.long, device=a.device)
        return self.encode(a, b, text, choice, users, 1)[0, : self.size]


MODELS: dict[str, type[Groups] | type[Latents]] = {"groups": Groups, "latent": Latents}


@dataclass(frozen=True)
class UserCard(Card):
    """Contents of reward.json: the form of the model, its users, and the mean and std that standardise scores."""

    model: str
    size: int
    backbone: str
    width: int
    users: tuple[str, ...]
    mean: float
    std: float
    report: dict[str, Any] = field(default_factory=dict)
    kind: str = KIND

    @property
    def is_valid(self) -> bool:
        valid = self.kind == KIND and self.model in MODELS and isinstance(self.backbone, str)
        valid = valid and 0 < self.size <= MAX_GROUPS and 0 < self.width <= MAX_WIDTH
        valid = valid and 0 < len(self.users) <= MAX_USERS and all(isinstance(user, str) for user in self.users)
        return valid and are_scales([self.mean], [self.std])


def train_on_users(
    pairs: Pairs, config: RewardTrainingConfig, model: str, size: int, out: Path, work: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Train groups or latents on pairs with users, write the reward to `out` and return its report.

    The report's accuracy on held-out prompts uses the profile of each pair's own user; "shared" uses the mean user.
    Raises RewardError if no pair has a user, and for options of other trainings.
    """
    _check(pairs, config, model, size)
    write_run_config(work, config, pairs, model=model, size=size)
    names = tuple(dict.fromkeys(str(user) for user in pairs.users))
    training_rows, held_rows = split_by_prompt(pairs.prompts, config.held_out, config.seed)
    backbone = load_backbone(config.backbone).to(device)
    users = torch.tensor([names.index(str(user)) for user in pairs.users])
    columns = [users.to(device), *features_of(backbone, pairs), pairs.labels.choice.to(device)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = MODELS[model](backbone.width, size, len(names)).to(device)
    training = rows_of(columns, torch.tensor(training_rows))
    batch = partial(_batch_of_users if model == "latent" else batch_at, size=config.batch_size, seed=config.seed)

    def loss_at(step: int) -> Tensor:
        rows = batch(step, count=len(training_rows)) if model == "groups" else batch(step, users=training[0].cpu())
        return net.loss(*rows_of(training, rows.to(device)))

    TrainingRun(work, config.steps, config.learning_rate, warmup=min(100, config.steps // 10)).train([net], loss_at)
    net.requires_grad_(False).eval()
    user_ids, a, b, text, choice = training
    known = torch.isin(torch.arange(len(names)), user_ids.cpu())  # users with training pairs
    fitted = net.profiles(a, b, text, choice, user_ids)
    fitted = torch.cat([fitted, fitted.new_zeros(len(names) - len(fitted), size)])
    profiles = torch.where(known.to(device)[:, None], fitted, net.prior(fitted[known.to(device)]).to(device))
    held = rows_of(columns, torch.tensor(held_rows or training_rows))
    report, mean, std = _report(net, profiles, held, config, len(training_rows), len(held_rows))
    card = UserCard(model, size, config.backbone, backbone.width, names, mean, std, report)
    save_users(out, card, net, profiles)
    return report


def _check(pairs: Pairs, config: RewardTrainingConfig, model: str, size: int) -> None:
    """Raise RewardError for options or pairs that do not match."""
    if not 1 < size <= MAX_GROUPS and not (model == "latent" and size == 1):
        raise RewardError(f"--{'groups' if model == 'groups' else 'latent'} must be from 2 to {MAX_GROUPS}, got {size}")
    if config.members > 1 or config.train_backbone or config.start:
        raise RewardError(
            "--groups and --latent train one model on a frozen CLIP: leave out --members, --train-backbone and --start"
        )
    if not pairs.users or None in pairs.users:
        missing = sum(user is None for user in pairs.users) or "all"
        raise RewardError(
            f"--groups and --latent need a column user for every pair; {missing} of {len(pairs)} pairs have none"
        )


def _batch_of_users(step: int, size: int, seed: int, users: Tensor) -> Tensor:
    """Return the rows of a few users, up to CONTEXT of each, in random order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows: list[Tensor] = []
    for user in torch.randperm(int(users.max()) + 1, generator=generator).tolist():
        own = (users == user).nonzero()[:, 0]
        rows.append(own[torch.randperm(len(own), generator=generator)[:CONTEXT]])
        if sum(map(len, rows)) >= size:
            break
    return torch.cat(rows)


def _report(
    net: Groups | Latents, profiles: Tensor, held: Sequence[Tensor], config: RewardTrainingConfig, *counts: int
) -> tuple[dict[str, Any], float, float]:
    """Return the report, and the mean and deviation of the scores."""
    users, a, b, text, choice = held
    labels = PreferenceLabels(choice.cpu(), torch.ones(len(choice)))
    measured, sides = {}, list[Tensor]()
    for name, profile in (("shared", net.prior(profiles).to(a).expand(len(users), -1)), ("ensemble", profiles[users])):
        sides = [net(image, text, profile).cpu() for image in (a, b)]
        measured[name] = asdict(preference_metrics(sides, labels))
    (mean,), (std,) = raw_statistics([sides])
    pairs = {"trained": counts[0], "held_out": counts[1]}
    return {"config": asdict(config), "pairs": pairs} | measured, mean, std


def save_users(out: Path, card: UserCard, net: nn.Module, profiles: Tensor) -> None:
    """Write a reward of users: reward.json, and the weights with the users' profiles."""
    state = {f"net.{key}": value.cpu().contiguous() for key, value in net.state_dict().items() if key != "logits"}
    with atomic_write_with_checksums(out, [CARD, WEIGHTS]) as new:
        save_file(state | {"profiles": profiles.cpu().contiguous()}, new[WEIGHTS])
        write_card(new[CARD], card)


class UserReward:
    """The reward of one user, of the mean user, or an aggregate over the groups; differentiable, standardised.

    user       name of a training user; by default the mean user, or z = 0
    like       a file with a few pairs of a new user; the profile is fitted to them
    aggregate  min or mean over the groups (of `--groups`): min is high if every group likes the image
    Raises RewardError for an unknown user, and if two of the options are given.
    """

    differentiable = True

    def __init__(
        self,
        folder: str,
        *,
        user: str | None = None,
        like: str | None = None,
        aggregate: str | None = None,
        micro_batch: str | int = 64,
    ) -> None:
        path = Path(folder)
        self.card = card = read_card(path, UserCard, [path / WEIGHTS], "a reward of users")
        options = {"user": user, "like": like, "aggregate": aggregate}
        if len(given := [f"{name}={value}" for name, value in options.items() if value is not None]) > 1:
            raise RewardError(f"{folder}: give one of user, like and aggregate, got {', '.join(given)}")
        if aggregate is not None and (aggregate not in ("min", "mean") or card.model != "groups"):
            raise RewardError(f"{folder}: aggregate={aggregate}: groups have min and mean, latent users none")
        self.name = path.name + "".join(f"[{name}]" for name in given)
        self._backbone = load_backbone(card.backbone)
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            net = MODELS[card.model](card.width, card.size, 0)
        state = {key: value.float() for key, value in read_checkpoint(path / WEIGHTS).items()}
        self.profiles = state.pop("profiles", torch.zeros(0))
        if self.profiles.shape != (len(card.users), card.size):
            raise RewardError(f"{path / WEIGHTS}: profiles of {tuple(self.profiles.shape)} for {len(card.users)} users")
        state = {key.removeprefix("net."): value for key, value in state.items()}
        load_weights(net, state | ({"logits": torch.zeros(0, card.size)} if card.model == "groups" else {}), str(path))
        self._net = net.requires_grad_(False)
        for module in (self._backbone, self._net):
            cast(module, None)
        self.profile = torch.eye(card.size) if aggregate else self._profile_of(user, like)[None]
        self._least = aggregate == "min"
        self.prompt_limit = self._backbone.limit
        self._texts = self._backbone.prompt_cache(self.name)
        self._batched = in_micro_batches(self._score, micro_batch)

    def _profile_of(self, user: str | None, like: str | None) -> Tensor:
        prior = self._net.prior(self.profiles)
        if like is not None:
            pairs = read_pairs(Path(like))
            with torch.no_grad():
                a, b, text = features_of(self._backbone, pairs)
                return self._net.fit(prior, a, b, text, pairs.labels.choice)
        if user is None:
            return prior
        if user not in self.card.users:
            known = ", ".join(self.card.users[:8])
            raise RewardError(f"{self.name}: no user {user!r:.40} among its {len(self.card.users)}: {known}")
        return self.profiles[self.card.users.index(user)]

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(to_module_device(images, self._backbone, self._net), prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image, text = self._backbone.images(images), self._texts(prompts).to(images.device)
        scores = [self._net(image, text, one.to(image).expand(len(image), -1)) for one in self.profile]
        raw = torch.stack(scores).amin(0) if self._least else torch.stack(scores).mean(0)
        return (raw - self.card.mean) / self.card.std
