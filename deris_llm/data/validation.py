"""Entries of any source become rows of a prepared set, or faults: the one place where a source's claims are checked.

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
from PIL import Image

from deris_llm.data.errors import describe
from deris_llm.data.masks import (
    NoPixel,
    empty_rle,
    encode_mask,
    picture_mask,
    segmentation_rle,
    two_valued_mask,
    usable_segmentation,
)
from deris_llm.data.images import BROKEN, MAX_PIXELS, ImageFolder, PictureError, PictureFacts, picture_facts
from deris_llm.data.formats.base import FaultReason, MaskFile, SourceEntry, SourceInstance, is_int64

PHRASE_SCHEMA = pa.schema(
    {
        "id": pa.string(),  # unique in its split
        "image": pa.int32(),  # row of the pictures' table
        "phrase": pa.string(),
        "raw": pa.string(),  # as typed; null where the source has one text only
        "category": pa.string(),
        "num_same_class": pa.int32(),
        "ref_id": pa.int64(),
        "instances": pa.list_(pa.struct({"id": pa.int64(), "counts": pa.binary()})),  # COCO RLE, the picture's size
        "crowds": pa.list_(pa.struct({"id": pa.int64(), "counts": pa.binary()})),  # `ReferringRecord.crowds`
    }
)
"""A row per phrase, in the source's order."""

ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Fault:
    """Why an entry, or a phrase of it, cannot be used."""

    order: int  # of the entry in the source
    where: str
    split: str
    reason: FaultReason
    message: str
    num_phrases: int = 1
    image: str | None = None  # as the source names it

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True, eq=False)
class LocatedEntry:
    """An entry whose picture is known to be there and whole."""

    order: int
    entry: SourceEntry
    image: int  # row of the pictures' table
    height: int  # px, as annotated
    width: int


@dataclass(eq=False)
class ShardResult:
    """What became of a shard's entries."""

    num_refs: int = 0
    num_phrases: int = 0
    num_no_target: int = 0
    is_generalised: bool = False  # some phrase has no referent, or several
    num_bad: Counter[str] = field(default_factory=Counter)  # phrases by reason
    faults: list[Fault] = field(default_factory=list)
    num_lossy_masks: int = 0  # stored as JPEG, thresholded at half
    crowds: list[str] = field(default_factory=list)  # phrases that name crowds beside other referents
    without_pixel: list[Fault] = field(default_factory=list)  # referents of phrases that are kept


@dataclass(eq=False)
class _Shard:
    """What the entries of a shard share."""

    split: str
    image_folder: ImageFolder
    checked: dict[tuple[int, int], dict[str, Any] | str] = field(default_factory=dict)  # by picture and annotation id
    num_lossy_masks: int = 0
    crowds: list[str] = field(default_factory=list)
    without_pixel: list[Fault] = field(default_factory=list)


def look_at(image_folder: ImageFolder, names: list[str]) -> dict[str, PictureFacts | str]:
    """Facts of some pictures, or what is wrong with them."""
    found: dict[str, PictureFacts | str] = {}
    for name in names:
        path, fault = image_folder.file(name)
        if path is None:
            found[name] = f"picture: {fault}"
            continue
        try:
            found[name] = picture_facts(path)
        except PictureError as error:
            found[name] = f"picture {str(path)[:300]}: {error}"
    return found


def write_shard(path: Path, split: str, entries: Sequence[LocatedEntry], image_folder: ImageFolder) -> ShardResult:
    """Checks entries and writes the good ones as an Arrow stream, which `datasets.Dataset.from_file` opens too."""
    result = ShardResult()
    rows: list[dict[str, Any]] = []
    shard = _Shard(split, image_folder)
    for located in entries:
        found, faults = _rows(located, shard)
        for fault in faults:
            result.num_bad[fault.reason] += fault.num_phrases
            result.faults.append(fault)
        rows += found
        result.num_refs += bool(found)
        result.num_no_target += len(found) if located.entry.is_no_target else 0
        result.is_generalised |= bool(found) and len(found[0]["instances"]) + len(found[0]["crowds"]) != 1
    result.num_phrases, result.num_lossy_masks = len(rows), shard.num_lossy_masks
    result.crowds, result.without_pixel = shard.crowds, shard.without_pixel
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, PHRASE_SCHEMA) as stream:
        for first in range(0, len(rows), ROWS_PER_BATCH):
            stream.write_batch(pa.RecordBatch.from_pylist(rows[first : first + ROWS_PER_BATCH], PHRASE_SCHEMA))
    return result


def _rows(located: LocatedEntry, shard: _Shard) -> tuple[list[dict[str, Any]], list[Fault]]:
    entry = located.entry

    def bad(reason: FaultReason, message: str, num_phrases: int) -> Fault:
        return Fault(located.order, entry.where, shard.split, reason, message, num_phrases, entry.image)

    whole = max(1, len(entry.phrases))
    size_hw = (located.height, located.width)
    if entry.size_hw is not None and tuple(entry.size_hw) != size_hw:
        height, width = entry.size_hw
        said = f"expected masks drawn for {entry.image}, {size_hw[1]} x {size_hw[0]} px, got {width!r} x {height!r} px"
        return [], [bad("size", said, whole)]
    if entry.category is not None and not is_text(entry.category):
        return [], [bad("structure", f"expected the category's name, got {describe(entry.category)}", whole)]
    if entry.is_no_target and entry.instances:
        return [], [bad("target", f"expected no mask where there is no target, got {len(entry.instances)}", whole)]
    if not entry.is_no_target and not entry.instances:
        ask = "expected a mask, or the word that there is no target (no_target: true), got neither"
        return [], [bad("target", ask, whole)]
    instances: list[dict[str, Any]] = []
    crowds: list[dict[str, Any]] = []
    empty: list[tuple[SourceInstance, Fault]] = []
    for number, instance in enumerate(entry.instances):
        found = _instance(instance, located, shard)
        of = f"object {number + 1} of {len(entry.instances)}: " if len(entry.instances) > 1 else ""
        if isinstance(found, NoPixel):
            empty.append((instance, bad("mask", f"{of}{_named(instance)}{found}", whole)))
        elif isinstance(found, str):
            return [], [bad("mask", of + found, whole)]
        else:
            (crowds if instance.is_crowd else instances).append(found)
    if empty and not instances:
        if not entry.may_be_empty:
            return [], [empty[0][1]]
        counts = segmentation_rle(empty_rle(*size_hw), *size_hw)["counts"]
        instances = [{"id": instance.id, "counts": counts} for instance, _ in empty if not instance.is_crowd]
    shard.without_pixel += [replace(fault, num_phrases=0) for _, fault in empty]
    if len({each["id"] for each in (*instances, *crowds)}) < len(instances) + len(crowds):
        return [], [bad("target", "expected each object once, got one twice (same id or same mask)", whole)]
    rows: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for phrase in entry.phrases:
        if isinstance(phrase.id, bool) or not isinstance(phrase.id, (int, str)) or not is_text(str(phrase.id)):
            faults.append(bad("structure", f"expected a phrase id, a text or number, got {describe(phrase.id)}", 1))
        elif not is_text(phrase.text):
            faults.append(bad("phrase", f"expected a phrase {phrase.id} of some words, got {describe(phrase.text)}", 1))
        elif phrase.raw is not None and not isinstance(phrase.raw, str):
            faults.append(bad("phrase", f"expected phrase {phrase.id} as typed, got {describe(phrase.raw)}", 1))
        else:
            rows.append(
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
                }
            )
    named = ", ".join(str(each["id"]) for each in crowds)
    shard.crowds += [f"sent_id {row['id']} (ann_id {named})" for row in rows if crowds]
    return rows, faults


def _named(instance: SourceInstance) -> str:
    return "" if instance.id is None else f"annotation {instance.id}: "


def is_text(value: object) -> bool:
    """Text that says something and that UTF-8 can hold (JSON can name lone surrogates, which it cannot)."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _instance(instance: SourceInstance, located: LocatedEntry, shard: _Shard) -> dict[str, Any] | str:
    """A referent's columns, or what is wrong with it; each annotation of a picture is drawn once."""
    if instance.id is None:
        return _drawn(instance, located, shard)
    if not is_int64(instance.id):
        return f"expected an annotation id, a whole number, got {instance.id!r}"
    key = (located.image, instance.id)
    if key not in shard.checked:
        shard.checked[key] = _drawn(instance, located, shard)
    return shard.checked[key]


def _drawn(instance: SourceInstance, located: LocatedEntry, shard: _Shard) -> dict[str, Any] | str:
    try:
        counts = _counts(instance.mask, (located.height, located.width), shard)
    except ValueError as error:
        return error.args[0]  # a text, or `NoPixel`
    named = instance.id
    if named is None:  # the same mask is the same object, whichever line names it
        named = int.from_bytes(hashlib.sha256(counts).digest()[:8], "little") >> 1
    return {"id": named, "counts": counts}


def _counts(mask: Any, size_hw: tuple[int, int], shard: _Shard) -> bytes:
    """The compressed RLE of a mask of any form.

    Raises:
        ValueError: it is none of this picture.
    """
    if isinstance(mask, ValueError):
        raise mask
    if isinstance(mask, (MaskFile, bytes)):
        return encode_mask(_read_mask(mask, size_hw, shard))["counts"].encode()
    if (array := _array(mask, size_hw)) is not None:
        inside = two_valued_mask(array)
        if not inside.any():
            raise ValueError(NoPixel("expected some pixels above 0 in the array, got none"))
        return encode_mask(inside)["counts"].encode()
    segmentation, fault = usable_segmentation(mask, *size_hw)
    if fault is not None:
        raise ValueError(fault)
    return segmentation_rle(segmentation, *size_hw)["counts"]


def _array(mask: Any, size_hw: tuple[int, int]) -> np.ndarray | None:
    """A mask given as rows of numbers; polygons are never as many and as long as a picture's rows."""
    if not isinstance(mask, list) or len(mask) != size_hw[0]:
        return None
    if not all(isinstance(row, list) and len(row) == size_hw[1] for row in mask):
        return None
    array = np.asarray(mask)
    return array if array.dtype.kind in "biuf" else None


def _read_mask(mask: MaskFile | bytes, size_hw: tuple[int, int], shard: _Shard) -> np.ndarray:
    if isinstance(mask, MaskFile):
        name = mask.name
        opened, fault = shard.image_folder.file(name)
        if opened is None:
            raise ValueError(f"mask: {fault}")
    else:
        name, opened = f"of {len(mask):,} bytes", io.BytesIO(mask)
    try:
        with Image.open(opened) as file:
            is_large = file.width * file.height > MAX_PIXELS
            if not is_large:
                file.load()
    except BROKEN as error:
        raise ValueError(f"mask {name}: expected a picture, got {type(error).__name__}: {error}") from error
    if is_large or (file.height, file.width) != size_hw:
        raise ValueError(f"mask {name}: expected {size_hw[1]} x {size_hw[0]} px, got {file.width} x {file.height} px")
    try:
        inside, is_lossy = picture_mask(file)
    except ValueError as error:
        raise ValueError(f"mask {name}: {error}") from error
    if not inside.any():
        raise ValueError(NoPixel(f"mask {name}: expected some pixels above {'half' if is_lossy else 0}, got none"))
    shard.num_lossy_masks += is_lossy
    return inside
