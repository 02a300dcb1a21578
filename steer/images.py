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
MOST_PIXELS = 1 << 26  # 8192 x 8192: a few bytes can ask for more than any memory holds
BROKEN = (  # what Pillow raises; IndexError at a colour profile that has no end, TypeError at tags of a TIFF
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path | bytes) -> Tensor:
    """An image file, or the bytes of one, as (3, H, W) in [0, 1]: upright as its EXIF says, transparency on white.

    Of an animation the first picture; 16 bits a pixel are brought to 8. Raises InputError where it cannot be read as an
    image, or is larger than 8192 x 8192 pixels.
    """
    name = f"an image of {len(path)} bytes" if isinstance(path, bytes) else path
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path, formats=FORMATS) as file:
            _check(file, name)
            image = _of_8_bits(ImageOps.exif_transpose(file)).convert("RGBA")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that can be read") from error
    except BROKEN as error:
        raise InputError(f"{name}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _check(file: Image.Image, name: object) -> None:
    """Raises InputError for what would fill the memory, and what has no right reading; no pixel is decoded yet."""
    width, height = file.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels: at most {MOST_PIXELS}, make it smaller")
    if file.mode in ("I", "F"):
        raise InputError(f"{name}: 32 bits a pixel do not say how bright white is: save it with 8 or 16")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, which Pillow would cut off above 255; other images as they are."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    seen = Image.fromarray(np.where(values == image.info.get("transparency", -1), 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, seen))
