"""HPSv3 on a tiny random checkpoint in both published layouts, against Qwen2-VL and the head applied by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_vlm import bit_images, tiny_hpsv3
from torch import Tensor
from transformers import AutoProcessor

from steer.reward import RewardError
from steer.rewards.hpsv3 import INSTRUCTION, fit
from steer.rewards.inputs import as_uint8
from steer.rewards.parser import load_reward

PROMPTS = ["a red star", "two blue circles and a red star", "<|Reward|> Yes"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Any]:
    """The base folder, the state dict of today's names, and the model."""
    folder = tmp_path_factory.mktemp("hpsv3")
    return folder, *tiny_hpsv3(folder)


@torch.no_grad()
def by_hand(checkpoint: tuple[Path, dict[str, Tensor], Any], image: Tensor, prompt: str) -> float:
    folder, state, model = checkpoint
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION.replace("{prompt}", prompt)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.fromarray(as_uint8(image[None])[0])
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    states = model.model(**inputs).last_hidden_state[0]
    place = (inputs["input_ids"][0] == len(processor.tokenizer) - 1).nonzero()[-1, 0]
    x = states[place]
    for index in (0, 3, 5):
        x = state[f"rm_head.{index}.weight"] @ (x if index == 0 else x.relu()) + state[f"rm_head.{index}.bias"]
    return float(x[0])


@pytest.mark.parametrize("layout", ["old", "new"])
def test_scores_are_mu_at_the_reward_token(checkpoint: tuple[Path, dict[str, Tensor], Any], layout: str) -> None:
    """448 px are kept, so that PIL's and our pixels are equal; prompts of several lengths are one batch."""
    folder, images = checkpoint[0], bit_images(3, 448, 448)
    reward = load_reward(f"hpsv3:path={folder / f'{layout}.safetensors'},base={folder}")
    expected = [by_hand(checkpoint, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert reward(images, PROMPTS).tolist() == pytest.approx(expected, abs=2e-4)
    alone = load_reward(f"hpsv3:path={folder / f'{layout}.safetensors'},base={folder},micro_batch=1")
    assert alone(images, PROMPTS).tolist() == pytest.approx(expected, abs=2e-4)


def test_gradients_flow_to_the_images(checkpoint: tuple[Path, dict[str, Tensor], Any]) -> None:
    folder = checkpoint[0]
    reward = load_reward(f"hpsv3:path={folder / 'new.safetensors'},base={folder}")
    assert reward.differentiable
    images = bit_images(1, 64, 64).mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["a star"]).sum(), images)
    direction, step = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), 1e-2
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, ["a star"]).sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=0.05)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((64, 64), (448, 448)), ((512, 1024), (308, 616))],
)
def test_images_are_resized_to_256_tokens(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    """√(H W / 200704) scales both sides, which are then multiples of 28."""
    assert tuple(fit(torch.rand(1, 3, *size)).shape[-2:]) == fitted


def test_other_files_are_refused_in_one_line(checkpoint: tuple[Path, dict[str, Tensor], Any], tmp_path: Path) -> None:
    folder, state, _ = checkpoint
    save_file({key: t for key, t in state.items() if not key.startswith("rm_head")}, tmp_path / "plain.safetensors")
    save_file({key: t for key, t in state.items() if "layers.1.mlp" not in key}, tmp_path / "few.safetensors")
    for name, message in (("plain", "not an HPSv3 checkpoint: rm_head"), ("few", "does not fit this model .missing")):
        with pytest.raises(RewardError, match=message) as caught:
            load_reward(f"hpsv3:path={tmp_path / f'{name}.safetensors'},base={folder}")
        assert "\n" not in str(caught.value)
