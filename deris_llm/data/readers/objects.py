"""What readers of annotation tools' files (COCO, LabelMe, CVAT) share: splits and pictures by name, objects as phrases.

These files have objects with a class, and pictures whose names are relative to a folder that the file does not name. A
phrase is the name of a class, which asks for all its objects in the picture, or an object's own text, which asks for it
alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deris_llm.data.pictures import ImageFolder, portable_name
from deris_llm.data.readers.base import SourceEntry, SourceInstance, SourcePhrase

Key = TypeVar("Key", bound=Hashable)

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_CORNERS = 64  # of the polygon that stands for an ellipse; 0.2 % of its area is lost


def split_named(name: str) -> str | None:
    """The one of train, val and test that a file's or folder's name says (``instances_train2017``, ``valid``)."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, eq=False)
class LabelledObject:
    """An object of a picture as an annotation tool writes it."""

    name: str  # of the phrase that asks for it alone, unique in its split
    label: Any  # name of its class
    mask: Any  # as of `SourceInstance`
    caption: Any = None  # a text of its own; None: it is asked by its class
    id: Any = None  # annotation id; None: the mask's content is its identity
    class_id: Any = None  # in the names of phrases; None: the label
    where: str = ""


def entries_of_picture(
    name: str, split: str, image: Any, size_hw: Any, objects: Sequence[LabelledObject]
) -> Iterator[SourceEntry]:
    """Objects with a text of their own, then the classes of the others, each with all of its objects.

    Args:
        name: of the picture, in the names of phrases.
        split: of the picture.
        image: its file.
        size_hw: px, for which the masks were drawn; None if nothing says.
        objects: those of the picture, in the order of the file.
    """
    by_class: dict[Any, list[LabelledObject]] = {}
    for each in objects:
        by_class.setdefault(each.label, []).append(each)
    asked = [(each.name, each.caption, [each]) for each in objects if each.caption is not None]
    for label, members in by_class.items():
        if any(each.caption is None for each in members):
            class_id = members[0].label if members[0].class_id is None else members[0].class_id
            asked.append((f"{name}-{class_id}", label, members))
    for phrase_id, text, members in asked:
        yield SourceEntry(
            where=members[0].where,
            split=split,
            image=image,
            phrases=(SourcePhrase(phrase_id, text),),
            instances=tuple(SourceInstance(each.mask, each.id) for each in members),
            size_hw=size_hw,
            category=members[0].label,
            num_same_class=len(by_class[members[0].label]) - len(members),
        )


def find_pictures(
    wanted: Mapping[Key, tuple[Any, Sequence[Path]]], *, follow_links: bool
) -> tuple[Path | None, dict[Key, Any]]:
    """Finds pictures whose folder is not said.

    Args:
        wanted: a name and the folders where it may be, likeliest first; those that do not exist are passed over.
        follow_links: as of `ImageFolder`.

    Returns:
        The folder that holds all of the folders with pictures, None if there is no folder; and each name below it. A
        picture that is nowhere is named below its first folder, for the message that it is missing.
    """
    chosen: dict[Key, tuple[Any, Path]] = {}
    is_dir = cache(Path.is_dir)
    for key, (name, folders) in wanted.items():
        there = [folder for folder in folders if is_dir(folder)]
        if there:
            chosen[key] = (name, next((folder for folder in there if _holds(folder, name, follow_links)), there[0]))
    if not chosen:
        return None, {key: name for key, (name, _) in wanted.items()}
    root = Path(os.path.commonpath({str(folder.absolute()) for _, folder in chosen.values()}))
    prefixes = {folder: os.path.relpath(folder.absolute(), root) for _, folder in chosen.values()}
    return root, {
        key: f"{prefixes[folder]}/{portable_name(name)}" if isinstance(name, str) and prefixes[folder] != "." else name
        for key, (name, folder) in chosen.items()
    }


def _holds(folder: Path, name: Any, follow_links: bool) -> bool:
    path, _ = ImageFolder(folder, follow_links).file(name)
    try:
        return path is not None and path.is_file()
    except OSError:  # a name longer than a file system takes
        return False


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
