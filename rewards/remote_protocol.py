"""What the two sides of a remote reward send each other: version 1, JSON and PNG over HTTP/1.1. See remote-rewards.md.

    GET  BASE         → {"protocol": 1, "name": "clip:scenes", "differentiable": false, "version": "0.1.0"}
    POST BASE + score   {"protocol": 1, "images": [base64 of a PNG, …], "prompts": [text, …]}
                      → {"scores": [number, …]}
    whatever is wrong → {"error": "one line"} with a status that is not 200

Images are 8-bit RGB, all of one size. Neither side believes the other: sizes are checked before anything is decoded.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steer.contract import RewardError
from steer.errors import InputError
from steer.images import BROKEN
from steer.rewards.grammar import NUMBER

PROTOCOL = 1
MOST_IMAGES, MOST_PIXELS = 32, 2**24  # of one request, all its images together
MOST_BYTES = 80_000_000  # of a request: so many pixels of noise as PNG in base64, and the prompts
MOST_REPLY = 1_000_000  # bytes
LONGEST_LINE = 300  # characters of what the other side says
ADDRESS = r"https?://[^\s,()]+"
TOKEN = "STEER_REWARD_TOKEN"  # an environment variable: an option would be in reports and in the list of processes


def is_remote(text: str) -> bool:
    """Whether a term is the address of a reward, with options and weight or without."""
    return re.match(r"https?://", text) is not None


def read_weight(text: str) -> tuple[str, float]:
    """A term as (address with options, weight). Behind a host without a path a number is its port."""
    if written := re.fullmatch(rf"(https?://[^/\s]+(?:/\S*?|,\S*?)):({NUMBER})", text):
        return written[1], float(written[2])
    return text, 1.0


def encode(images: Tensor, prompts: Sequence[str]) -> bytes:
    """The body of a request. images (N, 3, H, W), clamped to [0, 1] and rounded to 8 bits."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    told = []
    for one in pixels:
        file = BytesIO()
        Image.fromarray(one).save(file, format="PNG", compress_level=1)
        told.append(base64.b64encode(file.getvalue()).decode())
    return json.dumps({"protocol": PROTOCOL, "images": told, "prompts": list(prompts)}).encode()


def decode(body: bytes) -> tuple[Tensor, list[str]]:
    """The images (N, 3, H, W) in [0, 1] and the prompts of a request. Raises InputError, one line."""
    told = read_json(body)
    if told.get("protocol") != PROTOCOL:
        raise InputError(f"this side speaks protocol {PROTOCOL}, got {told.get('protocol')!r:.20}")
    images, prompts = told.get("images"), told.get("prompts")
    if not isinstance(images, list) or not isinstance(prompts, list):
        raise InputError("`images` and `prompts` must be lists")
    if not all(isinstance(text, str) for text in images + prompts):
        raise InputError("`images` must hold base64 texts, `prompts` texts")
    if not 0 < len(images) <= MOST_IMAGES or len(images) != len(prompts):
        raise InputError(f"1 to {MOST_IMAGES} images, and as many prompts: got {len(images)} and {len(prompts)}")
    return torch.stack(_pictures(images)), prompts


def _pictures(images: Sequence[str]) -> list[Tensor]:
    """Of base64 texts, each (3, H, W). All sizes are known before the first pixel is decoded."""
    try:
        files = [Image.open(BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) for text in images]
        sizes = {file.size for file in files}
        if len(sizes) > 1 or any(file.mode != "RGB" for file in files):
            raise InputError("images must be 8-bit RGB and all of one size")
        if (pixels := len(files) * files[0].width * files[0].height) > MOST_PIXELS:
            raise InputError(f"{pixels} pixels in one request: at most {MOST_PIXELS}")
        arrays = [np.asarray(file).copy() for file in files]
    except InputError:
        raise
    except (*BROKEN, binascii.Error) as error:
        raise InputError(f"an image cannot be read as PNG ({line(error)})") from error
    return [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]


def read_scores(told: Mapping[str, Any], count: int) -> Tensor:
    """The scores of a reply, (count,) fp32. What is finite is for the contract to say. Raises RewardError."""
    scores = told.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"{count} images must have a list of {count} scores, got {got}")
    if wrong := [one for one in scores if isinstance(one, bool) or not isinstance(one, int | float)]:
        raise RewardError(f"scores must be numbers, got {wrong[0]!r:.40}")
    try:
        return torch.tensor([float(one) for one in scores])
    except OverflowError as error:
        raise RewardError("scores must fit in fp32") from error


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {line(body[:60].decode(errors='replace'))!r}") from error
    if not isinstance(told, dict):
        raise InputError(f"not a JSON object but {type(told).__name__}")
    return told


def line(said: object) -> str:
    """What the other side says as one line that a terminal can show."""
    text = " ".join(str(said).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:LONGEST_LINE]


def read_token() -> str | None:
    """The token of this environment, on both sides; None where there is none. Raises InputError."""
    token = os.environ.get(TOKEN, "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError(f"{TOKEN} must be of printable ASCII without spaces")
    return token or None
