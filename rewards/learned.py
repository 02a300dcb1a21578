"""Learned rewards and their training: a folder with reward.json and the weights of one or several members."""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from steer.assets import REWARDS
from steer.diffusion.seeds import derived_seed
from steer.files import atomic_write_with_checksums, write_text
from steer.registry import choose
from steer.reward import RewardError
from steer.rewards import objectives
from steer.rewards.analysis import preference_metrics
from steer.rewards.clip import CONFIG, Backbone, clip_folder, load_backbone, open_clip_folder
from steer.rewards.compose import AGGREGATES
from steer.rewards.compose import aggregate as compose_aggregate
from steer.rewards.folders import CARD, Card, are_scales, read_card, write_card
from steer.rewards.grammar import Call, format_number
from steer.rewards.images import in_micro_batches, resize_and_crop
from steer.rewards.inputs import takes_any_images
from steer.rewards.preference_pairs import Captions, Pairs, Ratings, Source, load_images, rows_digest, split_by_prompt
from steer.rewards.training_config import RewardTrainingConfig
from steer.rewards.weights import cast, linear_layers, load_weights, read_checkpoint, to_module_device
from steer.tables import parse_json, read_text
from steer.training.supervised import TrainingRun, batch_at

logger = logging.getLogger(__name__)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HIDDEN = 128
BANK = 64  # images that a general preference compares with, as a reward
MAX_WIDTH = 65_536  # features; bounds the memory that a card can ask for


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths, with GELUs between them."""
    return linear_layers(widths, range(0, 2 * len(widths) - 2, 2), nn.GELU)


def scaled(features: Tensor) -> Tensor:
    """Scale features (…, D) of unit length, whose entries are about 1/√D, to entries of about 1."""
    return features * math.sqrt(features.shape[-1])


def joined(image: Tensor, text: Tensor) -> Tensor:
    """Concatenate features of images and texts, and their products: (…, 3 D)."""
    image, text = scaled(image), scaled(text)
    return torch.cat([image, text, image * text], -1)


class Similarity(nn.Module):
    """exp(t) · cos(image, text), the form of PickScore (arXiv 2305.01569); needs --train-backbone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.log_scale.exp() * (image * text).sum(-1)


class ImageHead(nn.Module):
    """An MLP of the image features, as in aesthetic predictors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = mlp(width, HIDDEN, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.layers(scaled(image))[:, 0]


class PairHead(nn.Module):
    """An MLP of image features, text features and their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = mlp(3 * width, HIDDEN, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.layers(joined(image, text))[:, 0]


class GeneralPreference(nn.Module):
    """Preferences that need not be transitive (General Preference Model, arXiv 2410.02197).

    s(a ≻ b) = Σ_l λ_l (v_{a,2l} v_{b,2l+1} − v_{a,2l+1} v_{b,2l}), v(image, prompt) of unit length in 2k dimensions,
    λ = k · softmax of a linear map of the prompt; Δ = s / τ, so that P(a ≻ b) = σ(Δ) and Δ(a, b) = −Δ(b, a).

    As a reward: the mean Δ against `bank`, images of the training set.
    """

    def __init__(self, width: int, planes: int = 2, temperature: float = 0.1) -> None:
        super().__init__()
        self.vector = mlp(3 * width, HIDDEN, 2 * planes)
        self.scales = nn.Linear(width, planes)
        self.temperature = temperature
        self.register_buffer("bank", torch.zeros(BANK, width))

    def difference(self, a: Tensor, b: Tensor, text: Tensor) -> Tensor:
        """Return Δ(a, b) of features (…, D), in nats."""
        left, right = (self._vector(image, text).unflatten(-1, (-1, 2)) for image in (a, b))
        scales = self.scales(scaled(text)).softmax(-1) * left.shape[-2]
        area = left[..., 0] * right[..., 1] - left[..., 1] * right[..., 0]
        return (scales * area).sum(-1) / self.temperature

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        bank: Any = self.bank
        others = bank.to(image).expand(len(image), -1, -1)
        pairs = [one[:, None].expand_as(others) for one in (image, text)]
        return self.difference(pairs[0], others, pairs[1]).mean(1)

    def _vector(self, image: Tensor, text: Tensor) -> Tensor:
        return F.normalize(self.vector(joined(image, text)), dim=-1)


HEADS: dict[str, type[nn.Module]] = {
    "similarity": Similarity,
    "image": ImageHead,
    "pair": PairHead,
    "general": GeneralPreference,
}


def raw_pair(head: nn.Module, a: Tensor, b: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return raw rewards (N,) of both images of each pair, with difference Δ; ±Δ/2 for a general preference."""
    if isinstance(head, GeneralPreference):
        difference = head.difference(a, b, text)
        return difference / 2, -difference / 2
    return head(a, text), head(b, text)


@dataclass(frozen=True)
class RewardCard(Card):
    """Contents of reward.json: how to build the members, and the mean and std that standardise their raw scores."""

    head: str
    backbone: str  # a name for `load_backbone`, or "." for the one in the folder
    width: int
    means: tuple[float, ...]
    stds: tuple[float, ...]
    report: dict[str, Any]

    @property
    def is_valid(self) -> bool:
        valid = self.head in HEADS and isinstance(self.backbone, str) and 0 < self.width <= MAX_WIDTH
        return valid and are_scales(self.means, self.stds)


class LearnedReward:
    """A learned reward: the aggregate of its members' scores, each standardised over its held-out images.

    folder     a folder of `steer rewards train`, or a name in `embedded`
    aggregate  mean, min, mean-std (lam=), quantile (q=) or robust (gamma=) of the members
    member     index of the only member to use
    dtype      precision of the backbones: float32, float16 or bfloat16

    Raises RewardError if the folder does not hold a complete learned reward.
    """

    differentiable = True
    kind = ""
    embedded: Mapping[str, Path] = {}

    def __init__(
        self,
        folder: str,
        *,
        aggregate: str = "mean",
        member: str | int | None = None,
        micro_batch: str | int = 64,
        dtype: str | None = None,
        lam: str | float | None = None,
        q: str | float | None = None,
        gamma: str | float | None = None,
    ) -> None:
        path = self.embedded.get(folder, Path(folder))
        card = read_reward_card(path)
        choose("aggregate", aggregate, AGGREGATES)
        options = {name: value for name, value in (("lam", lam), ("q", q), ("gamma", gamma)) if value is not None}
        call = Call(f"aggregate={aggregate}", (), {name: str(value) for name, value in options.items()}, 1.0)
        numbers = {name: call.number(name, 0.0) for name in options}
        self._aggregate = compose_aggregate(aggregate, numbers, str(path))
        self._label = f"{self.kind}:{folder}" if folder in self.embedded else path.name
        inside = [self._label, *(f"{name}={format_number(number)}" for name, number in numbers.items())]
        self.name = self._label if aggregate == "mean" else f"{aggregate}({', '.join(inside)})"
        self._numbers = range(len(card.means))
        if member is not None:
            if not str(member).isdecimal() or int(member) not in self._numbers:
                last = len(card.means) - 1
                raise RewardError(f"{path}: member={member} is not one of its {last + 1} members, 0 to {last}")
            self._numbers = range(int(member), int(member) + 1)
            self.name = f"{self._label}[{member}]"
        own = card.backbone == "."
        load = partial(open_clip_folder, path, weights=False) if own else partial(load_backbone, card.backbone)
        self._backbones = [load() for _ in (self._numbers if own else self._numbers[:1])]
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            self._heads = [HEADS[card.head](card.width) for _ in self._numbers]
        for index, number in enumerate(self._numbers):
            file = path / f"member-{number}.safetensors"
            state = {key: value.float() for key, value in read_checkpoint(file).items()}
            load_weights(member_module(self._heads[index], self._backbones[index] if own else None), state, str(file))
        for module in (*self._backbones, *self._heads):
            cast(module, dtype if isinstance(module, Backbone) else None)
        means_and_stds = torch.tensor([card.means, card.stds])[:, self._numbers.start : self._numbers.stop, None]
        self._means, self._stds = means_and_stds
        self.prompt_limit = None if card.head == "image" else min(one.limit for one in self._backbones)
        self._texts = [one.prompt_cache(self.name) for one in self._backbones]
        self._members = in_micro_batches(self._score, micro_batch)

    @property
    def num_members(self) -> int:
        """M, the size of the ensemble."""
        return len(self._heads)

    def members(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the standardised scores (M, N) of all members."""
        return self._members(to_module_device(images, *self._backbones, *self._heads), prompts).T

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image, text = self._features(images, prompts)
        raw = [head(image[k], text[k]) for k, head in enumerate(self._heads)]
        scores = torch.stack(raw)
        return ((scores - self._means.to(scores)) / self._stds.to(scores)).T

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return P(a ≻ b) (N,): the mean over the members of σ(Δ), from their raw rewards in nats."""
        images = to_module_device(torch.cat([images_a, images_b]), *self._backbones, *self._heads)
        probabilities = []
        with torch.no_grad():
            image, text = self._features(images, [*prompts, *prompts])
            for k, head in enumerate(self._heads):
                (a, b), words = image[k].chunk(2), text[k].chunk(2)[0]
                raw_a, raw_b = raw_pair(head, a, b, words)
                probabilities.append(torch.sigmoid(raw_a - raw_b))
        return torch.stack(probabilities).mean(0)

    def _features(self, images: Tensor, prompts: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Encode images and prompts for each member; members with the same backbone share the features."""
        image = [backbone.images(images) for backbone in self._backbones]
        text = [encode(prompts).to(images.device) for encode in self._texts] if self.prompt_limit is not None else image
        members = len(self._heads) if len(self._backbones) == 1 else 1
        return image * members, text * members

    def components(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return each member's scores (N,)."""
        rows = self.members(images, prompts)
        return {f"{self._label}[{number}]": row for number, row in zip(self._numbers, rows, strict=True)}

    def total(self, components: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Aggregate the members' scores (N,)."""
        return self._aggregate(torch.stack(list(components.values())))

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._aggregate(self.members(images, prompts))


class Preference(LearnedReward):
    """preference:scenes, trained on noisy preferences between images of scenes; or preference:FOLDER."""

    kind = "preference"
    embedded = REWARDS[kind]


class LearnedAestheticReward(LearnedReward):
    """aesthetic:scenes, trained on noisy preferences about composition only."""

    kind = "aesthetic"
    embedded = REWARDS[kind]


def read_reward_card(folder: Path) -> RewardCard:
    """Read the folder's card, and verify its files. Raises RewardError."""
    files = [*(folder / name for name in (CONFIG, *TOKENIZER)), *sorted(folder.glob("member-*"))]
    return read_card(folder, RewardCard, files, "a learned reward")


def member_module(head: nn.Module, backbone: Backbone | None) -> nn.ModuleDict:
    """Return one member as it is trained and saved: its head and, if it has its own, its CLIP."""
    return nn.ModuleDict({"head": head} | ({"backbone": backbone} if backbone else {}))


def save_learned(
    folder: Path,
    card: RewardCard,
    heads: Sequence[nn.Module],
    backbones: Sequence[Backbone],
    configuration: Path | None = None,
) -> None:
    """Write a learned reward, with the members' backbones in half precision if each has its own.

    configuration  an open_clip folder; its configuration and tokenizer are written with the backbones
    Raises InputError if writing fails; the previous contents stay.
    """
    members = [f"member-{number}.safetensors" for number in range(len(heads))]
    config_files = configuration_files(configuration) if configuration else []
    with atomic_write_with_checksums(folder, [CARD, *members, *(path.name for path in config_files)]) as new:
        for number, (name, head) in enumerate(zip(members, heads, strict=True)):
            state = member_module(head, backbones[number] if backbones else None).state_dict()
            save_file(
                {key: weight_to_save(value, half=key.startswith("backbone")) for key, value in state.items()}, new[name]
            )
        for path in config_files:
            shutil.copyfile(path, new[path.name])
        write_card(new[CARD], card)


def weight_to_save(weight: Tensor, half: bool) -> Tensor:
    """Return a weight as it is written, contiguous on the CPU."""
    weight = weight.detach().cpu().contiguous()
    return weight.half() if half else weight


def configuration_files(folder: Path) -> list[Path]:
    """Return the configuration and the tokenizer of an open_clip folder, without its weights."""
    return [folder / name for name in (CONFIG, *TOKENIZER) if (folder / name).is_file()]


FEATURE_BATCH = 64  # images whose features are computed at a time, outside training
Features = Sequence[Tensor]  # features (N, D) of image a, of image b (none for ratings), of the prompt
T = TypeVar("T")
OnStep = Callable[[int, int], object]  # the training step, from 1, and the number of steps


def train_reward(
    pairs: Pairs,
    config: RewardTrainingConfig,
    out: Path,
    work: Path,
    device: str = "cpu",
    on_step: OnStep = lambda step, total: None,
) -> dict[str, Any]:
    """Train on pairs, write the reward to `out`, and return its report; an interrupted run in `work` resumes.

    The report holds the held-out accuracy and calibration of every member and of their mean; without held-out
    pairs, those on the training pairs.

    on_step  called with the step, from 1, and the number of steps of all members; its exceptions end the training
    """
    objective = choose("objective", config.objective, objectives.OBJECTIVES)
    if objective is objectives.triplet and config.head != "similarity":
        raise RewardError("--objective triplet compares cosines: add --head similarity --train-backbone")
    if config.head == "similarity" and not config.train_backbone:
        raise RewardError("--head similarity trains a scale alone: add --train-backbone, or take --head pair")
    write_run_config(work, config, pairs)
    training_rows, held_rows = split_by_prompt(pairs.prompts, config.held_out, config.seed)
    training, held = pairs.select(training_rows), pairs.select(held_rows or training_rows)
    backbone, outputs, members = load_backbone(config.backbone).to(device), [], []
    frozen, frozen_held = (None if config.train_backbone else features_of(backbone, part) for part in (training, held))
    loss = pair_loss(objective, training.labels.to(device), config)
    for member, own in train_members(training, frozen, backbone, loss, config, work, on_step=on_step):
        with torch.no_grad():
            outputs.append([raw.cpu() for raw in raw_pair(member["head"], *(frozen_held or features_of(own, held)))])
        members.append(member)
        logger.info("member %d: %s", len(members) - 1, preference_metrics(outputs[-1], held.labels).summary)
    card = _card(config, backbone.width, outputs, held.labels, {"trained": len(training), "held_out": len(held_rows)})
    save_members(out, card, members, config)
    return card.report


def _new_member(config: RewardTrainingConfig, number: int, backbone: Backbone) -> tuple[nn.ModuleDict, Backbone]:
    """Return a member to train, on the backbone's device, and its backbone: its own if backbones are trained.

    Raises RewardError if the reward in `start` has another head or backbone.
    """
    device = next(backbone.parameters()).device
    own = load_backbone(config.backbone).to(device) if config.train_backbone else backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + number)
        head = HEADS[config.head](backbone.width)
    member = member_module(head, own if config.train_backbone else None).to(device)
    if config.start is not None:
        _load_start(member, Path(config.start), number, config)
    return member, own


def _load_start(member: nn.ModuleDict, folder: Path, number: int, config: RewardTrainingConfig) -> None:
    card, backbone = read_reward_card(folder), card_backbone(config)
    if (card.head, card.backbone) not in ((config.head, backbone), (config.head, config.backbone)):
        given = f"--head {card.head} --backbone {card.backbone}"
        raise RewardError(f"--start {folder}: a reward with {given}; train with the same head and backbone")
    file = folder / f"member-{number % len(card.means)}.safetensors"
    state = {key: value.float() for key, value in read_checkpoint(file).items()}
    if "backbone" in member and not any(key.startswith("backbone") for key in state):
        state |= {key: value for key, value in member.state_dict().items() if key.startswith("backbone")}
    load_weights(member, state, str(file))


def card_backbone(config: RewardTrainingConfig) -> str:
    """Return the backbone that reward.json names: "." if the members have their own CLIPs in the folder."""
    own = config.train_backbone and (clip_folder(config.backbone) / CONFIG).is_file()
    return "." if own else config.backbone


def save_members(out: Path, card: RewardCard, members: Sequence[Any], config: RewardTrainingConfig) -> None:
    """Write trained members, with the configuration of their CLIPs if these are in the folder."""
    own_folder = clip_folder(config.backbone) if card.backbone == "." else None
    backbones: list[Any] = [member["backbone"] for member in members] if config.train_backbone else []
    save_learned(out, card, [member["head"] for member in members], backbones, own_folder)


def write_run_config(work: Path, config: RewardTrainingConfig, data: Captions | Pairs | Ratings, **others: Any) -> None:
    """Write the run's configuration, other settings and a digest of its rows to `work`.

    Raises RewardError if `work` has another configuration or other rows; what older versions left out is not compared.
    """
    record = asdict(config) | others | {"rows": len(data.prompts), "digest": rows_digest(data)}
    note = work / "config.json"
    before = parse_json(read_text(note), str(note)) if note.exists() else {}
    if not isinstance(before, dict) or record | before != record:
        raise RewardError(
            f"--work {work} holds a run with another configuration or other data; choose another folder, or remove it"
        )
    write_text(note, json.dumps(record, indent=1))


def features_of(backbone: Backbone, data: Pairs | Ratings) -> Features:
    """Encode all images and prompts, outside of training: image a, image b (none for ratings) and prompt."""
    images = encode_once(backbone, partial(image_features, backbone), [*itertools.chain(*data.columns)])
    features = [*images.chunk(len(data.columns)), encode_once(backbone, backbone.texts, data.prompts)]
    return [column.to(next(backbone.parameters()).device) for column in features]


@torch.no_grad()
def encode_once(backbone: Backbone, encode: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
    """Encode each distinct image or prompt once, outside of training: features (N, D) of N items, on the CPU."""
    backbone.eval()
    row_of = {one: row for row, one in enumerate(dict.fromkeys(items))}
    distinct, starts = list(row_of), range(0, len(row_of), FEATURE_BATCH)
    features = torch.cat([encode(distinct[start : start + FEATURE_BATCH]).cpu() for start in starts])
    return features[[row_of[one] for one in items]]


def image_features(backbone: Backbone, sources: Sequence[Source]) -> Tensor:
    """Encode image files or their bytes, of any sizes: (N, D), on the backbone's device."""
    images = load_images(sources, lambda image: resize_and_crop(image, backbone.size))
    return backbone.images(images.to(next(backbone.parameters()).device))


def text_features(backbone: Backbone, prompts: Sequence[str]) -> Tensor:
    """Encode prompts, each distinct one once: (N, D), on the backbone's device; with gradients."""
    distinct = list(dict.fromkeys(prompts))
    return backbone.texts(distinct)[[distinct.index(prompt) for prompt in prompts]]


def rows_of(features: Features, rows: Tensor) -> Features:
    """Return the given rows of features."""
    return [column[rows] for column in features]


def _encode(backbone: Backbone, data: Pairs | Ratings, rows: Tensor) -> Features:
    chosen = data.select(rows.tolist())
    images = image_features(backbone, [*itertools.chain(*chosen.columns)])
    return [*images.chunk(len(chosen.columns)), text_features(backbone, chosen.prompts)]


# Loss of a head from the features of some rows and the indices of these rows.
HeadLoss = Callable[[Any, Features, Tensor], Tensor]


def pair_loss(
    objective: objectives.Objective, labels: objectives.PreferenceLabels, config: RewardTrainingConfig
) -> HeadLoss:
    """Return the loss of some pairs: the objective with the penalties of the configuration."""

    def loss(head: Any, features: Features, rows: Tensor) -> Tensor:
        a, b = raw_pair(head, *features)
        if objective is objectives.triplet:  # on cosines, without the scale of the similarity
            return objectives.triplet((a - b) / head.log_scale.exp(), labels[rows], config.margin)
        smoothed = objectives.smooth_labels(labels[rows], config.label_smoothing)
        value = objective(objectives.noisy_difference(a - b, config.label_noise), smoothed)
        return value + config.center_rewards_coefficient * objectives.center_rewards_penalty(a, b)

    return loss


def _penalised_loss(
    loss: HeadLoss,
    backbone: Backbone,
    data: Pairs | Ratings,
    config: RewardTrainingConfig,
    head: Any,
    features: Features,
    rows: Tensor,
) -> Tensor:
    """Add the slope penalty, at points between the images of each pair that depend on the rows alone."""
    chosen = data.select(rows.tolist())
    images = load_images([*itertools.chain(*chosen.columns)], lambda image: resize_and_crop(image, backbone.size))
    share = torch.rand(len(rows), 1, 1, 1, generator=torch.Generator().manual_seed(int(rows.sum())))
    a, b = images.chunk(2)
    between = torch.lerp(a, b, share).to(next(backbone.parameters()).device)
    texts = text_features(backbone, chosen.prompts)
    with sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no second derivative
        penalty = objectives.slope_penalty(lambda x: head(backbone.images(x), texts), between, config.slope)
    return loss(head, features, rows) + config.slope_penalty * penalty


def train_members(
    data: Pairs | Ratings,
    frozen: Features | None,
    backbone: Backbone,
    loss: HeadLoss,
    config: RewardTrainingConfig,
    work: Path,
    first: int = 0,
    on_step: OnStep = lambda step, total: None,
) -> Iterator[tuple[nn.ModuleDict, Backbone]]:
    """Train the members of an ensemble, and yield each with its backbone; an interrupted run in `work` resumes.

    Each minimises `loss` over a bootstrap sample of the rows; a single member over all of them.

    frozen  features of the data; None: every member trains its own backbone
    first   number of the first member, which seeds it
    """
    for number in range(first, first + config.members):
        member, own = _new_member(config, number, backbone)
        encode = partial(_encode, own, data) if frozen is None else partial(rows_of, frozen)
        sample = torch.arange(len(data))
        if config.members > 1:
            generator = torch.Generator().manual_seed(config.seed + number)
            sample = torch.randint(len(data), (len(data),), generator=generator)
        folder, warmup = work / f"member-{number}", min(100, config.steps // 10)
        run = TrainingRun(folder, config.steps, config.learning_rate, warmup=warmup)
        whole = partial(_penalised_loss, loss, own, data, config) if config.slope_penalty else loss
        run.train([member], partial(_loss_at, member, encode, whole, sample, config, number, on_step))
        member.eval()
        if isinstance(member["head"], GeneralPreference):
            with torch.no_grad():
                member["head"].bank = encode(torch.arange(BANK) % len(data))[0].detach().clone()
        yield member, own


def _loss_at(
    member: Any,
    encode: Callable[[Tensor], Features],
    loss: HeadLoss,
    sample: Tensor,
    config: RewardTrainingConfig,
    number: int,
    on_step: OnStep,
    step: int,
) -> Tensor:
    on_step(number * config.steps + step + 1, config.members * config.steps)
    member.train()
    rows = sample[batch_at(step, config.batch_size, len(sample), config.seed + number)]
    *images, texts = encode(rows)
    if config.mix_text:
        seed = derived_seed(config.seed + number, f"mixed texts {step}")
        texts = objectives.mixed_texts(texts, config.mix_text, torch.Generator().manual_seed(seed))
    return loss(member["head"], [*images, texts], rows)


def raw_statistics(outputs: Sequence[Sequence[Tensor]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each member's raw rewards of images a and b. Raises RewardError if all are equal."""
    means, stds = (
        tuple(statistic(torch.cat([*raw])).item() for raw in outputs) for statistic in (torch.mean, torch.std)
    )
    if not all(std > 0 for std in stds):
        raise RewardError("the reward scores all held-out images equally: train for more steps, or on more pairs")
    return means, stds


def _card(
    config: RewardTrainingConfig,
    width: int,
    outputs: Sequence[Sequence[Tensor]],
    labels: objectives.PreferenceLabels,
    counts: dict[str, int],
) -> RewardCard:
    """Create the card from the members' raw rewards of held-out images a, b. Raises RewardError if all are equal."""
    means, stds = raw_statistics(outputs)
    ensemble = [torch.stack(rows).mean(0) for rows in zip(*outputs, strict=True)]
    report = {
        "config": asdict(config),
        "pairs": counts,
        "members": [asdict(preference_metrics(raw, labels)) for raw in outputs],
        "ensemble": asdict(preference_metrics(ensemble, labels)),
    }
    return RewardCard(config.head, card_backbone(config), width, means, stds, report)
