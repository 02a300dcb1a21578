"""MPS on a tiny random checkpoint in the published layout, against its attention written out by hand."""

from pathlib import Path

import pytest
import torch
from tiny_vlm import HEAD, HEADS, LAYERS, MULT, WIDTH, bit_images, tiny_mps
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from steer.apps.scenes.training import LENGTH, build_tokenizer
from steer.reward import RewardError
from steer.rewards.images import CLIP_MEAN, CLIP_STD
from steer.rewards.mps import CONDITIONS
from steer.rewards.parser import load_reward

State = dict[str, Tensor]
PROMPTS = ["a red circle left of a blue star", "two green squares"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel, State]:
    """The base folder, CLIP, and the state dict of CLIP and the fusion."""
    folder = tmp_path_factory.mktemp("mps")
    return folder, *tiny_mps(folder)


def gated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] * F.silu(x[..., half:])


def fused(state: State, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """One image (I, D), one prompt (L, D), a mask (L,) of 0 and −∞: head by head."""
    for k in range(LAYERS):
        w = {key.split(f"layers.{k}.")[1]: value for key, value in state.items() if f"cross_model.layers.{k}." in key}
        x = F.layer_norm(image, [WIDTH], w["0.fn.norm.weight"], w["0.fn.norm.bias"])
        keys, values = (words @ w["0.fn.to_kv.weight"].T).split(HEAD, -1)
        heads = []
        for query in (x @ w["0.fn.to_q.weight"].T * HEAD**-0.5).split(HEAD, -1):
            heads.append((query @ keys.T + mask).softmax(-1) @ values)
        image = image + torch.cat(heads, -1) @ w["0.fn.to_out.weight"].T
        image = image + gated(x @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T
        x = F.layer_norm(image, [WIDTH], w["1.fn.norm.weight"], w["1.fn.norm.bias"])
        inner = HEADS * HEAD
        parts = (x @ w["1.fn.fused_attn_ff_proj.weight"].T).split([inner, HEAD, HEAD, 2 * MULT * WIDTH], -1)
        angles = torch.arange(len(image))[:, None] * w["1.fn.rotary_emb.inv_freq"]
        turn = torch.polar(torch.ones_like(angles), angles)

        def turned(t: Tensor, turn: Tensor = turn) -> Tensor:
            """Pairs (x_k, x_{k + d/2}) as complex numbers."""
            complex_ = torch.complex(t[:, : HEAD // 2], t[:, HEAD // 2 :]) * turn
            return torch.cat([complex_.real, complex_.imag], -1)

        heads = [(turned(q) @ turned(parts[1]).T * HEAD**-0.5).softmax(-1) @ parts[2] for q in parts[0].split(HEAD, -1)]
        image = (
            image + torch.cat(heads, -1) @ w["1.fn.attn_out.weight"].T + gated(parts[3]) @ w["1.fn.ff_out.1.weight"].T
        )
    return image[0]


@torch.no_grad()
def by_hand(checkpoint: tuple[Path, CLIPModel, State], image: Tensor, prompt: str) -> float:
    folder, clip, state = checkpoint
    tokenizer = build_tokenizer(folder / "again")
    ids = tokenizer([prompt, CONDITIONS["overall"]], padding="max_length", truncation=True, max_length=LENGTH)
    out = clip.text_model(torch.tensor(ids.input_ids))
    words, condition = out.last_hidden_state @ state["model.text_projection.weight"].T
    pooled = state["model.text_projection.weight"] @ out.pooler_output[0]
    similarity = torch.stack([(condition @ word).max() for word in words])
    mask = torch.where(similarity / similarity.max() > 0.3, 0.0, -torch.inf)
    pixels = (image - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    tokens = clip.vision_model(pixels[None]).last_hidden_state[0] @ state["model.visual_projection.weight"].T
    vector = fused(state, tokens, words, mask)
    return float(clip.logit_scale.exp() * (vector @ pooled) / vector.norm() / pooled.norm())


def test_scores_equal_the_attention_by_hand(checkpoint: tuple[Path, CLIPModel, State]) -> None:
    folder, images = checkpoint[0], bit_images(2, 32, 32)
    reward = load_reward(f"mps:path={folder / 'MPS.pth'},base={folder}")
    expected = [by_hand(checkpoint, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert reward(images, PROMPTS).tolist() == pytest.approx(expected, rel=1e-4)
    swapped = load_reward(f"mps:path={folder / 'MPS.pth'},base={folder},micro_batch=1")(images.flip(0), PROMPTS[::-1])
    assert swapped.flip(0).tolist() == pytest.approx(expected, rel=1e-4)


def test_gradients_flow_to_the_images(checkpoint: tuple[Path, CLIPModel, State]) -> None:
    reward = load_reward(f"mps:path={checkpoint[0] / 'MPS.pth'},base={checkpoint[0]}")
    images = bit_images(2, 40, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_what_cannot_be_read_is_refused(checkpoint: tuple[Path, CLIPModel, State], tmp_path: Path) -> None:
    folder, clip, state = checkpoint
    torch.save(clip, tmp_path / "pickle.pth")
    torch.save({key: t for key, t in state.items() if "cross" not in key}, tmp_path / "clip.pth")
    torch.save({key: t for key, t in state.items() if "1.1.fn.ff_out" not in key}, tmp_path / "few.pth")
    files = {"pickle": "refused", "clip": "not a state dict of MPS", "few": "missing: cross_model.layers.1.1.fn.ff_out"}
    for name, message in files.items():
        with pytest.raises(RewardError, match=message):
            load_reward(f"mps:path={tmp_path / f'{name}.pth'},base={folder}")
    with pytest.raises(RewardError, match="convert it to a state dict"):
        load_reward("mps")
