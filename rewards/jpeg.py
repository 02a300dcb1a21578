"""JPEG compressibility, the black-box reward of DDPO, D3PO and PRDP. Needs no weights."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Sizes (N,) in kB (1,000 bytes) of images (N, 3, H, W) as JPEGs of quality 95 (DDPO, arXiv 2305.13301)."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegCompressibility:
    """Minus the size in kB: prefers plain pictures."""

    name = "jpeg"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -jpeg_kilobytes(images)


class JpegIncompressibility:
    """The size in kB: prefers busy pictures."""

    name = "jpeg-incompressible"
    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return jpeg_kilobytes(images)
