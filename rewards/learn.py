"""Training a reward from preferences: an ensemble of seeds, each a head or a whole small CLIP."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.choices import choose
from steer.reward import RewardError
from steer.rewards.calibration_curve import Judgement, judged
from steer.rewards.clip_backbone import CONFIG, Backbone, clip_folder, load_backbone
from steer.rewards.learned import HEADS, Card, save_learned
from steer.rewards.objectives import OBJECTIVES, Choices, Objective, centred, flipped, smoothed
from steer.rewards.pairs import Pairs, Source, load_images, split_by_prompt
from steer.rewards.preprocess import resize_and_crop
from steer.staged import write_text
from steer.training import Run, batch_at

logger = logging.getLogger(__name__)

CHUNK = 64  # images whose features are computed at a time, outside training
Features = tuple[Tensor, Tensor, Tensor]  # of image a, of image b, of the prompt: (N, D) each
Encode = Callable[[Tensor], Features]  # of row numbers


@dataclass(frozen=True)
class Recipe:
    """How a reward is trained. Published as part of its reward.json.

    backbone   a CLIP, as `steer.rewards.clip_backbone.load_backbone` names it
    head       similarity, image or pair (`steer.rewards.learned`)
    objective  bradley-terry, scaled-bradley-terry or regression
    whole      train the CLIP too, not the head alone
    members    how many, each with its own seed and its own bootstrap sample of the pairs
    smoothing  ε of the labels, 0..½;  flip: share of labels taken to be wrong, 0..½
    centre     η of `centred`, ≥ 0: what makes members comparable that are aggregated
    held_out   share of the prompts that accuracy and calibration are measured on
    """

    backbone: str
    head: str = "pair"
    objective: str = "bradley-terry"
    whole: bool = False
    members: int = 1
    steps: int = 500
    batch: int = 64
    learning_rate: float = 1e-3
    smoothing: float = 0.0
    flip: float = 0.0
    centre: float = 0.0
    held_out: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises RewardError for a number that cannot be, before anything is read."""
        for name in ("members", "steps", "batch"):
            if getattr(self, name) < 1:
                raise RewardError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("smoothing", "flip"):
            if not 0 <= getattr(self, name) < 0.5:
                raise RewardError(f"--{name} must be from 0 to below 0.5, got {getattr(self, name)}")
        if not 0 <= self.centre < float("inf"):
            raise RewardError(f"--centre must be a number from 0 on, got {self.centre}")
        if not 0 <= self.held_out < 1:
            raise RewardError(f"--held-out must be from 0 to below 1, got {self.held_out}")


class Member(nn.Module):
    """A head and, where the whole is trained, its own CLIP."""

    def __init__(self, recipe: Recipe, backbone: Backbone, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = HEADS[recipe.head](width)
        self.backbone = backbone if recipe.whole else None

    def rewards(self, features: Features) -> tuple[Tensor, Tensor]:
        """r(a) and r(b), raw: (N,) each."""
        a, b, text = features
        return self.head(a, text), self.head(b, text)


def train_reward(pairs: Pairs, recipe: Recipe, out: Path, work: Path, device: str = "cpu") -> dict[str, Any]:
    """Trains on pairs, writes the reward to `out`, and returns its report; an interrupted run in `work` goes on.

    The report holds the held-out accuracy and calibration of every member and of their mean; with nothing held out,
    those on the training pairs.
    """
    recipe.check()
    choose("head", recipe.head, HEADS)
    objective = choose("objective", recipe.objective, OBJECTIVES)
    if recipe.head == "similarity" and not recipe.whole:
        raise RewardError("--head similarity has nothing to train but a scale: add --whole, or take --head pair")
    claim(work, recipe, len(pairs))
    training_rows, held_rows = split_by_prompt(pairs.prompts, recipe.held_out, recipe.seed)
    training, held = pairs.take(training_rows), pairs.take(held_rows or training_rows)
    backbone = load_backbone(recipe.backbone).to(device)
    width = backbone.width
    frozen = None if recipe.whole else (features_of(backbone, training), features_of(backbone, held))
    members, outputs = [], []
    for number in range(recipe.members):
        own = load_backbone(recipe.backbone).to(device) if recipe.whole else backbone
        member = Member(recipe, own, width, recipe.seed + number).to(device)
        encode = _known(frozen[0], device) if frozen else _encoded(own, training)
        choices = training.choices.to(device)
        _fit(member, encode, choices, objective, recipe, work / f"member-{number}", recipe.seed + number)
        outputs.append(_raw(member, frozen[1] if frozen else features_of(own, held)))
        members.append(member)
        logger.info("member %d: %s", number, judged(outputs[-1], held.choices).summary)
    judgements = [judged(raw, held.choices) for raw in outputs]
    together = judged([torch.stack(rows).mean(0) for rows in zip(*outputs, strict=True)], held.choices)
    card = _card(recipe, width, outputs, _report(recipe, len(training), len(held_rows), judgements, together))
    copied = clip_folder(recipe.backbone) if recipe.whole and card.backbone == "." else None
    save_learned(out, card, [m.head for m in members], [m.backbone for m in members if m.backbone], copied)
    return card.report


def claim(work: Path, recipe: Recipe, rows: int) -> None:
    """Notes in `work` what is trained there. Raises RewardError where that is something else already."""
    told = json.dumps(asdict(recipe) | {"rows": rows}, indent=1)
    note = work / "recipe.json"
    if note.exists() and note.read_text() != told:
        raise RewardError(f"--work {work} holds a run with other settings or pairs; choose another, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    write_text(note, told)


@torch.no_grad()
def features_of(backbone: Backbone, pairs: Pairs) -> Features:
    """Of every pair, on the CPU: image a, image b, prompt."""
    backbone.eval()
    rows = torch.arange(len(pairs)).split(CHUNK)
    parts = [_encode(backbone, pairs, some) for some in rows]
    a, b, text = (torch.cat([part[k].cpu() for part in parts]) for k in range(3))
    return a, b, text


def image_features(backbone: Backbone, sources: Sequence[Source]) -> Tensor:
    """Of image files or their bytes, of any sizes: (N, D), on the backbone's device."""
    images = load_images(sources, lambda image: resize_and_crop(image, backbone.size))
    return backbone.images(images.to(next(backbone.parameters()).device))


def _encode(backbone: Backbone, pairs: Pairs, rows: Tensor) -> Features:
    """Features of some pairs; each distinct prompt is encoded once."""
    chosen = pairs.take(rows.tolist())
    a, b = image_features(backbone, [*chosen.a, *chosen.b]).chunk(2)
    prompts = list(dict.fromkeys(chosen.prompts))
    text = backbone.texts(prompts)[[prompts.index(prompt) for prompt in chosen.prompts]]
    return a, b, text


def _known(features: Features, device: str) -> Encode:
    """Features of some rows of those that were computed before."""
    a, b, text = (part.to(device) for part in features)
    return lambda rows: (a[rows], b[rows], text[rows])


def _encoded(backbone: Backbone, pairs: Pairs) -> Encode:
    """Features of some rows, computed with gradients."""
    return lambda rows: _encode(backbone, pairs, rows)


def _fit(
    member: Member, encode: Encode, choices: Choices, objective: Objective, recipe: Recipe, folder: Path, seed: int
) -> None:
    """Minimises the objective over a bootstrap sample of the pairs (all of them where there is one member)."""
    count = len(choices.choice)
    sample = torch.arange(count)
    if recipe.members > 1:
        sample = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))

    def loss_at(step: int) -> Tensor:
        member.train()
        rows = sample[batch_at(step, recipe.batch, count, seed)]
        a, b = member.rewards(encode(rows))
        loss = objective(flipped(a - b, recipe.flip), smoothed(choices[rows], recipe.smoothing))
        return loss + recipe.centre * centred(a, b)

    warmup = min(100, recipe.steps // 10)
    Run(folder, recipe.steps, recipe.learning_rate, warmup=warmup).train([member], loss_at)
    member.eval()


@torch.no_grad()
def _raw(member: Member, features: Features) -> list[Tensor]:
    """Raw rewards of the images a and of the images b."""
    device = next(member.parameters()).device
    a, b = member.rewards((features[0].to(device), features[1].to(device), features[2].to(device)))
    return [a.cpu(), b.cpu()]


def _card(recipe: Recipe, width: int, outputs: Sequence[list[Tensor]], report: dict[str, Any]) -> Card:
    own = recipe.whole and (clip_folder(recipe.backbone) / CONFIG).is_file()
    stds = tuple(torch.cat(raw).std().item() for raw in outputs)
    if not all(std > 0 for std in stds):
        raise RewardError("the trained reward gives every held-out image the same score: more steps, or more pairs")
    means = tuple(torch.cat(raw).mean().item() for raw in outputs)
    return Card(recipe.head, "." if own else recipe.backbone, width, means, stds, report)


def _report(
    recipe: Recipe, trained: int, held: int, members: Sequence[Judgement], together: Judgement
) -> dict[str, Any]:
    return {
        "recipe": asdict(recipe),
        "pairs": {"trained": trained, "held_out": held},
        "members": [asdict(member) for member in members],
        "ensemble": asdict(together),
    }
