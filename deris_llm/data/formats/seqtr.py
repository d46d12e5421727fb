"""Reads the JSON of SeqTR, in which SimVG, C3VG and DeRIS publish their splits.

    {"train": [{"image_id": 98304, "expressions": ["the lady with the blue shirt", ...], "bbox": [...], "category_id": 1,
                "mask": [[x0, y0, x1, y1, ...], ...], "width": 640, "height": 480}, ...], "val": [...]}

One file with all splits, or a list per file, whose name is the split's; `--source` is the file, its folder, or a root in
which `seqtr_type/annotations/*/instances*.json` or `annotations/*/instances*.json` matches one file only.

Accepted per entry: `image_id` (of COCO's train2014) or the image's `file_name`; `expressions` as a text, a list, or an
object with `raw` (or `sent`) of either; the referent as `mask` (polygons or RLE), or several as `annotations`, each with
`id` and `segmentation` or `mask`. An annotation of negative id, `empty: true` (DeRIS writes `id: null` beside it) or an id
of 0 without a mask is gRefCOCO's no target. A list of annotations per expression (SimVG's gRefCOCO) gives each
expression its own referents; a list of entries in place of one (InstanceVG's R-RefCOCO, whose loader draws one of
them) is read as these entries. If an entry has only the ids of COCO's annotations (`annotation_id`, `ann_id` or `mask_id`,
one or a list), `--mapping instances=PATH` names COCO's instances file.

The forms are those that the public code reads; its files were not at hand (`expressions` as a list; gRefCOCO's
`expressions["raw"]`, `annotations` with ids, -1 for none; an index by split; `mask`, `width`, `height`; the folders).
Phrases have no ids there: theirs are `ENTRY-NUMBER`, counted from 0 in the split (`ENTRY.ALTERNATIVE-NUMBER` in lists).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    PrepareOptions,
    SourcePhrase,
    SourceReader,
    files_in,
    read_json_file,
)
from deris_llm.data.formats.coco import CocoTables, coco_tables, whole_number
from deris_llm.data.formats.refer import IMAGE_FOLDERS

_PATTERNS = (
    "instances*.json", "instance*.json", "*.json", "seqtr_type/annotations/*/instance*.json", "annotations/*/instance*.json",
)  # fmt: skip

_ID_KEYS = ("annotation_id", "ann_id", "mask_id")
"""Names under which an entry has the id, or ids, of its annotations."""

_TREE = """Expected one of
  FILE.json                                         {"train": [...], "val": [...]}
  FOLDER/instances*.json                            the same
  FOLDER/train.json, FOLDER/val.json, ...           a list each
  ROOT/seqtr_type/annotations/SET/instances*.json   with ROOT/seqtr_type/images/mscoco/train2014/COCO_train2014_*.jpg
  ROOT/annotations/SET/instances*.json              with ROOT/images/train2014/COCO_train2014_*.jpg"""


class SeqtrReader(SourceReader):
    """The entries of all splits, in the order of the files."""

    format = "seqtr"
    expected = "a JSON file of SeqTR's form, or its folder"
    mapping_keys = {"instances": ""}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self.files = _find_files(self.source)
        self._splits = _read_splits(self.files)
        if drawn := sum(isinstance(entry, list) for entries in self._splits.values() for entry in entries):
            self.notes = (
                f"{drawn:,} entries are lists of alternatives, of which InstanceVG's loader draws one: each was read as an entry",
            )
        self.image_folder = options.images or _find_images(self.files[0])
        self._instances: CocoTables | None = None
        if self.mapping["instances"]:
            path = Path(self.mapping["instances"])
            self._instances = _read_instances(path)
            self.files = (*self.files, path)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, entries in self._splits.items():
            for number, entry in enumerate(entries):
                alternatives = {f"{number}": entry}
                if isinstance(entry, list) and entry:
                    alternatives = {f"{number}.{k}": alternative for k, alternative in enumerate(entry)}
                for name, alternative in alternatives.items():
                    yield from self._entries(split, name, alternative)

    def _entries(self, split: str, name: str, entry: Any) -> Iterator[SourceEntry | SourceFault]:
        """One entry if all expressions have the same referents, or one per expression."""
        where = f"{split}[{name}]"
        if not isinstance(entry, dict):
            yield SourceFault(where, split, "structure", f"expected an object, got {describe(entry)}")
            return
        texts, raws = _texts(entry.get("expressions"))
        if texts is None:
            message = f"expected `expressions` to be texts, got {describe(entry.get('expressions'))}"
            yield SourceFault(where, split, "structure", message)
            return
        phrases = [SourcePhrase(f"{name}-{k}", text, raws[k] if raws else None) for k, text in enumerate(texts)]
        annotations = entry.get("annotations")
        if not isinstance(annotations, list) or not annotations or not all(isinstance(a, list) for a in annotations):
            yield self._entry(where, split, entry, phrases)
        elif len(annotations) != len(phrases):
            message = f"expected a list of annotations for each of {len(phrases)} expressions, got {len(annotations)}"
            yield SourceFault(where, split, "structure", message, len(phrases))
        else:
            for phrase, own in zip(phrases, annotations, strict=True):
                yield self._entry(where, split, {**entry, "annotations": own}, [phrase])

    def _entry(
        self, where: str, split: str, entry: Mapping[str, Any], phrases: Sequence[SourcePhrase]
    ) -> SourceEntry | SourceFault:
        image = entry.get("file_name") or entry.get("image_id")
        if isinstance(image, int) and not isinstance(image, bool):
            image = f"COCO_train2014_{image:012d}.jpg"
        try:
            instances = self._referents(entry)
        except ValueError as error:
            return SourceFault(where, split, "reference", str(error), len(phrases))
        return SourceEntry(
            where=where,
            split=split,
            image=image,
            phrases=tuple(phrases),
            instances=tuple(instances),
            is_no_target=not instances,
            size_hw=(entry["height"], entry["width"]) if {"width", "height"} <= entry.keys() else None,
        )

    def _referents(self, entry: Mapping[str, Any]) -> list[SourceInstance]:
        """The referents, none for no target.

        Raises:
            ValueError: the entry does not say which they are.
        """
        if entry.get("empty") is True:
            return []
        crowds = [False]
        if "annotations" in entry:
            given = _annotations(entry["annotations"])
            crowds = [each.get("iscrowd") == 1 for _, each in given]
            masks = [(i, each.get("segmentation", each.get("mask"))) for i, each in given]
        elif "mask" in entry:
            number = next((whole_number(entry[key]) for key in _ID_KEYS if key in entry), None)
            masks = [(number if number is not None and number >= 0 else None, entry["mask"])]
        else:
            ids = next((entry[key] for key in _ID_KEYS if key in entry), None)
            ids = ids if isinstance(ids, list) else [ids]
            if ids in ([], [-1], [[]]):
                return []
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ValueError(f"expected `mask`, `annotations` or ids of COCO's annotations, got {describe(dict(entry))}")
            crowds = [False] * len(ids)
            masks = [(i, None) for i in ids]
        found: list[SourceInstance] = []
        for (annotation_id, mask), is_crowd in zip(masks, crowds, strict=True):
            if mask is None:
                known = self._known_annotation(annotation_id)
                mask, is_crowd = known.get("segmentation"), is_crowd or known.get("iscrowd") == 1
            found.append(SourceInstance(mask, annotation_id, is_crowd))
        if all(each.is_crowd for each in found):  # a phrase that names only crowds keeps them, as in REFER's form
            return [SourceInstance(each.mask, each.id) for each in found]
        return found

    def _known_annotation(self, annotation_id: int | None) -> dict[str, Any]:
        if self._instances is None:
            raise ValueError(
                f"expected a mask, got annotation {annotation_id} without; name COCO's file with --mapping instances=PATH"
            )
        known = self._instances.annotations.get(annotation_id) if annotation_id is not None else None
        if known is None:
            unknown = f"expected an annotation of the file that --mapping instances names, got {annotation_id}"
            raise ValueError(self._instances.fault_of("annotations", annotation_id) or unknown)
        return known


def _annotations(annotations: Any) -> list[tuple[int | None, dict[str, Any]]]:
    """The annotations of an entry that have an object, with their ids.

    Raises:
        ValueError: the list is malformed, or empty.
    """
    if not isinstance(annotations, list) or not all(isinstance(each, dict) for each in annotations):
        raise ValueError(f"expected `annotations` to be a list of objects, got {describe(annotations)}")
    if not annotations:
        raise ValueError("expected an annotation, or one of id -1 for no target, got an empty list")
    # SimVG numbers annotations anew, from 0, and keeps COCO's id beside.
    keys = ("original_id", "id", "annotation_id", "ann_id")
    ids = [next((each[key] for key in keys if key in each), None) for each in annotations]
    if wrong := [i for i in ids if i is not None and (isinstance(i, bool) or not isinstance(i, int))]:
        raise ValueError(f"expected ids of annotations to be whole numbers, got {wrong[0]!r}")
    return [(i, each) for i, each in zip(ids, annotations, strict=True) if not _is_nothing(i, each)]


def _is_nothing(annotation_id: int | None, annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation says that there is no target."""
    if annotation.get("empty") is True or (annotation_id is not None and annotation_id < 0):
        return True
    return annotation_id == 0 and not (annotation.get("segmentation") or annotation.get("mask"))


def _texts(expressions: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """Phrases, and the same as typed if both are there; None for anything else."""
    if isinstance(expressions, dict):
        raw = _texts(expressions.get("raw"))[0]
        sent = _texts(expressions["sent"])[0] if "sent" in expressions else raw
        return sent, raw if raw is not None and sent is not None and len(raw) == len(sent) else None
    if isinstance(expressions, str):
        return [expressions], None
    if isinstance(expressions, list) and expressions:
        return expressions, None
    return None, None


def _find_files(source: Path) -> tuple[Path, ...]:
    if source.is_file():
        return (source,)
    for pattern in _PATTERNS:
        found = files_in(source, pattern)
        if len(found) == 1 or (found and pattern == "*.json"):
            return found
        if found:
            listed = ", ".join(str(path) for path in found[:8])
            raise DataError(f"--source {source}: expected one annotation file, got {listed}. Name one of them as --source")
    holds = ", ".join(sorted(path.name for path in source.iterdir())[:12]) or "nothing"
    raise DataError(f"--source {source}: expected SeqTR's annotations, got a folder that holds {holds}. {_TREE}")


def _read_splits(files: tuple[Path, ...]) -> dict[str, list[Any]]:
    splits: dict[str, list[Any]] = {}
    for file in files:
        content = read_json_file(file)
        found = {file.stem: content} if isinstance(content, list) else content
        if not isinstance(found, dict) or not found or not all(isinstance(each, list) for each in found.values()):
            raise DataError(f"{file}: expected lists of entries by split, or one list, got {describe(content)}. {_TREE}")
        if twice := splits.keys() & found.keys():
            raise DataError(f"{file}: expected each split in one file, got {', '.join(twice)} again. Name one as --source")
        splits |= found
    return splits


def _read_instances(path: Path) -> CocoTables:
    if not path.is_file():
        raise DataError(
            f"--mapping instances={path}: expected COCO's instances file, got nothing there. Check the path"
        )
    tables = coco_tables(read_json_file(path))
    if isinstance(tables, str):
        raise DataError(f"{path}: expected COCO instances, got {tables}. Use the dataset's own file")
    return tables


def _find_images(file: Path) -> Path:
    for folder in list(file.resolve().parents)[:5]:
        for below in IMAGE_FOLDERS:
            if (folder / below).is_dir():
                return folder / below
    raise DataError(
        f"images for {file}: expected COCO's train2014 in a folder above, as one of {', '.join(IMAGE_FOLDERS)}, got "
        f"none. Name the folder with --images. {_TREE}"
    )
