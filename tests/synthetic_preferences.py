"""A tiny CLIP with random weights, images of noise, and labels with a planted truth, for tests of learned rewards."""

import functools
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from steer.apps.scenes.training import LENGTH, build_tokenizer
from steer.files import read_image
from steer.rewards.clip import load_backbone
from steer.rewards.learned import image_features
from steer.rewards.objectives import PreferenceLabels
from steer.rewards.preference_pairs import Pairs, Source

SIDE, WIDTH = 16, 16


@functools.cache
def tiny_clip() -> str:
    """The folder of a CLIP of random weights in open_clip's format."""
    folder = Path(tempfile.mkdtemp())
    tokenizer = build_tokenizer(folder)
    vision = {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": LENGTH, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text | {"hf_tokenizer_name": "tiny"}}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = open_clip.CLIP(WIDTH, vision, {**text, "hf_tokenizer_name": None})
    save_file(
        {key: value.contiguous() for key, value in made.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return str(folder)


@functools.cache
def images(count: int, seed: int = 0) -> tuple[bytes, ...]:
    """PNG files of four random colours each."""
    rng, files = np.random.default_rng(seed), []
    for corners in rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(corners.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return tuple(files)


@functools.cache
def truth(count: int, seed: int = 0) -> Tensor:
    """A linear function (N,) of the four principal features of the images, with mean 0 and deviation 1."""
    with torch.no_grad():
        features = image_features(load_backbone(tiny_clip()), images(count))
    centred = features - features.mean(0)
    parts = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:4].T
    values = (parts / parts.std(0)) @ torch.randn(4, generator=torch.Generator().manual_seed(seed))
    return (values - values.mean()) / values.std()


def tensors(files: Sequence[Source]) -> Tensor:
    return torch.stack([read_image(one) for one in files])


def prompts(count: int, different: int = 20) -> tuple[str, ...]:
    return tuple(f"a picture {k % different}" for k in range(count))


def random_rows(count: int, number: int, seed: int) -> Tensor:
    """Numbers of two different images (P, 2)."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(count, (number,), generator=generator)
    return torch.stack([first, (first + torch.randint(1, count, (number,), generator=generator)) % count], 1)


def pairs_of(
    count: int, rows: Tensor, choice: Tensor, users: Sequence[str] = (), strength: Tensor | None = None
) -> Pairs:
    """Pairs of some of the images; row n has the n-th prompt."""
    a, b = (tuple(images(count)[k] for k in column) for column in rows.T.tolist())
    labels = PreferenceLabels(choice.float(), torch.ones(len(rows)) if strength is None else strength.float())
    return Pairs(a, b, prompts(len(rows)), labels, tuple(users))
