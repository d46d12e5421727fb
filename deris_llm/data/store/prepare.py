"""`deris-llm data prepare`: makes a prepared set (`deris_llm.data.store.prepared`) of a source of any format.

Two passes over the source: its images (`image_table`: each is decoded and hashed once), then its phrases (`shards`). All files
are written beside the final folder, as `.NAME.preparing`, which is renamed when it is complete. Shards that an interrupted
preparation had finished are reused if source, options and images are still the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deris_llm.common.folders import check_writable
from deris_llm.common.locks import locked
from deris_llm.common.strict_files import json_of
from deris_llm.common.version import __version__
from deris_llm.data.errors import DataError, bad_records_error
from deris_llm.data.formats import VIDEO_FORMATS, open_source, refer
from deris_llm.data.formats.base import PrepareOptions, SourceEntry, SourceFault, SourceReader
from deris_llm.data.formats.objects import split_named
from deris_llm.data.images import ImageFolder, portable_name
from deris_llm.data.store.image_table import ImageTable, undecided_note
from deris_llm.data.store.prepared import ARROW_FOLDER, IMAGES_FILE, LAYOUT, LEFT_OUT_FILE, MANIFEST_FILE, file_sha256
from deris_llm.data.store.shards import NAME, ShardWriter, asked_class
from deris_llm.data.validation import is_text
from deris_llm.structures import Exif

logger = logging.getLogger(__name__)

_LATER_OPTIONS = ("val_share", "keeps_val", "follow_links", "exif", "takes_crowds", "normalised", "train_frames")

_ANNOTATED_AS_STORED = frozenset({"refer", "seqtr", *VIDEO_FORMATS})
"""Formats of datasets over COCO and videos, whose masks were drawn on stored pixels; other tools draw on what viewers display."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A finished preparation."""

    manifest: dict[str, Any]
    was_there: bool  # the same source had been prepared before; nothing was written


def prepare(options: PrepareOptions, *, on_progress: Callable[[str, int, int], None] = lambda *_: None) -> Prepared:
    """Reads, checks and writes a source.

    Args:
        options: what, from where, to where.
        on_progress: called with the stage (`images`, `phrases`), the number done and the total.

    Raises:
        DataError: unusable records (the first ten causes are listed; nothing is written), a source that is not of the format,
            or an output folder that holds something else.
    """
    _check_options(options)
    out = options.out
    reader = open_source(options)
    source = _described_source(options, reader)
    if (known := _existing(out, source)) is not None:
        return Prepared(known, was_there=True)
    check_writable(out.parent, "--out below")
    with locked(out.with_name(f".{out.name}.lock"), f"--out {out}"):
        if (known := _existing(out, source)) is not None:  # another process has prepared it meanwhile
            return Prepared(known, was_there=True)
        return Prepared(_prepare(options, reader, source, on_progress), was_there=False)


def _prepare(
    options: PrepareOptions,
    reader: SourceReader,
    source: dict[str, Any],
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Writes the set and returns its manifest."""
    out, work = options.out, options.work
    (work / ARROW_FOLDER).mkdir(parents=True, exist_ok=True)
    try:
        with _pool(options.workers) as pool:
            manifest = _Preparation(options, reader, source, pool, on_progress).run()
        (work / MANIFEST_FILE).write_bytes(_json_bytes(manifest, indent=1))
        _rename(work, out)
    except DataError:
        shutil.rmtree(work)  # a repaired source is another source: nothing here could be reused
        raise
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"--workers {options.workers}: expected processes to survive, got one that was killed (too little memory?). Lower "
            "--workers and start again: finished shards are reused"
        ) from error
    return manifest


def _check_options(options: PrepareOptions) -> None:
    out = options.out
    if not NAME.fullmatch(out.name):
        raise DataError(
            f"--out {out}: expected ROOT/NAME with a name of letters, digits and _ + . -, got {out.name!r}. Choose another name"
        )
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise DataError(f"--val-share {options.val_share}: expected a number between 0 and 1. Use e.g. 0.1")
    is_video = options.format in VIDEO_FORMATS
    if options.val_share is not None and is_video:
        raise DataError(
            f"--val-share {options.val_share}: expected the splits of the source, got --format {options.format}, of which frames of one "
            "video would come into both. Leave it out"
        )
    if options.train_frames is not None and not (is_video and options.train_frames > 0):
        raise DataError(
            f"--train-frames {options.train_frames}: expected a number from 1 with --format {' or '.join(VIDEO_FORMATS)}, got "
            f"--format {options.format}. Leave it out, or correct it"
        )
    if options.takes_crowds and options.format != "coco":
        raise DataError(
            f"--crowds taken: expected --format coco, got {options.format}. Leave it out; gRefCOCO's crowds are kept in the set, and "
            "a protocol with crowds: taken counts them"
        )


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
    # Options that came later are described only if they are used, so that older sets remain valid.
    later = {name: getattr(options, name) for name in _LATER_OPTIONS}
    described |= {name: value for name, value in later.items() if value}
    return described if options.decode_images else {**described, "decode_images": False}


def source_key(options: PrepareOptions) -> str:
    """Returns a hash of the source's content and of the options that change the set, wherever both are stored.

    Raises:
        DataError: the source is not of the format.
    """
    return _fingerprint(_described_source(options, open_source(options)))[:16]


def _fingerprint(source: dict[str, Any], *more: str) -> str:
    # The place of the source is not part of it.
    content = {key: value for key, value in source.items() if key != "source"}
    return hashlib.sha256(json.dumps([LAYOUT, content, *more]).encode()).hexdigest()


def _existing(out: Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in ``out`` if it was made of this source; None if nothing is there."""
    path = out / MANIFEST_FILE
    if not path.is_file():
        holds = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
        if out.is_file() or (holds and out.name not in {each.folder for each in refer.DATASETS.values()}):
            raise DataError(
                f"--out {out}: expected a new folder, got one that holds {', '.join(holds[:5]) or 'a file'}. Name another, or "
                "remove it"
            )
        return None
    try:
        manifest = json_of(path.read_bytes())
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
        pool: ProcessPoolExecutor | None,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.options = options
        self.reader = reader
        self.source = source
        self.work = options.work
        self.arrow = options.work / ARROW_FOLDER
        self.pool = pool
        self.on_progress = on_progress
        self.image_folder = ImageFolder(reader.image_folder, options.follow_links)
        self.exif: Exif = options.exif or ("stored" if options.format in _ANNOTATED_AS_STORED else "displayed")
        self.notes = list(reader.notes)
        self.num_phrases = 0
        self.classes: Counter[int] = Counter()  # by `asked_class`
        self.divided_split: str | None = None
        self.val_images: frozenset[str] = frozenset()  # of the divided split

    def run(self) -> dict[str, Any]:
        """Writes all files and returns the manifest."""
        table = self._images()
        image_file = table.write(self.arrow)
        writer = ShardWriter(
            self.arrow,
            self.image_folder,
            table.places,
            key=_fingerprint(self.source, image_file["sha256"]),
            is_normalised=self.options.normalised,
            classes=self.classes,
            divided_split=self.divided_split,
        )
        self.on_progress("phrases", 0, self.num_phrases)
        writer.write(
            self._entries(), self.pool, self.options.workers, lambda done: self.on_progress("phrases", done, self.num_phrases)
        )
        self.on_progress("phrases", self.num_phrases, self.num_phrases)
        contents = {split: writer.splits[split] for split in refer.in_known_order(writer.splits)}
        contents = {split: content for split, content in contents.items() if content.num_phrases}
        if writer.faults and not (self.options.skip_bad and contents):
            raise self._bad_records(writer)
        if not contents:
            raise self._no_records()
        self._write_left_out(writer)
        self._add_notes(writer, list(contents))
        shards = {shard["file"] for content in contents.values() for shard in content.shards}
        for path in self.arrow.iterdir():
            if path.name not in {IMAGES_FILE, *shards}:
                path.unlink()
        is_generalised = self.reader.is_generalised
        return {
            "layout": LAYOUT,
            "made_by": f"deris_llm {__version__}",
            "name": self.options.out.name,
            "is_generalised": any(each.is_generalised for each in contents.values()) if is_generalised is None else is_generalised,
            "benchmark": self.reader.benchmark,
            "image_folder": self._final_image_folder(),
            "images": image_file,
            "exif": self.exif,
            "splits": {
                split: content.described(self.arrow, self.reader.split_notes.get(split, ()))
                for split, content in contents.items()
            },
            "skipped": {split: dict(counts) for split, counts in writer.num_bad.items() if counts},
            "notes": self.notes,
            "source": self.source,
        }

    def _entries(self) -> Iterator[SourceEntry | SourceFault]:
        """The entries of the wanted splits, with the names that the set will have."""
        wanted = self.options.splits
        for entry in self.reader.entries():
            if wanted and entry.split not in wanted:
                continue
            if isinstance(entry, SourceEntry) and isinstance(entry.image, str) and "\\" in entry.image:
                entry = replace(entry, image=portable_name(entry.image))
            if self.divided_split is not None and str(entry.split) == self.divided_split:
                is_val = isinstance(entry, SourceEntry) and entry.image in self.val_images
                entry = replace(entry, split="val" if is_val else "train")
            yield entry

    def _images(self) -> ImageTable:
        """The first pass: looks at every image, counts phrases and classes, and divides the split if asked."""
        options = self.options
        table = ImageTable(self.image_folder, exif=options.exif, decode=options.decode_images)
        splits: dict[str, set[str]] = {}  # image names by split
        for entry in self._entries():
            names = splits.setdefault(str(entry.split), set())
            self.num_phrases += entry.num_phrases if isinstance(entry, SourceFault) else max(1, len(entry.phrases))
            if isinstance(entry, SourceEntry) and is_text(entry.image):
                table.add(entry)
                names.add(entry.image)
                if entry.asks_class:
                    self.classes[asked_class(entry, str(entry.split))] += 1
        divided = self._split_to_divide(list(splits))
        table.look(self.pool, lambda done, total: self.on_progress("images", done, total))
        if table.undecided:
            self.notes.append(undecided_note(table.undecided, exif=self.exif, is_given=options.exif is not None))
            if options.exif is None:
                logger.warning(
                    "EXIF: images whose size does not say which orientation was annotated: %d", len(table.undecided)
                )
        if options.val_share is not None and divided is not None:
            which = f"the only split, {divided}," if len(splits) == 1 else f"the split {divided}"
            usable = [row for row in table.rows if row["file"] in splits[divided]]
            # Where images are missing, the second pass says which: that nothing is left to divide would hide it.
            if len(usable) > 1 or len(usable) == len(splits[divided]) or options.skip_bad:
                self._divide(options.val_share, usable, divided, which)
        return table

    def _split_to_divide(self, splits: Sequence[str]) -> str | None:
        """Returns the split that gives some of its images to val: the only one, or train; None if nothing is divided."""
        share = self.options.val_share
        if share is None or (self.options.keeps_val and "val" in splits):
            return None
        if len(splits) == 1:
            return splits[0]
        if self.options.keeps_val and "train" in splits:
            return "train"
        raise DataError(
            f"--val-share {share}: expected a source with one split, got {', '.join(splits) or 'none'}. "
            "Leave it out, or name one of them with --splits"
        )

    def _divide(self, share: float, rows: Sequence[dict[str, Any]], split: str, which: str) -> None:
        """Chooses the images of val: those with the lowest content hashes, whatever the order and the machine."""
        contents = sorted({row["sha256"] for row in rows})
        if len(contents) < 2:
            cure = "Add images, or a val split" if self.options.keeps_val else "Add images, or leave --val-share out"
            raise DataError(
                f"{which} with a share of {share} for val: expected at least 2 images, got {len(contents)}. {cure}"
            )
        chosen = set(contents[: min(max(1, round(share * len(contents))), len(contents) - 1)])
        self.divided_split = split
        self.val_images = frozenset(row["file"] for row in rows if row["sha256"] in chosen)
        self.notes.append(
            f"{which} was divided by image: {len(self.val_images):,} of {len(rows):,} images are val "
            f"(--val-share {share}), the others train"
        )

    def _write_left_out(self, writer: ShardWriter) -> None:
        if left_out := sorted([*writer.faults, *writer.without_pixel], key=lambda fault: fault.order):
            lines = (_json_bytes(asdict(fault)) for fault in left_out)
            (self.work / LEFT_OUT_FILE).write_bytes(b"\n".join([*lines, b""]))

    def _add_notes(self, writer: ShardWriter, splits: Sequence[str]) -> None:
        if (number := writer.num_lossy_masks) > 0:
            count = f"{number:,} mask{'s are JPEG files' if number > 1 else ' is a JPEG file'}"
            self.notes.append(f"{count}: pixels of at least half brightness are inside")
        if not any(split in refer.KNOWN_SPLITS or split_named(split) for split in splits):
            self.notes.append(
                f"no split is named train, which training reads, or val or test: {', '.join(splits)}. --val-share 0.1 divides one "
                "split into train and val"
            )

    def _final_image_folder(self) -> str:
        """The image folder after the work folder is renamed; relative to the data root if they are moved together."""
        folder, work = self.reader.image_folder.absolute(), self.work.absolute()
        if folder.is_relative_to(work):  # written by the reader
            folder = self.options.out.absolute() / folder.relative_to(work)
        root = self.options.out.parent.absolute()
        source = Path(self.options.source).absolute()
        source = source if source.is_dir() else source.parent
        are_together = folder.is_relative_to(root) or (folder.is_relative_to(source) and root.is_relative_to(source))
        return os.path.relpath(folder, root) if are_together else str(folder)

    def _bad_records(self, writer: ShardWriter) -> DataError:
        listed = [str(fault) for fault in sorted(writer.faults, key=lambda fault: fault.order)]
        total = sum(sum(counts.values()) for counts in writer.num_bad.values())
        error = bad_records_error(self.options.source, listed, num_records=self.num_phrases, num_bad=total)
        if self.options.skip_bad:  # there was nothing else
            return error
        return DataError(
            f"{error}; or leave them out with --skip-bad, which counts them in the manifest and names all in {LEFT_OUT_FILE}"
        )

    def _no_records(self) -> DataError:
        splits = self.options.splits
        found = "others only. Check the file and --splits" if splits else "none. Check the file"
        return DataError(
            f"--source {self.options.source}: expected phrases"
            + (f" of the splits {', '.join(splits)}" if splits else "")
            + f", got {found}"
            + "".join(f"\n  - {note}" for note in self.notes)
        )


def _json_bytes(content: Any, *, indent: int | None = None) -> bytes:
    """JSON in UTF-8, with lone surrogates, which UTF-8 cannot hold, as JSON's own escapes."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _pool(workers: int) -> Any:
    """Fresh processes: forking a process that has threads (Arrow's) may hang."""
    if workers <= 1:
        return nullcontext(None)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _rename(work: Path, out: Path) -> None:
    """Gives the finished folder its name; into a folder of REFER's files the manifest is moved last."""
    if not out.is_dir():
        work.rename(out)
        return
    for entry in sorted(work.iterdir(), key=lambda entry: entry.name == MANIFEST_FILE):
        is_left = entry.name == ARROW_FOLDER and (out / ARROW_FOLDER / IMAGES_FILE).is_file()
        if is_left:  # by a preparation that was interrupted right here
            shutil.rmtree(out / ARROW_FOLDER)
        entry.replace(out / entry.name)
    work.rmdir()
