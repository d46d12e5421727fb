"""Reads RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and other datasets in REFER's format, in their authors' own files.

    root/images/train2014/COCO_train2014_000000000123.jpg   (or another of `IMAGE_FOLDERS`)
    root/refcoco/instances.json, root/refcoco/refs(unc).p
    root/refcoco+/instances.json, root/refcoco+/refs(unc).p
    root/refcocog/instances.json, root/refcocog/refs(umd).p and/or refs(google).p
    root/grefcoco/instances.json, root/grefcoco/grefs(unc).json (or .p)
    root/ref-zom/instances.json, root/ref-zom/refs(final).p, root/images/trainval2014/
    root/rrefcoco/instances.json, root/rrefcoco/refs(unc).p; the same of rrefcoco+ and rrefcocog
    root/rrsisd/instances.json, root/rrsisd/refs(unc).p, root/images/rrsisd/JPEGImages/

`DATASETS` says what is special about each. All images of RefCOCO's datasets, also those of val and test, belong to COCO's
train2014. ``ref["file_name"]`` carries an annotation suffix and is not read; the image's name is the one in ``instances.json``.

A ref of gRefCOCO has a list of annotation ids: [-1] means that its phrases name nothing in the image; each of several
ids is a referent of its own. Crowds (iscrowd=1) beside other referents are not referents, as in gRefCOCO's own API; a record
keeps them apart (`ReferringRecord.crowds`), for protocols that take them.

Ref-ZOM says with ``ref["source"]`` (zero, one, many) whether its phrases name something; R-RefCOCO says it of each sentence
(``exist``), as the public code of both (toggle1995/RIS-DMMI 753cd60, jianzongwu/robust-ref-seg 97dd7f9) reads them.

A referent that covers no pixel does not stop a split: its phrase keeps the others, or has an empty truth if there are none, as
in the public APIs. The split's notes count and name such referents and crowds.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from deris_llm.common.strict_files import json_of
from deris_llm.common.unpickle import load_plain_pickle
from deris_llm.data.errors import DataError, describe, missing_path_error
from deris_llm.data.formats.base import (
    PrepareOptions,
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourcePhrase,
    SourceReader,
    is_int64,
)
from deris_llm.data.formats.coco import CocoTables, coco_tables
from deris_llm.data.formats.reviewed import PUBLISHED_COUNTS, read_reviews

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
"""Where COCO's train2014 lies below a data root, in the trees that public code expects; the first that is not empty is read."""


class ReferDataset(NamedTuple):
    """Where a dataset in REFER's format lies, and what says which objects its phrases name."""

    folder: str  # below the data root
    split_by: str  # of refs(SPLIT_BY).p: who made the splits
    # `ann_id`: one annotation. `ann_ids`: a list, [-1] for none. `source`: the ref says zero, one or many. `exist`: each sentence
    # says whether it names the ref's annotation or nothing
    names: Literal["ann_id", "ann_ids", "source", "exist"] = "ann_id"
    image_folders: tuple[str, ...] = IMAGE_FOLDERS

    @property
    def is_generalised(self) -> bool:
        """Whether phrases may name nothing or several objects."""
        return self.names != "ann_id"

    @property
    def benchmark(self) -> str | None:
        """The benchmark whose own metrics are reported too (`deris_llm.evaluation.metrics.benchmark_ratios`)."""
        return {"source": "ref-zom", "exist": "r-refcoco"}.get(self.names)


DATASETS: Mapping[str, ReferDataset] = {
    "refcoco": ReferDataset("refcoco", "unc"),
    "refcoco+": ReferDataset("refcoco+", "unc"),
    "refcocog_umd": ReferDataset("refcocog", "umd"),
    "refcocog_google": ReferDataset("refcocog", "google"),
    "grefcoco": ReferDataset("grefcoco", "unc", "ann_ids"),
    "ref-zom": ReferDataset("ref-zom", "final", "source", ("images/trainval2014", "trainval2014", "coco/trainval2014")),
    "rrefcoco": ReferDataset("rrefcoco", "unc", "exist"),
    "rrefcoco+": ReferDataset("rrefcoco+", "unc", "exist"),
    "rrefcocog": ReferDataset("rrefcocog", "unc", "exist"),
    "rrsisd": ReferDataset("rrsisd", "unc", image_folders=("images/rrsisd/JPEGImages", "rrsisd/images/rrsisd/JPEGImages")),
}
"""The datasets by name."""

GENERALISED_DATASETS = frozenset(name for name, dataset in DATASETS.items() if dataset.is_generalised)
"""Datasets whose phrases may name nothing or several objects."""

OVER_COCO = frozenset(DATASETS) - {"rrsisd"}
"""Datasets over COCO's images, so that a split of one may show images that another trains on."""

KNOWN_SPLITS = ("train", "val", "valid_u", "valid", "testA", "testB", "test")
"""Names of the published sets' splits, those of videos included."""

_NO_TARGET_ID = -1  # gRefCOCO's annotation id of phrases that name nothing

_REF_KEYS = frozenset({"ref_id", "ann_id", "image_id", "split", "sentences"})

_LAYOUT = """Expected layout below ROOT, which `data.root` names:
  ROOT/images/train2014/COCO_train2014_*.jpg   or another folder of these images named above
  ROOT/refcoco/     instances.json   refs(unc).p
  ROOT/refcoco+/    instances.json   refs(unc).p
  ROOT/refcocog/    instances.json   refs(umd).p and/or refs(google).p
  ROOT/grefcoco/    instances.json   grefs(unc).json or grefs(unc).p
  ROOT/ref-zom/     instances.json   refs(final).p   ROOT/images/trainval2014/COCO_*2014_*.jpg
  ROOT/rrefcoco/    instances.json   refs(unc).p     likewise rrefcoco+ and rrefcocog
  ROOT/rrsisd/      instances.json   refs(unc).p     ROOT/images/rrsisd/JPEGImages/*.jpg
  ROOT/NAME/        manifest.json    a set of your own (`deris-llm data prepare`)
`deris-llm data synth --out ROOT` writes a synthetic one"""


def in_known_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Names of splits: train first, then the other published ones, then others by name."""
    return tuple(sorted(splits, key=lambda split: (KNOWN_SPLITS.index(split) if split in KNOWN_SPLITS else 99, split)))


def refs_path(root: str | Path, dataset: str) -> Path:
    """Where a dataset's phrases are expected."""
    known = DATASETS[dataset]
    folder = Path(root) / known.folder
    if known.names == "exist":
        # The public code's default is unc; the published R-RefCOCOg could not be looked at, so the one file there is taken.
        found = sorted(folder.glob("refs(*).p"))
        return found[0] if len(found) == 1 else folder / f"refs({known.split_by}).p"
    if known.names != "ann_ids":
        return folder / f"refs({known.split_by}).p"
    pickled = folder / f"grefs({known.split_by}).p"
    return pickled if pickled.is_file() and not pickled.with_suffix(".json").is_file() else pickled.with_suffix(".json")


def find_image_folder(root: str | Path, dataset: str = "refcoco") -> Path:
    """The folder of a dataset's images below ``root``: most datasets have those of COCO's train2014.

    Raises:
        DataError: none of the known places exists.
    """
    root, folders = Path(root), DATASETS[dataset].image_folders
    there = [root / folder for folder in folders if (root / folder).is_dir()]
    if there:  # an empty folder is taken only if there is no other
        return next((folder for folder in there if any(folder.iterdir())), there[0])
    places = ", ".join(folders)
    raise missing_path_error(root / folders[0], f"images in {root} (one of {places})", hint=_layout_hint(root))


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
            raise missing_path_error(path, f"dataset {dataset!r}", hint=_layout_hint(root))
    return refs, instances


def _layout_hint(root: Path) -> str:
    for folder in ("seqtr_type/annotations", "annotations"):
        if (root / folder).is_dir():
            return (
                f"{root / folder}/ looks like SeqTR's layout: `deris-llm data prepare --format seqtr --source {root} --out "
                f"{root}/NAME` reads it.\n{_LAYOUT}"
            )
    return _LAYOUT


class ReferReader(SourceReader):
    """The refs of one dataset, by split, in the order of their file. `--source` is the data root.

    The dataset is the name of the prepared set, or `--mapping dataset=refcocog_umd`. `--mapping reviewed=FOLDER` leaves out the
    phrases that Ref-L4's reviewers called wrong (`deris_llm.data.formats.reviewed`); the set must have another name then.
    """

    format = "refer"
    expected = "a data root with REFER's folders"
    mapping_keys = {"dataset": "", "reviewed": ""}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        dataset = self.mapping["dataset"] or options.out.name
        self.files = dataset_paths(self.source, dataset)
        self._names = DATASETS[dataset].names
        self.is_generalised = DATASETS[dataset].is_generalised
        self.benchmark = DATASETS[dataset].benchmark
        self._splits: dict[str, list[dict[str, Any]]] = {}
        for ref in _read_refs(self.files[0]):
            self._splits.setdefault(ref["split"], []).append(ref)
        if self.mapping["reviewed"]:
            self._leave_out_wrong(dataset, Path(self.mapping["reviewed"]))
        self._tables = _read_instances(self.files[1])
        self._class_counts = Counter(
            (annotation["image_id"], annotation["category_id"])
            for annotation in self._tables.annotations.values()
            if isinstance(annotation.get("category_id"), int) and not annotation.get("iscrowd")
        )
        self.image_folder = options.images or find_image_folder(self.source, dataset)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split in in_known_order(self._splits):
            for ref in self._splits[split]:
                yield from self._entries_of(split, ref)

    def _leave_out_wrong(self, dataset: str, folder: Path) -> None:
        """Leaves out the phrases that were reviewed as wrong, and the splits that were not reviewed.

        Raises:
            DataError: the set would have the name of an unfiltered one, or the reviews are not of its phrases.
        """
        if self.options.out.name in DATASETS:
            raise DataError(
                f"--out {self.options.out}: expected a name that says that phrases were left out, got that of the published dataset. "
                f"Name it {dataset}-reviewed"
            )
        reviews = read_reviews(folder, dataset)
        if missing := [split for split in self.options.splits if split not in reviews]:
            raise DataError(f"--splits {missing[0]}: expected one of {', '.join(reviews)}, which were reviewed, got another")
        splits, self._splits = self._splits, {}
        counts = Counter[str]()
        for split, review in reviews.items():
            name, refs = f"{dataset}/{split}", splits.get(split, [])
            number = sum(len(ref["sentences"]) for ref in refs)
            self._splits[split], num_wrong, num_unknown = review.without_wrong(
                refs, name, skips_unknown=self.options.skip_bad
            )
            counts.update(phrases=number, wrong=num_wrong)
            self.split_notes = {
                **self.split_notes,
                split: (
                    f"REVIEWED LABELS: {num_wrong:,} of {number:,} phrases of {name}, which Ref-L4's reviewers called wrong "
                    f"(caption_quality 0), are left out"
                    + (f", and {num_unknown:,} that were not reviewed" if num_unknown else "")
                    + f", so numbers are not comparable with those of {name}",
                ),
            }
        self.notes = (
            f"not reviewed, so left out: {', '.join(in_known_order(splits.keys() - reviews.keys())) or 'no split'}",
            "reviewed {:,} phrases, of which {:,} are wrong; published: {:,} and {:,} in all splits".format(
                counts["phrases"], counts["wrong"], *PUBLISHED_COUNTS[dataset]
            ),
        )
        self.files = (*self.files, *(review.file for review in reviews.values()))

    def _entries_of(self, split: str, ref: dict[str, Any]) -> Iterator[SourceEntry | SourceFault]:
        """The entry of a ref; of R-RefCOCO's refs one for the sentences that name the object and one for the others."""
        where = f"ref_id {ref['ref_id']}"
        image = self._tables.images.get(ref["image_id"])
        file = None if image is None else _file_of(image)
        try:
            annotations = self._annotations_of(ref)
            groups = _by_existence(ref) if self._names == "exist" else {True: ref["sentences"]}
        except ValueError as error:
            yield SourceFault(where, split, "reference", str(error), max(1, len(ref["sentences"])), file)
            return
        assert image is not None, "checked with the annotations"
        for exists, sentences in groups.items():
            yield self._entry(split, ref, sentences, image, annotations if exists else [])

    def _entry(
        self,
        split: str,
        ref: dict[str, Any],
        sentences: list[dict[str, Any]],
        image: dict[str, Any],
        annotations: list[dict[str, Any]],
    ) -> SourceEntry:
        kept, crowds = self._without_crowds(annotations)
        category, num_same_class = self._classes_of(kept)
        return SourceEntry(
            where=f"ref_id {ref['ref_id']}",
            split=split,
            image=_file_of(image),
            phrases=tuple(SourcePhrase(s.get("sent_id"), self._text(s), s.get("raw")) for s in sentences),
            instances=(
                *(SourceInstance(each.get("segmentation"), each["id"]) for each in kept),
                *(SourceInstance(each.get("segmentation"), each["id"], is_crowd=True) for each in crowds),
            ),
            is_no_target=not annotations,
            may_be_empty=True,
            size_hw=(image["height"], image["width"]),
            category=category,
            num_same_class=num_same_class,
            ref_id=ref["ref_id"] if is_int64(ref["ref_id"]) else None,
        )

    def _text(self, sentence: dict[str, Any]) -> Any:
        """The cleaned text; Ref-ZOM's own code reads ``raw`` only, so that its file may lack it."""
        return sentence.get("sent", sentence.get("raw")) if self._names == "source" else sentence.get("sent")

    def _annotations_of(self, ref: dict[str, Any]) -> list[dict[str, Any]]:
        """The annotations that a ref names.

        Raises:
            ValueError: the ref, its image or one of its annotations cannot be used.
        """
        read = {"ann_ids": _gref_ids, "source": _ref_zom_ids}.get(self._names)
        ids = [ref["ann_id"]] if read is None else read(ref)
        if not all(isinstance(each, int) for each in ids):
            raise ValueError(f"expected one ann_id, a whole number, got {ref['ann_id']!r}")
        if ref["image_id"] not in self._tables.images:
            unknown = f"expected image_id among the images of {self.files[1].name}, got {ref['image_id']}"
            raise ValueError(self._tables.fault_of("images", ref["image_id"]) or unknown)
        found = []
        for annotation_id in ids:
            annotation = self._tables.annotations.get(annotation_id)
            if annotation is None:
                unknown = f"expected ann_id among the annotations of {self.files[1].name}, got {annotation_id}"
                raise ValueError(self._tables.fault_of("annotations", annotation_id) or unknown)
            if annotation["image_id"] != ref["image_id"]:
                raise ValueError(
                    f"expected an annotation of image {ref['image_id']}, got ann_id {annotation_id} of image {annotation['image_id']}"
                )
            found.append(annotation)
        return found

    def _without_crowds(self, annotations: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The referents among some annotations, and the crowds that gRefCOCO's own API leaves out.

        A phrase that names only crowds keeps them: the public code cannot open it, so there is no number to agree with.
        """
        crowds = [each for each in annotations if each.get("iscrowd")] if self._names == "ann_ids" else []
        if len(crowds) == len(annotations):
            return annotations, []
        return [each for each in annotations if not each.get("iscrowd") or not crowds], crowds

    def _classes_of(self, annotations: list[dict[str, Any]]) -> tuple[str | None, int | None]:
        """The one class of some referents, and how many other objects of their classes the image has."""
        if not annotations or not all(isinstance(each.get("category_id"), int) for each in annotations):
            return None, None
        classes = {(each["image_id"], each["category_id"]) for each in annotations}
        num_same_class = max(0, sum(self._class_counts[each] for each in classes) - len(annotations))
        names = self._tables.categories
        category = names.get(next(iter(classes))[1], {}).get("name") if len(classes) == 1 else None
        return category, num_same_class


def _file_of(image: dict[str, Any]) -> str:
    """The file name without folders: images are searched in the image folder only."""
    return PurePosixPath(image.get("file_name") or f"COCO_train2014_{image['id']:012d}.jpg").name


def _gref_ids(ref: dict[str, Any]) -> list[int]:
    """The annotation ids of a ref of gRefCOCO.

    Raises:
        ValueError: they are malformed or contradict ``no_target``.
    """
    ids = ref["ann_id"]
    if not isinstance(ids, list) or not ids or not all(isinstance(each, int) for each in ids):
        raise ValueError(f"expected ann_id to be a list of whole numbers, [-1] for no target, got {ids!r}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"expected each annotation once in ann_id, got {ids}")
    if _NO_TARGET_ID in ids and len(ids) > 1:
        raise ValueError(f"expected ann_id to name annotations or no target ({_NO_TARGET_ID}), got both: {ids}")
    found = [] if ids == [_NO_TARGET_ID] else ids
    if "no_target" in ref and bool(ref["no_target"]) != (not found):
        raise ValueError(f"expected no_target to agree with ann_id, got {ref['no_target']!r} and {ids}")
    return found


def _ref_zom_ids(ref: dict[str, Any]) -> list[int]:
    """The annotation ids of a ref of Ref-ZOM; the ids of a ref that names nothing are not read, as in its own API.

    Raises:
        ValueError: they are malformed, or the ref does not say how many objects it names.
    """
    source, ids = ref.get("source"), ref["ann_id"]
    if source not in ("zero", "one", "many"):
        raise ValueError(f"expected source to be zero, one or many, as in Ref-ZOM's own file, got {source!r}")
    if source == "zero":
        return []
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(is_int64(each) for each in ids):
        raise ValueError(f"expected ann_id of source {source} to be whole numbers, got {ref['ann_id']!r}")
    return list(dict.fromkeys(ids))


def _by_existence(ref: dict[str, Any]) -> dict[bool, list[dict[str, Any]]]:
    """The sentences of a ref of R-RefCOCO that name its object (True), and those that name nothing (False).

    Raises:
        ValueError: a sentence does not say it; without the key it names the object, as in the public code.
    """
    if not is_int64(ref["ref_id"]):
        raise ValueError(f"expected ref_id, over whose sentences rIoU is computed, to be a whole number, got {ref['ref_id']!r}")
    found: dict[bool, list[dict[str, Any]]] = {}
    for sentence in ref["sentences"]:
        exists = sentence.get("exist", True)
        if exists not in (True, False):
            raise ValueError(f"expected exist of sent_id {sentence.get('sent_id')} to be true or false, got {exists!r}")
        found.setdefault(bool(exists), []).append(sentence)
    return found


def _read_json(path: Path) -> Any:
    # Without the check for repeated keys of `base.read_json_file`, which takes seconds for files of hundreds of MB.
    try:
        return json_of(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}. Download the file again") from error


def _read_refs(path: Path) -> list[dict[str, Any]]:
    refs = _read_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if fault := _fault_of_refs(refs):
        raise DataError(
            f"{path}: expected a list of refs, each a dict with {', '.join(sorted(_REF_KEYS))}, got {fault}. "
            "Use the dataset's own file"
        )
    return refs


def _fault_of_refs(refs: Any) -> str | None:
    if not isinstance(refs, list) or not refs:
        return describe(refs)
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            return f"{describe(ref)} as number {number}"
        where = f"number {number} (ref_id {ref.get('ref_id')})"
        if not ref.keys() >= _REF_KEYS:
            return f"{where} without {', '.join(sorted(_REF_KEYS - ref.keys()))}: {describe(ref)}"
        is_id = isinstance(ref["image_id"], int) and not isinstance(ref["image_id"], bool)
        if not isinstance(ref["split"], str) or not is_id:
            return f"{where} with split {ref['split']!r} and image_id {ref['image_id']!r}"
        if not isinstance(ref["sentences"], list) or not all(isinstance(each, dict) for each in ref["sentences"]):
            return f"{where} whose sentences are {describe(ref['sentences'])}"
    return None


def _read_instances(path: Path) -> CocoTables:
    tables = coco_tables(_read_json(path))
    # An id that is given to different images or annotations spoils only the refs that name it.
    fault = tables if isinstance(tables, str) else next(
        (each.message for each in tables.faults if not each.is_repeated or each.table == "categories"), None
    )
    if fault is not None or isinstance(tables, str):
        raise DataError(
            f"{path}: expected COCO instances with `images` and `annotations`, got {fault}. "
            "Use the instances.json that comes with REFER's refs"
        )
    return tables
