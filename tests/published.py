"""Scores that authors publish, and the comparison of a reward with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.rewards.parser import load_reward, score


@dataclass(frozen=True)
class Published:
    """A published score of one image and prompt, with the tolerance that covers preprocessing and devices."""

    reward: str
    image: str
    prompt: str
    value: float
    tolerance: float
    source: str


IMAGE_REWARD = "https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6/assets/images/{}.webp"
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
CLIP = "clip:openai/clip-vit-base-patch32,unit=logit"
PUBLISHED = (
    *(
        Published("imagereward", IMAGE_REWARD.format(k), OCEAN, value, 0.05, "README of ImageReward, example use")
        for k, value in enumerate((0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492), 1)
    ),
    Published(CLIP, CATS, "a photo of a cat", 24.5701, 0.1, "transformers, integration test of CLIPModel"),
    Published(CLIP, CATS, "a photo of a dog", 19.3049, 0.1, "transformers, integration test of CLIPModel"),
)
# Their authors publish no score of an image or text: they load, and their scores are in the documented range.
RANGES = {
    "clip": (0.0, 0.5),
    "pickscore": (5.0, 35.0),
    "hpsv2": (0.0, 0.5),
    "hpsv2.1": (0.0, 0.5),
    "hpsv3": (-20.0, 20.0),
    "aesthetic:v2": (0.0, 11.0),
    "aesthetic:v2-relu": (0.0, 11.0),
    "aesthetic:v1": (0.0, 11.0),
    "aesthetic:v1-b32": (0.0, 11.0),
    "aesthetic:v1-b16": (0.0, 11.0),
    "geneval": (0.0, 1.0),
    "vqa:HuggingFaceTB/SmolVLM-256M-Instruct": (0.0, 1.0),
    "perplexity:openai-community/gpt2": (-10.0, 0.0),
    "lpips:IMAGE": (-1e-6, 0.0),  # of the image itself
}
# A tiny pipeline of each family of tests/families.py, of the same class, and the arguments of a cheap call.
SMALL: dict[str, Any] = {"height": 64, "width": 64}
PICTURE = {"image": torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("hf-internal-testing/tiny-stable-diffusion-pipe", SMALL),
    "img2img": ("hf-internal-testing/tiny-stable-diffusion-pipe", PICTURE),
    "controlnet": ("hf-internal-testing/tiny-stable-diffusion-pipe", SMALL | PICTURE),
    "sdxl": ("hf-internal-testing/tiny-sdxl-pipe", SMALL),
    "sd3": ("hf-internal-testing/tiny-sd3-pipe", {}),  # its own size
    "flux": ("hf-internal-testing/tiny-flux-pipe", SMALL),
    "pixart": (
        "hf-internal-testing/tiny-pixart-sigma-pipe",
        SMALL | {"clean_caption": False, "use_resolution_binning": False},
    ),
    "wan": ("hf-internal-testing/tiny-wan-pipe", {"height": 32, "width": 32, "num_frames": 5}),
}
CONTROLNET = "hf-internal-testing/tiny-controlnet"


def mismatches(rows: Sequence[Published], open_image: Callable[[str], Tensor]) -> list[str]:
    """Return one line for each published score that a reward misses. Each reward is loaded once."""
    lines = []
    for name in dict.fromkeys(row.reward for row in rows):
        reward = load_reward(name)
        for row in [one for one in rows if one.reward == name]:
            with torch.no_grad():
                given = score(open_image(row.image), row.prompt, reward).item()
            if not abs(given - row.value) <= row.tolerance:
                what = f"{given:.4f}, published {row.value:.4f} ± {row.tolerance:g}"
                lines.append(f"{name} on {row.image}, {row.prompt!r}: {what} ({row.source})")
    return lines
