"""Rewards of CLIP's family on tiny random models in the layouts of the published ones."""

import json
import math
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_imagereward import Writes, pictures, refused
from tiny_rewards import (
    HEAD,
    PATCH,
    SIDE,
    WEIGHTS,
    State,
    copied,
    tiny_hps,
    tiny_open_clip,
    tiny_specifications,
    tiny_transformers,
)
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, pad, resize
from transformers import CLIPModel

from steer.apps.scenes.training import LENGTH
from steer.reward import Reward, score
from steer.rewards.clip import CONFIG, ClipReward, load_backbone, open_clip_backbone, open_clip_folder
from steer.rewards.images import CLIP_MEAN, CLIP_STD, PromptCache, resize_and_crop, resize_and_pad
from steer.rewards.parser import load_reward

LONG = "two red circles and one blue star left of " * 3
PROMPTS = ["a red circle", "two Blue  stars", "", "a green square left of a red star", LONG]
SCENES = (0.5, 0.5, 0.5)


class Reads(dict[str, Tensor]):
    """A checkpoint that notes which of its tensors were used."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


class Plain:
    """Blocks of the forward pass that transformers and open_clip share, written from their equations."""

    def __init__(self, state: State) -> None:
        self.state = Reads(state)

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

    def norm(self, key: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]

    def patches(self, pixels: Tensor, key: str) -> Tensor:
        return F.unfold(pixels, PATCH, stride=PATCH).mT @ self.state[key].flatten(1).T

    @property
    def scale(self) -> float:
        return math.exp(self.state["logit_scale"].item())


class OpenClip(Plain):
    """open_clip's, on its own names; HPSv2 has the same. Heads are 16 wide."""

    def image(self, pixels: Tensor) -> Tensor:
        return self.norm("visual.ln_post", self.places(pixels)[:, 0]) @ self.state["visual.proj"]

    def places(self, pixels: Tensor, depth: int = 2) -> Tensor:
        """The class token and those of the patches, after some layers."""
        first = self.state["visual.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, self.patches(pixels, "visual.conv1.weight")], 1)
        x = self.norm("visual.ln_pre", x + self.state["visual.positional_embedding"])
        return self.transformed("visual.transformer", x, causal=False, depth=depth)

    def text(self, ids: Tensor) -> Tensor:
        x = self.state["token_embedding.weight"][ids] + self.state["positional_embedding"]
        x = self.norm("ln_final", self.transformed("transformer", x, causal=True))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.state["text_projection"]

    def transformed(self, tower: str, x: Tensor, causal: bool, depth: int = 2) -> Tensor:
        for layer in [f"{tower}.resblocks.{k}" for k in range(depth)]:
            weight, bias = (self.state[f"{layer}.attn.in_proj_{part}"] for part in ("weight", "bias"))
            q, k, v = (self.norm(f"{layer}.ln_1", x) @ weight.T + bias).chunk(3, -1)
            x = x + self.linear(f"{layer}.attn.out_proj", attended(q, k, v, causal))
            hidden = self.activation(self.linear(f"{layer}.mlp.c_fc", self.norm(f"{layer}.ln_2", x)))
            x = x + self.linear(f"{layer}.mlp.c_proj", hidden)
        return x

    def activation(self, x: Tensor) -> Tensor:
        return gelu(x)


class QuickOpenClip(OpenClip):
    """As OpenAI's weights want it."""

    def activation(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


class Transformers(Plain):
    """Forward pass of transformers, on its parameter names."""

    def __init__(self, state: State, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(state)
        self.activation = activation

    def image(self, pixels: Tensor) -> Tensor:
        x = self.norm("vision_model.post_layernorm", self.places(pixels)[:, 0])
        return x @ self.state["visual_projection.weight"].T

    def places(self, pixels: Tensor, depth: int = 2) -> Tensor:
        """The class token and those of the patches, after some layers."""
        tower, embeddings = "vision_model", "vision_model.embeddings"
        first = self.state[f"{embeddings}.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, self.patches(pixels, f"{embeddings}.patch_embedding.weight")], 1)
        x = self.norm(f"{tower}.pre_layrnorm", x + self.state[f"{embeddings}.position_embedding.weight"])
        return self.transformed(tower, x, causal=False, depth=depth)

    def text(self, ids: Tensor) -> Tensor:
        tower, embeddings = "text_model", "text_model.embeddings"
        x = self.state[f"{embeddings}.token_embedding.weight"][ids]
        x = x + self.state[f"{embeddings}.position_embedding.weight"]
        x = self.norm(f"{tower}.final_layer_norm", self.transformed(tower, x, causal=True))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.state["text_projection.weight"].T

    def transformed(self, tower: str, x: Tensor, causal: bool, depth: int = 2) -> Tensor:
        for layer in [f"{tower}.encoder.layers.{k}" for k in range(depth)]:
            before = self.norm(f"{layer}.layer_norm1", x)
            q, k, v = (self.linear(f"{layer}.self_attn.{part}_proj", before) for part in "qkv")
            x = x + self.linear(f"{layer}.self_attn.out_proj", attended(q, k, v, causal))
            hidden = self.activation(self.linear(f"{layer}.mlp.fc1", self.norm(f"{layer}.layer_norm2", x)))
            x = x + self.linear(f"{layer}.mlp.fc2", hidden)
        return x


def attended(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """softmax(QKᵀ/√d)V in heads, on (N, L, D); causal: nobody looks ahead."""
    q, k, v = (tensor.unflatten(-1, (-1, HEAD)).transpose(1, 2) for tensor in (queries, keys, values))
    logits = q @ k.mT / math.sqrt(HEAD)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1) == 1, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def by_hand(prompts: list[str], folder: Path) -> Tensor:
    """Token ids (N, 24) by the rule: lower case, words, start … end, padded with ends, long ones cut before the end."""
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    end = known["<|endoftext|>"]
    rows = []
    for prompt in prompts:
        words = [known[f"{word}</w>"] for word in prompt.lower().split()][: LENGTH - 2]
        rows.append([known["<|startoftext|>"], *words, *[end] * (LENGTH - 1 - len(words))])
    return torch.tensor(rows)


def similarity(plain: OpenClip | Transformers, squares: Tensor, ids: Tensor, mean: object, std: object) -> Tensor:
    """cos(image, text) of pictures that have the model's own size."""
    centre, spread = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return F.cosine_similarity(plain.image((squares - centre) / spread), plain.text(ids))


def squares(count: int = len(PROMPTS)) -> Tensor:
    return pictures(SIDE, SIDE, count)


def allclose(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, other, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, none of which any test changes."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_open_clip(folder / "open_clip")
    tiny_open_clip(folder / "scenes", SCENES, SCENES)
    tiny_hps(folder / "HPS.pt", folder / "open_clip")
    state = torch.load(folder / "HPS.pt", weights_only=True)["state_dict"]
    torch.save(state | {"context_length": torch.tensor(77)}, folder / "social.pt")
    for name, activation, old in (("new", "quick_gelu", False), ("gelu", "gelu", False), ("old", "quick_gelu", True)):
        tiny_transformers(folder / name, activation, old)
    return folder


def specification(spec: str, tiny: Path) -> str:
    return spec.replace("TINY", str(tiny))


KINDS = {
    "open_clip": "clip:TINY/open_clip",
    "transformers": "clip:TINY/new",
    "pickscore": "pickscore:path=TINY/new",
    "hpsv2": "hpsv2:path=TINY/HPS.pt,model=TINY/open_clip",
    "hpsv2, crop": "hpsv2:path=TINY/HPS.pt,model=TINY/open_clip,preprocess=crop",
    "hpsv2.1": "hpsv2.1:path=TINY/HPS.pt,model=TINY/open_clip",
    "social": "social:path=TINY/social.pt,model=TINY/open_clip",
}


Make = Callable[..., ClipReward]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def make(request: pytest.FixtureRequest, tiny: Path) -> Make:
    """A reward of one kind with further options."""

    def made(**options: object) -> ClipReward:
        error_text = "".join(f",{key}={value}" for key, value in options.items())
        reward = load_reward(specification(request.param, tiny) + error_text)
        assert isinstance(reward, ClipReward)
        return reward

    return made


def cropped(images: Tensor) -> Tensor:
    """CLIP's preprocessing by torchvision."""
    resized = resize(images, [SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return center_crop(resized.clamp(0, 1), [SIDE, SIDE])


def padded(images: Tensor, size: int = SIDE) -> Tensor:
    """HPSv2's preprocessing by torchvision, with bars around pictures whose longer side fits already, too."""
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    resized = resize(images, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pad(resized, [left, top, size - width - left, size - height - top])


def of_open_clip(tiny: Path, folder: str) -> OpenClip:
    return OpenClip(load_file(tiny / folder / WEIGHTS))


def of_hps(tiny: Path) -> OpenClip:
    return OpenClip(torch.load(tiny / "HPS.pt", weights_only=True)["state_dict"])


def of_transformers(tiny: Path, folder: str, activation: Callable[[Tensor], Tensor]) -> Transformers:
    return Transformers(load_file(tiny / folder / "model.safetensors"), activation)


@pytest.mark.parametrize("kind", ["open_clip", "new"])
def test_two_layers_are_those_of_the_plain_forward_pass(tiny: Path, kind: str) -> None:
    """The embedding and, after half of the layers, the mean over the patches, without the class token."""
    images, plain = squares(), of_open_clip(tiny, kind) if kind == "open_clip" else None
    plain = plain or of_transformers(tiny, kind, quick_gelu)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (images - mean) / std
    expected = torch.cat([F.normalize(plain.image(pixels), dim=-1), plain.places(pixels, 1)[:, 1:].mean(1)], 1)
    with torch.no_grad():
        assert allclose(load_backbone(str(tiny / kind)).image_layers(images), expected)


@pytest.mark.parametrize("name", ["RN50", "convnext_base", "coca_ViT-B-32", "ViT-B-16-SigLIP"])
@pytest.mark.hard
def test_towers_of_open_clip_have_a_middle_layer(name: str) -> None:
    model = open_clip.create_model(name).eval()
    size = model.visual.image_size
    pixels = torch.rand(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        last, middle = open_clip_backbone(model, open_clip.get_tokenizer("ViT-B-32"))._layers(pixels)
        assert allclose(F.normalize(last, dim=-1), F.normalize(model.encode_image(pixels), dim=-1), 1e-4)
        assert middle.ndim == 2 and middle.isfinite().all()


@pytest.mark.few(12)
@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (47, 64), (90, 33), (20, 27)])
@pytest.mark.parametrize(
    ("spec", "plain", "prepared"),
    [
        ("clip:TINY/open_clip", partial(of_open_clip, folder="open_clip"), cropped),
        ("clip:TINY/scenes", partial(of_open_clip, folder="scenes"), cropped),
        ("clip:TINY/open_clip,preprocess=pad", partial(of_open_clip, folder="open_clip"), padded),
        ("hpsv2:path=TINY/HPS.pt,model=TINY/open_clip", of_hps, padded),
        ("hpsv2:path=TINY/HPS.pt,model=TINY/open_clip,preprocess=crop", of_hps, cropped),
        ("hpsv2.1:path=TINY/HPS.pt,model=TINY/open_clip", of_hps, padded),
        ("social:path=TINY/social.pt,model=TINY/open_clip", of_hps, cropped),
        ("clip:TINY/new", partial(of_transformers, folder="new", activation=quick_gelu), cropped),
        ("clip:TINY/gelu", partial(of_transformers, folder="gelu", activation=gelu), cropped),
        ("clip:TINY/old", partial(of_transformers, folder="old", activation=quick_gelu), cropped),
        ("pickscore:path=TINY/old,unit=cosine", partial(of_transformers, folder="old", activation=quick_gelu), cropped),
    ],
)
def test_scores_are_those_of_the_published_forward_pass(
    tiny: Path,
    spec: str,
    plain: Callable[[Path], OpenClip | Transformers],
    prepared: Callable[[Tensor], Tensor],
    height: int,
    width: int,
) -> None:
    images, model = pictures(height, width), plain(tiny)
    mean, std = (SCENES, SCENES) if "scenes" in spec else (CLIP_MEAN, CLIP_STD)
    expected = similarity(model, prepared(images), by_hand(PROMPTS, tiny / "open_clip"), mean, std)
    reward = load_reward(specification(spec, tiny))
    assert allclose(score(reward, images, PROMPTS), expected)
    assert expected.std() > 0.05
    assert {key for key in model.state if "position_ids" not in key} - model.state.read == {"logit_scale"}


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("clip:TINY/open_clip", partial(of_open_clip, folder="open_clip")),
        ("clip:TINY/new", partial(of_transformers, folder="new", activation=quick_gelu)),
        ("pickscore:path=TINY/new", partial(of_transformers, folder="new", activation=quick_gelu)),
    ],
)
def test_units_are_the_published_ones(tiny: Path, spec: str, plain: Callable[[Path], OpenClip | Transformers]) -> None:
    model = plain(tiny)
    cosine = similarity(model, squares(), by_hand(PROMPTS, tiny / "open_clip"), CLIP_MEAN, CLIP_STD)
    units = {"cosine": cosine, "logit": model.scale * cosine, "clipscore": 100 * cosine.clamp(min=0)}
    factors = {"cosine": 1.0, "logit": float(model.scale), "clipscore": 100.0}  # which a cosine's rounding grows by
    for unit, expected in units.items():
        reward = load_reward(specification(spec, tiny) + f",unit={unit}")
        assert torch.allclose(score(reward, squares(), PROMPTS), expected, rtol=1e-5, atol=1e-6 * factors[unit])
    usual = "logit" if spec.startswith("pickscore") else "cosine"
    assert torch.allclose(score(load_reward(specification(spec, tiny)), squares(), PROMPTS), units[usual], atol=1e-5)
    assert cosine.min() < 0 < cosine.max()  # where CLIPScore's floor shows


def test_a_reward_has_the_name_that_it_was_asked_for_by(tiny: Path, make: Make) -> None:
    assert isinstance(make(), Reward) and make().differentiable
    name, *options = make().name.split(",")
    assert name in (
        "pickscore",
        "hpsv2",
        "hpsv2.1",
        "social",
        *(f"clip:{tiny / name}" for name in ("open_clip", "new")),
    )
    assert options in ([], ["preprocess=crop"])


def test_two_scales_have_two_names(tiny: Path) -> None:
    folder = tiny / "open_clip"
    names = {load_reward(f"clip:{folder}{more}").name for more in ("", ",unit=logit", ",preprocess=pad,unit=clipscore")}
    assert names == {f"clip:{folder}{more}" for more in ("", ",unit=logit", ",unit=clipscore,preprocess=pad")}


SIZES = [(32, 32), (32, 75), (224, 224), (225, 223), (300, 191), (97, 613), (31, 33), (7, 19), (512, 512)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [32, 224])
def test_preprocessing_is_torchvisions_on_tensors(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).round()
    resized = resize(images, [size], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    assert allclose(resize_and_crop(images, size), center_crop(resized, [size, size]))
    assert allclose(resize_and_pad(images, size), padded(images, size))


@pytest.mark.parametrize(("height", "width"), [(224, 100), (9, 224)])
def test_bars_come_even_where_the_longer_side_fits(height: int, width: int) -> None:
    images = torch.rand(1, 3, height, width)
    result = resize_and_pad(images, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    assert result.shape == (1, 3, 224, 224)
    assert torch.equal(result[..., top : top + height, left : left + width], images)
    assert result.sum().item() == pytest.approx(images.sum().item(), rel=1e-5)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 191), (97, 613), (140, 100), (512, 512)])
def test_preprocessing_follows_the_published_path_over_pillow(height: int, width: int) -> None:
    images = (pictures(height, width, 1) * 255).round() / 255
    image = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    short = 224 / min(height, width)
    scaled = image.resize((max(224, int(width * short)), max(224, int(height * short))), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - 224) / 2), round((scaled.height - 224) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 224, top + 224))) / 255
    difference = np.abs(resize_and_crop(images, 224)[0].permute(1, 2, 0).numpy() - expected)
    assert (difference <= 1.5 / 255).mean() > 0.99
    assert difference.max() <= 3 / 255


@pytest.mark.few(3)
def test_a_score_depends_on_its_image_and_prompt_alone(make: Make) -> None:
    images = pictures(40, 33)
    expected = score(make(), images, PROMPTS)
    alone = [score(make(), images[k : k + 1], PROMPTS[k : k + 1]) for k in range(len(PROMPTS))]
    assert allclose(torch.cat(alone), expected)
    assert allclose(score(make(), images.flip(0), PROMPTS[::-1]).flip(0), expected)
    for size in (1, 2, 64):
        small = make(micro_batch=size)
        assert allclose(score(small, images, PROMPTS), expected)
        assert allclose(score(small, images, PROMPTS), expected)  # prompts known by now
    assert (score(make(), images, PROMPTS[:1] * 5) - expected)[1:].abs().min() > 1e-4


# Of cosines. Half precision keeps 8 bits of bfloat16 and 11 of float16.
@pytest.mark.few(6)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02), ("float16", 0.003)])
def test_half_precision_stays_close_and_scores_in_fp32(make: Make, dtype: str, tolerance: float) -> None:
    half, whole, images = make(dtype=dtype), make(), squares().requires_grad_()
    scores, scale = half(images, PROMPTS), whole._unit(torch.ones(1), whole._logit_scale)
    assert scores.dtype == torch.float32
    assert allclose(scores / scale, whole(images, PROMPTS) / scale, tolerance)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0
    assert allclose(score(half, images.half(), PROMPTS) / scale, scores / scale, tolerance + 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_temperature_is_not_rounded(tiny: Path, dtype: str) -> None:
    spec = f"clip:{tiny / 'open_clip'},dtype={dtype},unit="
    cosine, logit = (score(load_reward(spec + unit), squares(), PROMPTS) for unit in ("cosine", "logit"))
    assert torch.allclose(logit, of_open_clip(tiny, "open_clip").scale * cosine, rtol=1e-5, atol=0)


def test_weights_saved_in_half_precision_compute_in_fp32(tiny: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(tiny / "new", dtype=torch.float16).save_pretrained(
        copied(tiny / "new", tmp_path / "half")
    )
    reward = load_reward(f"clip:{tmp_path / 'half'}")
    assert isinstance(reward, ClipReward) and reward.backbone.dtype == torch.float32
    assert allclose(
        score(reward, squares(), PROMPTS), score(load_reward(f"clip:{tiny / 'new'}"), squares(), PROMPTS), 0.003
    )


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (37, 45)])
def test_gradients_match_finite_differences(make: Make, height: int, width: int) -> None:
    reward = make()
    reward.backbone.double()
    images = pictures(height, width).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        ahead, behind = (reward(images + step * direction, PROMPTS) for step in (1e-5, -1e-5))
    slopes = (gradient * direction).sum((1, 2, 3))
    assert torch.allclose((ahead - behind) / 2e-5, slopes, rtol=1e-6, atol=1e-8)
    assert slopes.abs().min() > 1e-3
    assert not any(parameter.requires_grad for parameter in reward.backbone.parameters())


def test_gradients_are_the_same_in_micro_batches(make: Make) -> None:
    gradients = []
    for size in (16, 2):
        reward = make(micro_batch=size)
        reward.backbone.double()
        images = pictures(40, 33).double().requires_grad_()
        gradients += torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-13)
    assert gradients[0].abs().amax((1, 2, 3)).min() > 1e-4


def test_each_prompt_is_encoded_once(tiny: Path) -> None:
    reward = load_reward(f"clip:{tiny / 'open_clip'},micro_batch=2")
    assert isinstance(reward, ClipReward)
    encoded: list[int] = []
    reward.backbone.model.token_embedding.register_forward_hook(lambda *call: encoded.append(len(call[1][0])))
    images = squares(6).requires_grad_()
    reward(images, ["a red circle", "", "a red circle", "two stars", "two stars", ""]).sum().backward()
    reward(images, ["two stars"] * 6)
    assert sum(encoded) == 3


def test_known_prompts_are_bounded_the_least_recently_used_are_forgotten() -> None:
    asked: list[str] = []

    def encode(prompts: list[str]) -> Tensor:
        asked.extend(prompts)
        return torch.tensor([[float(len(prompt))] * 3 for prompt in prompts])

    texts = PromptCache(encode, size=2)
    assert texts(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert texts(["bb", "a"])[:, 0].tolist() == [2, 1] and asked == ["a", "bb"]
    assert texts(["ccc"])[:, 0].tolist() == [3]  # bb goes: a was asked for after it
    assert texts(["a"])[:, 0].tolist() == [1] and asked == ["a", "bb", "ccc"]
    assert texts(["bb", "dddd", "eeeee"])[:, 0].tolist() == [2, 4, 5]
    assert asked[3:] == ["bb", "dddd", "eeeee"] and len(texts._cache) == 2
    assert all(row.untyped_storage().nbytes() == 3 * 4 for row in texts._cache.values())


def test_gradients_come_after_inference_mode(make: Make) -> None:
    reward = make()
    with torch.inference_mode():
        inputs = reward(squares(), PROMPTS)
    images = squares().requires_grad_()
    scores = reward(images, PROMPTS)
    assert allclose(scores, inputs)
    assert torch.autograd.grad(scores.sum(), images)[0].abs().max() > 0


def test_a_reward_follows_the_images_to_another_device(make: Make) -> None:
    """From the CPU to meta, the other device of every machine: its tensors are shapes without numbers."""
    reward = make(micro_batch=2)
    expected = reward(squares(), PROMPTS)
    with torch.inference_mode():
        there = reward(squares().to("meta"), PROMPTS)
    assert there.device.type == "meta" and there.shape == expected.shape
    assert all(p.device.type == "meta" and not p.is_inference() for p in reward.backbone.parameters())
    assert reward._texts(PROMPTS).device.type == "cpu"  # known ones do not depend on where the model is now


def test_loading_draws_no_random_number_and_says_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Connections that were tried; the network is cut."""
    asked: list[object] = []

    def cut(*where: object, **_: object) -> None:
        asked.append(where)
        raise OSError("the network is cut")

    monkeypatch.setattr(socket, "getaddrinfo", cut)
    monkeypatch.setattr(socket.socket, "connect", cut)
    return asked


@pytest.mark.hard
def test_what_lies_in_a_folder_asks_nothing_of_the_network(tmp_path: Path, attempts: list[object]) -> None:
    for spec in tiny_specifications(tmp_path).values():
        score(load_reward(spec), squares(1), PROMPTS[:1])
    assert not attempts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:nobody/nothing", "CLIP 'nobody/nothing' cannot be loaded: .*HF_HUB_OFFLINE=1"),
        ("clip", "CLIP 'openai/clip-vit-large-patch14' cannot be loaded: "),
        ("clip:ViT-B-32/openai", "CLIP 'ViT-B-32/openai' cannot be loaded: "),
        ("pickscore", "CLIP 'yuvalkirstain/PickScore_v1' cannot be loaded: "),
        ("hpsv2", "cannot fetch HPS_v2_compressed.pt of xswu/HPSv2: .*path="),
        ("hpsv2.1", "cannot fetch HPS_v2.1_compressed.pt of xswu/HPSv2: .*path="),
        ("aesthetic", "offline, and https://.*linearMSE.pth is not in the cache: .*path="),
    ],
)
def test_offline_what_is_not_in_the_cache_is_refused_at_once(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refused(lambda: load_reward(spec), message)
    assert not attempts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:ViT-B-32", "no weights '' are published: write ViT-B-32/TAG"),
        ("clip:ViT-B-32/laion2b_e17", "no weights 'laion2b_e17' are published: .*laion2b_e16"),
        ("clip:/nowhere/at all", "CLIP '/nowhere/at all' cannot be loaded: "),
        ("clip:TINY", "CLIP '.*' has neither open_clip_config.json nor config.json"),
        ("clip:TINY/open_clip,unit=cosin", "unknown unit 'cosin': did you mean cosine"),
        ("clip:TINY/open_clip,preprocess=pat", "unknown preprocess 'pat': did you mean pad"),
        ("clip:TINY/open_clip,dtype=float64", "dtype=float64: use .*float16"),
        ("clip:TINY/open_clip,micro_batch=0", "micro_batch=0: use a positive integer"),
        ("clip:TINY/open_clip,micro_batch=1.5", "micro_batch=1.5: use a positive integer"),
        ("clip:TINY/open_clip,size=3", "'clip' cannot take .*size"),
        ("pickscore:path=TINY/nowhere", "pickscore:path=.*nowhere: no such folder"),
        ("pickscore:path=TINY/HPS.pt", "pickscore:path=.*HPS.pt: no such folder"),
        ("pickscore:path=TINY/new,preprocess=pad", "'pickscore' cannot take .*preprocess"),
        ("hpsv2:path=TINY/none.pt", "none.pt: no such checkpoint"),
        ("hpsv2:path=TINY/HPS.pt,model=ViT-H-41", "model=ViT-H-41: not an architecture of open_clip"),
        ("hpsv2:path=TINY/HPS.pt,model=TINY/new", r"CLIP '.*new' cannot be loaded: .*open_clip_config.json"),
        ("hpsv2:path=TINY/HPS.pt,model=TINY/open_clip,unit=logit", "'hpsv2' cannot take .*unit"),
        # Wrong options are refused first, before gigabytes are read.
        ("clip:/nowhere,unit=cosin", "unknown unit 'cosin'"),
        ("hpsv2:path=/nowhere,dtype=int8", "dtype=int8: use "),
        ("pickscore:path=TINY,micro_batch=none", "micro_batch=none: use "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny: Path, spec: str, message: str) -> None:
    refused(lambda: load_reward(specification(spec, tiny)), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "HPS.pt: the checkpoint does not fit this model .missing: visual.proj"),
        ({"visual.prok": torch.ones(2)}, "unexpected: visual.prok"),
        ({"text_projection": torch.ones(3, 3)}, "of another shape: text_projection"),
        ({"ln_final.bias": None, "ln_final.odd": torch.ones(1)}, "missing: ln_final.bias; unexpected: ln_final.odd"),
        ({f"odd.{k}": torch.ones(1) for k in range(9)}, "unexpected: odd.0, odd.1, odd.2, odd.3 and 5 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tiny: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = torch.load(tiny / "HPS.pt", weights_only=True)["state_dict"] | change
    torch.save({"state_dict": {key: value for key, value in state.items() if value is not None}}, tmp_path / "HPS.pt")
    refused(lambda: load_reward(f"hpsv2:path={tmp_path / 'HPS.pt'},model={tiny / 'open_clip'}"), message)


@pytest.mark.parametrize(
    ("folder", "file", "key", "value", "message"),
    [
        ("new", "model.safetensors", "visual_projection.weight", None, "missing: visual_projection.weight"),
        ("new", "model.safetensors", "odd", torch.ones(2), "unexpected: odd"),
        ("new", "model.safetensors", "logit_scale", torch.ones(3), "of another shape: logit_scale"),
        ("open_clip", WEIGHTS, "visual.proj", None, "Missing key.*visual.proj"),
        ("open_clip", WEIGHTS, "odd", torch.ones(2), "Unexpected key.*odd"),
        ("open_clip", WEIGHTS, "visual.ln_pre.bias", torch.ones(2), "size mismatch for visual.ln_pre.bias"),
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_refused(
    tiny: Path, tmp_path: Path, folder: str, file: str, key: str, value: Tensor | None, message: str
) -> None:
    corrupt = copied(tiny / folder, tmp_path / "corrupt")
    state = {name: tensor for name, tensor in load_file(corrupt / file).items() if name != key}
    save_file(state | ({key: value} if value is not None else {}), corrupt / file, metadata={"format": "pt"})
    refused(lambda: load_reward(f"clip:{corrupt}"), f"CLIP '.*corrupt'.*{message}")


@pytest.mark.parametrize(
    ("folder", "missing"),
    [
        ("open_clip", ["tokenizer.json"]),
        ("open_clip", ["tokenizer.json", "tokenizer_config.json"]),
        ("open_clip", [WEIGHTS]),
        ("new", ["tokenizer.json"]),
        ("new", ["tokenizer.json", "tokenizer_config.json"]),
        ("new", ["model.safetensors"]),
        ("new", ["config.json"]),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(tiny: Path, tmp_path: Path, folder: str, missing: list[str]) -> None:
    corrupt = copied(tiny / folder, tmp_path / "corrupt")
    for name in missing:
        (corrupt / name).unlink()
    refused(lambda: load_reward(f"clip:{corrupt}"), "CLIP '.*corrupt'")


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        '{"model_cfg": {}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": [], "text_cfg": {}}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"head_width": 0}, "text_cfg": {"vocab_size": 600}}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"layers": 0, "odd": 1}, "text_cfg": {"vocab_size": 600}}}',
        '{"model_cfg": {"embed_dim": 16, "vision_cfg": {"layers": 1}, "text_cfg": {"vocab_size": 600}}}',
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tiny: Path, tmp_path: Path, config: str) -> None:
    corrupt = copied(tiny / "open_clip", tmp_path / "corrupt")
    (corrupt / CONFIG).write_text(config)
    refused(lambda: load_reward(f"clip:{corrupt}"), "CLIP '.*corrupt'")


def test_a_truncated_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    for folder, file in (("open_clip", WEIGHTS), ("new", "model.safetensors")):
        corrupt = copied(tiny / folder, tmp_path / folder)
        (corrupt / file).write_bytes((tiny / folder / file).read_bytes()[:5000])
        refused(partial(load_reward, f"clip:{corrupt}"), f"CLIP '.*{folder}' cannot be loaded")
    (tmp_path / "HPS.pt").write_bytes((tiny / "HPS.pt").read_bytes()[:5000])
    spec = f"hpsv2:path={tmp_path / 'HPS.pt'},model={tiny / 'open_clip'}"
    refused(lambda: load_reward(spec), "HPS.pt: cannot be read, is it complete")


class Trap:
    """A folder whose Python file leaves a canary when it runs, in a session where everybody says yes."""

    def __init__(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.canary = copied(source, folder), folder / "canary"
        (self.folder / "evil.py").write_text(f"open({str(self.canary)!r}, 'w')\nclass Evil: pass\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")

    def change(self, file: str, change: dict[str, object]) -> None:
        present = json.loads((self.folder / file).read_text()) if (self.folder / file).exists() else {}
        (self.folder / file).write_text(json.dumps(merged(present, change)))


def merged(one: Any, other: Any) -> Any:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return one | {key: merged(one.get(key), value) for key, value in other.items()}


MAPS = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil"] * 2}}
TRUST = {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({CONFIG: TRUST}, "tokenizer_kwargs"),
        ({CONFIG: TRUST, "tokenizer_config.json": MAPS | {"tokenizer_class": "Evil"}}, "tokenizer_kwargs and auto_map"),
        ({"tokenizer_config.json": MAPS | {"tokenizer_class": "Evil"}}, "auto_map"),
        ({"config.json": MAPS | {"model_type": "evil"}}, "auto_map"),
        ({CONFIG: {"model_cfg": {"text_cfg": {"hf_model_name": "evil/evil"}}}}, "hf_model_name"),
        ({CONFIG: {"model_cfg": {"vision_cfg": {"timm_model_name": "hf-hub:evil/evil"}}}}, "timm_model_name"),
    ],
)
def test_no_code_of_a_folder_of_open_clip_runs(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempts: list[object],
    changes: dict[str, dict[str, object]],
    message: str,
) -> None:
    trap = Trap(tiny / "open_clip", tmp_path / "trap", monkeypatch)
    for file, change in changes.items():
        trap.change(file, change)
    refused(lambda: load_reward(f"clip:{trap.folder}"), f"CLIP '.*trap': {message} .*not read from a folder; remove")
    refused(lambda: open_clip_folder(trap.folder, weights=False), message)
    assert not trap.canary.exists() and not attempts


def test_no_code_of_a_folder_of_transformers_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[object]
) -> None:
    trap = Trap(tiny / "new", tmp_path / "trap", monkeypatch)
    trap.change("config.json", MAPS | {"attn_implementation": "evil/evil"})
    trap.change("tokenizer_config.json", MAPS | {"tokenizer_class": "Evil"})
    expected = score(load_reward(f"clip:{tiny / 'new'}"), squares(), PROMPTS)
    assert torch.equal(score(load_reward(f"clip:{trap.folder}"), squares(), PROMPTS), expected)
    assert not trap.canary.exists() and not attempts


@pytest.mark.parametrize(
    ("folder", "weights", "pickled"),
    [("open_clip", WEIGHTS, "open_clip_pytorch_model.bin"), ("new", "model.safetensors", "pytorch_model.bin")],
)
def test_weights_with_code_in_a_folder_are_refused_and_not_run(
    tiny: Path, tmp_path: Path, folder: str, weights: str, pickled: str
) -> None:
    corrupt, canary = copied(tiny / folder, tmp_path / "corrupt"), tmp_path / "canary"
    (corrupt / weights).unlink()
    torch.save(load_file(tiny / folder / weights) | {"logit_scale": Writes(canary)}, corrupt / pickled)
    refused(lambda: load_reward(f"clip:{corrupt}"), "CLIP '.*corrupt' cannot be loaded")
    assert not canary.exists()


@pytest.mark.parametrize(("quick", "plain"), [(True, QuickOpenClip), (False, OpenClip)])
def test_published_weights_get_the_activation_that_they_were_trained_with(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, quick: bool, plain: type[OpenClip]
) -> None:
    """open_clip itself warns only: "ViT-L-14/openai" there is a model with the wrong one."""
    config = json.loads((tiny / "open_clip" / CONFIG).read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(tiny / "open_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", config)
    published = {"file": str(tiny / "open_clip" / WEIGHTS), "quick_gelu": quick, "mean": CLIP_MEAN, "std": CLIP_STD}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", {"tiny": published})
    model = plain(load_file(tiny / "open_clip" / WEIGHTS))
    expected = similarity(model, squares(), by_hand(PROMPTS, tiny / "open_clip"), CLIP_MEAN, CLIP_STD)
    assert allclose(score(load_reward("clip:Tiny-8/tiny"), squares(), PROMPTS), expected)
    refused(lambda: load_reward("clip:Tiny-8/tinny"), "no weights 'tinny' are published: write Tiny-8/TAG, .* tiny")
