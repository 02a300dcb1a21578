"""Image files from outside."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from steer.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other: some formats start outside programs
BROKEN = (  # what Pillow raises; IndexError at a colour profile that has no end
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path | bytes) -> Tensor:
    """An image file, or the bytes of one, as (3, H, W) in [0, 1]: upright as its EXIF says, transparency on white.

    Raises InputError where it cannot be read as an image.
    """
    name = f"an image of {len(path)} bytes" if isinstance(path, bytes) else path
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that can be read") from error
    except BROKEN as error:
        raise InputError(f"{name}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
