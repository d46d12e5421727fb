"""`deris-llm data prepare`: a source of any format becomes a prepared set (`deris_llm.data.store.prepared`).

Two passes over the source: its images (each decoded once, hashed), then its phrases, in shards. Everything is written
beside the final folder, as `.NAME.preparing`, and renamed when it is whole. Shards that an interrupted run had finished
are taken over if source, options and images are still the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from deris_llm.common.version import __version__
from deris_llm.data.formats import refer
from deris_llm.data.errors import DataError, bad_records_error, printable
from deris_llm.data.masks import polygons_in_px
from deris_llm.data.images import BROKEN, ImageFolder, ImageError, ImageFacts, image_facts, portable_name
from deris_llm.data.store.prepared import (
    ARROW_FOLDER,
    COCO_STEM,
    IMAGE_SCHEMA,
    IMAGES_FILE,
    LAYOUT,
    MANIFEST_FILE,
    file_sha256,
    map_arrow,
)
from deris_llm.data.formats.base import (
    FaultReason,
    MaskFile,
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourceReader,
    is_int64,
)
from deris_llm.data.formats.objects import class_key, split_named
from deris_llm.data.formats import open_source
from deris_llm.data.validation import Fault, LocatedEntry, ShardResult, is_text, look_at, write_shard
from deris_llm.common.folders import check_writable
from deris_llm.structures import Exif

logger = logging.getLogger(__name__)

PHRASES_PER_SHARD = 8192

LEFT_OUT_FILE = "left_out.jsonl"
"""All that ``skip_bad`` left out, and referents that draw no pixel, a line each, beside the manifest."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,99}")
_PICTURES_PER_JOB = 32


@dataclass(frozen=True)
class PrepareOptions:
    """What is asked of a preparation."""

    format: str
    source: str
    out: Path  # ROOT/NAME
    images: Path | None = None  # folder of the images; None: where the format has them
    splits: tuple[str, ...] = ()  # only these; () = all
    skip_bad: bool = False  # leave out what cannot be used and count it, instead of stopping
    mapping: dict[str, str] = field(default_factory=dict)
    workers: int = 1
    val_share: float | None = None  # of the images of a source with one split: they become val, the others train
    follow_links: bool = False  # links in the folder of the images may lead outside it
    exif: Exif | None = None  # which way up images were annotated where their size does not say; None: the format's habit
    takes_crowds: bool = False  # annotations with iscrowd=1 are objects as others (coco)
    normalised: bool = False  # polygons are given as shares of the image's sides, from 0 to 1
    decode_images: bool = True  # False: images must be there, but are neither decoded nor hashed; the source says their sizes


_ANNOTATED_AS_STORED = frozenset({"refer", "seqtr"})
"""Formats of datasets over COCO, whose masks were drawn on stored pixels; other tools draw on what viewers show."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A finished preparation."""

    manifest: dict[str, Any]
    was_there: bool  # the same source had been prepared before; nothing was written


def prepare(options: PrepareOptions, *, on_progress: Callable[[str, int, int], None] = lambda *_: None) -> Prepared:
    """Reads, checks and writes a source.

    Args:
        options: what, from where, to where.
        on_progress: called with the stage (`images`, `phrases`), what is done and what is to do.

    Raises:
        DataError: unusable records (the first ten are listed; nothing is written), a source that is not of the format,
            or a folder that holds something else.
    """
    out = options.out
    if not _NAME.fullmatch(out.name):
        raise DataError(
            f"--out {out}: expected ROOT/NAME with a name of letters, digits and _ + . -, got {out.name!r}. Name it otherwise"
        )
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise DataError(f"--val-share {options.val_share}: expected a number between 0 and 1, got another. Use e.g. 0.1")
    if options.takes_crowds and options.format != "coco":
        raise DataError(
            f"--crowds taken: expected --format coco, got {options.format}. Leave it out; gRefCOCO's crowds are kept in the set, and "
            "a protocol with crowds: taken counts them"
        )
    work = out.parent / f".{out.name}.preparing"
    reader = open_source(
        options.format,
        SourceOptions(
            options.source,
            out.name,
            options.images,
            options.mapping,
            own_images=work / "pictures",
            follow_links=options.follow_links,
            takes_crowds=options.takes_crowds,
        ),
    )
    source = _described_source(options, reader)
    if (known := _existing(out, source)) is not None:
        return Prepared(known, was_there=True)
    check_writable(work / ARROW_FOLDER, "--out")
    try:
        with _pool(options.workers) as pool:
            manifest = _Preparation(options, reader, source, work, pool, on_progress).run()
        (work / MANIFEST_FILE).write_bytes(_json_bytes(manifest, indent=1))
        _rename(work, out)
    except DataError:
        shutil.rmtree(work)  # a repaired source is another source: nothing here would be of use
        raise
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"--workers {options.workers}: expected processes that live, got one that was killed (too little memory?). Lower "
            "--workers and start again: finished shards are taken over"
        ) from error
    return Prepared(manifest, was_there=False)


def _described_source(options: PrepareOptions, reader: SourceReader) -> dict[str, Any]:
    """What a preparation depends on, apart from the images."""
    base = Path(options.source)
    base = base if base.is_dir() else base.parent
    files = [
        {
            "file": str(path.relative_to(base)) if path.is_relative_to(base) else path.name,
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in reader.files
    ]
    if len(files) > 100:  # masks that are files of their own
        together = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        files = [*files[:10], {"file": f"and {len(files) - 10:,} more, sha256 of the list of all", "sha256": together}]
    described = {
        "format": options.format,
        "source": options.source,
        "files": files,
        "identity": reader.identity,
        "images": str(options.images) if options.images else None,
        "splits": list(options.splits),
        "mapping": dict(options.mapping),
        "skip_bad": options.skip_bad,
    }
    for name in ("val_share", "follow_links", "exif", "takes_crowds", "normalised"):  # only where they are used: sets that were made before remain the same
        if getattr(options, name):
            described[name] = getattr(options, name)
    if not options.decode_images:
        described["decode_images"] = False
    return described


def _fingerprint(source: dict[str, Any], *more: str) -> str:
    # Where the source lies is not what it is.
    content = {key: value for key, value in source.items() if key != "source"}
    return hashlib.sha256(json.dumps([LAYOUT, content, *more]).encode()).hexdigest()


def _existing(out: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in ``out`` if it was made of this source; None where there is room."""
    path = out / MANIFEST_FILE
    if not path.is_file():
        holds = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
        if out.is_file() or (holds and out.name not in {folder for folder, _ in refer.DATASETS.values()}):
            raise DataError(
                f"--out {out}: expected a new folder, got one that holds {', '.join(holds[:5]) or 'a file'}. Name another, or "
                "remove it"
            )
        return None
    try:
        manifest = json.loads(path.read_bytes())
        there = manifest["source"]
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        is_whole = all((out / ARROW_FOLDER / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
    except (ValueError, KeyError, TypeError, OSError):
        there, manifest, is_whole = {}, {}, False
    if is_whole and _fingerprint(there) == _fingerprint(source):
        return manifest
    differ = [key for key in {**source, **there} if key != "source" and there.get(key) != source.get(key)]
    raise DataError(
        f"--out {out}: expected a new folder or a set made of the same input, got one made of {there.get('source')} with other "
        f"{', '.join(differ) or 'shards than its manifest names'}. Name another folder, or remove this one"
    )


class _Preparation:
    """One run: the images, the phrases, the manifest."""

    def __init__(
        self,
        options: PrepareOptions,
        reader: SourceReader,
        source: dict[str, Any],
        work: Path,
        pool: ProcessPoolExecutor | None,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.options = options
        self.reader = reader
        self.image_folder = ImageFolder(reader.image_folder, options.follow_links)
        self.source = source
        self.arrow = work / ARROW_FOLDER
        self.pool = pool
        self.on_progress = on_progress
        self.images: dict[str, tuple[int, int, int] | tuple[FaultReason, str]] = {}  # row, height, width; or a fault
        self.faults: list[Fault] = []
        self.without_pixel: list[Fault] = []  # referents; their phrases are kept
        self.left_out: dict[str, refer.LeftOut] = {}  # split -> what its notes say
        self.num_bad: dict[str, Counter[str]] = {}
        self.num_total = 0
        self.notes = list(reader.notes)
        self.exif: Exif = options.exif or ("stored" if options.format in _ANNOTATED_AS_STORED else "displayed")
        self.val_images: frozenset[str] | None = None  # names of images; None: the source's own splits
        self.classes: Counter[int] = Counter()  # hash of split, image and class -> entries that ask for all of the class
        self.objects: dict[tuple[str, int], tuple[str, SourceInstance, str]] = {}  # (split, id) -> image, first, where

    def run(self) -> dict[str, Any]:
        """Writes all files and returns the manifest."""
        image_file = self._pictures()
        splits = self._phrases(_fingerprint(self.source, image_file["sha256"]))
        if self.faults and not self.options.skip_bad:
            raise self._too_bad()
        for split in [split for split, found in splits.items() if not found["num_phrases"]]:
            del splits[split]
        if not splits:
            raise self._too_bad() if self.faults else self._nothing()
        if left_out := sorted([*self.faults, *self.without_pixel], key=lambda fault: fault.order):
            lines = (_json_bytes(asdict(fault)) for fault in left_out)
            (self.arrow.parent / LEFT_OUT_FILE).write_bytes(b"\n".join([*lines, b""]))
        if not any(split in refer.KNOWN_SPLITS or split_named(split) for split in splits):
            self.notes.append(
                f"no split is named train, which training reads, or val or test: {', '.join(splits)}. --val-share 0.1 divides one "
                "split into train and val"
            )
        generalised = any([found.pop("is_generalised") for found in splits.values()])
        for leftover in (
            set(self.arrow.iterdir())
            - {self.arrow / IMAGES_FILE}
            - {self.arrow / shard["file"] for split in splits.values() for shard in split["shards"]}
        ):
            leftover.unlink()
        folder, work = self.reader.image_folder.absolute(), self.arrow.parent.absolute()
        if folder.is_relative_to(work):  # written by the reader; its folder is about to be renamed
            folder = self.options.out.absolute() / folder.relative_to(work)
        root = self.options.out.parent.absolute()
        return {
            "layout": LAYOUT,
            "made_by": f"deris_llm {__version__}",
            "name": self.options.out.name,
            "is_generalised": generalised if self.reader.is_generalised is None else self.reader.is_generalised,
            "image_folder": os.path.relpath(folder, root) if folder.is_relative_to(root) else str(folder),
            "images": image_file,
            "exif": self.exif,
            "splits": {split: splits[split] for split in refer.in_known_order(splits)},
            "skipped": {split: dict(counts) for split, counts in self.num_bad.items() if counts},
            "notes": self.notes,
            "source": self.source,
        }

    def _entries(self) -> Iterator[SourceEntry | SourceFault]:
        wanted = self.options.splits
        for entry in self.reader.entries():
            if wanted and entry.split not in wanted:
                continue
            if isinstance(entry, SourceEntry) and isinstance(entry.image, str):
                entry = replace(entry, image=portable_name(entry.image))
            if self.val_images is not None:
                is_val = isinstance(entry, SourceEntry) and entry.image in self.val_images
                entry = replace(entry, split="val" if is_val else "train")
            yield entry

    # Images

    def _pictures(self) -> dict[str, Any]:
        """Looks at every image once and writes their table."""
        sizes: dict[str, list[Any]] = {}  # file -> the different sizes that its entries say, in their order
        ids: dict[str, list[Any]] = {}
        splits: dict[str, None] = {}
        masks: dict[str, str] = {}  # file -> that of a mask, where no entry says a size
        for entry in self._entries():
            splits[str(entry.split)] = None
            self.num_total += entry.num_phrases if isinstance(entry, SourceFault) else max(1, len(entry.phrases))
            if isinstance(entry, SourceEntry) and is_text(entry.image):
                self.classes.update([self._class_asked(entry)] if entry.asks_class else [])
                size_hw, said = _declared_size(entry), sizes.setdefault(entry.image, [])
                said += [size_hw] if size_hw is not None and size_hw not in said else []
                masks |= {entry.image: each.mask.name for each in entry.instances if isinstance(each.mask, MaskFile)}
                named = ids.setdefault(entry.image, [])
                named += [entry.image_id] if entry.image_id is not None and entry.image_id not in named else []
        if self.options.val_share is not None and len(splits) != 1:
            raise DataError(
                f"--val-share {self.options.val_share}: expected a source with one split, got {', '.join(splits) or 'none'}. "
                "Leave it out, or name one of them with --splits"
            )
        rows: list[dict[str, Any]] = []
        of_id: dict[str, tuple[str, int, int]] = {}
        undecided: list[str] = []
        facts = self._facts(list(sizes), sizes)
        for name, said in sizes.items():
            found = facts[name]
            if isinstance(found, ImageFacts):
                said += self._size_of_mask(masks.get(name)) if found.is_sideways and not said else []
                row = _image_row(name, found, said, ids[name], self.options.exif)
                undecided += [name] if isinstance(row, dict) and found.is_undecided else []
            else:
                row = ("image", found)
            if isinstance(row, dict):
                one = (row["sha256"], row["height"], row["width"])
                if of_id.setdefault(row["image_id"], one) != one:
                    row = (
                        "reference",
                        f"expected each image_id to be one image, one way up, got {row['image_id']!r} for {name} and another",
                    )
            if isinstance(row, dict):
                self.images[name] = (len(rows), row["height"], row["width"])
                rows.append(row)
            else:
                self.images[name] = row
        if undecided:
            self._say_undecided(undecided)
        if self.options.val_share is not None:
            self._choose_val(self.options.val_share, rows, *splits)
        path = self.arrow / IMAGES_FILE
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, IMAGE_SCHEMA) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, IMAGE_SCHEMA))
        return {"file": IMAGES_FILE, "count": len(rows), "bytes": path.stat().st_size, "sha256": file_sha256(path)}

    def _size_of_mask(self, name: str | None) -> list[tuple[int, int]]:
        """Height and width of a mask that is a file; nothing if it is none, which is said when masks are read."""
        path = self.image_folder.file(name)[0] if name is not None else None
        try:
            facts = image_facts(path) if path is not None else None
        except ImageError:
            facts = None
        return [] if facts is None else [(facts.height, facts.width)]

    def _say_undecided(self, names: Sequence[str]) -> None:
        """Notes images of which both ways up are as large; warns if nobody said which one was annotated."""
        other = "stored" if self.exif == "displayed" else "displayed"
        said = (
            f"images that EXIF turns by 180 degrees, mirrors, or turns and that are square: {len(names):,}; their size does not say "
            f"which way up they were annotated, and their masks are taken as drawn on the image as it is {self.exif}: "
            f"{', '.join(names[:10])}{f' and {len(names) - 10:,} more' if len(names) > 10 else ''}"
        )
        if self.options.exif is None:
            said += f". If they were drawn on the image as it is {other}: --exif {other}"
            logger.warning("EXIF: images whose size does not say which way up they were annotated: %d", len(names))
        self.notes.append(said)

    def _choose_val(self, share: float, rows: Sequence[dict[str, Any]], split: str) -> None:
        """Takes images out of the only split, those of the lowest content hashes: the same for any order and machine."""
        contents = sorted({row["sha256"] for row in rows})
        if len(contents) < 2:
            raise DataError(f"--val-share {share}: expected at least 2 images, got {len(contents)}. Leave it out")
        chosen = set(contents[: min(max(1, round(share * len(contents))), len(contents) - 1)])
        self.val_images = frozenset(row["file"] for row in rows if row["sha256"] in chosen)
        self.notes.append(
            f"the only split, {split}, was divided by image: {len(self.val_images):,} of {len(rows):,} images are val "
            f"(--val-share {share}), the others train"
        )

    def _facts(self, names: list[str], sizes: dict[str, list[Any]]) -> dict[str, ImageFacts | str]:
        found: dict[str, ImageFacts | str] = {}
        if not self.options.decode_images:
            return {name: self._undecoded(name, sizes[name]) for name in names}
        jobs = [names[i : i + _PICTURES_PER_JOB] for i in range(0, len(names), _PICTURES_PER_JOB)]
        look = partial(look_at, self.image_folder)
        self.on_progress("images", 0, len(names))
        for part in self.pool.map(look, jobs) if self.pool else map(look, jobs):
            found |= part
            self.on_progress("images", len(found), len(names))
        return found

    def _undecoded(self, name: str, sizes_hw: Sequence[Any]) -> ImageFacts | str:
        """The facts that the source states about an image that is there."""
        path, fault = self.image_folder.file(name)
        if path is None:
            return f"image: {fault}"
        if not os.path.isfile(path):
            return f"image {path}: expected an image, got no file"
        if not sizes_hw:
            return f"image {path}: expected its size in the source, got none"
        height, width = sizes_hw[0]
        return ImageFacts(height, width, orientation=1, sha256="")

    # Phrases

    def _phrases(self, key: str) -> dict[str, dict[str, Any]]:
        """Writes all shards; what they hold by split."""
        results: dict[str, dict[str, Any]] = {}
        done = num_lossy_masks = 0
        for split, number, num_phrases, result in _in_order(self._shards(key), 2 * self.options.workers):
            found = results.setdefault(
                split,
                {"num_refs": 0, "num_phrases": 0, "num_images": 0, "num_no_target": 0, "notes": [], "shards": []}
                | {"is_generalised": False},
            )
            path = self.arrow / _shard_name(split, number)
            for name in ("num_refs", "num_phrases", "num_no_target"):
                found[name] += getattr(result, name)
            found["is_generalised"] |= result.is_generalised
            num_lossy_masks += result.num_lossy_masks
            self.num_bad.setdefault(split, Counter()).update(result.num_bad)
            self.faults += result.faults
            self.left_out.setdefault(split, refer.LeftOut()).crowds += result.crowds
            self.left_out[split].without_pixel += map(str, result.without_pixel)
            self.without_pixel += result.without_pixel
            if result.num_phrases:
                size = path.stat().st_size
                shard = {
                    "file": path.name,
                    "num_phrases": result.num_phrases,
                    "bytes": size,
                    "sha256": file_sha256(path),
                }
                found["shards"].append(shard)
                _write_json(
                    path.with_suffix(".json"),
                    {
                        "key": key,
                        "sha256": shard["sha256"],
                        **vars(result),
                        "faults": [asdict(fault) for fault in result.faults],
                        "without_pixel": [asdict(fault) for fault in result.without_pixel],
                    },
                )
            done += num_phrases
            self.on_progress("phrases", done, self.num_total)
        if num_lossy_masks:
            count = f"{num_lossy_masks:,} mask{'s are JPEG files' if num_lossy_masks > 1 else ' is a JPEG file'}"
            self.notes.append(f"{count}: pixels of at least half brightness are inside")
        for split, found in results.items():
            found["notes"] = self.left_out[split].notes()
            found["num_images"] = len(_images_of(self.arrow, found["shards"]))
        self.on_progress("phrases", self.num_total, self.num_total)
        return results

    def _shards(self, key: str) -> Iterator[tuple[str, int, int, Future[ShardResult] | ShardResult]]:
        """Split, number, phrases, and what is or will be known of each shard."""
        pending: dict[str, list[LocatedEntry]] = {}
        sizes: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        seen: dict[str, set[str]] = {}

        def shard(split: str) -> tuple[str, int, int, Future[ShardResult] | ShardResult]:
            path = self.arrow / _shard_name(split, numbers[split])
            job = (path, split, pending.pop(split), self.image_folder)
            result = _finished_shard(path, key)
            if result is None:
                result = self.pool.submit(write_shard, *job) if self.pool else write_shard(*job)
            numbers[split] += 1
            return split, numbers[split] - 1, sizes.pop(split), result

        for order, entry in enumerate(self._entries()):
            located = self._located(order, entry, seen)
            if located is None:
                continue
            split = str(located.entry.split)
            pending.setdefault(split, []).append(located)
            sizes[split] += len(located.entry.phrases)
            if sizes[split] >= PHRASES_PER_SHARD:
                yield shard(split)
        for split in list(pending):
            yield shard(split)

    def _located(self, order: int, entry: SourceEntry | SourceFault, seen: dict[str, set[str]]) -> LocatedEntry | None:
        """The entry with its image, without phrases whose id was there before; None if nothing of it can be used."""
        if isinstance(entry, SourceFault):
            self._fault(Fault(order, entry.where, str(entry.split), entry.reason, entry.message, entry.num_phrases))
            return None
        whole = max(1, len(entry.phrases))
        named = entry.image if isinstance(entry.image, str) else None
        if not isinstance(entry.split, str) or not _NAME.fullmatch(entry.split):
            message = f"expected the name of a split, letters and digits, got {str(entry.split)[:100]!r}"
            self._fault(Fault(order, entry.where, str(entry.split), "structure", message, whole, named))
            return None
        found: Any = self.images.get(entry.image) if isinstance(entry.image, str) else None
        if found is None:
            found = ("image", f"expected the name of an image, got {entry.image!r}")
        if isinstance(found[0], str):
            self._fault(Fault(order, entry.where, entry.split, found[0], found[1], whole, named))
            return None
        if self.options.normalised:
            try:
                entry = _in_px(entry, height=found[1], width=found[2])
            except ValueError as error:
                self._fault(Fault(order, entry.where, entry.split, "mask", str(error), whole, named))
                return None
        if entry.asks_class and self.classes[self._class_asked(entry)] > 1:
            message = f"expected one record of image {entry.image} with all of its objects {entry.phrases[0].text!r}, got several"
            self._fault(Fault(order, entry.where, entry.split, "target", f"{message}: join them", whole, named))
            return None
        if (message := self._other_object(entry)) is not None:
            self._fault(Fault(order, entry.where, entry.split, "duplicate id", message, whole))
            return None
        ids = seen.setdefault(entry.split, set())
        kept = []
        for phrase in entry.phrases:
            if str(phrase.id) in ids:
                message = f"expected each phrase id once in {entry.split}, got {phrase.id!r} again"
                self._fault(Fault(order, entry.where, entry.split, "duplicate id", message, 1, named))
            else:
                ids.add(str(phrase.id))
                kept.append(phrase)
        if len(kept) < len(entry.phrases):
            entry = replace(entry, phrases=tuple(kept))
        return LocatedEntry(order, entry, *found) if kept else None

    def _class_asked(self, entry: SourceEntry) -> int:
        split = "" if self.options.val_share is not None else str(entry.split)
        return hash((split, os.path.normpath(entry.image), class_key(entry.phrases[0].text)))

    def _other_object(self, entry: SourceEntry) -> str | None:
        """Whether an annotation id of the entry was given to another object of the split before, and to which."""
        for instance in entry.instances:
            if is_int64(instance.id):
                first = self.objects.setdefault((entry.split, instance.id), (entry.image, instance, entry.where))
                image, one, where = first
                if image != entry.image or (one.mask is not instance.mask and one.mask != instance.mask):
                    other = f"image {image}" if image != entry.image else "another mask"
                    return f"expected annotation id {instance.id} to be one object, got {other} under it in {where}"
        return None

    def _fault(self, fault: Fault) -> None:
        self.num_bad.setdefault(printable(fault.split), Counter())[fault.reason] += fault.num_phrases
        self.faults.append(fault)

    def _too_bad(self) -> DataError:
        listed = [str(fault) for fault in sorted(self.faults, key=lambda fault: fault.order)]
        total = sum(sum(counts.values()) for counts in self.num_bad.values())
        error = bad_records_error(self.options.source, listed, num_records=self.num_total, num_bad=total)
        return DataError(
            f"{error}; or leave them out with --skip-bad, which counts them in the manifest and names all in {LEFT_OUT_FILE}"
        )

    def _nothing(self) -> DataError:
        return DataError(
            f"--source {self.options.source}: expected phrases"
            + (f" of the splits {', '.join(self.options.splits)}" if self.options.splits else "")
            + f", got {'others only' if self.options.splits else 'none'}. Check the file{' and --splits' * bool(self.options.splits)}"
            + "".join(f"\n  - {note}" for note in self.notes)
        )


def _in_px(entry: SourceEntry, *, height: int, width: int) -> SourceEntry:
    """The entry with normalised polygons scaled to the image; other masks have no unit."""
    return replace(
        entry,
        instances=tuple(
            replace(each, mask=polygons_in_px(each.mask, height, width)) if isinstance(each.mask, list) else each
            for each in entry.instances
        ),
    )


def _image_row(
    name: str, facts: ImageFacts, sizes_hw: Sequence[Any], given_ids: Sequence[Any], exif: Exif | None
) -> dict[str, Any] | tuple[FaultReason, str]:
    """A row of the images' table, or what is wrong; sizes and ids are those that the image's entries say."""
    if len(given_ids) > 1:
        return "reference", f"expected one image_id of {name}, got {given_ids[0]!r} and {given_ids[1]!r}"
    given_id = given_ids[0] if given_ids else None
    if given_id is not None and (
        isinstance(given_id, bool) or not isinstance(given_id, (int, str)) or not is_text(str(given_id))
    ):
        return "structure", f"expected image_id to be a text or number, got {given_id!r}"
    size = next((size_hw for size_hw in sizes_hw if facts.fits(size_hw)), facts.size_hw(exif or "stored"))
    if not sizes_hw and exif is None and facts.is_sideways and facts.height != facts.width:
        return "size", (
            f"image {name}: expected width and height, or --exif displayed or stored for all, for EXIF turns it by 90 degrees and nothing says for which orientation "
            f"the masks were drawn: {facts.width} x {facts.height} px as stored, {facts.height} x {facts.width} px as shown; "
            "got neither"
        )
    stem = Path(name if given_id is None else str(given_id)).stem  # an image_id may be COCO's file name
    is_coco = COCO_STEM.fullmatch(stem) is not None
    named = (
        stem if is_coco else str(given_id) if given_id is not None else f"sha256-{facts.sha256[:24]}"
    )
    return {"image_id": named, "file": name, "height": size[0], "width": size[1], "sha256": facts.sha256}


def _declared_size(entry: SourceEntry) -> Any:
    """Height and width that an entry, or its RLE, was made for; None if nothing says."""
    if entry.size_hw is not None:
        return tuple(entry.size_hw)
    for instance in entry.instances:
        size = instance.mask.get("size") if isinstance(instance.mask, dict) else None
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return tuple(size)
        if isinstance(instance.mask, bytes):
            try:
                with Image.open(io.BytesIO(instance.mask)) as file:
                    return (file.height, file.width)
            except BROKEN:
                return None
    return None


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.arrow"


def _finished_shard(path: Path, key: str) -> ShardResult | None:
    """What an interrupted run with the same input had finished."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file() or not path.is_file():
        return None
    try:
        content = json.loads(sidecar.read_bytes())
    except ValueError:
        return None
    if content.pop("key", None) != key or content.pop("sha256", None) != file_sha256(path):
        return None
    faults = {name: [Fault(**fault) for fault in content.pop(name)] for name in ("faults", "without_pixel")}
    return ShardResult(**{**content, "num_bad": Counter(content["num_bad"]), **faults})


def _in_order(
    shards: Iterable[tuple[str, int, int, Future[ShardResult] | ShardResult]], window: int
) -> Iterator[tuple[str, int, int, ShardResult]]:
    """Results in the order of the jobs, with at most ``window`` of them under way."""
    under_way: list[tuple[str, int, int, Future[ShardResult] | ShardResult]] = []

    def first() -> tuple[str, int, int, ShardResult]:
        split, number, size, result = under_way.pop(0)
        return split, number, size, result.result() if isinstance(result, Future) else result

    for shard in shards:
        under_way.append(shard)
        if len(under_way) >= window or not isinstance(shard[3], Future):
            yield first()
    while under_way:
        yield first()


def _images_of(arrow: Path, shards: list[dict[str, Any]]) -> set[int]:
    found: set[int] = set()
    for shard in shards:
        for batch in map_arrow(arrow / shard["file"], shard["bytes"]):
            found |= set(np.unique(batch.column("image").to_numpy()).tolist())
    return found


def _json_bytes(content: Any, *, indent: int | None = None) -> bytes:
    """JSON in UTF-8; lone surrogates, which UTF-8 cannot hold, as JSON's own escapes."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


def _pool(workers: int) -> Any:
    """Fresh processes: forking one that has threads (Arrow's) may hang."""
    if workers <= 1:
        return nullcontext(None)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _rename(work: Path, out: Path) -> None:
    """Gives the finished folder its name; into a folder of REFER's files the manifest comes last."""
    if not out.is_dir():
        work.rename(out)
        return
    for entry in sorted(work.iterdir(), key=lambda entry: entry.name == MANIFEST_FILE):
        if (
            entry.name == ARROW_FOLDER and (out / ARROW_FOLDER / IMAGES_FILE).is_file()
        ):  # a run was interrupted right here
            shutil.rmtree(out / ARROW_FOLDER)
        entry.replace(out / entry.name)
    work.rmdir()
