"""Reads REFER's own files: RefCOCO, RefCOCO+, RefCOCOg (umd, google) and gRefCOCO, as `deris_llm.data.formats.refer_files` does.

`--source` is the data root (the layouts are listed there); the dataset is the name of the prepared set, or
`--mapping dataset=refcocog_umd`. Records, ids and their order are those of reading the files directly; what a prepared
set adds is that a run does not hold them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from deris_llm.data.formats import refer_files as refer
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourcePhrase,
    checked_mapping,
    existing_source,
    is_int64,
)


class ReferReader:
    """One dataset's refs, in the order of their file."""

    identity = ""
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        root = existing_source(options, "a data root with REFER's folders")
        self._dataset = checked_mapping(options, {"dataset": options.name})["dataset"]
        self.files = refer.dataset_paths(root, self._dataset)
        self._loaded = refer.load_dataset(root, self._dataset)
        self.image_folder = options.images or refer.find_image_folder(root)
        self.is_generalised: bool | None = self._dataset in refer.GENERALISED_DATASETS

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split in refer.in_known_order(self._loaded.splits):
            for ref in self._loaded.splits[split]:
                yield self._entry(split, ref)

    def _entry(self, split: str, ref: dict) -> SourceEntry | SourceFault:
        loaded, where = self._loaded, f"ref_id {ref['ref_id']}"

        def fault(message: str) -> SourceFault:
            return SourceFault(where, split, "reference", message, max(1, len(ref["sentences"])))

        ids, wrong = refer.annotation_ids_of(ref, self._dataset)
        if wrong is not None:
            return fault(wrong)
        image = loaded.images.get(ref["image_id"])
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
        kept, crowds = refer.without_crowds(loaded, self._dataset, ids)
        category, num_same_class = refer.classes_of(loaded, ref["image_id"], kept)
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
