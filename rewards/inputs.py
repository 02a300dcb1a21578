"""Conversion of images and prompts in all supported forms to the batch (N, 3, H, W) that rewards score.

| images                                                        | prompts                                          |
|---------------------------------------------------------------|--------------------------------------------------|
| tensor (N, 3, H, W) or (3, H, W), floats in [0, 1] or uint8   | one text for all images                          |
| array (N, H, W, 3) or (H, W, 3), floats in [0, 1] or uint8    | one for each image                               |
| PIL image                                                     | fewer: image n has prompt n // (images / prompts), |
| list of these; a list in it, or one more axis, is a video     | as pipelines order several images of a prompt    |
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from steer.files import read_image
from steer.reward import RewardError, as_texts, mean_over_frames

T = TypeVar("T")
FORMS = "(N, 3, H, W) tensors, (N, H, W, 3) arrays, PIL images, or a list of them"


def takes_any_images(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate the `__call__` of a reward of tensors, so that it takes images and prompts in every form above.

    The score of a video is the mean over evenly spaced frames.
    """

    @functools.wraps(call)
    def converted(self: Any, images: Any, prompts: Any, *rest: Any, **named: Any) -> Tensor:
        batch, texts = as_batch(images, prompts)
        return mean_over_frames(batch, lambda frames: (call(self, frames, texts, *rest, **named), {}), self)[0]

    return converted


def takes_any_samples(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a reward's `__call__` as `takes_any_images` does, so that it also takes a list of texts."""
    of_images = takes_any_images(call)

    @functools.wraps(call)
    def converted(self: Any, images: Any, prompts: Any, *rest: Any, **named: Any) -> Tensor:
        if (texts := as_texts(images)) is None:
            return of_images(self, images, prompts, *rest, **named)
        return call(self, texts, prompt_of_each(len(texts), prompts), *rest, **named)

    return converted


def as_batch(images: Any, prompts: str | Sequence[str]) -> tuple[Tensor, Sequence[str]]:
    """Convert images to a tensor (N, 3, H, W), videos to (N, F, 3, H, W), and pair each with its prompt.

    Raises RewardError, in one line, for other forms, images of several sizes, and counts that do not match.
    """
    if as_texts(images) is not None:
        raise RewardError("a reward of images was given texts: use a reward of texts, such as says:WORD")
    batch = _as_tensor(images)
    if batch.dim() == 3:
        batch = batch[None]
    if batch.dim() not in (4, 5) or batch.shape[-3] != 3:
        raise RewardError(f"a reward takes {FORMS}; got the shape {tuple(batch.shape)}")
    return batch, prompt_of_each(len(batch), prompts)


def prompt_of_each(count: int, prompts: str | Sequence[str]) -> Sequence[str]:
    """Return the prompt of each of `count` images or texts. Raises RewardError for counts that do not match."""
    if isinstance(prompts, str):
        return [prompts] * count
    if len(prompts) != count:
        if not prompts or count % len(prompts) or count < len(prompts):
            raise RewardError(f"a reward takes one prompt an image, got {len(prompts)} prompts and {count} images")
        prompts = [prompt for prompt in prompts for _ in range(count // len(prompts))]
    return prompts


def rows_by_prompt(prompts: Sequence[T]) -> dict[T, list[int]]:
    """Return the rows of each distinct prompt, or other key, in the order of their first occurrence."""
    rows: dict[T, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows


def file_batches(
    sources: Sequence[Path | bytes], prompts: Sequence[str], size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Load image files, or their bytes, of any sizes, in batches of at most `size` consecutive ones of one image size.

    Yields images (N, 3, H, W) in [0, 1] and their N prompts. Raises InputError for a file that is not an image.
    """
    loaded = zip(map(read_image, sources), prompts, strict=True)
    for _, group in groupby(loaded, key=lambda one: one[0].shape):
        while some := list(islice(group, size)):
            images, texts = zip(*some, strict=True)
            yield torch.stack(images), list(texts)


def _as_tensor(images: Any) -> Tensor:
    """Convert to floats in [0, 1], channels before height and width."""
    if isinstance(images, Image.Image):
        images = np.asarray(images.convert("RGB"))
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images.copy())
        images = images.movedim(-1, -3) if images.dim() >= 3 else images
    if isinstance(images, list | tuple) and images:
        tensors = [_as_tensor(image) for image in images]
        if len(shapes := {tuple(one.shape) for one in tensors}) > 1:
            raise RewardError(f"images of one call have one size, got shapes {sorted(shapes)}: score them one by one")
        return torch.stack(tensors)
    if not torch.is_tensor(images):
        raise RewardError(f"a reward takes {FORMS}; got {type(images).__name__}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise RewardError(f"images are floats in [0, 1] or 8-bit integers, got {images.dtype}")
    return images


def as_uint8(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert images (N, 3, H, W) to (N, H, W, 3) of 8 bits, clamped and rounded as in image files."""
    arrays = VaeImageProcessor.pt_to_numpy(images.detach().float().clamp(0, 1))
    return (arrays * 255).round().astype(np.uint8)


def as_png(images: Tensor) -> list[bytes]:
    """Encode images (N, 3, H, W) as PNG files of 8 bits, clamped and rounded."""
    files = [BytesIO() for _ in images]
    for file, pixels in zip(files, as_uint8(images), strict=True):
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return [file.getvalue() for file in files]
