"""What readers of annotation tools' files (COCO, LabelMe, CVAT) share: splits and images by name, objects as phrases.

These files have objects with a class, and images whose names are relative to a folder that the file does not name. A
phrase is the name of a class, which asks for all its objects in the image, or an object's own text, which asks for it
alone.
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
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.images import ImageFolder, fault_of_name, portable_name
from deris_llm.data.formats.base import SourceEntry, SourceInstance, SourcePhrase

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_CORNERS = 64  # of the polygon that stands for an ellipse; 0.2 % of its area is lost


def split_named(name: str) -> str | None:
    """The one of train, val and test that a file's or folder's name says (``instances_train2017``, ``valid``)."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class LabelledObject:
    """An object of an image as an annotation tool writes it."""

    name: str  # of the phrase that asks for it alone, unique in its split
    label: Any  # name of its class
    mask: Any  # as of `SourceInstance`
    caption: Any = None  # a text of its own; None: it is asked by its class
    id: Any = None  # annotation id; None: the mask's content is its identity
    class_id: Any = None  # in the names of phrases; None: the label
    where: str = ""


def class_key(label: Any) -> Any:
    """The same for labels that differ in case and blanks alone: as phrases they ask for the same objects."""
    return " ".join(label.casefold().split()) if isinstance(label, str) else label


def entries_of_image(
    name: str, split: str, image: Any, size_hw: Any, objects: Sequence[LabelledObject]
) -> Iterator[SourceEntry]:
    """Objects with a text of their own, then the classes of the others, each with all of its objects.

    Args:
        name: of the image, in the names of phrases.
        split: of the image.
        image: its file.
        size_hw: px, for which the masks were drawn; None if nothing says.
        objects: those of the image, in the order of the file.
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


@dataclass(frozen=True, eq=False)
class FoundPictures:
    """Where the images of a source are."""

    folder: Path | None  # holds all folders with images; None: no folder that was asked for exists
    names: Mapping[Any, Any]  # key -> name below the folder
    notes: tuple[str, ...]  # what was found in another way than by its whole name


def find_images(wanted: Mapping[Any, tuple[Any, Sequence[Path]]], *, follow_links: bool) -> FoundPictures:
    """Finds images whose folder is not said.

    An image that is not there by its whole name is looked for by the last part of it, if no other name ends so. One that
    is nowhere is named below its first folder, for the message that it is missing.

    Args:
        wanted: key -> a name and the folders where it may be, likeliest first; those that do not exist are passed over.
        follow_links: as of `ImageFolder`.

    Raises:
        DataError: not one of them is there.
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
        found = next((folder for folder in there if _holds(folder, name, follow_links)), None)
        end = name.rpartition("/")[2]
        if found is None and ends[end, tuple(folders)] == 1:
            found = next((folder for folder in there if _holds(folder, end, follow_links)), None)
            by_end += [f"{name} as {end}"] if found is not None else []
            name = name if found is None else end
        places[key] = (name, found or there[0])
    names = {key: name for key, (name, _) in wanted.items()}
    if not places:
        return FoundPictures(None, names, ())
    if not any(os.path.lexists(folder / name) for name, folder in places.values()):
        folders = dict.fromkeys(folder for _, folders in wanted.values() for folder in folders if is_dir(folder))
        raise DataError(
            f"images: expected {len(places):,} in one of {', '.join(map(str, folders))}, got none of them, not even "
            f"{next(iter(places.values()))[0]}. Name their folder with --images"
        )
    root = Path(os.path.commonpath({str(folder.absolute()) for _, folder in places.values()}))
    prefix = cache(lambda folder: os.path.relpath(folder.absolute(), root))
    names |= {
        key: name if prefix(folder) == "." else f"{prefix(folder)}/{name}" for key, (name, folder) in places.items()
    }
    said = (f"{len(by_end):,} images were found by the last part of their names, e.g. {by_end[0]}",) if by_end else ()
    return FoundPictures(root, names, said)


def _holds(folder: Path, name: Any, follow_links: bool) -> bool:
    # Most folders do not have it: the slow question, where links lead, comes second.
    return os.path.isfile(folder / name) and ImageFolder(folder, follow_links).file(name)[0] is not None


def rectangle(x0: float, y0: float, x1: float, y1: float, *, degrees: float = 0.0) -> list[float]:
    """A box as a polygon, turned clockwise (as seen, y down) about its centre."""
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    return _turned([(-w, -h), (w, -h), (w, h), (-w, h)], x, y, degrees)


def ellipse(x: float, y: float, rx: float, ry: float, *, degrees: float = 0.0) -> list[float]:
    """An ellipse as a polygon, turned clockwise (as seen, y down) about its centre (x, y)."""
    angles = [2 * math.pi * k / _CORNERS for k in range(_CORNERS)]
    return _turned([(rx * math.cos(a), ry * math.sin(a)) for a in angles], x, y, degrees)


def _turned(points: Sequence[tuple[float, float]], x: float, y: float, degrees: float) -> list[float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [value for dx, dy in points for value in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)]


@dataclass(frozen=True, eq=False)
class Shape:
    """A drawn shape; shapes of one label and group are parts of one object."""

    where: str
    label: Any
    group: Any  # None: an object of its own
    mask: Any  # polygons, RLE, or the ValueError why there is none: nothing is asked that would mean this object too
    caption: str | None = None


def objects_of_shapes(name: str, shapes: Sequence[Shape], size_hw: tuple[int, int] | None) -> list[LabelledObject]:
    """Joins the parts of objects; an object's text is the first that a part of it has.

    Raises:
        ValueError: parts that must be drawn to be joined, and cannot.
    """
    parts: dict[Any, list[Shape]] = {}
    for number, shape in enumerate(shapes):
        parts.setdefault(number if shape.group is None else (shape.label, shape.group), []).append(shape)
    return [
        LabelledObject(
            name=f"{name}#{number}",
            label=members[0].label,
            mask=members[0].mask if len(members) == 1 else _joined([each.mask for each in members], size_hw),
            caption=next((each.caption for each in members if each.caption), None),
            where=members[0].where,
        )
        for number, members in enumerate(parts.values())
    ]


def _joined(masks: Sequence[Any], size_hw: tuple[int, int] | None) -> Any:
    if faults := [mask for mask in masks if isinstance(mask, ValueError)]:
        return faults[0]
    if all(isinstance(mask, list) for mask in masks):
        return [polygon for mask in masks for polygon in mask]
    if size_hw is None:
        raise ValueError("expected the image's size where an object has several masks, got none")
    return encode_mask(np.logical_or.reduce([decode_segmentation(mask, *size_hw) for mask in masks]))


def pasted(crop: np.ndarray, left: int, top: int, size_hw: tuple[int, int] | None) -> dict[str, Any]:
    """The RLE of a mask that was cut out of its image's size.

    Args:
        crop: bool (h, w).
        left: px, of its first column.
        top: px, of its first row.
        size_hw: px, of the image.

    Raises:
        ValueError: it does not lie within the image, or its size is not known.
    """
    height, width = crop.shape
    if size_hw is None or left < 0 or top < 0 or top + height > size_hw[0] or left + width > size_hw[1]:
        raise ValueError(f"expected a mask within the image, {size_hw} px, got {(height, width)} px at row {top}, column {left}")
    whole = np.zeros(size_hw, bool)
    whole[top : top + height, left : left + width] = crop
    return encode_mask(whole)


def takes_boxes(mapping: Mapping[str, str]) -> bool:
    """What ``boxes`` of a mapping says: whether a box is the mask of what fills it.

    Raises:
        DataError: neither yes nor no.
    """
    if mapping["boxes"] not in ("masks", "refused"):
        raise DataError(f"--mapping boxes={mapping['boxes']}: expected masks or refused, got another. Correct it")
    return mapping["boxes"] == "masks"


NO_MASK = "a box is no mask; if it was drawn for something that fills it, take boxes with --mapping boxes=masks"
