"""What readers of annotation tools' files (COCO, LabelMe, CVAT) share: splits, images by name, objects as phrases.

These files hold objects with a class, and image names relative to a folder that the file does not name. A phrase is the
name of a class, which means all its objects in the image, or an object's own text, which means this object alone.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import SourceEntry, SourceFault, SourceInstance, PrepareOptions, SourcePhrase, SourceReader
from deris_llm.data.images import ImageFolder, fault_of_name, portable_name
from deris_llm.data.masks import decode_segmentation, encode_mask

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_CORNERS = 64  # of the polygon that approximates an ellipse; 0.2 % of its area is lost


@dataclass(frozen=True, eq=False)
class LabelledObject:
    """An object of an image as an annotation tool writes it."""

    name: str  # of the phrase that means this object alone, unique in its split
    label: Any  # name of its class
    mask: Any  # as of `SourceInstance`
    caption: Any = None  # a text of its own; None: its class is the phrase
    id: Any = None  # annotation id; None: the mask's content identifies the object
    class_id: Any = None  # in phrase ids; None: the label
    where: str = ""


@dataclass(frozen=True, eq=False)
class Shape:
    """A drawn shape; shapes of one label and group are parts of one object."""

    where: str
    label: Any
    group: Any  # None: an object of its own
    mask: Any  # polygons, RLE, or the ValueError that says why there is none, which spoils every phrase for this object
    caption: str | None = None


class AnnotationReader(SourceReader):
    """A reader of annotation tools' files.

    Raises:
        DataError: as `SourceReader`, and a mapping ``boxes`` that is neither masks nor refused.
    """

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        boxes = self.mapping.get("boxes", "refused")
        if boxes not in ("masks", "refused"):
            raise DataError(f"--mapping boxes={boxes}: expected masks or refused. Correct it")
        self.takes_boxes = boxes == "masks"

    def check_box(self) -> None:
        """Checks that the user takes boxes as masks.

        Raises:
            ValueError: the user does not.
        """
        if not self.takes_boxes:
            raise ValueError("a box is not a mask; if it encloses an object that fills it, take boxes with --mapping boxes=masks")

    def locate_images(self, wanted: Mapping[Any, tuple[Any, Sequence[Path]]]) -> None:
        """Sets ``image_folder`` and ``image_names``, and adds notes.

        An image that is not found by its full name is searched by the last part of it, if no other name ends the same. A
        missing image gets a name below its first folder, for the message that it is missing.

        Args:
            wanted: key -> a name and the folders that may hold it, likeliest first; folders that do not exist are skipped.

        Raises:
            DataError: not a single image is found.
        """
        is_dir = cache(Path.is_dir)
        ends = Counter(
            (name.rpartition("/")[2], folders)
            for name, folders in {(portable_name(n), tuple(f)) for n, f in wanted.values() if isinstance(n, str)}
        )
        places: dict[Any, tuple[str, Path]] = {}  # without names that are to be refused
        by_end: list[str] = []
        for key, (given, folders) in wanted.items():
            there = [folder for folder in folders if is_dir(folder)]
            if not there or fault_of_name(there[0], given) is not None:
                continue
            name = portable_name(given)
            found = next((folder for folder in there if self._holds(folder, name)), None)
            end = name.rpartition("/")[2]
            if found is None and ends[end, tuple(folders)] == 1:
                found = next((folder for folder in there if self._holds(folder, end)), None)
                by_end += [f"{name} as {end}"] if found is not None else []
                name = name if found is None else end
            places[key] = (name, found or there[0])
        self.image_names = {key: name for key, (name, _) in wanted.items()}
        self.image_folder = self.options.images or (self.source if self.source.is_dir() else self.source.parent)
        if not places:
            return
        if not any(os.path.lexists(folder / name) for name, folder in places.values()):
            searched = dict.fromkeys(folder for _, folders in wanted.values() for folder in folders if is_dir(folder))
            raise DataError(
                f"images: expected {len(places):,} in one of {', '.join(map(str, searched))}, got none of them, not even "
                f"{next(iter(places.values()))[0]}. Name their folder with --images"
            )
        self.image_folder = root = Path(os.path.commonpath({str(folder.absolute()) for _, folder in places.values()}))
        prefix = cache(lambda folder: os.path.relpath(folder.absolute(), root))
        self.image_names |= {
            key: name if prefix(folder) == "." else f"{prefix(folder)}/{name}" for key, (name, folder) in places.items()
        }
        if by_end:
            said = f"{len(by_end):,} images were found by the last part of their names, e.g. {by_end[0]}"
            self.notes = (*self.notes, said)

    def _holds(self, folder: Path, name: str) -> bool:
        # Most folders do not hold the image, so the slow check, where links lead, comes second.
        return (
            os.path.isfile(folder / name) and ImageFolder(folder, self.options.follow_links).file(name)[0] is not None
        )


def split_named(name: str) -> str | None:
    """The one of train, val and test that a file or folder name contains (``instances_train2017``, ``valid``)."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def class_key(label: Any) -> Any:
    """Equal for labels that differ only in case and blanks: as phrases they mean the same objects."""
    return " ".join(label.casefold().split()) if isinstance(label, str) else label


def entries_of_image(
    name: str, split: str, image: Any, size_hw: Any, objects: Sequence[LabelledObject]
) -> Iterator[SourceEntry]:
    """Yields the objects with a text of their own, then the classes of the others, each with all of its objects.

    Args:
        name: of the image, in phrase ids.
        split: of the image.
        image: its file.
        size_hw: px, for which the masks were drawn; None if unknown.
        objects: of the image, in the order of the file.
    """
    by_class: dict[Any, list[LabelledObject]] = {}
    for each in objects:
        by_class.setdefault(class_key(each.label), []).append(each)
    asked = [(each.name, each.caption, [each], False) for each in objects if each.caption is not None]
    for members in by_class.values():
        if any(each.caption is None for each in members):
            class_id = members[0].label if members[0].class_id is None else members[0].class_id
            asked.append((f"{name}-{class_id}", members[0].label, members, True))
    for phrase_id, text, members, asks_class in asked:
        yield SourceEntry(
            where=next((each.where for each in members if isinstance(each.mask, ValueError)), members[0].where),
            split=split,
            image=image,
            phrases=(SourcePhrase(phrase_id, text),),
            instances=tuple(SourceInstance(each.mask, each.id) for each in members),
            size_hw=size_hw,
            category=members[0].label,
            num_same_class=len(by_class[class_key(members[0].label)]) - len(members),
            asks_class=asks_class,
        )


def entries_of_shapes(
    name: str, split: str, image: Any, size_hw: Any, shapes: Sequence[Shape], where: str
) -> Iterator[SourceEntry | SourceFault]:
    """As `entries_of_image`, of objects whose parts are shapes; an object's text is the first one that a part has."""
    parts: dict[Any, list[Shape]] = {}
    for number, shape in enumerate(shapes):
        parts.setdefault(number if shape.group is None else (shape.label, shape.group), []).append(shape)
    try:
        objects = [
            LabelledObject(
                name=f"{name}#{number}",
                label=members[0].label,
                mask=members[0].mask if len(members) == 1 else _joined([each.mask for each in members], size_hw),
                caption=next((each.caption for each in members if each.caption), None),
                where=members[0].where,
            )
            for number, members in enumerate(parts.values())
        ]
    except ValueError as error:
        yield SourceFault(where, split, "mask", str(error))
        return
    yield from entries_of_image(name, split, image, size_hw, objects)


def _joined(masks: Sequence[Any], size_hw: tuple[int, int] | None) -> Any:
    """The union of masks; polygons stay polygons."""
    if faults := [mask for mask in masks if isinstance(mask, ValueError)]:
        return faults[0]
    if all(isinstance(mask, list) for mask in masks):
        return [polygon for mask in masks for polygon in mask]
    if size_hw is None:
        raise ValueError("expected the image's size where an object has several masks, got none")
    return encode_mask(np.logical_or.reduce([decode_segmentation(mask, *size_hw) for mask in masks]))


def rectangle(x0: float, y0: float, x1: float, y1: float, *, degrees: float = 0.0) -> list[float]:
    """A box as a polygon, rotated clockwise (y points down) about its centre."""
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return _rotated([(-w, -h), (w, -h), (w, h), (-w, h)], x, y, degrees)


def ellipse(x: float, y: float, rx: float, ry: float, *, degrees: float = 0.0) -> list[float]:
    """An ellipse as a polygon, rotated clockwise (y points down) about its centre (x, y)."""
    angles = [2 * math.pi * k / _CORNERS for k in range(_CORNERS)]
    return _rotated([(rx * math.cos(a), ry * math.sin(a)) for a in angles], x, y, degrees)


def _rotated(points: Sequence[tuple[float, float]], x: float, y: float, degrees: float) -> list[float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [value for dx, dy in points for value in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


def pasted(crop: np.ndarray, left: int, top: int, size_hw: tuple[int, int] | None) -> dict[str, Any]:
    """The RLE of a mask that is stored as a crop of the image.

    Args:
        crop: bool (h, w).
        left: of its first column, px.
        top: of its first row, px.
        size_hw: of the image, px.

    Raises:
        ValueError: the crop leaves the image, or the image's size is unknown.
    """
    height, width = crop.shape
    if size_hw is None or left < 0 or top < 0 or top + height > size_hw[0] or left + width > size_hw[1]:
        raise ValueError(f"expected a mask within the image, {size_hw} px, got {(height, width)} px at row {top}, column {left}")
    whole = np.zeros(size_hw, bool)
    whole[top : top + height, left : left + width] = crop
    return encode_mask(whole)
