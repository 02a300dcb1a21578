"""Image files from outside."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from steer.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no other: some formats start outside programs
BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: Path) -> Tensor:
    """An image file as (3, H, W) in [0, 1]: upright as its EXIF says, transparency on white.

    Raises InputError where it cannot be read as an image.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read") from error
    except BROKEN as error:
        raise InputError(f"{path}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
