"""HTML from elements: every text is escaped and every tag closed because no page of ours is put together from strings."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from importlib.resources import files
from xml.etree.ElementTree import Element, tostring

from PIL import Image

Node = Element | str | None

MAX_PICTURE_BYTES = 45_000
"""Of one encoded picture; with a bounded number of pictures it bounds the page."""

_QUALITIES = (88, 78, 66, 54)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Node | Iterable[Node], **attributes: str | float | None) -> Element:
    """An element of HTML or inline SVG.

    Args:
        tag: its name.
        children: elements and texts in their order, or lists of them; None is left out.
        attributes: by name; ``class_`` is ``class``, other underscores are hyphens (``stroke_width``); None is left out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(
                name.rstrip("_").replace("_", "-"), plain(f"{value:g}" if isinstance(value, float) else str(value))
            )
    for child in children:
        for node in (child,) if child is None or isinstance(child, (str, Element)) else child:
            _append(made, node)
    return made


def _append(parent: Element, node: Node) -> None:
    if node is None:
        return
    if isinstance(node, Element):
        parent.append(node)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + plain(node)
    else:
        parent.text = (parent.text or "") + plain(node)


def plain(text: str) -> str:
    """The text with what no HTML page can hold (control characters, half a surrogate pair) replaced."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters; what is cut off ends in an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


def phrase(text: str, length: int = 220) -> Element:
    """A phrase as data: isolated, so that its writing direction does not touch the page's."""
    return element("bdi", shortened(text, length))


def document(title: str, body: Iterable[Node]) -> str:
    """A whole page that needs nothing else: no script, no font, no request."""
    style = (files("deris_llm.evaluation.page") / "page.css").read_text(encoding="utf-8")
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            element("style", style),
        ),
        element("body", body),
        lang="en",
    )
    return f"<!doctype html>\n{tostring(page, encoding='unicode', method='html')}\n"


def picture(image: Image.Image, alt: str, *, max_bytes: int = MAX_PICTURE_BYTES) -> Element:
    """A JPEG inside the page, of bounded size.

    Args:
        image: RGB.
        alt: what it shows.
        max_bytes: a picture that is larger is encoded more coarsely, and then smaller.
    """
    while True:
        for quality in _QUALITIES:
            stream = io.BytesIO()
            image.save(stream, format="JPEG", quality=quality, optimize=True)
            if stream.tell() <= max_bytes:
                data = base64.b64encode(stream.getvalue()).decode("ascii")
                return element(
                    "img", src=f"data:image/jpeg;base64,{data}", alt=shortened(alt, 220), width=image.width,
                    height=image.height, loading="lazy",
                )  # fmt: skip
        image = image.resize((max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)), Image.Resampling.LANCZOS)
