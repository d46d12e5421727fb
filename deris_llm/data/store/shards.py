"""The second pass of `deris-llm data prepare`: checks the phrases and writes them in shards.

A finished shard has a file beside it that says what it holds and of which input it was made, so that an interrupted
preparation is resumed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deris_llm.common.strict_files import json_of
from deris_llm.common.words import printable
from deris_llm.data.formats.base import BadEntryError, SourceEntry, SourceFault, SourceInstance, is_int64
from deris_llm.data.formats.objects import class_key
from deris_llm.data.images import ImageFolder
from deris_llm.data.masks import polygons_in_px
from deris_llm.data.store.prepared import file_sha256, map_arrow, sentence_names
from deris_llm.data.validation import LocatedEntry, ShardResult, left_out_notes, write_shard

PHRASES_PER_SHARD = 8192

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,99}")
"""Names of sets and splits, which become names of files."""


@dataclass(eq=False)
class SplitContent:
    """What was written of a split."""

    num_refs: int = 0
    num_phrases: int = 0
    num_no_target: int = 0
    is_generalised: bool = False
    has_truth: bool = True
    crowds: list[str] = field(default_factory=list)
    without_pixel: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def described(self, arrow: Path, notes: Sequence[str] = ()) -> dict[str, Any]:
        """The split's part of the manifest; ``notes`` are the reader's."""
        images: set[int] = set()
        videos: set[str | None] = set()
        sentences: set[str | None] = set()
        for shard in self.shards:
            for batch in map_arrow(arrow / shard["file"], shard["bytes"]):
                images |= set(np.unique(batch.column("image").to_numpy()).tolist())
                if "video" in batch.schema.names:
                    videos |= set(batch.column("video").unique().to_pylist()) - {None}
                    sentences |= set(sentence_names(batch).unique().to_pylist()) - {None}
        described = {
            "num_refs": self.num_refs,
            "num_phrases": self.num_phrases,
            "num_images": len(images),
            "num_no_target": self.num_no_target,
            "notes": [*notes, *left_out_notes(self.crowds, self.without_pixel)],
            "shards": self.shards,
        }
        if videos:
            described |= {"num_videos": len(videos), "num_sentences": len(sentences)}
        return described if self.has_truth else {**described, "has_truth": False}


class _Shard(NamedTuple):
    split: str
    path: Path
    num_phrases: int
    result: Future[ShardResult]


class ShardWriter:
    """Checks entries and writes those of each split in shards of about `PHRASES_PER_SHARD` phrases.

    Args:
        folder: where shards are written.
        image_folder: of the source.
        places: image file -> row, height and width; or why the image cannot be used.
        key: hash of the input; finished shards of another input are written again.
        is_normalised: polygons are given as fractions of the image's sides.
        classes: how many entries ask for all objects of a class in an image, by `asked_class`.
        divided_split: the source's only split if `--val-share` divides it.
    """

    def __init__(
        self,
        folder: Path,
        image_folder: ImageFolder,
        places: dict[str, tuple[int, int, int] | BadEntryError],
        *,
        key: str,
        is_normalised: bool,
        classes: Counter[int],
        divided_split: str | None,
    ) -> None:
        self.splits: dict[str, SplitContent] = {}
        self.faults: list[SourceFault] = []
        self.without_pixel: list[SourceFault] = []  # referents; their phrases are kept
        self.num_bad: dict[str, Counter[str]] = {}  # split -> phrases by reason
        self.num_lossy_masks = 0
        self._folder = folder
        self._image_folder = image_folder
        self._places = places
        self._key = key
        self._is_normalised = is_normalised
        self._classes = classes
        self._divided_split = divided_split
        self._objects: dict[tuple[str, int], tuple[str, SourceInstance, str]] = {}  # (split, id) -> image, first, where
        self._phrase_ids: dict[str, set[str]] = {}  # by split

    def write(
        self,
        entries: Iterable[SourceEntry | SourceFault],
        pool: ProcessPoolExecutor | None,
        workers: int,
        on_progress: Callable[[int], None],
    ) -> None:
        """Writes all shards; ``on_progress`` is called with the number of phrases that are done."""
        done = 0
        under_way: deque[_Shard] = deque()  # results are taken in the order of the shards
        for shard in self._started_shards(entries, pool):
            under_way.append(shard)
            if pool is None or len(under_way) >= 2 * workers:
                done += self._finish(under_way.popleft())
                on_progress(done)
        while under_way:
            done += self._finish(under_way.popleft())
            on_progress(done)

    def _started_shards(
        self, entries: Iterable[SourceEntry | SourceFault], pool: ProcessPoolExecutor | None
    ) -> Iterator[_Shard]:
        pending: dict[str, list[LocatedEntry]] = {}
        sizes: Counter[str] = Counter()
        numbers: Counter[str] = Counter()

        def started(split: str) -> _Shard:
            path = self._folder / f"{split}-{numbers[split]:05d}.arrow"
            numbers[split] += 1
            job = (path, pending.pop(split), self._image_folder)
            known = _finished_shard(path, self._key)
            if known is None and pool is not None:
                return _Shard(split, path, sizes.pop(split), pool.submit(write_shard, *job))
            future: Future[ShardResult] = Future()
            future.set_result(write_shard(*job) if known is None else known)
            return _Shard(split, path, sizes.pop(split), future)

        for order, entry in enumerate(entries):
            located = self._located(order, entry)
            if located is None:
                continue
            split = str(located.entry.split)
            pending.setdefault(split, []).append(located)
            sizes[split] += len(located.entry.phrases)
            if sizes[split] >= PHRASES_PER_SHARD:
                yield started(split)
        for split in list(pending):
            yield started(split)

    def _finish(self, shard: _Shard) -> int:
        result, content = shard.result.result(), self.splits.setdefault(shard.split, SplitContent())
        content.num_refs += result.num_refs
        content.num_phrases += result.num_phrases
        content.num_no_target += result.num_no_target
        content.is_generalised |= result.is_generalised
        content.has_truth &= result.has_truth
        content.crowds += result.crowds
        content.without_pixel += [f"{fault} ({fault.image})" for fault in result.without_pixel]
        self.num_lossy_masks += result.num_lossy_masks
        self.num_bad.setdefault(shard.split, Counter()).update(result.num_bad)
        self.faults += result.faults
        self.without_pixel += result.without_pixel
        if result.num_phrases:
            size, sha256 = shard.path.stat().st_size, file_sha256(shard.path)
            content.shards.append(
                {"file": shard.path.name, "num_phrases": result.num_phrases, "bytes": size, "sha256": sha256}
            )
            aside = shard.path.with_suffix(".part")
            faults = {name: [asdict(fault) for fault in getattr(result, name)] for name in ("faults", "without_pixel")}
            described = {"key": self._key, "sha256": sha256, **vars(result), **faults}
            aside.write_text(json.dumps(described), encoding="utf-8")
            aside.replace(shard.path.with_suffix(".json"))
        return shard.num_phrases

    def _located(self, order: int, entry: SourceEntry | SourceFault) -> LocatedEntry | None:
        """The entry with its image, without phrases whose id occurred before; None if nothing of it can be used."""
        if isinstance(entry, SourceFault):
            self._add_fault(replace(entry, split=str(entry.split), order=order))
            return None
        try:
            row, height, width = self._checked_place(entry)
            located = LocatedEntry(order, self._in_px(entry, height=height, width=width), row, height, width)
        except ValueError as error:
            reason = error.reason if isinstance(error, BadEntryError) else "mask"
            named = entry.image if isinstance(entry.image, str) else None
            num_phrases = max(1, len(entry.phrases))
            self._add_fault(SourceFault(entry.where, str(entry.split), reason, str(error), num_phrases, named, order))
            return None
        return self._with_new_phrases(located)

    def _checked_place(self, entry: SourceEntry) -> tuple[int, int, int]:
        """Row, height and width of an entry's image.

        Raises:
            BadEntryError: the entry's split, image, class or annotation ids cannot be used.
        """
        if not isinstance(entry.split, str) or not NAME.fullmatch(entry.split):
            message = f"expected the name of a split, letters and digits, got {str(entry.split)[:100]!r}"
            raise BadEntryError("structure", message)
        place = self._places.get(entry.image) if isinstance(entry.image, str) else None
        if place is None:
            raise BadEntryError("image", f"expected the name of an image, got {entry.image!r}")
        if isinstance(place, BadEntryError):
            raise place
        if entry.asks_class and self._classes[asked_class(entry, self._divided_split or entry.split)] > 1:
            raise BadEntryError(
                "target",
                f"expected one record of image {entry.image} with all of its objects {entry.phrases[0].text!r}, got several: join them",
            )
        for instance in entry.instances:
            if is_int64(instance.id):
                key = (entry.split, instance.id)
                image, one, where = self._objects.setdefault(key, (entry.image, instance, entry.where))
                if image != entry.image or (one.mask is not instance.mask and one.mask != instance.mask):
                    other = f"image {image}" if image != entry.image else "another mask"
                    message = f"expected annotation id {instance.id} to be one object, got {other} under it in {where}"
                    raise BadEntryError("duplicate id", message)
        return place

    def _in_px(self, entry: SourceEntry, *, height: int, width: int) -> SourceEntry:
        """The entry with normalised polygons scaled to the image; other masks have no unit."""
        if not self._is_normalised:
            return entry
        scaled = (
            replace(each, mask=polygons_in_px(each.mask, height, width)) if isinstance(each.mask, list) else each
            for each in entry.instances
        )
        return replace(entry, instances=tuple(scaled))

    def _with_new_phrases(self, located: LocatedEntry) -> LocatedEntry | None:
        entry = located.entry
        ids = self._phrase_ids.setdefault(entry.split, set())
        kept = []
        for phrase in entry.phrases:
            if str(phrase.id) in ids:
                message = f"expected each phrase id once in {entry.split}, got {phrase.id!r} again"
                self._add_fault(located.fault("duplicate id", message, 1))
            else:
                ids.add(str(phrase.id))
                kept.append(phrase)
        if len(kept) == len(entry.phrases):
            return located if kept else None
        return replace(located, entry=replace(entry, phrases=tuple(kept))) if kept else None

    def _add_fault(self, fault: SourceFault) -> None:
        self.num_bad.setdefault(printable(fault.split), Counter())[fault.reason] += fault.num_phrases
        self.faults.append(fault)


def asked_class(entry: SourceEntry, split: str) -> int:
    """Hash of the split, the image and the class that an entry asks for."""
    return hash((split, os.path.normpath(entry.image), class_key(entry.phrases[0].text)))


def _finished_shard(path: Path, key: str) -> ShardResult | None:
    """What an interrupted preparation of the same input had finished."""
    described = path.with_suffix(".json")
    if not described.is_file() or not path.is_file():
        return None
    try:
        content = json_of(described.read_bytes())
    except ValueError:
        return None
    if content.pop("key", None) != key or content.pop("sha256", None) != file_sha256(path):
        return None
    faults = {name: [SourceFault(**fault) for fault in content.pop(name)] for name in ("faults", "without_pixel")}
    return ShardResult(**{**content, "num_bad": Counter(content["num_bad"]), **faults})
