"""Image files from outside."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from steer.errors import InputError


def read_image(path: Path) -> Tensor:
    """An image file as (3, H, W) in [0, 1]: upright as its EXIF says, transparency on white.

    Raises InputError where it cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
