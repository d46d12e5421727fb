"""Reads LabelMe's JSON, one file beside each image, and ReasonSeg (`deris_llm.data.formats.reasonseg`), which is similar.

    {"imagePath": "a.jpg", "imageHeight": 480, "imageWidth": 640,
     "shapes": [{"label": "dog", "shape_type": "polygon", "points": [[10, 10], [60, 10], [60, 40]], "group_id": null,
                 "description": "the left dog"}]}

`--source` is a file, or a folder with such files or with a folder of them per split (`train/`, `valid/`; if no folder name
says a split, all is `train`). A label is a phrase that means all its objects in the image; an object with a `description`
(or the field that `--mapping caption=FIELD` names) is meant by that text, alone. Shapes of one label and `group_id` are one
object. Polygons, circles and masks are drawn; boxes only with `--mapping boxes=masks`. Images: as `imagePath` says, or with
the JSON's own name; below --images, if given.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import PrepareOptions, SourceEntry, SourceFault
from deris_llm.data.formats.objects import (
    AnnotationReader,
    Shape,
    ellipse,
    entries_of_shapes,
    pasted,
    rectangle,
    split_named,
)
from deris_llm.data.formats.reasonseg import entries_of_file, is_reasonseg, notes_of_split, read_any_encoding
from deris_llm.data.images import BROKEN, MAX_PIXELS, ImageFolder, opened_image, portable_name
from deris_llm.data.masks import mask_of_image

_BOXES = ("rectangle", "oriented_rectangle", "rotation")  # two corners, or four
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")


class LabelmeReader(AnnotationReader):
    """The images in the order of their files' names."""

    format = "labelme"
    expected = "LabelMe's *.json with `shapes`, or a folder of them"
    mapping_keys = {"caption": "description", "boxes": "refused"}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._root = self.source if self.source.is_dir() else self.source.parent
        self._contents: dict[Path, dict[str, Any] | str] = {}
        others: list[str] = []
        for file in self.find_files("*.json|*/*.json"):
            content = _read(file)
            if isinstance(content, str) or (isinstance(content, dict) and "shapes" in content):
                self._contents[file] = content
            else:
                others.append(str(file.relative_to(self._root)))
        if not self._contents:
            raise self.no_files_error(", ".join(others[:5]))
        self.files = tuple(self._contents)
        self.notes = (
            *([f"not read, as they are not LabelMe's: {', '.join(others)}"] if others else []),
            *(
                ["no folder name says a split: all is train"]
                if not any(split_named(file.parent.name) for file in self.files)
                else []
            ),
        )
        contents = {file: content for file, content in self._contents.items() if isinstance(content, dict)}
        self._note_reasonseg(contents)
        self.locate_images({file: self._image_of(file, content) for file, content in contents.items()})

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for file, content in self._contents.items():
            split = split_named(file.parent.name) or "train"
            where = str(file.relative_to(self._root))
            if isinstance(content, str):
                yield SourceFault(where, split, "structure", content)
            elif not isinstance(content["shapes"], list) or not all(isinstance(s, dict) for s in content["shapes"]):
                message = f"expected `shapes` to be a list of objects, got {describe(content['shapes'])}"
                yield SourceFault(where, split, "structure", message)
            elif is_reasonseg(content):
                folder = ImageFolder(self.image_folder, self.options.follow_links)
                exif = self.options.exif or "displayed"
                yield from entries_of_file(content, where, split, file.stem, self.image_names[file], folder, exif)
            else:
                yield from self._labelled(file, where, split, content)

    def _note_reasonseg(self, contents: Mapping[Path, dict[str, Any]]) -> None:
        """Notes by split what is special about files of ReasonSeg."""
        of_split: dict[str, list[Mapping[str, Any]]] = {}
        for file, content in contents.items():
            shapes = content["shapes"]
            if is_reasonseg(content) and isinstance(shapes, list) and all(isinstance(shape, dict) for shape in shapes):
                of_split.setdefault(split_named(file.parent.name) or "train", []).append(content)
        for half, is_sentence in (("test_short", False), ("test_long", True)):
            of_split[half] = [each for each in of_split.get("test", []) if each.get("is_sentence") is is_sentence]
        self.split_notes = {split: notes_of_split(found, split) for split, found in of_split.items()}

    def _labelled(
        self, file: Path, where: str, split: str, content: Mapping[str, Any]
    ) -> Iterator[SourceEntry | SourceFault]:
        size_hw = _size_of(content)
        shapes: list[Shape] = []
        for number, each in enumerate(content["shapes"]):
            at = f"{where} shape {number}"
            label, caption, group = each.get("label"), each.get(self.mapping["caption"]), each.get("group_id")
            if not isinstance(label, str):
                yield SourceFault(at, split, "structure", f"expected a text as label, got {describe(label)}")
                continue
            try:
                mask = self._mask(each, size_hw)
            except BROKEN as error:
                mask = ValueError(str(error))
            shapes.append(Shape(at, label, group if isinstance(group, (int, str)) else None, mask, caption or None))
        name = file.stem if split_named(file.parent.name) else os.path.splitext(where)[0]
        for entry in entries_of_shapes(name, split, self.image_names[file], size_hw, shapes, where):
            yield entry if isinstance(entry, SourceFault) else replace(entry, size_hw=_declared(content))

    def _mask(self, shape: Mapping[str, Any], size_hw: tuple[int, int] | None) -> Any:
        """Polygons or RLE of a shape.

        Raises:
            ValueError: the shape has no area, or its points do not fit its type.
        """
        kind, points = shape.get("shape_type") or "polygon", shape.get("points")
        if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise ValueError(f"expected points [[x, y], ...], got {describe(points)}")
        flat = [value for point in points for value in point]
        if kind in _BOXES:
            self.check_box()
        if kind == "polygon" or (kind in _BOXES and len(points) == 4):
            return [flat]
        if kind not in ("rectangle", "circle", "mask"):
            raise ValueError(f"expected a polygon, circle or mask, got shape_type {kind!r}, which has no area")
        if len(points) != 2 or not all(isinstance(value, (int, float)) for value in flat):
            raise ValueError(f"expected two points of a {kind}, got {describe(points)}")
        if kind == "rectangle":
            x0, y0, x1, y1 = flat
            return [rectangle(x0, y0, x1, y1)]
        if kind == "circle":
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            return [ellipse(x, y, radius, radius)]
        return _decoded(shape.get("mask"), flat, size_hw)

    def _image_of(self, file: Path, content: Mapping[str, Any]) -> tuple[Any, Sequence[Path]]:
        """The name of a file's image, and the folders that may hold it."""
        images, given = self.options.images, content.get("imagePath")
        if not isinstance(given, str) or not given.strip():
            names = [file.with_suffix(suffix).name for suffix in _SUFFIXES]
            folders = [*([images, images / file.parent.name] if images else []), file.parent]
            there = {name: next((folder / name for folder in folders if (folder / name).is_file()), None) for name in names}
            found = {(path.stat().st_dev, path.stat().st_ino): name for name, path in there.items() if path}
            return list(found.values()) if len(found) > 1 else [*found.values(), *names][0], folders
        folder, _, name = portable_name(given).rpartition("/")
        if images is not None:
            return name, [images / file.parent.relative_to(self._root), images]
        said = Path(os.path.normpath(file.parent / folder))
        inside = [said] if said.is_relative_to(self._root) else []
        return name, [*inside, file.parent, file.parent / "images", self._root / "images"]


def _read(file: Path) -> dict[str, Any] | str | None:
    """The content without the embedded image; what is wrong with the file; or None for JSON of another form."""
    try:
        content = read_any_encoding(file)
    except DataError as error:
        return str(error)
    return {key: value for key, value in content.items() if key != "imageData"} if isinstance(content, dict) else None


def _declared(content: Mapping[str, Any]) -> Any:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return None if height is None and width is None else (height, width)


def _size_of(content: Mapping[str, Any]) -> tuple[int, int] | None:
    declared = _declared(content)
    if declared is None or not all(isinstance(side, int) and side > 0 for side in declared):
        return None
    return declared if declared[0] * declared[1] <= MAX_PIXELS else None


def _decoded(encoded: Any, corners: Sequence[float], size_hw: tuple[int, int] | None) -> dict[str, Any]:
    """A mask that is stored as a PNG of its box, in base64."""
    if not all(math.isfinite(value) for value in corners):
        raise ValueError(f"expected two points of a mask, got {describe(corners)}")
    left, top, right, bottom = (round(value) for value in corners)
    try:
        content = base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a mask as PNG in base64, got {describe(encoded)}") from error
    with opened_image(io.BytesIO(content)) as file:
        if file.size != (right - left + 1, bottom - top + 1):  # before it is decoded
            raise ValueError(f"expected a mask of its box, {right - left + 1} x {bottom - top + 1} px, got {file.size}")
        crop, _ = mask_of_image(file)
    return pasted(crop, left, top, size_hw)
