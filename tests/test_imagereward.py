"""ImageReward on tiny random checkpoints in the layout of the published one."""

import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steer.reward import Reward, RewardError, score
from steer.rewards.imagereward import ImageReward
from steer.rewards.images import CLIP_MEAN, CLIP_STD

State = dict[str, Tensor]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "star", "two", "##s", "left", "of"]
EYE, READ = "blip.visual_encoder.", "blip.text_encoder."
LAYERS, TOKENS, PATCH, SIDE = 2, 35, 16, 48
PROMPTS = ["a red circle", "two blue stars", "A red circle left of two stars", "nothing known", ""]


def normal(generator: torch.Generator, *shape: int, around: float = 0.0, std: float = 0.1) -> Tensor:
    return around + std * torch.randn(shape, generator=generator)


def published(vision: int = 128, text: int = 192, side: int = SIDE, embeddings: float = 1.0) -> State:
    """Random weights under the published names. `embeddings` scales what comes in: small ones show the norms' eps."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def linear(key: str, before: int, after: int, std: float = 0.1) -> None:
        state[f"{key}.weight"] = normal(generator, after, before, std=std)
        state[f"{key}.bias"] = normal(generator, after)

    def norm(key: str, width: int) -> None:
        state[f"{key}.weight"] = normal(generator, width, around=1.0)
        state[f"{key}.bias"] = normal(generator, width)

    positions = (side // PATCH) ** 2 + 1
    state[f"{EYE}cls_token"] = embeddings * normal(generator, 1, 1, vision)
    state[f"{EYE}pos_embed"] = embeddings * normal(generator, 1, positions, vision)
    state[f"{EYE}patch_embed.proj.weight"] = embeddings * normal(generator, vision, 3, PATCH, PATCH, std=0.05)
    state[f"{EYE}patch_embed.proj.bias"] = embeddings * normal(generator, vision)
    for k in range(LAYERS):
        block = f"{EYE}blocks.{k}."
        norm(f"{block}norm1", vision)
        linear(f"{block}attn.qkv", vision, 3 * vision)
        linear(f"{block}attn.proj", vision, vision)
        norm(f"{block}norm2", vision)
        linear(f"{block}mlp.fc1", vision, 2 * vision)
        linear(f"{block}mlp.fc2", 2 * vision, vision)
    norm(f"{EYE}norm", vision)
    state[f"{READ}embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{READ}embeddings.word_embeddings.weight"] = embeddings * normal(generator, len(WORDS) + 2, text)
    state[f"{READ}embeddings.position_embeddings.weight"] = embeddings * normal(generator, 40, text)
    norm(f"{READ}embeddings.LayerNorm", text)
    for k in range(LAYERS):
        layer = f"{READ}encoder.layer.{k}."
        for part, source in (("attention", text), ("crossattention", vision)):
            linear(f"{layer}{part}.self.query", text, text)
            linear(f"{layer}{part}.self.key", source, text)
            linear(f"{layer}{part}.self.value", source, text)
            linear(f"{layer}{part}.output.dense", text, text)
            norm(f"{layer}{part}.output.LayerNorm", text)
        linear(f"{layer}intermediate.dense", text, 2 * text)
        linear(f"{layer}output.dense", 2 * text, text)
        norm(f"{layer}output.LayerNorm", text)
    linear("blip.vision_proj", vision, 32)
    linear("blip.text_proj", text, 32)
    for key, before, after in zip((0, 2, 4, 6, 7), (text, 40, 24, 12, 8), (40, 24, 12, 8, 1), strict=True):
        linear(f"mlp.layers.{key}", before, after, std=before**-0.5)
    return state


def attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V in heads of 64, on (N, L, D); mask (N, L) is 0 where nobody may look."""
    q, k, v = (tensor.unflatten(-1, (-1, 64)).transpose(1, 2) for tensor in (queries, keys, values))
    logits = q @ k.transpose(-1, -2) / math.sqrt(64)
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Published:
    """The published forward pass, written from its equations on the published names."""

    def __init__(self, state: State) -> None:
        self.state = state

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

    def norm(self, key: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]

    def see(self, pixels: Tensor) -> Tensor:
        weight, bias = (self.state[f"{EYE}patch_embed.proj.{part}"] for part in ("weight", "bias"))
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2) @ weight.flatten(1).T + bias
        first = self.state[f"{EYE}cls_token"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.state[f"{EYE}pos_embed"]
        for k in range(LAYERS):
            block = f"{EYE}blocks.{k}."
            q, k_, v = self.linear(f"{block}attn.qkv", self.norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}attn.proj", attended(q, k_, v))
            hidden = gelu(self.linear(f"{block}mlp.fc1", self.norm(f"{block}norm2", x, 1e-6)))
            x = x + self.linear(f"{block}mlp.fc2", hidden)
        return self.norm(f"{EYE}norm", x, 1e-6)

    def attend(self, part: str, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q = self.linear(f"{part}.self.query", x)
        k, v = (self.linear(f"{part}.self.{name}", source) for name in ("key", "value"))
        added = self.linear(f"{part}.output.dense", attended(q, k, v, mask))
        return self.norm(f"{part}.output.LayerNorm", x + added, 1e-12)

    def read(self, ids: Tensor, inputs: Tensor) -> Tensor:
        embeddings = f"{READ}embeddings."
        x = self.state[f"{embeddings}word_embeddings.weight"][ids]
        x = x + self.state[f"{embeddings}position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{embeddings}LayerNorm", x, 1e-12)
        for k in range(LAYERS):
            layer = f"{READ}encoder.layer.{k}."
            x = self.attend(f"{layer}attention", x, x, (ids != WORDS.index("[PAD]")).long())
            x = self.attend(f"{layer}crossattention", x, inputs, None)
            hidden = gelu(self.linear(f"{layer}intermediate.dense", x))
            x = self.norm(f"{layer}output.LayerNorm", x + self.linear(f"{layer}output.dense", hidden), 1e-12)
        return x[:, 0]

    def __call__(self, squares: Tensor, ids: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        x = self.read(ids, self.see((squares - mean) / std))
        for k in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{k}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def by_hand(prompts: list[str]) -> Tensor:
    """Token ids (N, 35) by the rule: lower case, words, a plural's s apart; [CLS] … [SEP], padded."""
    rows = []
    for prompt in prompts:
        words: list[str] = []
        for word in prompt.lower().split():
            plural = word not in WORDS and word.removesuffix("s") in WORDS
            words += [word.removesuffix("s"), "##s"] if plural else [word]
        row = ["[CLS]", *words[: TOKENS - 2], "[SEP]"]
        rows.append([WORDS.index(w) if w in WORDS else 1 for w in row] + [0] * (TOKENS - len(row)))
    return torch.tensor(rows)


def pictures(height: int = SIDE, width: int = SIDE, count: int = len(PROMPTS)) -> Tensor:
    """Smooth, and away from 0 and 1, where a clamp would bend them."""
    rough = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return 0.1 + 0.8 * F.interpolate(rough, (height, width), mode="bilinear")


Make = Callable[..., ImageReward]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A reward of a state and options, by way of files."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(WORDS) + "\n")

    def made(state: State | None = None, **options: str) -> ImageReward:
        torch.save(published() if state is None else state, tmp_path / "ImageReward.pt")
        given = {"path": str(tmp_path / "ImageReward.pt"), "tokenizer": str(tmp_path / "words")} | options
        return ImageReward(**given)

    return made


@pytest.mark.parametrize(
    "size", [{}, {"vision": 64, "text": 128, "side": 32}, {"embeddings": 1e-2}, {"embeddings": 1e-5}], ids=str
)
def test_parity_with_the_published_forward_pass(make: Make, size: dict[str, Any]) -> None:
    state = published(**size)
    squares = pictures(size.get("side", SIDE), size.get("side", SIDE))
    expected = Published(state)(squares, by_hand(PROMPTS))
    reward = make(state)
    assert isinstance(reward, Reward) and reward.name == "imagereward" and reward.differentiable
    scores = score(reward, squares, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5)
    # The weights are such that pictures and prompts matter.
    other_prompts = Published(state)(squares, by_hand(PROMPTS[:1] * 5))
    other_pictures = Published(state)(squares[:1].expand_as(squares), by_hand(PROMPTS))
    for other in (other_prompts, other_pictures):
        assert (other - expected)[1:].abs().min() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(96, 96), (130, 75), (57, 200), (40, 30)])
def test_other_sizes_are_resized_as_torchvision_does_and_cropped(make: Make, height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    bicubic = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    images = torch.rand(len(PROMPTS), 3, height, width, generator=torch.Generator().manual_seed(2)).round()
    resized = transforms.resize(images, [SIDE], interpolation=bicubic, antialias=True)
    squares = transforms.center_crop(resized.clamp(0, 1), [SIDE, SIDE])
    expected = Published(published())(squares, by_hand(PROMPTS))
    assert torch.allclose(score(make(), images, PROMPTS), expected, rtol=0, atol=1e-5)


def test_a_score_depends_on_its_image_and_prompt_alone(make: Make) -> None:
    images = pictures()
    expected = score(make(), images, PROMPTS)
    one_by_one = [score(make(), images[k : k + 1], PROMPTS[k : k + 1]) for k in range(len(PROMPTS))]
    assert torch.allclose(torch.cat(one_by_one), expected, rtol=0, atol=1e-5)
    assert torch.allclose(score(make(), images.flip(0), PROMPTS[::-1]).flip(0), expected, rtol=0, atol=1e-5)
    for size in ("1", "2", "64"):
        small = make(micro_batch=size)
        assert torch.allclose(score(small, images, PROMPTS), expected, rtol=0, atol=1e-5)
        assert torch.allclose(score(small, images, PROMPTS), expected, rtol=0, atol=1e-5)  # prompts known by now


def test_long_prompts_are_cut_after_35_tokens(make: Make) -> None:
    reward, images = make(), pictures(count=2)
    long = "a red star " * 20
    assert torch.equal(by_hand([long]), by_hand(["a red star " * 11]))
    expected = Published(published())(images, by_hand([long, "a red circle"]))
    assert torch.allclose(score(reward, images, [long, "a red circle"]), expected, rtol=0, atol=1e-5)
    alone = score(reward, images[1:], ["a red circle"])
    assert torch.allclose(alone, expected[1:], rtol=0, atol=1e-5)


# Of scores that spread over 0.7. Half precision keeps 8 bits of bfloat16 and 11 of float16.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision_stays_close_and_scores_in_fp32(make: Make, dtype: str, tolerance: float) -> None:
    reward, images = make(dtype=dtype), pictures().requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, make()(images, PROMPTS), rtol=0, atol=tolerance)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0
    assert torch.allclose(score(reward, images.half(), PROMPTS), scores, rtol=0, atol=2 * tolerance + 1e-3)


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (75, 60)])
def test_gradients_match_finite_differences(make: Make, height: int, width: int) -> None:
    reward = make()
    reward._network.double()
    images = pictures(height, width).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward._standardised(images, PROMPTS).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        ahead, behind = (reward._standardised(images + step * direction, PROMPTS) for step in (1e-5, -1e-5))
    slopes = (gradient * direction).sum((1, 2, 3))
    assert torch.allclose((ahead - behind) / 2e-5, slopes, rtol=1e-6, atol=1e-8)
    assert slopes.abs().min() > 1e-3
    assert not any(parameter.requires_grad for parameter in reward._network.parameters())


def test_gradients_are_the_same_in_micro_batches(make: Make) -> None:
    gradients = []
    for size in ("16", "2"):
        reward = make(micro_batch=size)
        reward._network.double()
        images = pictures(75, 60).double().requires_grad_()
        gradients += torch.autograd.grad(reward._standardised(images, PROMPTS).sum(), images)
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-13)
    assert gradients[0].abs().amax((1, 2, 3)).min() > 1e-4


def test_loading_draws_no_random_number(make: Make) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


QUERY = f"{READ}encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QUERY: None}, f"does not fit this model .missing: {QUERY}"),
        ({QUERY: torch.ones(64, 64)}, f"of another shape: {QUERY}"),
        ({f"{EYE}norm.bias": None}, f"missing: {EYE}post_layernorm.bias"),
        ({f"{EYE}head.bias": torch.ones(3)}, f"unexpected: {EYE}head.bias"),
        ({f"{EYE}blocks.9999.norm1.bias": torch.ones(128)}, r"missing: .*layers\.2\..*unexpected: .*layers\.9999\."),
        ({f"{EYE}pos_embed": torch.ones(1, 9, 128)}, "of another shape: .*position_embedding"),
        ({f"{EYE}pos_embed": torch.ones(9)}, r"pos_embed is of shape \(9,\), expected 3 dimensions"),
        ({f"{EYE}pos_embed": None}, "not an ImageReward checkpoint: .*pos_embed is missing"),
        ({f"{EYE}patch_embed.proj.weight": torch.ones(96, 3, 16, 16)}, "has width 96, which is no multiple of 64"),
        ({f"{READ}embeddings.position_embeddings.weight": torch.ones(34, 192)}, "has 34 positions"),
        ({"mlp.layers.1.weight": torch.ones(3)}, "unexpected: mlp.layers.1.weight"),
        ({"mlp.layers.4.weight": None}, "not an ImageReward checkpoint: mlp.layers.4.weight is missing"),
        ({"mlp.layers.7.weight": torch.ones(2, 8)}, "of another shape: mlp.layers.7.weight"),
        (dict.fromkeys(published()), "not an ImageReward checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(make: Make, change: dict[str, Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in (published() | change).items() if tensor is not None}
    refused(lambda: make(state), message)


class Writes:
    """Runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_broken_and_malicious_files_are_refused_and_run_nothing(make: Make, tmp_path: Path) -> None:
    whole, canary = tmp_path / "whole.pt", tmp_path / "canary"
    torch.save(published(), whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    torch.save(published() | {"mlp.layers.7.bias": Writes(canary)}, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"mlp.layers.7.bias": Writes(canary)}, protocol=2))
    broken = {"none": "no such checkpoint", "cut": "cannot be read, is it complete", "empty": "cannot be read"}
    for name, message in (broken | {"code": "refused", "plain": "refused"}).items():
        refused(partial(make, path=str(tmp_path / f"{name}.pt")), f"{name}.pt: {message}")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": "0"}, "micro_batch=0: use a positive integer"),
        ({"micro_batch": "many"}, "micro_batch=many: use a positive integer"),
        ({"dtype": "float8"}, "dtype=float8: use .*float16"),
        ({"tokenizer": "/nowhere"}, "tokenizer=/nowhere: name a folder with BERT's vocab.txt"),
    ],
)
def test_bad_options_are_refused(make: Make, options: dict[str, str], message: str) -> None:
    refused(lambda: make(**options), message)


def test_the_tokenizer_must_be_that_of_the_checkpoint(make: Make, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    refused(lambda: make(tokenizer=str(tmp_path)), "has 15 tokens, the checkpoint 16")


def test_without_a_network_the_published_files_are_asked_for_in_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused(ImageReward, "cannot fetch ImageReward.pt of zai-org/ImageReward: .*path=")
    make()
    path = str(tmp_path / "ImageReward.pt")
    refused(lambda: ImageReward(path=path), "cannot fetch vocab.txt of google-bert/bert-base-uncased: .*tokenizer=")
