"""Rewards that `steer rewards train` made: a folder with reward.json and the weights of one or several members."""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from steer.assets import REWARDS
from steer.choices import choose
from steer.errors import InputError
from steer.reward import RewardError
from steer.rewards.aggregate import AGGREGATES
from steer.rewards.batches import PromptCache, in_micro_batches
from steer.rewards.clip_backbone import CONFIG, Backbone, load_backbone, open_clip_folder
from steer.rewards.weights import cast, load_weights, placed, read_checkpoint
from steer.sums import check_sums, staged_with_sums
from steer.truncation import noting_cuts

logger = logging.getLogger(__name__)

CARD = "reward.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HIDDEN = 128
WIDEST = 65_536  # features; a card that asks for more asks for all memory


class Similarity(nn.Module):
    """exp(t) · cos(image, text), the form of PickScore (arXiv 2305.01569); needs a backbone that is trained too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.log_scale.exp() * (image * text).sum(-1)


class ImageHead(nn.Module):
    """An MLP of the image alone, as aesthetic predictors are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.layers(image * math.sqrt(image.shape[-1]))[:, 0]


class PairHead(nn.Module):
    """An MLP of image, text and their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        # Features of unit length have entries of about 1/√D: brought to about 1 for the layers.
        image, text = (features * math.sqrt(features.shape[-1]) for features in (image, text))
        return self.layers(torch.cat([image, text, image * text], -1))[:, 0]


HEADS: dict[str, type[nn.Module]] = {"similarity": Similarity, "image": ImageHead, "pair": PairHead}


@dataclass(frozen=True)
class Card:
    """What reward.json says: how the members are built, and how each one's raw score becomes (raw − mean)/std."""

    head: str
    backbone: str  # a name for `load_backbone`, or "." for the folder's own
    width: int
    means: tuple[float, ...]
    stds: tuple[float, ...]
    report: dict[str, Any]
    format: int = 1


class Learned:
    """A learned reward. Score: the members' own, each standardised over its held-out images, aggregated.

    folder     of `steer rewards train`, or a name in `embedded`
    aggregate  mean, min, mean-std or quantile of the members
    member     one of them alone
    dtype      float32, float16 or bfloat16: what the backbones compute in

    Raises RewardError where the folder does not hold a learned reward that is whole.
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
    ) -> None:
        path = self.embedded.get(folder, Path(folder))
        _verify(path)
        card = read_card(path)
        self._aggregate = choose("aggregate", aggregate, AGGREGATES)
        self._known_as = f"{self.kind}:{folder}" if folder in self.embedded else path.name
        self.name = self._known_as if aggregate == "mean" else f"{aggregate}({self._known_as})"
        wanted = range(len(card.means))
        if member is not None:
            wanted = _member(member, len(card.means), path)
            self.name = f"{self._known_as}[{member}]"
        self._numbers = wanted
        own = card.backbone == "."
        self._backbones = [_backbone(path, card) for _ in (wanted if own else wanted[:1])]
        with torch.random.fork_rng(devices=[]):  # no random number is drawn for what is filled at once
            self._heads = [HEADS[card.head](card.width) for _ in wanted]
        for place, number in enumerate(wanted):
            _fill(path / f"member-{number}.safetensors", self._heads[place], self._backbones[place] if own else None)
        for module in (*self._backbones, *self._heads):
            cast(module, dtype if isinstance(module, Backbone) else None)
        self._centre = torch.tensor([card.means[number] for number in wanted])[:, None]
        self._spread = torch.tensor([card.stds[number] for number in wanted])[:, None]
        self.prompt_limit = None if card.head == "image" else min(one.limit for one in self._backbones)
        self._texts = [
            PromptCache(noting_cuts(f"reward {self.name!r}", one.texts, one.count, one.limit))
            for one in self._backbones
        ]
        self._members = in_micro_batches(self._score, micro_batch)

    def members(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (M, N) of every member, standardised."""
        return self._members(placed(images, *self._backbones, *self._heads), prompts).T

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image = [backbone.images(images) for backbone in self._backbones]
        text = [known(prompts).to(images.device) for known in self._texts] if self.prompt_limit is not None else image
        shared = len(self._backbones) == 1
        raw = [head(image[0 if shared else k], text[0 if shared else k]) for k, head in enumerate(self._heads)]
        scores = torch.stack(raw)
        return ((scores - self._centre.to(scores)) / self._spread.to(scores)).T

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each member's scores (N,)."""
        rows = self.members(images, prompts)
        return {f"{self._known_as}[{number}]": row for number, row in zip(self._numbers, rows, strict=True)}

    def total(self, parts: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """The aggregate (N,) of the members' scores."""
        return self._aggregate(torch.stack(list(parts.values())))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._aggregate(self.members(images, prompts))


class Preference(Learned):
    """preference:scenes, learned from noisy choices between images of scenes; or preference:FOLDER."""

    kind = "preference"
    embedded = REWARDS[kind]


class LearnedAesthetic(Learned):
    """aesthetic:scenes, learned from noisy choices that look at the composition alone."""

    kind = "aesthetic"
    embedded = REWARDS[kind]


def _verify(folder: Path) -> None:
    """Raises RewardError where a file of the folder is not the one that its sums tell of."""
    named = [folder / name for name in (CARD, CONFIG, *TOKENIZER)]
    try:
        unknown = check_sums(*(path for path in (*named, *sorted(folder.glob("member-*"))) if path.is_file()))
    except (InputError, OSError) as error:
        raise RewardError(str(error)) from error
    if unknown:
        logger.info("%s: nobody noted a sum of %s, it is read as it is", folder, unknown[0].name)


def read_card(folder: Path) -> Card:
    """The folder's reward.json. Raises RewardError where it is missing or says what cannot be."""
    try:
        found = json.loads((folder / CARD).read_text())
        card = Card(**found)
        card = Card(**{**asdict(card), "means": tuple(card.means), "stds": tuple(card.stds)})
        numbers = [float(number) for number in (*card.means, *card.stds)]
        sound = card.format == 1 and card.head in HEADS and isinstance(card.backbone, str) and 0 < card.width <= WIDEST
        sound = sound and len(card.means) == len(card.stds) > 0 and all(map(math.isfinite, numbers))
    except FileNotFoundError as error:
        raise RewardError(f"{folder}: no {CARD} there; give a folder of `steer rewards train`, or scenes") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RewardError(f"{folder / CARD}: cannot be read ({str(error)[:80]})") from error
    if not sound or min(card.stds) <= 0:
        raise RewardError(f"{folder / CARD}: not the card of a learned reward of this version")
    return card


def _member(member: str | int, count: int, path: Path) -> range:
    if not str(member).isdecimal() or int(member) >= count:
        raise RewardError(f"{path}: member={member} is not one of its {count} members, 0 to {count - 1}")
    return range(int(member), int(member) + 1)


def _backbone(folder: Path, card: Card) -> Backbone:
    return open_clip_folder(folder, weights=False) if card.backbone == "." else load_backbone(card.backbone)


def _fill(path: Path, head: nn.Module, backbone: Backbone | None) -> None:
    state = read_checkpoint(path)
    net = nn.ModuleDict({"head": head} | ({"backbone": backbone} if backbone else {}))
    load_weights(net, {key: value.float() for key, value in state.items()}, str(path))


def save_learned(
    folder: Path,
    card: Card,
    heads: Sequence[nn.Module],
    backbones: Sequence[Backbone],
    configuration: Path | None = None,
) -> None:
    """Writes a learned reward; the members' backbones, in half precision, where each has its own.

    configuration  an open_clip folder whose configuration and tokenizer belong to it
    Raises InputError where the disk refuses; what was there before stays.
    """
    members = [f"member-{number}.safetensors" for number in range(len(heads))]
    copied = configuration_files(configuration) if configuration else []
    with staged_with_sums(folder, [CARD, *members, *(path.name for path in copied)]) as new:
        for number, (name, head) in enumerate(zip(members, heads, strict=True)):
            net = nn.ModuleDict({"head": head} | ({"backbone": backbones[number]} if backbones else {}))
            state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
            halved = {key: value.half() if key.startswith("backbone") else value for key, value in state.items()}
            save_file(halved, new[name])
        for path in copied:
            shutil.copyfile(path, new[path.name])
        new[CARD].write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")


def configuration_files(folder: Path) -> list[Path]:
    """The configuration and the tokenizer of an open_clip folder, without its weights."""
    return [folder / name for name in (CONFIG, *TOKENIZER) if (folder / name).is_file()]
