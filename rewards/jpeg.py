"""JPEG compressibility, the black-box reward of DDPO, D3PO and PRDP. Needs no weights."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from steer.rewards.inputs import as_uint8, takes_any_images

QUALITY = 95


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Return the sizes (N,) in kB of images (N, 3, H, W) as JPEGs of quality 95 (DDPO, arXiv 2305.13301)."""
    sizes = []
    for image in as_uint8(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


class JpegIncompressibility:
    """The size in kB: prefers busy images."""

    name, sign = "jpeg-incompressible", 1
    differentiable = False

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.sign * jpeg_kilobytes(images)


class JpegCompressibility(JpegIncompressibility):
    """Minus the size in kB: prefers plain images."""

    name, sign = "jpeg", -1
