"""Reads the JSON of SeqTR, which SimVG, C3VG and DeRIS publish their splits in.

    {"train": [{"image_id": 98304, "expressions": ["the lady with the blue shirt", ...], "bbox": [...], "category_id": 1,
                "mask": [[x0, y0, x1, y1, ...], ...], "width": 640, "height": 480}, ...], "val": [...]}

One file with all splits, or a list per file, whose name is the split's; `--source` is the file, its folder, or a root in
which `seqtr_type/annotations/*/instances*.json` or `annotations/*/instances*.json` names just one.

Accepted per entry: `image_id` (of COCO's train2014) or the image's `file_name`; `expressions` as a text, a list, or an
object with `raw` (or `sent`) of either; the referent as `mask` (polygons or RLE), or several as `annotations`, each with
`id` and `segmentation` or `mask`. An annotation of negative id, `empty: true` (DeRIS writes `id: null` beside it) or an id
of 0 without a mask is gRefCOCO's no target. A list of annotations per expression (SimVG's gRefCOCO) gives each
expression its own referents; a list of entries in the place of one (InstanceVG's R-RefCOCO, whose loader draws one of
them) is read as these entries. Where an entry has only the ids of COCO's annotations (`annotation_id`, `ann_id` or `mask_id`, one or a list),
`--mapping instances=PATH` names COCO's instances file.

Seen in the public code, whose files were not at hand (`expressions` as a list; gRefCOCO's `expressions["raw"]`,
`annotations` with ids, -1 for none; an index by split; `mask`, `width`, `height`; the folders).
Phrases have no ids there: theirs are `ENTRY-NUMBER`, counted from 0 in the split (`ENTRY.ALTERNATIVE-NUMBER` in lists).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deris_llm.data.formats import refer
from deris_llm.data.formats.coco_tables import CocoTables, coco_tables, whole_number
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourcePhrase,
    checked_mapping,
    existing_image_folder,
    existing_source,
    files_in,
    read_json_file,
)

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


class SeqtrReader:
    """The entries of all splits, in the order of the files."""

    identity = ""
    is_generalised: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        source = existing_source(options, "a JSON file of SeqTR's form, or its folder")
        mapping = checked_mapping(options, {"instances": ""})
        files = _find_files(source)
        self._splits = _read_splits(files)
        if drawn := sum(isinstance(entry, list) for entries in self._splits.values() for entry in entries):
            self.notes = (
                f"{drawn:,} entries are lists of alternatives, of which InstanceVG's loader draws one: each was read as an entry",
            )
        self._instances = _read_instances(Path(mapping["instances"])) if mapping["instances"] else None
        self.files = (*files, Path(mapping["instances"])) if mapping["instances"] else files
        self.image_folder = existing_image_folder(
            options.images or _find_pictures(files[0]), why="found beside the annotations, or --images"
        )

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, entries in self._splits.items():
            for number, entry in enumerate(entries):
                alternatives = {f"{number}": entry}
                if isinstance(entry, list) and entry:
                    alternatives = {f"{number}.{k}": alternative for k, alternative in enumerate(entry)}
                for name, alternative in alternatives.items():
                    yield from self._entries(split, name, alternative)

    def _entries(self, split: str, name: str, entry: Any) -> Iterator[SourceEntry | SourceFault]:
        """An entry whose expressions mean the same, or one of each of its expressions."""
        where = f"{split}[{name}]"
        if not isinstance(entry, dict):
            yield SourceFault(where, split, "structure", f"expected an object, got {describe(entry)}")
            return
        texts, raws = _texts(entry.get("expressions"))
        if texts is None:
            ask = "expected `expressions` to be texts"
            yield SourceFault(where, split, "structure", f"{ask}, got {describe(entry.get('expressions'))}")
            return
        phrases = [SourcePhrase(f"{name}-{k}", text, raws[k] if raws else None) for k, text in enumerate(texts)]
        annotations = entry.get("annotations")
        if not isinstance(annotations, list) or not annotations or not all(isinstance(a, list) for a in annotations):
            yield self._entry(where, split, entry, phrases)
        elif len(annotations) != len(phrases):
            ask = f"expected a list of annotations for each of {len(phrases)} expressions"
            yield SourceFault(where, split, "structure", f"{ask}, got {len(annotations)}", len(phrases))
        else:
            for phrase, own in zip(phrases, annotations, strict=True):
                yield self._entry(where, split, {**entry, "annotations": own}, [phrase])

    def _entry(
        self, where: str, split: str, entry: Mapping[str, Any], phrases: Sequence[SourcePhrase]
    ) -> SourceEntry | SourceFault:
        image = entry.get("file_name") or entry.get("image_id")
        if isinstance(image, int) and not isinstance(image, bool):
            image = f"COCO_train2014_{image:012d}.jpg"
        found = self._referents(entry)
        if isinstance(found, str):
            return SourceFault(where, split, "reference", found, len(phrases))
        has_size = {"width", "height"} <= entry.keys()
        return SourceEntry(
            where=where,
            split=split,
            image=image,
            phrases=tuple(phrases),
            instances=tuple(found),
            is_no_target=not found,
            size_hw=(entry["height"], entry["width"]) if has_size else None,
        )

    def _referents(self, entry: Mapping[str, Any]) -> list[SourceInstance] | str:
        """The referents, none for no target; or what is wrong."""
        if entry.get("empty") is True:
            return []
        crowds: set[int] = set()  # numbers of referents
        if "annotations" in entry:
            annotations = entry["annotations"]
            if not isinstance(annotations, list) or not all(isinstance(each, dict) for each in annotations):
                return f"expected `annotations` to be a list of objects, got {describe(annotations)}"
            # SimVG numbers annotations anew, from 0, and keeps COCO's id beside.
            keys = ("original_id", "id", "annotation_id", "ann_id")
            ids = [next((each[key] for key in keys if key in each), None) for each in annotations]
            if wrong := [i for i in ids if i is not None and (isinstance(i, bool) or not isinstance(i, int))]:
                return f"expected ids of annotations to be whole numbers, got {wrong[0]!r}"
            meant = [(i, each) for i, each in zip(ids, annotations, strict=True) if not _is_nothing(i, each)]
            if annotations and not meant:
                return []
            if not annotations:
                return "expected an annotation, or one of id -1 for no target, got an empty list"
            masks = [(i, each.get("segmentation", each.get("mask"))) for i, each in meant]
            crowds = {number for number, (_, each) in enumerate(meant) if each.get("iscrowd") == 1}
        elif "mask" in entry:
            given = next((whole_number(entry[key]) for key in _ID_KEYS if key in entry), None)
            masks = [(given if given is not None and given >= 0 else None, entry["mask"])]
        else:
            given = next((entry[key] for key in _ID_KEYS if key in entry), None)
            ids = given if isinstance(given, list) else [given]
            if ids in ([-1], [[]]) or given == []:
                return []
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                return f"expected `mask`, `annotations` or ids of COCO's annotations, got {describe(dict(entry))}"
            masks = [(i, None) for i in ids]
        found: list[SourceInstance] = []
        for number, (annotation_id, mask) in enumerate(masks):
            if mask is None and self._instances is None:
                return f"expected a mask, got annotation {annotation_id} without; name COCO's file with --mapping instances=PATH"
            if mask is None and self._instances is not None:
                known = self._instances.annotations.get(annotation_id) if annotation_id is not None else None
                if known is None:
                    unknown = f"expected an annotation of the file that --mapping instances names, got {annotation_id}"
                    return self._instances.fault_of("annotations", annotation_id) or unknown
                mask = known.get("segmentation")
                crowds |= {number} if known.get("iscrowd") == 1 else set()
            found.append(SourceInstance(mask, annotation_id))
        if len(crowds) == len(found):  # a phrase that names crowds alone keeps them, as in REFER's form
            return found
        return [replace(each, is_crowd=number in crowds) for number, each in enumerate(found)]


def _is_nothing(annotation_id: int | None, annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation says that there is no target."""
    if annotation.get("empty") is True or (annotation_id is not None and annotation_id < 0):
        return True
    return annotation_id == 0 and not (annotation.get("segmentation") or annotation.get("mask"))


def _texts(expressions: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """Phrases, and the same as typed where both are there; None for what is neither."""
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
            raise DataError(
                f"--source {source}: expected one annotation file, got {listed}. Name one of them as --source"
            )
    holds = ", ".join(sorted(path.name for path in source.iterdir())[:12]) or "nothing"
    raise DataError(f"--source {source}: expected SeqTR's annotations, got a folder that holds {holds}. {_TREE}")


def _read_splits(files: tuple[Path, ...]) -> dict[str, list[Any]]:
    splits: dict[str, list[Any]] = {}
    for file in files:
        content = read_json_file(file)
        found = {file.stem: content} if isinstance(content, list) else content
        if not isinstance(found, dict) or not found or not all(isinstance(each, list) for each in found.values()):
            raise DataError(
                f"{file}: expected lists of entries by split, or one list, got {describe(content)}. {_TREE}"
            )
        if twice := splits.keys() & found.keys():
            raise DataError(
                f"{file}: expected each split in one file, got {', '.join(twice)} again. Name one as --source"
            )
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


def _find_pictures(file: Path) -> Path:
    for folder in list(file.resolve().parents)[:5]:
        for below in refer.IMAGE_FOLDERS:
            if (folder / below).is_dir():
                return folder / below
    raise DataError(
        f"images for {file}: expected COCO's train2014 in a folder above, as one of {', '.join(refer.IMAGE_FOLDERS)}, got "
        f"none. Name the folder with --images. {_TREE}"
    )
