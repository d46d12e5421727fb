"""Reads COCO-style instances: the phrase is the category's name, the referents are all its instances in the image.

    {"images": [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 9, "category_id": 3, "segmentation": [[...]], "iscrowd": 0}],
     "categories": [{"id": 3, "name": "dog"}]}

`--source` is the JSON, or a folder with such files, in `annotations/` or in a folder per split (Roboflow's
`train/_annotations.coco.json`). The split is what the file's or the folder's name says (`instances_train2017.json`: `train`,
`valid/`: `val`), else the file's name. Beside `instances_*.json`, and by their names, files of captions, keypoints and
panoptic segments are not read. Images: each is looked for in `images/`, in the JSON's folder and in those that COCO has
(`train2017/` beside `annotations/`), or in the same way below --images; LVIS names them in `coco_url`. An annotation with a
text of its own (`caption`, or the field that `--mapping caption=FIELD` names) is asked by that text, alone. Categories of
the same name, case and blanks apart, are one. Crowds (`iscrowd`: 1) are left out, counted and named; annotation tools write that for every RLE mask:
`--crowds taken` takes them as objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deris_llm.data.formats.coco_tables import CocoTables, coco_tables, whole_number
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceOptions,
    checked_mapping,
    existing_image_folder,
    existing_source,
    files_in,
    other_format,
    read_json_file,
)
from deris_llm.data.formats.objects import LabelledObject, class_key, entries_of_image, find_images, split_named

_NOT_INSTANCES = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
"""Beginnings of the names of COCO's other files."""


class CocoReader:
    """Phrases image by image, in the order of the files."""

    identity = ""
    is_generalised: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        source = existing_source(options, "COCO's instances as JSON, or a folder of such files")
        self.files, passed_over = _instance_files(source)
        self._takes_crowds = options.takes_crowds
        self._caption = checked_mapping(options, {"caption": "caption"})["caption"]
        images = existing_image_folder(options.images, why="--images") if options.images else None
        self._contents: dict[str, CocoTables] = {}
        wanted: dict[tuple[str, int], tuple[Any, Sequence[Path]]] = {}
        notes = [f"{file.name}: not read, no instances" for file in passed_over]
        named: dict[str, Path] = {}
        for file in self.files:
            split = _split_of(file)
            if split in named:
                raise DataError(
                    f"--source {source}: expected one file of each split, got {named[split].relative_to(source)} and "
                    f"{file.relative_to(source)}, both {split}. Name one of them as --source, or rename it"
                )
            named[split] = file
            self._contents[split] = tables = self._read(file)
            folders = _picture_folders(file, images)
            for image in tables.images.values():
                wanted[split, image["id"]] = (image.get("file_name"), folders)
                if "file_name" not in image and isinstance(image.get("coco_url"), str):  # LVIS
                    wanted[split, image["id"]] = _of_url(image["coco_url"], file, images)
            notes += [f"{file}: read as split {split}"] if split != file.stem.removeprefix("instances_") else []
            notes += _namesakes(split, tables)
            notes += _crowds(split, tables, are_taken=options.takes_crowds)
        self._pictures = find_images(wanted, follow_links=options.follow_links)
        self.image_folder = self._pictures.folder or images or self.files[0].parent
        self.notes = (*notes, *self._pictures.notes)

    def _read(self, file: Path) -> CocoTables:
        tables = coco_tables(read_json_file(file))
        if isinstance(tables, str):
            raise DataError(
                f"{file}: expected COCO instances with `images`, `annotations` and `categories`, got {tables}."
                f"{other_format(file, than='coco')} Repair the file, or name another with --source"
            )
        return tables

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, content in self._contents.items():
            yield from self._of_file(split, content)

    def _of_file(self, split: str, tables: CocoTables) -> Iterator[SourceEntry | SourceFault]:
        names: dict[int | None, str] = {number: category["name"] for number, category in tables.categories.items()}
        incomplete: dict[tuple[int | None, str | None], str] = {}  # (image, class) -> what is wrong with an object of it
        for fault in tables.faults:
            yield SourceFault(f"{split} {fault.where}", split, "structure", fault.message)
            if fault.table == "annotations":
                for each in fault.records:
                    class_name = class_key(names.get(whole_number(each.get("category_id"))))
                    incomplete[whole_number(each.get("image_id")), class_name] = fault.message
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in tables.annotations.values():
            where = f"{split} annotation {annotation['id']}"
            if _is_crowd(annotation) and not self._takes_crowds:
                continue
            if annotation["image_id"] not in tables.images:
                message = f"expected image_id among `images`, got {annotation['image_id']}"
                message = tables.fault_of("images", annotation["image_id"]) or message
                yield SourceFault(where, split, "reference", message)
            elif annotation.get(self._caption) is None and _category(annotation) not in names:
                message = f"expected category_id among `categories`, got {annotation.get('category_id')!r}"
                message = tables.fault_of("categories", _category(annotation)) or message
                yield SourceFault(where, split, "reference", message)
            elif "segmentation" not in annotation:
                message = f"expected a segmentation, got none ({describe(annotation)}); a box is no mask"
                yield SourceFault(where, split, "mask", message)
                incomplete[annotation["image_id"], class_key(names.get(_category(annotation)))] = message
            else:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        for image in tables.images.values():
            annotations = by_image.get(image["id"], [])
            for category in _not_exhaustive(image) & {_category(each) for each in annotations}:
                message = f"expected all objects of {names.get(category)!r}, but LVIS says that some are not annotated here"
                yield SourceFault(f"{split} image {image['id']}", split, "target", message)
                annotations = [each for each in annotations if _category(each) != category]
            objects = [self._object(split, each, names) for each in annotations]
            for label in dict.fromkeys(key for each in objects if (image["id"], key := class_key(each.label)) in incomplete):
                message = incomplete[image["id"], label]  # a phrase for the others would not mean all of its class
                yield SourceFault(f"{split} image {image['id']}", split, "target", message)
                objects = [each for each in objects if class_key(each.label) != label]
            size_hw = (image["height"], image["width"])
            yield from entries_of_image(str(image["id"]), split, self._pictures.names[split, image["id"]], size_hw, objects)

    def _object(self, split: str, annotation: dict[str, Any], names: dict[int | None, str]) -> LabelledObject:
        category = _category(annotation)
        return LabelledObject(
            name=f"a{annotation['id']}",
            label=names.get(category),
            mask=annotation["segmentation"],
            caption=annotation.get(self._caption),
            id=annotation["id"],
            class_id=category,
            where=f"{split} annotation {annotation['id']} of image {annotation['image_id']}",
        )


def _category(annotation: dict[str, Any]) -> int | None:
    return whole_number(annotation.get("category_id"))


def _not_exhaustive(image: dict[str, Any]) -> set[Any]:
    """Categories of which LVIS annotated only some objects in an image: their name asks for more than it gives."""
    found = image.get("not_exhaustive_category_ids")
    return {each for each in found if isinstance(each, int)} if isinstance(found, list) else set()


def _instance_files(source: Path) -> tuple[tuple[Path, ...], list[Path]]:
    """The files of instances of a source, and the others beside them."""
    if not source.is_dir():
        return (source,), []
    for pattern in ("*.json", "annotations/*.json", "*/*.json"):
        there = files_in(source, pattern)
        files = [file for file in there if file.name.startswith("instances_")]
        files = files or [file for file in there if not file.name.startswith(_NOT_INSTANCES)]
        if files:
            return tuple(files), [file for file in there if file not in files]
    raise DataError(
        f"--source {source}: expected *.json with instances in this folder, got none.{other_format(source, than='coco')} "
        "Name the instances file"
    )


def _split_of(file: Path) -> str:
    named = split_named(file.stem) or split_named(file.parent.name)
    return named or file.stem.removeprefix("instances_").lstrip("._-") or file.stem


def _picture_folders(file: Path, images: Path | None) -> list[Path]:
    """Where the images of a file may be, likeliest first; some of it may not exist."""
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
        f"{split}: categories {', '.join(map(str, ids))} have one name, {tables.categories[ids[0]]['name']!r}, and are taken as one"
        for ids in by_name.values()
        if len(ids) > 1
    ]
