"""Reads CVAT's own export, "CVAT for images 1.1": annotations.xml beside images/.

    <annotations><version>1.1</version>
      <image id="0" name="a.jpg" subset="train" width="640" height="480">
        <polygon label="dog" points="10.00,10.00;60.00,10.00;60.00,40.00" group_id="1">
          <attribute name="caption">the left dog</attribute></polygon>
        <mask label="cat" rle="3, 5, 12" left="10" top="20" width="5" height="4"/>
      </image></annotations>

`--source` is the XML, or a folder with such files. The split is the image's `subset`, else what the folder's name says, else
`train`. A label is a phrase that means all its objects in the image; an object with an attribute `caption` (or the one
that `--mapping caption=NAME` names) is meant by that text, alone. Shapes of one label and group are one object. Polygons,
ellipses and masks are drawn; boxes only with `--mapping boxes=masks`. An XML with a document type is refused: entities
may name other files or exhaust the memory, and CVAT writes none.
"""

from __future__ import annotations

import math

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import SourceEntry, SourceFault, PrepareOptions, check_is_unpacked
from deris_llm.data.formats.objects import (
    AnnotationReader,
    Shape,
    ellipse,
    entries_of_shapes,
    pasted,
    rectangle,
    split_named,
)
from deris_llm.data.images import MAX_PIXELS


class CvatReader(AnnotationReader):
    """The images in the order of the files."""

    format = "cvat"
    expected = "CVAT's annotations.xml, or its folder"
    mapping_keys = {"caption": "caption", "boxes": "refused"}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self.files = self.find_files("*.xml", "*/*.xml")
        self._pages = [(file, image) for file in self.files for image in _read(file).findall("image")]
        wanted: dict[int, tuple[Any, list[Path]]] = {}
        for number, (file, image) in enumerate(self._pages):
            subset = image.get("subset") or ""
            base = [options.images] if options.images else [file.parent / "images", file.parent]
            wanted[number] = (image.get("name"), [*(folder / subset for folder in base if subset), *base])
        tags = sum(len(image.findall("tag")) for _, image in self._pages)
        attributes = Counter(
            attribute.get("name") for _, image in self._pages for attribute in image.iterfind("./*/attribute")
        )
        unread = [str(name) for name in attributes if name != self.mapping["caption"]]
        self.notes = (
            *([f"{tags:,} tags of whole images were left out"] if tags else []),
            *([f"attributes not read: {', '.join(unread)}; --mapping caption=NAME reads one as phrases"] if unread else []),
        )
        self.locate_images(wanted)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for number, (file, image) in enumerate(self._pages):
            subset = image.get("subset") or ""
            split = split_named(subset) or split_named(file.parent.name) or "train"
            if subset and subset != "default" and split_named(subset) is None:
                split = subset
            yield from self._of_image(file.name, split, image, self.image_names[number])

    def _of_image(
        self, file: str, split: str, image: ElementTree.Element, image_name: Any
    ) -> Iterator[SourceEntry | SourceFault]:
        name = image.get("name") or ""
        where = f"{file} image {name}"
        sides = [image.get("height", ""), image.get("width", "")]
        if not all(side.isdecimal() for side in sides) or not 0 < math.prod(int(side[:9]) for side in sides) <= MAX_PIXELS:
            yield SourceFault(where, split, "size", f"expected height and width in px, got {' and '.join(map(repr, sides))}")
            return
        size_hw = (int(sides[0]), int(sides[1]))
        shapes: list[Shape] = []
        for number, each in enumerate(image):
            if each.tag == "tag":
                continue
            try:
                mask = self._mask(each, size_hw)
            except ValueError as error:
                mask = error
            texts = [a.text for a in each.findall("attribute") if a.get("name") == self.mapping["caption"]]
            caption = next((text.strip() for text in texts if text and text.strip()), None)
            group = each.get("group_id", "0")
            at = f"{where} {each.tag} {number}"
            shapes.append(Shape(at, each.get("label"), None if group == "0" else group, mask, caption))
        yield from entries_of_shapes(name, split, image_name, size_hw, shapes, where)

    def _mask(self, shape: ElementTree.Element, size_hw: tuple[int, int]) -> Any:
        """Polygons or RLE of a shape.

        Raises:
            ValueError: the shape has no area, or its numbers are malformed.
        """

        def numbers(*names: str) -> list[float]:
            return [_number(shape.get(name), name) for name in names]

        degrees = _number(shape.get("rotation", "0"), "rotation")
        if shape.tag == "polygon":
            points = [point.split(",") for point in shape.get("points", "").split(";")]
            if wrong := [point for point in points if len(point) != 2]:
                raise ValueError(f"expected points x,y;x,y;..., got {','.join(wrong[0])!r} as one of {len(points)}")
            return [[_number(value, "coordinate") for point in points for value in point]]
        if shape.tag == "ellipse":
            return [ellipse(*numbers("cx", "cy", "rx", "ry"), degrees=degrees)]
        if shape.tag == "box":
            self.check_box()
            return [rectangle(*numbers("xtl", "ytl", "xbr", "ybr"), degrees=degrees)]
        if shape.tag != "mask":
            raise ValueError(f"expected a polygon, ellipse or mask, got a {shape.tag}, which has no area")
        left, top, width, height = (_whole(shape.get(name), name) for name in ("left", "top", "width", "height"))
        counts = np.array([_whole(count, "RLE count") for count in shape.get("rle", "").split(",")])
        if width < 1 or height < 1 or counts.min() < 0 or not counts.sum() == width * height <= MAX_PIXELS:
            raise ValueError(f"expected RLE counts of {width} x {height} px in all, got {counts.sum()}")
        row_by_row = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return pasted(row_by_row.reshape(height, width), left, top, size_hw)


def _number(text: str | None, name: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"expected a number as {name}, got {text!r}") from None


def _whole(text: str | None, name: str) -> int:
    number = _number(text, name)
    if not number.is_integer():
        raise ValueError(f"expected a whole number as {name}, got {text!r}")
    return int(number)


def _read(file: Path) -> ElementTree.Element:
    """The root of an XML file that has no document type.

    Raises:
        DataError: the file is not XML, has a document type, or is not of "CVAT for images".
    """
    content = file.read_bytes()
    check_is_unpacked(file, content[:4])
    try:
        text = content.decode("utf-8-sig")  # whatever encoding it declares, so that nothing hides from the next check
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise DataError(
                f"{file}: expected CVAT's XML, which has no document type, got one: entities in a file from elsewhere may exhaust "
                "the memory. Export the task from CVAT again"
            )
        root = ElementTree.fromstring(text)
    except DataError:
        raise
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(
            f"{file}: expected XML in UTF-8, got {type(error).__name__}: {error}. Export the task from CVAT again"
        ) from error
    if root.tag != "annotations" or root.find("image") is None:
        holds = ", ".join(dict.fromkeys(child.tag for child in root)) or "nothing"
        raise DataError(
            f'{file}: expected <annotations> with an <image> each, got <{root.tag}> with {holds}. Export the task as "CVAT for '
            'images 1.1" (tracks belong to "CVAT for video")'
        )
    return root
