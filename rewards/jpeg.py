"""JPEG compressibility, the black-box reward of DDPO, D3PO and PRDP. Needs no weights."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from steer.rewards.inputs import as_uint8, takes_any_images

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Sizes (N,) in kB (1,000 bytes) of images (N, 3, H, W) as JPEGs of quality 95 (DDPO, arXiv 2305.13301)."""
    sizes = []
    for picture in as_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegCompressibility:
    """Minus the size in kB: prefers plain pictures."""

    name = "jpeg"
    differentiable = False

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """The size in kB: prefers busy pictures."""

    name = "jpeg-incompressible"
    differentiable = False

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return jpeg_kilobytes(images)
