"""Image files from outside: broken ones are refused in a line, whatever is wrong with them."""

import struct
import zlib
from io import BytesIO
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from steer.errors import InputError
from steer.files import read_image

KINDS = (b"iCCP", b"tRNS", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"eXIf", b"zTXt", b"IHDR", b"PLTE")


def whole() -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def with_chunk(raw: bytes, place: int, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk, whose check sum is right."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return raw[:place] + chunk + raw[place:]


@pytest.mark.parametrize(("kind", "data"), product(KINDS, (b"", b"x", b"x\0", b"x\0\1")))
def test_a_chunk_that_is_cut_short_is_refused_or_passed_over(kind: bytes, data: bytes, tmp_path: Path) -> None:
    raw = whole()
    for name, place in (("before", 33), ("after", raw.index(b"IEND") - 4)):
        path = tmp_path / f"{name}.png"
        path.write_bytes(with_chunk(raw, place, kind, data))
        for given, named in ((path, f"{name}.png"), (path.read_bytes(), "bytes")):
            try:
                assert read_image(given).shape == (3, 4, 4)
            except InputError as error:
                assert f"{named}: " in str(error) and "\n" not in str(error)


def test_a_colour_profile_without_an_end_is_refused(tmp_path: Path) -> None:
    raw = whole()
    (tmp_path / "cut.png").write_bytes(with_chunk(raw, raw.index(b"IEND") - 4, b"iCCP", b""))
    with pytest.raises(InputError, match=r"cut\.png: cannot read the image"):
        read_image(tmp_path / "cut.png")
