"""Images as bytes and data: URIs, so that the page shows them without a file that is served."""

from base64 import b64encode
from io import BytesIO

from PIL import Image


def as_jpeg(image: Image.Image, side: int | None = None) -> bytes:
    """Encode an image, at most `side` pixels across and down."""
    small, file = image.convert("RGB"), BytesIO()
    if side is not None:
        small.thumbnail((side, side))
    small.save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def as_png(image: Image.Image) -> bytes:
    """Encode an image without metadata."""
    file = BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def data_uri(image: Image.Image | bytes, side: int | None = None) -> str:
    """Encode an image, at most `side` pixels across and down, or the bytes of a PNG."""
    kind, data = ("png", image) if isinstance(image, bytes) else ("jpeg", as_jpeg(image, side))
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
