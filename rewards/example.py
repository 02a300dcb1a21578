"""like:FOLDER, a reward from a handful of example images, by the CLIP features that set them apart.

After Unsupervised Perceptual Rewards (arXiv 1612.06699). With f the features of the last and the middle layer of a
frozen CLIP, + the n examples and B other images:

    σ₊² ← (n σ₊² + 5 σ_B²) / (n + 5)              shrunk: n is about five
    d_i = |μ₊ − μ_B| / (σ₊ + σ_B)                 discriminability; the `keep` largest are kept
    r   = mean_i [log N(f_i; μ₊, σ₊²) − log N(f_i; μ_B, σ_B²)]     nats per feature
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steer.files import IMAGE_SUFFIXES, file_sha256, read_image
from steer.reward import RewardError
from steer.rewards.clip import BACKGROUND, DEFAULT_CLIP, WEIGHTS, Backbone, clip_folder, load_backbone, reward_name
from steer.rewards.compose import read_calibration
from steer.rewards.images import in_micro_batches
from steer.rewards.inputs import takes_any_images
from steer.rewards.names import option_count
from steer.rewards.weights import cast, read_checkpoint, to_module_device

logger = logging.getLogger(__name__)
PRIOR = 5  # weight of σ_B² in the shrunk σ₊², in images
KEEP, MIN_EXAMPLES, MIN_OTHERS = 32, 3, 8
WEAK_SEPARATION = 0.8


@dataclass(frozen=True)
class Gaussians:
    """The kept features (indices) and the Gaussians of the examples and of the other images over them, (F,) each."""

    kept: Tensor
    mean: Tensor
    std: Tensor
    other_mean: Tensor
    other_std: Tensor

    def ratio(self, features: Tensor) -> Tensor:
        """Return the log-likelihood ratio (N,) of features (N, D), in nats per kept feature."""
        x = features[:, self.kept]
        like = -(((x - self.mean) / self.std) ** 2) / 2 - self.std.log()
        other = -(((x - self.other_mean) / self.other_std) ** 2) / 2 - self.other_std.log()
        return (like - other).mean(1)


def fit(examples: Tensor, others: Tensor, keep: int = KEEP) -> Gaussians:
    """Fit the Gaussians of features (n, D) of the examples and (m, D) of other images, and select features."""
    n, (mean, other_mean) = len(examples), (examples.mean(0), others.mean(0))
    other_variance = others.var(0, correction=0) + 1e-12
    variance = (n * examples.var(0, correction=0) + PRIOR * other_variance) / (n + PRIOR)
    std, other_std = variance.sqrt(), other_variance.sqrt()
    kept = ((mean - other_mean).abs() / (std + other_std)).topk(min(keep, examples.shape[1])).indices
    return Gaussians(kept, mean[kept], std[kept], other_mean[kept], other_std[kept])


def separation(examples: Tensor, others: Tensor, keep: int = KEEP) -> float:
    """Return the leave-one-out AUC: the share of pairs in which a left-out example scores above another image."""
    shares = []
    for row in range(len(examples)):
        gaussians = fit(torch.cat([examples[:row], examples[row + 1 :]]), others, keep)
        shares.append((gaussians.ratio(examples[row][None]) > gaussians.ratio(others)).float().mean().item())
    return sum(shares) / len(shares)


class ExampleReward:
    """Similarity to example images, independent of the prompt, in nats per feature; differentiable.

    Above 0 if an image is more like the examples than like the other images.

    folder   at least three example images (five do)
    against  at least eight other images: samples of the base model, such as those of `steer sample --method base`
    calibration  a file of `steer rewards calibrate`; its images are the other images
    model    a CLIP, as `clip:MODEL` names it;  keep: features kept;  micro_batch: images per micro-batch
    Without against and calibration, the features of other images stored in the CLIP's folder are used.
    `separation` is the leave-one-out AUC; below 0.8 a warning is logged. Raises RewardError.
    """

    differentiable = True

    def __init__(
        self,
        folder: str,
        *,
        against: str | None = None,
        calibration: str | None = None,
        model: str = DEFAULT_CLIP,
        keep: str | int = KEEP,
        micro_batch: str | int = 16,
    ) -> None:
        kept = option_count("keep", keep)
        stored = clip_folder(model) / BACKGROUND
        place = _place_of_others(against, calibration)
        if place is None and not stored.is_file():
            raise RewardError(
                f"like:{folder}: name images that are not like them, against=FOLDER, of the base model: the CLIP "
                f"{model!r} has no stored features of others"
            )
        self.name = reward_name(f"like:{folder}", model=(model, DEFAULT_CLIP), keep=(str(keep), str(KEEP)))
        self._batched = in_micro_batches(self._score, micro_batch)
        files = _images(Path(folder), MIN_EXAMPLES)
        other_files = None if place is None else _images(place, MIN_OTHERS)
        self.backbone: Backbone = load_backbone(model)
        cast(self.backbone, None)
        examples = self._features(files)
        others = _read_background(stored) if other_files is None else self._features(other_files)
        self._gaussians = fit(examples, others, kept)
        self.separation = separation(examples, others, kept)
        if self.separation < WEAK_SEPARATION:
            logger.warning(
                "%s separates its examples from the others with a leave-one-out AUC of %.2f only: give more examples, "
                "or examples that have more in common",
                self.name,
                self.separation,
            )

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._batched(to_module_device(images, self.backbone), prompts)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        features = self.backbone.image_layers(images)
        parts = (part.to(features.device) for part in vars(self._gaussians).values())
        return Gaussians(*parts).ratio(features)

    @torch.no_grad()
    def _features(self, paths: Sequence[Path]) -> Tensor:
        """Encode image files of any sizes one by one: (n, D), in fp32."""
        return torch.cat([self.backbone.image_layers(read_image(path)[None]) for path in paths])


def _place_of_others(against: str | None, calibration: str | None) -> Path | None:
    """Return the folder of the other images. Raises RewardError if both are given, or a calibration names none."""
    if calibration is None:
        return None if against is None else Path(against)
    if against is not None:
        raise RewardError(f"against={against} and calibration={calibration} both name the other images: give one")
    images = read_calibration(Path(calibration)).source.get("images")
    place = Path(calibration).parent / str(images)
    if images is None or not place.is_dir():
        raise RewardError(f"calibration={calibration}: its images ({images}) are not there: give against=FOLDER")
    return place


def write_background(path: Path, weights: Path, features: Tensor) -> None:
    """Write features (m, D) of other images beside the weights of the CLIP that computed them, under their checksum."""
    save_file({file_sha256(weights): features.half().cpu().contiguous()}, path)


def _read_background(path: Path) -> Tensor:
    """Read the stored features (m, D) of a CLIP's folder. Raises RewardError if other weights computed them."""
    features = read_checkpoint(path).get(file_sha256(path.parent / WEIGHTS))
    if features is None:
        raise RewardError(f"{path} was computed by other weights than {WEIGHTS}: remove it, and give against=FOLDER")
    return features.float()


def _images(folder: Path, at_least: int) -> list[Path]:
    """Return the image files of a folder. Raises RewardError if there are too few."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < at_least:
        raise RewardError(
            f"{folder}: {len(paths)} images ({', '.join(IMAGE_SUFFIXES)}), at least {at_least} are needed"
        )
    return paths
