"""Aesthetic predictors on tiny heads in the published layouts, on a tiny CLIP."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_clip import OpenClip, allclose
from test_imagereward import Writes, pictures, refused
from tiny_rewards import LINEAR, RELU, SIDE, SPACE, WEIGHTS, State, aesthetic_head, tiny_open_clip
from torch import Tensor

from steer.reward import Reward, score
from steer.rewards.aesthetic import PREDICTORS, Aesthetic
from steer.rewards.images import CLIP_MEAN, CLIP_STD
from steer.rewards.parser import load_reward

PROMPTS = ["a red circle", "", "anything", "else", "two stars"]

Make = Callable[..., Aesthetic]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_open_clip(tmp_path_factory.mktemp("tiny") / "open_clip")


@pytest.fixture
def make(clip: Path, tmp_path: Path) -> Make:
    """A reward of a head and options, by way of files."""

    def made(state: State | None = None, /, **options: object) -> Aesthetic:
        torch.save(aesthetic_head() if state is None else state, tmp_path / "head.pth")
        error_text = {"path": tmp_path / "head.pth", "backbone": clip} | options
        reward = load_reward("aesthetic:" + ",".join(f"{key}={value}" for key, value in error_text.items()))
        assert isinstance(reward, Aesthetic)
        return reward

    return made


def embedded(clip: Path, squares: Tensor) -> Tensor:
    """The published input of a head: the image's embedding over its length."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    embedding = OpenClip(load_file(clip / WEIGHTS)).image((squares - mean) / std)
    return embedding / embedding.square().sum(1, keepdim=True).sqrt()


def applied(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}weight"].T + state[f"{key}bias"]


def mlp(state: State, x: Tensor, places: tuple[int, ...], relu: bool) -> Tensor:
    for place in places[:-1]:
        x = applied(state, f"layers.{place}.", x)
        x = x.clamp(min=0) if relu else x
    return applied(state, f"layers.{places[-1]}.", x)[:, 0]


LINE = {
    "weight": torch.randn(1, SPACE, generator=torch.Generator().manual_seed(5)),
    "bias": torch.tensor([5.0]),
}
# Each published layout with its forward pass.
LAYOUTS: dict[str, tuple[State, Callable[[State, Tensor], Tensor]]] = {
    "v2": (aesthetic_head(LINEAR), partial(mlp, places=LINEAR, relu=False)),
    "v2-relu": (aesthetic_head(RELU), partial(mlp, places=RELU, relu=True)),
    "v1": (LINE, lambda state, x: applied(state, "", x)[:, 0]),
}


def squares() -> Tensor:
    return pictures(SIDE, SIDE, len(PROMPTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_published_head(make: Make, clip: Path, layout: str) -> None:
    head, forward = LAYOUTS[layout]
    expected = forward(head, embedded(clip, squares()))
    reward = make(head)
    assert isinstance(reward, Reward) and reward.name == "aesthetic" and reward.differentiable
    assert allclose(score(reward, squares(), PROMPTS), expected)
    assert allclose(score(reward, squares(), PROMPTS[::-1]), expected)  # the prompt plays no part
    assert expected.std() > 0.01


def test_a_relu_is_not_mistaken_for_none(clip: Path) -> None:
    head, forward = LAYOUTS["v2-relu"]
    x = embedded(clip, squares())
    assert (forward(head, x) - mlp(head, x, RELU, relu=False)).abs().min() > 1e-3


@pytest.mark.few(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_score_depends_on_its_image_alone(make: Make, layout: str) -> None:
    images, head = pictures(40, 33, len(PROMPTS)), LAYOUTS[layout][0]
    expected = score(make(head), images, PROMPTS)
    alone = [score(make(head), images[k : k + 1], [""]) for k in range(len(images))]
    assert allclose(torch.cat(alone), expected)
    assert allclose(score(make(head), images.flip(0), PROMPTS).flip(0), expected)
    for size in (1, 2, 64):
        assert allclose(score(make(head, micro_batch=size), images, PROMPTS), expected)


# Of scores that spread over 1; the head stays in fp32.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.04), ("float16", 0.006)])
def test_half_precision_stays_close_and_scores_in_fp32(make: Make, dtype: str, tolerance: float) -> None:
    reward, images = make(dtype=dtype), squares().requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert allclose(scores, make()(images, PROMPTS), tolerance)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [16, 2])
def test_gradients_match_finite_differences(make: Make, layout: str, size: int) -> None:
    reward = make(LAYOUTS[layout][0], micro_batch=size)
    reward.backbone.double()
    reward.head.double()
    images = pictures(37, 45, len(PROMPTS)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        ahead, behind = (reward(images + step * direction, PROMPTS) for step in (1e-6, -1e-6))
    slopes = (gradient * direction).sum((1, 2, 3))
    assert torch.allclose((ahead - behind) / 2e-6, slopes, rtol=1e-6, atol=1e-8)
    assert slopes.abs().min() > 1e-3


def test_gradients_come_after_inference_mode_and_on_another_device(make: Make) -> None:
    reward, images = make(), squares().requires_grad_()
    with torch.inference_mode():
        inputs = reward(images, PROMPTS)
    assert torch.equal(reward(images, PROMPTS), inputs)
    assert torch.autograd.grad(reward(images, PROMPTS).sum(), images)[0].abs().max() > 0
    with torch.inference_mode():
        assert reward(images.to("meta"), PROMPTS).device.type == "meta"
    parameters = [*reward.backbone.parameters(), *reward.head.parameters()]
    assert all(p.device.type == "meta" and not p.is_inference() for p in parameters)


def test_loading_draws_no_random_number(make: Make) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.7.bias": None}, r"head.pth: not an aesthetic head in a published layout .keys: layers.0.bias"),
        ({"layers.8.bias": torch.ones(1)}, "not an aesthetic head in a published layout"),
        ({"layers.4.weight": torch.ones(12)}, "not an aesthetic head in a published layout"),
        ({"layers.4.weight": torch.ones(12, 19)}, "of another shape: layers.2.bias, layers.2.weight"),
        ({"layers.4.bias": torch.ones(13)}, "of another shape: layers.4.bias"),
        ({"layers.7.weight": torch.ones(2, 8)}, "of another shape: layers.7.weight"),
        (dict.fromkeys(aesthetic_head()), "not an aesthetic head in a published layout"),
        (dict.fromkeys(aesthetic_head()) | {"weight": torch.ones(3), "bias": torch.ones(1)}, "not an aesthetic head"),
        (dict.fromkeys(aesthetic_head()) | {"weight": torch.ones(2, 16), "bias": torch.ones(2)}, "another shape: bias"),
        ({"layers.0.weight": torch.ones(24, 15)}, "the head takes 15 features, this CLIP has 16: name another"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(make: Make, change: dict[str, Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in (aesthetic_head() | change).items() if tensor is not None}
    refused(lambda: make(state), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype=float8: use .*float16"),
        ({"micro_batch": -1}, "micro_batch=-1: use a positive integer"),
        ({"backbone": "/nowhere"}, "CLIP '/nowhere' cannot be loaded"),
        ({"path": "/nowhere.pth"}, "/nowhere.pth: no such checkpoint"),
        ({"head": 3}, "'aesthetic' cannot take .*head"),
    ],
)
def test_bad_options_are_refused(make: Make, options: dict[str, object], message: str) -> None:
    refused(lambda: make(**options), message)


def test_versions_are_refused_by_name() -> None:
    refused(lambda: load_reward("aesthetic:v3"), "aesthetic:v3: unknown version, did you mean .*v2")
    refused(lambda: load_reward("aesthetic:scenes,path=head.pth"), "takes neither path nor backbone")


def test_a_head_with_code_is_refused_and_not_run(make: Make, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(lambda: make(aesthetic_head() | {"layers.7.bias": Writes(canary)}), "head.pth: refused")
    assert not canary.exists()


@pytest.mark.parametrize("version", PREDICTORS)
def test_a_published_head_is_fetched_by_commit_and_another_file_in_its_place_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(url: str, path: str, hash_prefix: str) -> None:
        asked.append(url)
        torch.save(aesthetic_head(), path)

    monkeypatch.setattr("steer.rewards.weights.download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refused(lambda: load_reward(f"aesthetic:{version}"), "sha256 is .*, expected .*: remove it, download it again")
    assert asked == [PREDICTORS[version][0].url]
    assert set("/".join(asked).split("/")[5]) <= set("0123456789abcdef")  # a commit, not a branch
