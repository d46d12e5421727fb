"""Reads COCO-style instances: the phrase is the category's name, the referents are all its instances in the picture.

    {"images": [{"id": 9, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 9, "category_id": 3, "segmentation": [[...]], "iscrowd": 0}],
     "categories": [{"id": 3, "name": "dog"}]}

`--source` is the JSON, whose name is the split's, or a folder of such files (`instances_train.json` gives the split
`train`). Pictures: --images, or `images/` or the folder itself beside the JSON. An annotation with a text of its own
(`caption`, or the field that `--mapping caption=FIELD` names) is asked by that text, alone. Crowds are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deris_llm.data.coco_tables import CocoTables, coco_tables
from deris_llm.data.errors import DataError, describe
from deris_llm.data.readers.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourcePhrase,
    checked_mapping,
    existing_image_folder,
    existing_source,
    read_json_file,
)


class CocoReader:
    """Phrases picture by picture, in the order of the files."""

    identity = ""
    is_generalised: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        source = existing_source(options, "COCO's instances as JSON, or a folder of such files")
        self.files = tuple(sorted(source.glob("*.json"))) if source.is_dir() else (source,)
        if not self.files:
            raise DataError(f"--source {source}: expected *.json in this folder, got none. Name the instances file")
        self._caption = checked_mapping(options, {"caption": "caption"})["caption"]
        beside = self.files[0].parent
        folder = options.images or (beside / "images" if (beside / "images").is_dir() else beside)
        self.image_folder = existing_image_folder(folder, why="beside the JSON, or --images")
        self._contents = {_split_of(file): self._read(file) for file in self.files}

    def _read(self, file: Path) -> CocoTables:
        tables = coco_tables(read_json_file(file))
        if isinstance(tables, str):
            raise DataError(
                f"{file}: expected COCO instances with `images`, `annotations` and `categories`, got {tables}. Repair the file, or "
                "name another with --source"
            )
        return tables

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, content in self._contents.items():
            yield from self._of_file(split, content)

    def _of_file(self, split: str, tables: CocoTables) -> Iterator[SourceEntry | SourceFault]:
        names: dict[int | None, str] = {number: category["name"] for number, category in tables.categories.items()}
        for fault in tables.faults:
            yield SourceFault(f"{split} {fault.where}", split, "structure", fault.message)
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in tables.annotations.values():
            where = f"{split} annotation {annotation['id']}"
            if annotation.get("iscrowd"):
                continue
            if annotation["image_id"] not in tables.images:
                message = f"expected image_id among `images`, got {annotation['image_id']}"
                message = tables.fault_of("images", annotation["image_id"]) or message
                yield SourceFault(where, split, "reference", message)
            elif self._caption not in annotation and _category(annotation) not in names:
                message = f"expected category_id among `categories`, got {annotation.get('category_id')!r}"
                message = tables.fault_of("categories", _category(annotation)) or message
                yield SourceFault(where, split, "reference", message)
            elif "segmentation" not in annotation:
                message = f"expected a segmentation, got none ({describe(annotation)}); a box is no mask"
                yield SourceFault(where, split, "mask", message)
            else:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        for image in tables.images.values():
            yield from self._of_image(split, image, by_image.get(image["id"], []), names)

    def _of_image(
        self, split: str, image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[int | None, str]
    ) -> Iterator[SourceEntry]:
        by_class: dict[Any, list[dict[str, Any]]] = {}
        for annotation in annotations:
            by_class.setdefault(_category(annotation), []).append(annotation)
        asked: list[tuple[str, Any, list[dict[str, Any]]]] = []
        for annotation in annotations:
            if self._caption in annotation:
                asked.append((f"a{annotation['id']}", annotation[self._caption], [annotation]))
        for category, members in by_class.items():
            named = [each for each in members if self._caption not in each]
            if named:
                asked.append((f"{image['id']}-{category}", names[category], members))
        for name, text, members in asked:
            category = _category(members[0])
            yield SourceEntry(
                where=f"{split} annotation {members[0]['id']} of image {image['id']}",
                split=split,
                image=image.get("file_name"),
                phrases=(SourcePhrase(name, text),),
                instances=tuple(SourceInstance(each["segmentation"], each["id"]) for each in members),
                size_hw=(image["height"], image["width"]),
                category=names.get(category),
                num_same_class=len(by_class[category]) - len(members),
            )


def _category(annotation: dict[str, Any]) -> int | None:
    found = annotation.get("category_id")
    return found if isinstance(found, int) else None


def _split_of(file: Path) -> str:
    return file.stem.removeprefix("instances_") or file.stem
