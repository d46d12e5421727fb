"""Pages that are one file: jinja2 templates, and images inside the page."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

_QUALITIES = (88, 78, 66, 54)
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def environment(package: str, *, autoescape: bool = True) -> Environment:
    """Returns the templates of a package's folder `templates`; they are strict about names that are not given.

    Args:
        package: dotted name.
        autoescape: False for templates that are not HTML.
    """
    found = Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
    )
    found.filters |= {"repr": repr, "shortened": shortened}
    return found


def plain(value: Any) -> Any:
    """Replaces what no HTML page can hold in a text (control characters, half a surrogate pair)."""
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def shortened(text: str, length: int = 220) -> str:
    """Returns at most `length` characters; a cut text ends in an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def bounded_jpeg(image: Image.Image, max_bytes: int) -> tuple[str, Image.Image]:
    """Encodes an image as a JPEG of bounded size, more coarsely and then smaller until it fits.

    Args:
        image: RGB.
        max_bytes: of the file.

    Returns:
        a data URI, and the image in the size that was encoded.
    """
    while True:
        for quality in _QUALITIES:
            stream = io.BytesIO()
            image.save(stream, format="JPEG", quality=quality, optimize=True)
            if stream.tell() <= max_bytes:
                return _data_uri("jpeg", stream.getvalue()), image
        image = image.resize((max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)), Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, format_name: str, **options: Any) -> str:
    """Encodes an image as a data URI; `options` are those of PIL for the format."""
    stream = io.BytesIO()
    image.save(stream, format=format_name, **options)
    return _data_uri(format_name.lower(), stream.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
