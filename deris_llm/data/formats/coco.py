"""Reads COCO-style instances: the phrase is the category's name, the referents are all its instances in the image.

    {"images": [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 9, "category_id": 3, "segmentation": [[...]], "iscrowd": 0}],
     "categories": [{"id": 3, "name": "dog"}]}

`--source` is the JSON, or a folder with such files, in `annotations/` or in a folder per split (Roboflow's
`train/_annotations.coco.json`). The split is what the file or folder name says (`instances_train2017.json`: `train`,
`valid/`: `val`), else the file's name. Beside `instances_*.json`, and by their names, files of captions, keypoints and
panoptic segments are not read. Each image is searched in `images/`, in the JSON's folder and in the folders that COCO has
(`train2017/` beside `annotations/`), or in the same way below --images; LVIS names images in `coco_url`. An annotation with a
text of its own (`caption`, or the field that `--mapping caption=FIELD` names) is meant by that text, alone. Categories with
the same name, ignoring case and blanks, are one. Crowds (`iscrowd`: 1) are left out, counted and named; annotation tools write
that for every RLE mask: `--crowds taken` takes them as objects.

`coco_tables` also reads the instances files of REFER and SeqTR.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from deris_llm.common.words import shortened
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import SourceEntry, SourceFault, PrepareOptions, files_in, other_format, read_json_file
from deris_llm.data.formats.objects import AnnotationReader, LabelledObject, class_key, entries_of_image, split_named

logger = logging.getLogger(__name__)

_NUMBERS = {"images": ("id", "width", "height"), "annotations": ("id", "image_id"), "categories": ("id",)}
_TEXTS = {"images": "file_name", "categories": "name"}

_NOT_INSTANCES = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
"""Prefixes of the names of COCO's other files."""


@dataclass(frozen=True)
class TableFault:
    """Why a record, or all records of one id, cannot be used."""

    table: str  # images, annotations or categories
    id: int | None  # None: the record has no usable id
    message: str  # names the records by their number in the file
    records: tuple[dict[str, Any], ...] = ()  # those that the message names
    is_repeated: bool = False  # several valid records share this id but differ

    @property
    def where(self) -> str:
        """The record for a message, e.g. ``annotation 7``."""
        singular = {"images": "image", "annotations": "annotation", "categories": "category"}
        return self.table if self.id is None else f"{singular[self.table]} {self.id}"


@dataclass(frozen=True, eq=False)
class CocoTables:
    """Records by id. Identical records of one id count once; different records of one id are all left out."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]
    faults: list[TableFault] = field(default_factory=list)

    def fault_of(self, table: str, record_id: object) -> str | None:
        """Why the records of this id cannot be used; None if the file has no such records."""
        return None if record_id is None else self._messages.get((table, record_id))

    @cached_property
    def _messages(self) -> dict[tuple[str, object], str]:
        return {(fault.table, fault.id): fault.message for fault in self.faults}


def coco_tables(content: object) -> CocoTables | str:
    """Indexes a parsed COCO instances file; masks and image names are not checked.

    Returns:
        The tables, or why the file is not COCO instances.
    """
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return describe(content)
    content = {"categories": [], **content}
    for name in _NUMBERS:
        if not isinstance(content[name], list):
            return f"{name} that are {describe(content[name])}"
    faults: list[TableFault] = []
    by_name = {name: _by_id(name, content[name], faults) for name in _NUMBERS}
    return CocoTables(**by_name, faults=faults)


def _by_id(table: str, records: Sequence[Any], faults: list[TableFault]) -> dict[int, dict[str, Any]]:
    numbers: dict[int, int] = {}  # id -> its first record
    found: dict[int, dict[str, Any]] = {}
    different: dict[int, tuple[str, list[dict[str, Any]]]] = {}
    num_equal = 0
    for number, given in enumerate(records):
        record = _whole_record(table, given)
        if isinstance(record, str):
            known = whole_number(given.get("id")) if isinstance(given, dict) else None
            records_of_fault = (given,) if isinstance(given, dict) else ()
            faults.append(TableFault(table, known, f"number {number} of {table}: {record}", records_of_fault))
            continue
        first = numbers.setdefault(record["id"], number)
        if first == number:
            found[record["id"]] = record
        elif record == found[record["id"]]:
            num_equal += 1
        else:
            one = found[record["id"]]
            different.setdefault(record["id"], (_difference(table, first, one, number, record), [one]))[1].append(record)
    if num_equal:
        logger.info("%d of %d %s repeat an earlier record exactly and count once", num_equal, len(records), table)
    for record_id, (message, of_id) in different.items():
        faults.append(TableFault(table, record_id, message, tuple(of_id), is_repeated=True))
        del found[record_id]
    return found


def _whole_record(table: str, record: Any) -> dict[str, Any] | str:
    """The record with its numbers as integers, or what is wrong with it."""
    if not isinstance(record, dict):
        return f"expected an object, got {describe(record)}"
    numbers: dict[str, int] = {}
    for key in _NUMBERS[table]:
        if (whole := whole_number(record.get(key))) is None:
            return f"expected a whole number as {key}, got {_said(record, key)}"
        numbers[key] = whole
    key = _TEXTS.get(table)
    if key is not None and (key in record or table == "categories") and not isinstance(record.get(key), str):
        return f"expected a text as {key}, got {_said(record, key)}"
    category = whole_number(record.get("category_id"))
    return {**record, **numbers, **({} if category is None else {"category_id": category})}


def whole_number(value: object) -> int | None:
    """An integer, also one that a table program wrote as 1.0; None for other values."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _said(record: dict[str, Any], key: str) -> str:
    return shortened(record[key], 60) if key in record else f"none ({describe(record)})"


def _difference(table: str, first: int, one: dict[str, Any], second: int, other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]

    def says(record: dict[str, Any]) -> str:
        return ", ".join(f"{key} {shortened(record.get(key), 40)}" for key in keys[:3])

    return (
        f"expected one record of id {one['id']} in {table}, got different ones: number {first} ({says(one)}) and number "
        f"{second} ({says(other)})"
    )


class CocoReader(AnnotationReader):
    """Phrases image by image, in the order of the files."""

    format = "coco"
    expected = "COCO's instances as JSON, or a folder of such files"
    mapping_keys = {"caption": "caption"}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self.files, passed_over = self._instance_files()
        self._contents: dict[str, CocoTables] = {}
        wanted: dict[tuple[str, int], tuple[Any, Sequence[Path]]] = {}
        notes = [f"{file.name}: not read, no instances" for file in passed_over]
        named: dict[str, Path] = {}
        for file in self.files:
            split = _split_of(file)
            if split in named:
                raise DataError(
                    f"--source {self.source}: expected one file of each split, got {named[split].relative_to(self.source)} and "
                    f"{file.relative_to(self.source)}, both {split}. Name one of them as --source, or rename it"
                )
            named[split] = file
            self._contents[split] = tables = _read(file)
            folders = _image_folders(file, options.images)
            for image in tables.images.values():
                wanted[split, image["id"]] = (image.get("file_name"), folders)
                if "file_name" not in image and isinstance(image.get("coco_url"), str):  # LVIS
                    wanted[split, image["id"]] = _of_url(image["coco_url"], file, options.images)
            notes += [f"{file}: read as split {split}"] if split != file.stem.removeprefix("instances_") else []
            notes += _namesakes(split, tables)
            notes += _crowds(split, tables, are_taken=options.takes_crowds)
        self.notes = tuple(notes)
        self.locate_images(wanted)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, tables in self._contents.items():
            yield from self._of_file(split, tables)

    def _of_file(self, split: str, tables: CocoTables) -> Iterator[SourceEntry | SourceFault]:
        names: dict[int | None, str] = {number: category["name"] for number, category in tables.categories.items()}
        incomplete: dict[tuple[int | None, str | None], str] = {}  # (image, class) -> what is wrong with one of its objects
        for fault in tables.faults:
            yield SourceFault(f"{split} {fault.where}", split, "structure", fault.message)
            if fault.table == "annotations":
                for each in fault.records:
                    class_name = class_key(names.get(whole_number(each.get("category_id"))))
                    incomplete[whole_number(each.get("image_id")), class_name] = fault.message
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in tables.annotations.values():
            if _is_crowd(annotation) and not self.options.takes_crowds:
                continue
            found = self._fault_of(split, annotation, tables, names)
            if found is None:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
                continue
            yield found
            if found.reason == "mask":
                incomplete[annotation["image_id"], class_key(names.get(_category(annotation)))] = found.message
        for image in tables.images.values():
            yield from self._of_image(split, image, by_image.get(image["id"], []), names, incomplete)

    def _fault_of(
        self, split: str, annotation: dict[str, Any], tables: CocoTables, names: dict[int | None, str]
    ) -> SourceFault | None:
        where = f"{split} annotation {annotation['id']}"
        if annotation["image_id"] not in tables.images:
            message = f"expected image_id among `images`, got {annotation['image_id']}"
            return SourceFault(where, split, "reference", tables.fault_of("images", annotation["image_id"]) or message)
        if annotation.get(self.mapping["caption"]) is None and _category(annotation) not in names:
            message = f"expected category_id among `categories`, got {annotation.get('category_id')!r}"
            return SourceFault(where, split, "reference", tables.fault_of("categories", _category(annotation)) or message)
        if "segmentation" not in annotation:
            message = f"expected a segmentation, got none ({describe(annotation)}); a box is not a mask"
            return SourceFault(where, split, "mask", message)
        return None

    def _of_image(
        self,
        split: str,
        image: dict[str, Any],
        annotations: list[dict[str, Any]],
        names: dict[int | None, str],
        incomplete: dict[tuple[int | None, str | None], str],
    ) -> Iterator[SourceEntry | SourceFault]:
        where = f"{split} image {image['id']}"
        for category in _not_exhaustive(image) & {_category(each) for each in annotations}:
            message = f"expected all objects of {names.get(category)!r}, but LVIS says that some are not annotated here"
            yield SourceFault(where, split, "target", message)
            annotations = [each for each in annotations if _category(each) != category]
        objects = [self._object(split, each, names) for each in annotations]
        for label in dict.fromkeys(key for each in objects if (image["id"], key := class_key(each.label)) in incomplete):
            # A phrase for the remaining objects would not mean all of its class.
            yield SourceFault(where, split, "target", incomplete[image["id"], label])
            objects = [each for each in objects if class_key(each.label) != label]
        name = self.image_names[split, image["id"]]
        yield from entries_of_image(str(image["id"]), split, name, (image["height"], image["width"]), objects)

    def _object(self, split: str, annotation: dict[str, Any], names: dict[int | None, str]) -> LabelledObject:
        category = _category(annotation)
        return LabelledObject(
            name=f"a{annotation['id']}",
            label=names.get(category),
            mask=annotation["segmentation"],
            caption=annotation.get(self.mapping["caption"]),
            id=annotation["id"],
            class_id=category,
            where=f"{split} annotation {annotation['id']} of image {annotation['image_id']}",
        )

    def _instance_files(self) -> tuple[tuple[Path, ...], list[Path]]:
        """The files of instances, and the other files beside them."""
        if not self.source.is_dir():
            return (self.source,), []
        for pattern in ("*.json", "annotations/*.json", "*/*.json"):
            there = files_in(self.source, pattern)
            files = [file for file in there if file.name.startswith("instances_")]
            files = files or [file for file in there if not file.name.startswith(_NOT_INSTANCES)]
            if files:
                return tuple(files), [file for file in there if file not in files]
        raise self.no_files_error()


def _read(file: Path) -> CocoTables:
    tables = coco_tables(read_json_file(file))
    if isinstance(tables, str):
        raise DataError(
            f"{file}: expected COCO instances with `images`, `annotations` and `categories`, got {tables}."
            f"{other_format(file, than='coco')} Repair the file, or name another with --source"
        )
    return tables


def _category(annotation: dict[str, Any]) -> int | None:
    return whole_number(annotation.get("category_id"))


def _not_exhaustive(image: dict[str, Any]) -> set[Any]:
    """Categories of which LVIS annotated only some objects in an image: their name means more than the annotations show."""
    found = image.get("not_exhaustive_category_ids")
    return {each for each in found if isinstance(each, int)} if isinstance(found, list) else set()


def _split_of(file: Path) -> str:
    named = split_named(file.stem) or split_named(file.parent.name)
    return named or file.stem.removeprefix("instances_").lstrip("._-") or file.stem


def _image_folders(file: Path, images: Path | None) -> list[Path]:
    """Folders that may hold the images of a file, likeliest first; some may not exist."""
    parts = [file.stem.removeprefix("instances_"), file.parent.name, _split_of(file)]  # train2017, valid, val
    if images is not None:
        return [images, images / "images", *(images / part for part in parts)]
    folders = [file.parent / "images", file.parent]
    for beside in (file.parent, file.parent.parent):
        folders += [beside / "images" / part for part in parts] + [beside / part for part in parts]
    return [*folders, file.parent.parent / "images"]


def _of_url(url: str, file: Path, images: Path | None) -> tuple[str, list[Path]]:
    """Name and folders of an image at COCO's site, whose address ends in train2017/000000000009.jpg."""
    folder, name = ["", *url.split("/")][-2:]
    if images is not None:
        return name, [images / folder, images]
    return name, [beside / folder for beside in (file.parent, file.parent / "images", file.parent.parent)]


def _is_crowd(annotation: dict[str, Any]) -> bool:
    return annotation.get("iscrowd") in (1, "1")


def _crowds(split: str, tables: CocoTables, *, are_taken: bool) -> list[str]:
    ids = [number for number, annotation in tables.annotations.items() if _is_crowd(annotation)]
    if not ids:
        return []
    what = (
        "are taken as objects (--crowds taken)"
        if are_taken
        else "are left out; annotation tools write that for every RLE mask: if they are single objects, take them with --crowds taken"
    )
    named = ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10:,} more" if len(ids) > 10 else "")
    return [f"{split}: {len(ids):,} of {len(tables.annotations):,} annotations are crowds (iscrowd: 1) and {what}: {named}"]


def _namesakes(split: str, tables: CocoTables) -> list[str]:
    by_name: dict[Any, list[int]] = {}
    for number, category in tables.categories.items():
        by_name.setdefault(class_key(category["name"]), []).append(number)
    return [
        f"{split}: categories {', '.join(map(str, ids))} have the same name, {tables.categories[ids[0]]['name']!r}, and are read as one"
        for ids in by_name.values()
        if len(ids) > 1
    ]
