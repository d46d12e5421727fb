"""Reads RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in their authors' own files.

    root/images/train2014/COCO_train2014_000000000123.jpg   (or another of `IMAGE_FOLDERS`)
    root/refcoco/instances.json, root/refcoco/refs(unc).p
    root/refcoco+/instances.json, root/refcoco+/refs(unc).p
    root/refcocog/instances.json, root/refcocog/refs(umd).p and/or refs(google).p
    root/grefcoco/instances.json, root/grefcoco/grefs(unc).json (or .p)

Every image, those of val and test too, is one of COCO's train2014. ``ref["file_name"]`` carries an annotation suffix
and is not read; the image's name is that of ``instances.json``.

A ref of gRefCOCO has a list of annotation ids: [-1] says that its phrases name nothing in the image; each of several
ids is a referent of its own. Crowds (iscrowd=1) beside other referents are no referents, as in gRefCOCO's own API; a record
keeps them apart (`ReferringRecord.crowds`), for protocols that take them.

A referent of which no pixel is drawn does not stop a split: its phrase keeps the others, or has an empty truth where there
are none, as in the public APIs. `split_notes` counts and names such referents and crowds.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deris_llm.data.errors import DataError, bad_records_error, check_is_split, describe, missing_path_error
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    PrepareOptions,
    SourcePhrase,
    SourceReader,
    is_int64,
)
from deris_llm.data.formats.coco import CocoTables, coco_tables
from deris_llm.data.masks import NoPixelError, visible_rle
from deris_llm.data.validation import is_text, left_out_notes
from deris_llm.common.unpickle import load_plain_pickle
from deris_llm.structures import InstanceAnnotation, ReferringRecord

logger = logging.getLogger(__name__)

DATASETS: Mapping[str, tuple[str, str]] = {
    "refcoco": ("refcoco", "unc"),
    "refcoco+": ("refcoco+", "unc"),
    "refcocog_umd": ("refcocog", "umd"),
    "refcocog_google": ("refcocog", "google"),
    "grefcoco": ("grefcoco", "unc"),
}
"""Dataset name -> (folder, who made the splits)."""

GENERALISED_DATASETS = frozenset({"grefcoco"})
"""Datasets whose phrases may name nothing, or several objects."""

IMAGE_FOLDERS = (
    "images/train2014",
    "train2014",
    "images/mscoco/images/train2014",  # REFER, LAVT, LISA
    "images/mscoco/train2014",  # SimVG
    "seqtr_type/images/mscoco/train2014",  # DeRIS, InstanceVG
    "images/coco/train2014",
    "coco2014/train2014",  # Sa2VA
    "coco_2014/train2014",  # GLaMM
    "coco/train2014",
    "mscoco/train2014",
)
"""Where COCO's train2014 lies below a data root, in the trees that public code asks for; the first that holds something."""

KNOWN_SPLITS = ("train", "val", "testA", "testB", "test")
"""Names of the published sets' splits."""

NO_TARGET_ID = -1
"""gRefCOCO's annotation id of nothing."""

_REF_KEYS = frozenset({"ref_id", "ann_id", "image_id", "split", "sentences"})

_LAYOUT = """Expected layout below ROOT, which `data.root` names:
  ROOT/images/train2014/COCO_train2014_*.jpg   or another folder of these images named above
  ROOT/refcoco/     instances.json   refs(unc).p
  ROOT/refcoco+/    instances.json   refs(unc).p
  ROOT/refcocog/    instances.json   refs(umd).p and/or refs(google).p
  ROOT/grefcoco/    instances.json   grefs(unc).json or grefs(unc).p
  ROOT/NAME/        manifest.json    a set of your own (`deris-llm data prepare`)
`deris-llm data synth --out ROOT` writes a synthetic one"""


def in_known_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Names of splits, train first, then those of the published sets, then others by name."""
    return tuple(sorted(splits, key=lambda split: (KNOWN_SPLITS.index(split) if split in KNOWN_SPLITS else 99, split)))


def refs_path(root: str | Path, dataset: str) -> Path:
    """Where a dataset's phrases are expected."""
    folder, split_by = DATASETS[dataset]
    if dataset not in GENERALISED_DATASETS:
        return Path(root) / folder / f"refs({split_by}).p"
    pickled = Path(root) / folder / f"grefs({split_by}).p"
    return pickled if pickled.is_file() and not pickled.with_suffix(".json").is_file() else pickled.with_suffix(".json")


def find_image_folder(root: str | Path) -> Path:
    """The folder of COCO's train2014 images below ``root``.

    Raises:
        DataError: none of the known places exists.
    """
    root = Path(root)
    there = [root / folder for folder in IMAGE_FOLDERS if (root / folder).is_dir()]
    if there:  # one that was made and is still empty is taken if there is no other
        return next((folder for folder in there if any(folder.iterdir())), there[0])
    places = ", ".join(IMAGE_FOLDERS)
    raise missing_path_error(
        root / IMAGE_FOLDERS[0], f"images in {root} (one of {places})", hint=_layout_hint(Path(root))
    )


def _layout_hint(root: Path) -> str:
    for folder in ("seqtr_type/annotations", "annotations"):
        if (root / folder).is_dir():
            return (
                f"{root / folder}/ looks like SeqTR's layout: `deris-llm data prepare --format seqtr --source {root} --out "
                f"{root}/NAME` reads it.\n{_LAYOUT}"
            )
    return _LAYOUT


@dataclass(frozen=True)
class _Image:
    file_name: str
    width: int
    height: int

    @property
    def stem(self) -> str:
        return PurePosixPath(self.file_name).stem


@dataclass(frozen=True, eq=False)
class LoadedDataset:
    """One dataset's files: the refs by split, and of ``instances.json`` what they point at."""

    splits: dict[str, list[dict[str, Any]]]
    images: dict[int, _Image]
    annotations: dict[int, tuple[int, Any]]  # annotation id -> (image id, segmentation)
    classes: dict[int, int]  # annotation id -> category id
    class_names: dict[int, str]  # category id -> name
    class_counts: Counter[tuple[int, int]]  # (image id, category id) -> annotations, referred or not, crowds left out
    crowds: frozenset[int]  # annotation ids with iscrowd=1
    repeated: dict[tuple[str, int], str]  # (table, id) of different records -> which; they are in no other field


def dataset_paths(root: Path, dataset: str) -> tuple[Path, Path]:
    """The refs file and instances.json of a dataset.

    Raises:
        DataError: an unknown dataset or a missing file.
    """
    if dataset not in DATASETS:
        near = [name for name in DATASETS if dataset and name.startswith(f"{dataset}_")]
        near = near or difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0.4)
        raise DataError(
            f"dataset {dataset!r}: expected one of {', '.join(DATASETS)}."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
        )
    refs = refs_path(root, dataset)
    instances = refs.parent / "instances.json"
    for path in (instances, refs):
        if not path.is_file():
            raise missing_path_error(path, f"dataset {dataset!r}", hint=_layout_hint(Path(root)))
    return refs, instances


def load_dataset(root: Path, dataset: str) -> LoadedDataset:
    """Parses a dataset's files; checks their structure but not yet their records.

    Raises:
        DataError: a missing or malformed file.
    """
    refs_file, instances_file = map(str, dataset_paths(root, dataset))
    refs = _read_json(refs_file) if refs_file.endswith(".json") else load_plain_pickle(refs_file)
    if fault := _fault_of_refs(refs):
        raise DataError(
            f"{refs_file}: expected a list of refs, each a dict with {', '.join(sorted(_REF_KEYS))}, got {fault}. "
            "Use the dataset's own file"
        )
    tables = coco_tables(_read_json(instances_file))
    fault = tables if isinstance(tables, str) else _fault_of_tables(tables)
    if fault is not None or isinstance(tables, str):
        raise DataError(
            f"{instances_file}: expected COCO instances with `images` and `annotations`, got {fault}. "
            "Use the instances.json that comes with REFER's refs"
        )
    wanted = {i for ref in refs for i in _plain_ids(ref["ann_id"])}
    splits: dict[str, list[dict[str, Any]]] = {}
    for ref in refs:
        splits.setdefault(ref["split"], []).append(ref)
    annotations = tables.annotations.values()
    classed = [a for a in annotations if isinstance(a.get("category_id"), int)]
    return LoadedDataset(
        splits=splits,
        images={
            # An image is looked up in the images folder only, whatever path a file may name.
            image["id"]: _Image(
                PurePosixPath(image.get("file_name") or f"COCO_train2014_{image['id']:012d}.jpg").name,
                int(image["width"]),
                int(image["height"]),
            )
            for image in tables.images.values()
        },
        annotations={a["id"]: (a["image_id"], a.get("segmentation")) for a in annotations if a["id"] in wanted},
        classes={a["id"]: a["category_id"] for a in classed if a["id"] in wanted},
        class_names={number: category["name"] for number, category in tables.categories.items()},
        class_counts=Counter((a["image_id"], a["category_id"]) for a in classed if not a.get("iscrowd")),
        crowds=frozenset(a["id"] for a in annotations if a["id"] in wanted and a.get("iscrowd")),
        repeated={(fault.table, fault.id): fault.message for fault in tables.faults if fault.id is not None},
    )


def _fault_of_tables(tables: CocoTables) -> str | None:
    """What stops a file; an id that is given to different images or annotations spoils only the refs that name it."""
    spoilt = (fault.message for fault in tables.faults if not fault.is_repeated or fault.table == "categories")
    return next(spoilt, None)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}. Download the file again") from error


def _fault_of_refs(refs: Any) -> str | None:
    if not isinstance(refs, list) or not refs:
        return describe(refs)
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            return f"{describe(ref)} as number {number}"
        if not ref.keys() >= _REF_KEYS:
            missing = ", ".join(sorted(_REF_KEYS - ref.keys()))
            return f"number {number} (ref_id {ref.get('ref_id')}) without {missing}: {describe(ref)}"
        if not isinstance(ref["split"], str) or not _is_id(ref["image_id"]):
            return (
                f"number {number} (ref_id {ref['ref_id']}) with split {ref['split']!r} and image_id {ref['image_id']!r}"
            )
        if not isinstance(ref["sentences"], list) or not all(isinstance(each, dict) for each in ref["sentences"]):
            return f"number {number} (ref_id {ref['ref_id']}) whose sentences are {describe(ref['sentences'])}"
    return None


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain_ids(ann_id: Any) -> list[int]:
    """The integers of an ann_id, whatever else it holds."""
    return [i for i in (ann_id if isinstance(ann_id, list) else [ann_id]) if isinstance(i, int)]


def annotation_ids_of(ref: Mapping[str, Any], dataset: str) -> tuple[list[int], str | None]:
    """The annotations of a ref's referents, and what is wrong with its ann_id or None."""
    ann_id = ref["ann_id"]
    if dataset not in GENERALISED_DATASETS:
        fault = None if isinstance(ann_id, int) else f"expected one ann_id, a whole number, got {ann_id!r}"
        return _plain_ids(ann_id), fault
    if not isinstance(ann_id, list) or not ann_id or len(_plain_ids(ann_id)) != len(ann_id):
        return [], f"expected ann_id to be a list of whole numbers, [-1] for no target, got {ann_id!r}"
    if len(set(ann_id)) != len(ann_id):
        return [], f"ann_id {ann_id} names an annotation twice"
    if NO_TARGET_ID in ann_id and len(ann_id) > 1:
        return [], f"ann_id {ann_id} says both that there is no target ({NO_TARGET_ID}) and which it is"
    found = [] if ann_id == [NO_TARGET_ID] else ann_id
    if "no_target" in ref and bool(ref["no_target"]) != (not found):
        return [], f"no_target is {ref['no_target']!r}, but ann_id is {ann_id}"
    return found, None


def without_crowds(loaded: LoadedDataset, dataset: str, annotation_ids: list[int]) -> tuple[list[int], list[int]]:
    """The referents among some annotations, and the crowds that gRefCOCO's own API leaves out.

    A phrase that names crowds alone keeps them: the public code cannot open it, so there is no number to agree with.
    """
    crowds = [i for i in annotation_ids if i in loaded.crowds] if dataset in GENERALISED_DATASETS else []
    if len(crowds) == len(annotation_ids):
        return annotation_ids, []
    return [i for i in annotation_ids if i not in crowds], crowds


def classes_of(loaded: LoadedDataset, image_id: int, annotation_ids: Sequence[int]) -> tuple[str | None, int | None]:
    """The one class of some referents, and how many other objects of their classes the image has."""
    classes = {loaded.classes.get(annotation_id, -1) for annotation_id in annotation_ids}
    if not classes or -1 in classes:
        return None, None
    num_same_class = sum(loaded.class_counts[image_id, which] for which in classes) - len(annotation_ids)
    return loaded.class_names.get(classes.pop()) if len(classes) == 1 else None, max(num_same_class, 0)


class ReferReader(SourceReader):
    """The refs of one dataset, in the order of their file. `--source` is the data root.

    The dataset is the name of the prepared set, or `--mapping dataset=refcocog_umd`.
    """

    format = "refer"
    expected = "a data root with REFER's folders"
    mapping_keys = {"dataset": ""}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._dataset = self.mapping["dataset"] or options.out.name
        self.files = dataset_paths(self.source, self._dataset)
        self._loaded = load_dataset(self.source, self._dataset)
        self.image_folder = options.images or find_image_folder(self.source)
        self.is_generalised = self._dataset in GENERALISED_DATASETS

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split in in_known_order(self._loaded.splits):
            for ref in self._loaded.splits[split]:
                yield self._entry(split, ref)

    def _entry(self, split: str, ref: dict) -> SourceEntry | SourceFault:
        loaded, where = self._loaded, f"ref_id {ref['ref_id']}"
        image = loaded.images.get(ref["image_id"])

        def fault(message: str) -> SourceFault:
            named = None if image is None else image.file_name
            return SourceFault(where, split, "reference", message, max(1, len(ref["sentences"])), named)

        ids, wrong = annotation_ids_of(ref, self._dataset)
        if wrong is not None:
            return fault(wrong)
        if image is None:
            unknown = f"expected image_id among the images of {self.files[1].name}, got {ref['image_id']}"
            return fault(loaded.repeated.get(("images", ref["image_id"]), unknown))
        for annotation_id in ids:
            found = loaded.annotations.get(annotation_id)
            if found is None:
                unknown = f"expected ann_id among the annotations of {self.files[1].name}, got {annotation_id}"
                return fault(loaded.repeated.get(("annotations", annotation_id), unknown))
            if found[0] != ref["image_id"]:
                return fault(
                    f"expected an annotation of image {ref['image_id']}, got ann_id {annotation_id} of image {found[0]}"
                )
        kept, crowds = without_crowds(loaded, self._dataset, ids)
        category, num_same_class = classes_of(loaded, ref["image_id"], kept)
        return SourceEntry(
            where=where,
            split=split,
            image=image.file_name,
            phrases=tuple(SourcePhrase(s.get("sent_id"), s.get("sent"), s.get("raw")) for s in ref["sentences"]),
            instances=tuple(SourceInstance(loaded.annotations[i][1], i, is_crowd=i in crowds) for i in (*kept, *crowds)),
            is_no_target=not ids,
            may_be_empty=True,
            size_hw=(image.height, image.width),
            category=category,
            num_same_class=num_same_class,
            ref_id=ref["ref_id"] if is_int64(ref["ref_id"]) else None,
        )
