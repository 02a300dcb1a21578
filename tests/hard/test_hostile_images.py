"""Images of every kind: each reader of images gives the correct pixels, or refuses the file in one line."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from reliability import Tally

from steer.apps.demo.rewards_tab import read_upload
from steer.errors import InputError
from steer.files import MAX_PIXELS, read_image
from steer.rewards.preference_pairs import load_images

FULL = pytest.mark.hard
HEIGHT, WIDTH = 6, 8
RAMP = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
PICTURE = Image.fromarray(RAMP)
GREY = np.repeat(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1).round(), 3, 2)
DEEP = (np.linspace(0, 255, HEIGHT * WIDTH).round() * 257).astype(np.uint16).reshape(HEIGHT, WIDTH)


def packed(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """Encode a PNG by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def lines(pixels: np.ndarray[Any, Any]) -> bytes:
    """The rows of a PNG of 16 bits, unfiltered."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)


def turned(orientation: int, kind: str) -> bytes:
    """Encode an image with an EXIF orientation, without loss."""
    exif = Image.Exif()
    exif[274] = orientation
    return packed(PICTURE, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))


def upright(orientation: int) -> np.ndarray[Any, Any]:
    """Expected pixels for an EXIF orientation, from the table of the standard."""
    changes: dict[int, Callable[[Any], Any]] = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    return changes.get(orientation, lambda a: a)(RAMP)


def over_white(alpha: int) -> np.ndarray[Any, Any]:
    return RAMP * (alpha / 255) + 255 * (1 - alpha / 255)


def lab() -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB") or PICTURE


def with_alpha(alpha: int) -> Image.Image:
    image = PICTURE.copy()
    image.putalpha(alpha)
    return image


SECOND = [ImageOps.invert(PICTURE)]
# Bytes, expected pixels, and the tolerance (of 255) for lossy formats.
RIGHT: dict[str, tuple[bytes, Any, float]] = {
    "PNG": (packed(PICTURE, "PNG"), RAMP, 0.5),
    "CMYK JPEG": (packed(PICTURE.convert("CMYK"), "JPEG", quality=100, subsampling=0), RAMP, 12),
    "CMYK TIFF": (packed(PICTURE.convert("CMYK"), "TIFF"), RAMP, 0.5),
    "LAB TIFF": (packed(lab(), "TIFF"), RAMP, 8),
    "grey": (packed(PICTURE.convert("L").point(lambda v: v), "PNG"), np.asarray(PICTURE.convert("L"))[..., None], 0.5),
    "16 bits, grey PNG": (packed(Image.fromarray(DEEP), "PNG"), GREY, 0.5),
    "16 bits, grey TIFF": (packed(Image.fromarray(DEEP), "TIFF"), GREY, 0.5),
    "16 bits, colour PNG": (png(WIDTH, HEIGHT, 16, 2, lines(RAMP.astype(int) * 257)), RAMP, 1),
    "16 bits, one grey transparent": (
        png(WIDTH, HEIGHT, 16, 0, lines(DEEP), chunk(b"tRNS", struct.pack(">H", int(DEEP[0, 0])))),
        np.where((np.arange(HEIGHT * WIDTH) == 0).reshape(HEIGHT, WIDTH, 1), 255, GREY),
        0.5,
    ),
    "half transparent": (packed(with_alpha(128), "PNG"), over_white(128), 1),
    "transparent": (packed(with_alpha(0), "PNG"), over_white(0), 0.5),
    "half transparent WebP": (packed(with_alpha(128), "WEBP", lossless=True), over_white(128), 1),
    **{f"EXIF {one} {kind}": (turned(one, kind), upright(one), 0.5) for one in range(10) for kind in ("PNG", "WEBP")},
    "animated WebP": (packed(PICTURE, "WEBP", save_all=True, append_images=SECOND, lossless=True), RAMP, 0.5),
    "animated PNG": (packed(PICTURE, "PNG", save_all=True, append_images=SECOND), RAMP, 0.5),
    "pages of a TIFF": (packed(PICTURE, "TIFF", save_all=True, append_images=SECOND), RAMP, 0.5),
    "animated GIF": (
        packed(PICTURE.convert("L"), "GIF", save_all=True, append_images=[SECOND[0].convert("L")]),
        np.asarray(PICTURE.convert("L"))[..., None],
        0.5,
    ),
}
WHOLE = RIGHT["PNG"][0]
BMP = struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)
GIF = (
    b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b"\x2c" + struct.pack("<HHHHB", 0, 0, 0, 0, 0) + b"\x02\x00\x3b"
)
SIDE = int(MAX_PIXELS**0.5)
WRONG = {
    "bomb of 10^10 pixels": png(100_000, 100_000, 8, 2, b""),
    "bomb below Pillow's own limit": png(SIDE + 1, SIDE + 1, 8, 0, (b"\0" * (SIDE + 2)) * (SIDE + 1)),
    "0 × 0 PNG": png(0, 0, 8, 2, b""),
    "0 × 5 PNG": png(0, 5, 8, 2, b""),
    "0 × 0 BMP": b"BM" + BMP,
    "0 × 0 GIF": GIF,
    "32 bits a pixel": packed(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "floats": packed(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n",
    "PDF": packed(PICTURE, "PDF"),
    "empty": b"",
    **{f"cut at {part} %": WHOLE[: len(WHOLE) * part // 100] for part in range(5, 80, 15)},
}


def of_pairs(path: Path) -> torch.Tensor:
    return load_images([path], lambda image: image)[0]


READERS: dict[str, Callable[[Path], torch.Tensor]] = {
    "file": read_image,
    "bytes": lambda path: read_image(path.read_bytes()),
    "upload": read_upload,
    "pairs": of_pairs,
}


@pytest.mark.parametrize("noted", [False, pytest.param(True, marks=FULL)])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_correct_pixels_or_refuses(tmp_path: Path, reader: str, noted: bool) -> None:
    tally, read, path = Tally(), READERS[reader], tmp_path / "image"
    for name, (data, expected, loss) in RIGHT.items():
        path.write_bytes(data)
        pixels = read(path).permute(1, 2, 0).numpy() * 255
        assert pixels.shape[:2] == expected.shape[:2], name
        assert np.abs(pixels - expected).max() <= loss, (name, np.abs(pixels - expected).max())
        tally.count("right")
    for name, data in WRONG.items():
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            read(path)
        assert "\n" not in str(error.value), name
        tally.count("refused")
    if noted:
        tally.note(f"images, read as {reader}")


SEEDS = [data for data, _, _ in RIGHT.values()][::2] + [
    packed(PICTURE, "TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "tiff_deflate")
]


@pytest.mark.filterwarnings("ignore")  # warnings of Pillow
@pytest.mark.parametrize("flips", [15, pytest.param(400, marks=FULL)])
def test_images_with_flipped_bits_are_read_or_refused(flips: int, capfd: pytest.CaptureFixture[str]) -> None:
    tally, rng = Tally(), random.Random(0)
    for whole in SEEDS:
        for _ in range(flips):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 1, 4])):
                place, bit = divmod(rng.randrange(8 * len(data)), 8)
                data[place] ^= 1 << bit
            try:
                image = read_image(bytes(data))
            except InputError as error:
                assert "\n" not in str(error)
                tally.count("refused")
                continue
            assert image.dim() == 3 and len(image) == 3 and image.numel() and image.min() >= 0 and image.max() <= 1
            tally.count("read")
    capfd.readouterr()  # messages of libtiff
    assert tally.outcomes["refused"] and tally.outcomes["read"]
    if flips == 400:
        tally.note("images, bits flipped")
