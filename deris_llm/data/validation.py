"""Turns entries of any source into rows of a prepared set, or into faults: all claims of a source are checked here.

Runs in the workers of `deris-llm data prepare`, so it imports no torch.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deris_llm.data.errors import describe
from deris_llm.data.formats.base import (
    BadEntryError,
    FaultReason,
    LabelMask,
    MaskFile,
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourcePhrase,
    is_int64,
)
from deris_llm.data.images import BROKEN, MAX_PIXELS, ImageError, ImageFacts, ImageFolder, image_facts, opened_image
from deris_llm.data.masks import NoPixelError, encode_mask, mask_of_image, segmentation_rle, two_valued_mask, visible_rle

PHRASE_SCHEMA = pa.schema(
    {
        "id": pa.string(),  # unique in its split
        "image": pa.int32(),  # row of the table of images
        "phrase": pa.string(),
        "raw": pa.string(),  # as typed by the annotator; null if the source has one text only
        "category": pa.string(),
        "num_same_class": pa.int32(),
        "ref_id": pa.int64(),
        "instances": pa.list_(pa.struct({"id": pa.int64(), "counts": pa.binary()})),  # COCO RLE of the image's size
        "crowds": pa.list_(pa.struct({"id": pa.int64(), "counts": pa.binary()})),  # `ReferringRecord.crowds`
    }
)
"""One row per phrase, in the source's order."""

_VIDEO_COLUMNS = {"video": pa.string(), "frame": pa.int32(), "expression": pa.string()}
_TRUTH_COLUMN = {"has_truth": pa.bool_()}
_IGNORED_COLUMN = {"ignored": pa.binary()}  # counts of a COCO RLE of the image's size


def phrase_schema(entries: Sequence[SourceEntry]) -> pa.Schema:
    """`PHRASE_SCHEMA`, with the columns of videos, phrases without truth and ignored pixels only if some entry uses them."""
    columns = _VIDEO_COLUMNS if any(entry.video is not None for entry in entries) else {}
    if not all(entry.has_truth for entry in entries):
        columns = {**columns, **_TRUTH_COLUMN}
    if any(entry.ignored is not None for entry in entries):
        columns = {**columns, **_IGNORED_COLUMN}
    return pa.schema([*PHRASE_SCHEMA, *(pa.field(name, kind) for name, kind in columns.items())])

ROWS_PER_BATCH = 1024


@dataclass(frozen=True, eq=False)
class LocatedEntry:
    """An entry whose image is there and complete."""

    order: int
    entry: SourceEntry
    image: int  # row of the table of images
    height: int  # px, as annotated
    width: int

    def fault(self, reason: FaultReason, message: str, num_phrases: int) -> SourceFault:
        """A fault of this entry."""
        entry = self.entry
        return SourceFault(entry.where, entry.split, reason, message, num_phrases, entry.image, self.order)


@dataclass(eq=False)
class ShardResult:
    """What became of the entries of a shard."""

    num_refs: int = 0
    num_phrases: int = 0
    num_no_target: int = 0
    is_generalised: bool = False  # some phrase has no referent, or several
    has_truth: bool = True  # False: the referents of some phrase are not known
    num_bad: Counter[str] = field(default_factory=Counter)  # phrases by reason
    faults: list[SourceFault] = field(default_factory=list)
    num_lossy_masks: int = 0  # stored as JPEG, thresholded at half
    crowds: list[str] = field(default_factory=list)  # phrases that name crowds beside other referents
    without_pixel: list[SourceFault] = field(default_factory=list)  # referents of phrases that are kept


def left_out_notes(crowds: Sequence[str], without_pixel: Sequence[str]) -> list[str]:
    """What must be read with the numbers of a split: objects that it names and that are not in the truth of its phrases.

    Args:
        crowds: phrases that name crowds beside other referents.
        without_pixel: referents that cover no pixel, with where they are named.
    """
    notes = []
    if crowds:
        notes.append(
            f"phrases that name crowds beside other referents: {len(crowds):,}; the crowds are not in the truth under "
            f"protocols with crowds: left_out (the default, as gRefCOCO's own API and ReLA): {_first_ten(crowds)}"
        )
    if without_pixel:
        notes.append(
            f"referents that draw no pixel: {len(without_pixel):,}; their phrases keep the others, or have an empty truth "
            f"if there are none: {_first_ten(without_pixel)}"
        )
    return notes


def _first_ten(names: Sequence[str]) -> str:
    return "; ".join(names[:10]) + (f"; and {len(names) - 10:,} more" if len(names) > 10 else "")


def look_at(image_folder: ImageFolder, names: list[str]) -> dict[str, ImageFacts | str]:
    """Facts about images, or what is wrong with them, by name."""
    found: dict[str, ImageFacts | str] = {}
    for name in names:
        path, fault = image_folder.file(name)
        if path is None:
            found[name] = f"image: {fault}"
            continue
        try:
            found[name] = image_facts(path)
        except ImageError as error:
            found[name] = f"image {str(path)[:300]}: {error}"
    return found


def write_shard(path: Path, entries: Sequence[LocatedEntry], image_folder: ImageFolder) -> ShardResult:
    """Checks entries and writes the usable ones as an Arrow stream, which `datasets.Dataset.from_file` opens too."""
    shard = _Shard(image_folder)
    for located in entries:
        shard.add(located)
    schema = phrase_schema([located.entry for located in entries])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for first in range(0, len(shard.rows), ROWS_PER_BATCH):
            stream.write_batch(pa.RecordBatch.from_pylist(shard.rows[first : first + ROWS_PER_BATCH], schema))
    return shard.result


class _Shard:
    """Rows of a shard, and what its entries share."""

    def __init__(self, image_folder: ImageFolder) -> None:
        self.image_folder = image_folder
        self.rows: list[dict[str, Any]] = []
        self.result = ShardResult()
        self._shared: tuple[int, dict[LabelMask | int, tuple[Any, bytes | ValueError]]] = (-1, {})  # image -> its masks
        self._labels: tuple[str, np.ndarray | ValueError] = ("", np.zeros((0, 0), np.uint8))  # name and content of a palette image
        self._drawn: dict[tuple[int, int], bytes | ValueError] = {}  # (image, annotation id) -> RLE counts, or the fault

    def add(self, located: LocatedEntry) -> None:
        """Adds the rows of an entry's usable phrases and the faults of the others."""
        entry, result = located.entry, self.result
        try:
            _check_claims(entry, (located.height, located.width))
            instances, crowds = self._objects(located)
            ignored = self._ignored(located)
        except BadEntryError as error:
            self._add_fault(located.fault(error.reason, str(error), max(1, len(entry.phrases))))
            return
        num_before = len(self.rows)
        for phrase in entry.phrases:
            if (fault := _fault_of_phrase(phrase)) is not None:
                self._add_fault(located.fault(*fault, 1))
                continue
            self.rows.append(
                {
                    "id": str(phrase.id),
                    "image": located.image,
                    "phrase": phrase.text.strip(),
                    "raw": phrase.raw.strip() if phrase.raw and is_text(phrase.raw) else None,
                    "category": entry.category,
                    "num_same_class": entry.num_same_class,
                    "ref_id": entry.ref_id,
                    "instances": instances,
                    "crowds": crowds,
                    "video": entry.video,
                    "frame": entry.frame,
                    "expression": entry.expression,
                    "has_truth": entry.has_truth,
                    "ignored": ignored,
                }
            )
            if crowds:
                ids = ", ".join(str(each["id"]) for each in crowds)
                result.crowds.append(f"sent_id {phrase.id} (ann_id {ids})")
        if num_added := len(self.rows) - num_before:
            result.num_refs += 1
            result.num_phrases += num_added
            is_absent = entry.may_be_absent and entry.has_truth and not instances
            result.num_no_target += num_added if entry.is_no_target or is_absent else 0
            result.is_generalised |= entry.has_truth and len(instances) + len(crowds) != 1
            result.has_truth &= entry.has_truth

    def _add_fault(self, fault: SourceFault) -> None:
        self.result.num_bad[fault.reason] += fault.num_phrases
        self.result.faults.append(fault)

    def _objects(self, located: LocatedEntry) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The columns of an entry's referents and crowds.

        Raises:
            BadEntryError: a mask cannot be used, or an object is named twice.
        """
        entry = located.entry
        instances: list[dict[str, Any]] = []
        crowds: list[dict[str, Any]] = []
        empty: list[tuple[SourceInstance, str]] = []
        for number, instance in enumerate(entry.instances):
            where = f"object {number + 1} of {len(entry.instances)}: " if len(entry.instances) > 1 else ""
            try:
                (crowds if instance.is_crowd else instances).append(self._object(instance, located))
            except NoPixelError as error:
                named = "" if instance.id is None else f"annotation {instance.id}: "
                empty.append((instance, f"{where}{named}{error}"))
            except ValueError as error:
                raise BadEntryError("mask", f"{where}{error}") from error
        if entry.may_be_absent:
            return list({each["id"]: each for each in instances}.values()), crowds
        if empty and not instances:
            if not entry.may_be_empty:
                raise BadEntryError("mask", empty[0][1])
            height, width = located.height, located.width
            nothing = segmentation_rle({"size": [height, width], "counts": [height * width]}, height, width)
            instances = [{"id": one.id, "counts": nothing["counts"]} for one, _ in empty if not one.is_crowd]
        self.result.without_pixel += [located.fault("mask", message, 0) for _, message in empty]
        if len({each["id"] for each in (*instances, *crowds)}) < len(instances) + len(crowds):
            raise BadEntryError("target", "expected each object once, got one twice (same id or same mask)")
        return instances, crowds

    def _ignored(self, located: LocatedEntry) -> bytes | None:
        """The RLE counts of the pixels that no metric counts; None if there are none.

        Raises:
            BadEntryError: their mask cannot be used.
        """
        if located.entry.ignored is None:
            return None
        try:
            return self._counts(located.entry.ignored, (located.height, located.width))
        except NoPixelError:
            return None
        except ValueError as error:
            raise BadEntryError("mask", f"ignored pixels: {error}") from error

    def _object(self, instance: SourceInstance, located: LocatedEntry) -> dict[str, Any]:
        """The columns of an object; each annotation of an image is drawn once.

        Raises:
            ValueError: its mask or its id cannot be used.
        """
        size_hw = (located.height, located.width)
        if instance.id is None:
            counts = self._counts_of_image(instance.mask, located)
            # The same mask is the same object, whichever line names it.
            return {"id": int.from_bytes(hashlib.sha256(counts).digest()[:8], "little") >> 1, "counts": counts}
        if not is_int64(instance.id):
            raise ValueError(f"expected an annotation id, a whole number, got {instance.id!r}")
        key = (located.image, instance.id)
        if key not in self._drawn:
            try:
                self._drawn[key] = self._counts(instance.mask, size_hw)
            except ValueError as error:
                self._drawn[key] = error
        counts = self._drawn[key]
        if isinstance(counts, ValueError):
            raise counts
        return {"id": instance.id, "counts": counts}

    def _counts_of_image(self, mask: Any, located: LocatedEntry) -> bytes:
        """`_counts`, once for a mask that the sentences of a frame share.

        Raises:
            ValueError: it is not a mask of this image.
        """
        size_hw = (located.height, located.width)
        if not isinstance(mask, (dict, LabelMask)):
            return self._counts(mask, size_hw)
        if self._shared[0] != located.image:
            self._shared = (located.image, {})
        known = self._shared[1]
        key = mask if isinstance(mask, LabelMask) else id(mask)  # the value keeps the mask, so its id stays its own
        if key not in known:
            try:
                known[key] = (mask, self._counts(mask, size_hw))
            except ValueError as error:
                known[key] = (mask, error)
        if isinstance(counts := known[key][1], ValueError):
            raise counts
        return counts

    def _counts(self, mask: Any, size_hw: tuple[int, int]) -> bytes:
        """The counts of the compressed RLE of a mask of any form.

        Raises:
            ValueError: it is not a mask of this image.
        """
        if isinstance(mask, ValueError):
            raise mask
        if isinstance(mask, (MaskFile, bytes)):
            return encode_mask(self._read_mask(mask, size_hw))["counts"].encode()
        if isinstance(mask, LabelMask):
            inside = self._labels_of(mask.name, size_hw) == mask.label
            if not inside.any():
                raise NoPixelError(f"mask {mask.name}: expected pixels of object {mask.label}, got none")
            return encode_mask(inside)["counts"].encode()
        if (array := _array(mask, size_hw)) is None:
            return visible_rle(mask, *size_hw)["counts"]
        inside = two_valued_mask(array)
        if not inside.any():
            raise NoPixelError("expected some pixels above 0 in the array, got none")
        return encode_mask(inside)["counts"].encode()

    def _labels_of(self, name: str, size_hw: tuple[int, int]) -> np.ndarray:
        """The numbers of objects in a palette image, uint8 (height, width); the phrases of a frame share the last one."""
        if self._labels[0] != name:
            self._labels = (name, self._read_labels(name, size_hw))
        if isinstance(labels := self._labels[1], ValueError):
            raise labels
        return labels

    def _read_labels(self, name: str, size_hw: tuple[int, int]) -> np.ndarray | ValueError:
        path, fault = self.image_folder.file(name)
        if path is None:
            return ValueError(f"mask: {fault}")
        if not path.is_file():
            return ValueError(f"mask {name}: expected a palette PNG, got no file")
        try:
            with opened_image(path) as file:
                mode, height, width = file.mode, file.height, file.width
                labels = np.asarray(file) if (height, width) == size_hw and mode == "P" else None
        except BROKEN as error:
            return ValueError(f"mask {name}: expected a palette PNG, got {type(error).__name__}: {error}")
        if (height, width) != size_hw:
            return ValueError(f"mask {name}: expected {size_hw[1]} x {size_hw[0]} px, got {width} x {height} px")
        if labels is None:
            return ValueError(
                f"mask {name}: expected a PNG with a palette, whose numbers are those of the objects, got mode {mode}: the numbers "
                "cannot be known from grey values or colours; use the published file"
            )
        return labels

    def _read_mask(self, mask: MaskFile | bytes, size_hw: tuple[int, int]) -> np.ndarray:
        if isinstance(mask, MaskFile):
            name = mask.name
            opened, fault = self.image_folder.file(name)
            if opened is None:
                raise ValueError(f"mask: {fault}")
        else:
            name, opened = f"of {len(mask):,} bytes", io.BytesIO(mask)
        try:
            with opened_image(opened) as file:
                is_large = file.width * file.height > MAX_PIXELS
                if not is_large:
                    file.load()
        except BROKEN as error:
            raise ValueError(f"mask {name}: expected an image, got {type(error).__name__}: {error}") from error
        if is_large or (file.height, file.width) != size_hw:
            raise ValueError(f"mask {name}: expected {size_hw[1]} x {size_hw[0]} px, got {file.width} x {file.height} px")
        try:
            inside, is_lossy = mask_of_image(file)
        except ValueError as error:
            raise ValueError(f"mask {name}: {error}") from error
        if not inside.any():
            raise NoPixelError(f"mask {name}: expected some pixels above {'half' if is_lossy else 0}, got none")
        self.result.num_lossy_masks += is_lossy
        return inside


def _check_claims(entry: SourceEntry, size_hw: tuple[int, int]) -> None:
    """Checks what an entry says beside its phrases and masks.

    Raises:
        BadEntryError: it contradicts itself or the image.
    """
    if entry.size_hw is not None and tuple(entry.size_hw) != size_hw:
        height, width = entry.size_hw
        raise BadEntryError(
            "size",
            f"expected masks drawn for {entry.image}, {size_hw[1]} x {size_hw[0]} px, got {width!r} x {height!r} px",
        )
    if entry.category is not None and not is_text(entry.category):
        raise BadEntryError("structure", f"expected the category's name, got {describe(entry.category)}")
    if entry.is_no_target and entry.instances:
        raise BadEntryError("target", f"expected no mask where there is no target, got {len(entry.instances)}")
    if not entry.has_truth and (entry.is_no_target or entry.instances):
        raise BadEntryError("target", f"expected no mask where the truth is not known, got {len(entry.instances)}")
    if entry.has_truth and not entry.is_no_target and not entry.instances:
        raise BadEntryError("target", "expected a mask, or a statement that there is no target (no_target: true), got neither")


def _fault_of_phrase(phrase: SourcePhrase) -> tuple[FaultReason, str] | None:
    if isinstance(phrase.id, bool) or not isinstance(phrase.id, (int, str)) or not is_text(str(phrase.id)):
        return "structure", f"expected a phrase id, a text or number, got {describe(phrase.id)}"
    if not is_text(phrase.text):
        return "phrase", f"expected a phrase {phrase.id} of some words, got {describe(phrase.text)}"
    if phrase.raw is not None and not isinstance(phrase.raw, str):
        return "phrase", f"expected phrase {phrase.id} as typed, got {describe(phrase.raw)}"
    return None


def is_text(value: object) -> bool:
    """Whether a value is a text that is not blank and that UTF-8 can hold (JSON may hold lone surrogates)."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _array(mask: Any, size_hw: tuple[int, int]) -> np.ndarray | None:
    """A mask given as rows of numbers; polygons never have as many and as long rows as an image."""
    if not isinstance(mask, list) or len(mask) != size_hw[0]:
        return None
    if not all(isinstance(row, list) and len(row) == size_hw[1] for row in mask):
        return None
    array = np.asarray(mask)
    return array if array.dtype.kind in "biuf" else None
