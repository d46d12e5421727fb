"""What readers of source formats share: the entries they yield, their options, and how they find and open files.

A reader only knows its format. Whether a name is safe, an image exists, a mask is valid and a phrase says something is
checked in one place for all formats (`deris_llm.data.validation`), so fields of entries may hold whatever the source holds.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from deris_llm.common.strict_files import unique_keys
from deris_llm.data.errors import DataError
from deris_llm.structures import Exif

FaultReason = Literal["structure", "reference", "image", "size", "mask", "target", "phrase", "duplicate id"]
"""Why a record cannot be used; the manifest counts skipped records by reason."""


@dataclass(frozen=True, eq=False)
class SourcePhrase:
    """One phrase as the source has it."""

    id: Any  # unique in its split
    text: Any
    raw: Any = None  # as typed by the annotator, if the source has both


@dataclass(frozen=True)
class MaskFile:
    """A mask stored as an image of one channel; pixels above 0 are inside."""

    name: str  # relative to the reader's image folder


@dataclass(frozen=True)
class LabelMask:
    """One object of a palette image, in which the number of a colour is the number of an object."""

    name: str  # relative to the reader's image folder
    label: int


@dataclass(frozen=True, eq=False)
class SourceInstance:
    """One referent as the source has it."""

    mask: Any  # COCO polygons or RLE, a `MaskFile` or `LabelMask`, the bytes of such a file, or the ValueError that says why there is none
    id: Any = None  # annotation id; None: the mask's content identifies the object
    is_crowd: bool = False  # kept apart from the other referents, for protocols that take crowds


@dataclass(frozen=True, eq=False)
class SourceEntry:
    """Phrases of one image for the same referents."""

    where: str  # for messages: "line 7", "ref_id 12"
    split: Any
    image: Any  # file name relative to the reader's image folder
    phrases: tuple[SourcePhrase, ...]
    instances: tuple[SourceInstance, ...]
    is_no_target: bool = False  # the source says that the phrases name nothing; otherwise an entry needs an instance
    may_be_empty: bool = False  # if no referent covers a pixel, the truth is empty, as in REFER's API; else that is a fault
    may_be_absent: bool = False  # a referent that covers no pixel is not in this image; without any there is no target
    size_hw: Any = None  # px, for which the masks were annotated; None: the masks or the image tell
    image_id: Any = None  # only if the source's ids are shared with other datasets
    category: str | None = None
    num_same_class: int | None = None
    ref_id: int | None = None
    ignored: Any = None  # mask of pixels that no metric counts
    video: str | None = None  # `ReferringRecord` says what these four mean
    frame: int | None = None
    expression: str | None = None
    has_truth: bool = True  # False: no instances and not is_no_target
    asks_class: bool = False  # the phrase means all objects of a class in the image, so only one entry may ask for the class


@dataclass(frozen=True)
class SourceFault:
    """Why an entry, or a phrase of it, cannot be used."""

    where: str
    split: Any
    reason: FaultReason
    message: str
    num_phrases: int = 1
    image: str | None = None  # file name, if it is known
    order: int = 0  # of the entry in the source; readers leave it 0

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class BadEntryError(ValueError):
    """An entry of which no phrase can be used."""

    def __init__(self, reason: FaultReason, message: str) -> None:
        super().__init__(message)
        self.reason: FaultReason = reason


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare; the options of `deris-llm data prepare`."""

    format: str
    source: str  # a file or folder; of Hugging Face datasets also a name
    out: Path  # ROOT/NAME
    images: Path | None = None  # folder of the images; None: where the format has them
    splits: tuple[str, ...] = ()  # only these; () = all
    skip_bad: bool = False  # leave out and count what cannot be used, instead of stopping
    mapping: Mapping[str, str] = field(default_factory=dict)  # which field of the source means what
    workers: int = 1
    val_share: float | None = None  # fraction of the images of a source with one split that become val; the others train
    keeps_val: bool = False  # val_share only applies if the source has no split val; it then divides train
    follow_links: bool = False  # links in the image folder may lead outside it
    exif: Exif | None = None  # orientation that was annotated if sizes do not tell; None: the format's convention
    takes_crowds: bool = False  # annotations with iscrowd=1 are objects like others (coco)
    normalised: bool = False  # polygons are given as fractions of the image's sides, from 0 to 1
    train_frames: int | None = None  # at most so many evenly spaced frames of each video of train; None = all
    decode_images: bool = True  # False: images are not opened; the source tells their sizes

    @property
    def work(self) -> Path:
        """The folder in which the set is written; it is renamed to ``out`` when it is complete."""
        return self.out.parent / f".{self.out.name}.preparing"


class SourceReader(ABC):
    """An opened source. The base class checks the options that all formats have.

    Raises:
        DataError: the source or the image folder does not exist, an unknown mapping, or a source of another format.
    """

    format: ClassVar[str]  # as of --format
    expected: ClassVar[str]  # what --source should be, for messages
    mapping_keys: ClassVar[Mapping[str, str]] = {}  # keys of --mapping with their defaults

    image_folder: Path
    files: tuple[Path, ...]  # their content decides whether two runs have the same input
    identity: str = ""  # the same for a source that has no files here
    is_generalised: bool | None = None  # phrases may name nothing or several objects; None: the entries show it
    benchmark: str | None = None  # whose own metrics are reported beside ours (`deris_llm.evaluation.metrics.benchmark_ratios`)
    notes: tuple[str, ...] = ()  # what was left out or chosen on opening; printed and kept in the manifest
    split_notes: Mapping[str, tuple[str, ...]] = {}  # by split: what must be read with its numbers; reports repeat it

    def __init__(self, options: PrepareOptions) -> None:
        self.options = options
        self.source = Path(options.source)
        self.check_source()
        if unknown := [key for key in options.mapping if key not in self.mapping_keys]:
            raise DataError(
                f"--mapping {unknown[0]}=...: expected one of {', '.join(self.mapping_keys) or 'none: this format has no mapping'}"
                f", got {', '.join(unknown)}. Correct the key, or leave it out"
            )
        self.mapping: dict[str, str] = {**self.mapping_keys, **options.mapping}
        if options.images is not None:
            check_image_folder(options.images, why="--images")

    @abstractmethod
    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        """The entries of all splits; every call yields the same ones in the same order."""

    def check_source(self) -> None:
        if not self.source.exists():
            raise DataError(
                f"--source {self.source}: expected {self.expected}, got nothing at this path. Check the path"
            )

    def find_files(self, *patterns: str) -> tuple[Path, ...]:
        """The source if it is a file; else its files that match the first pattern that matches any.

        Raises:
            DataError: no pattern matches.
        """
        if not self.source.is_dir():
            return (self.source,)
        for pattern in patterns:
            if found := files_in(self.source, *pattern.split("|")):
                return found
        raise self.no_files_error()

    def no_files_error(self, found: str = "none") -> DataError:
        return DataError(
            f"--source {self.source}: expected {self.expected}, got {found}.{other_format(self.source, than=self.format)} "
            "Check the path and --format"
        )


def read_json_file(path: Path) -> Any:
    """Parses a JSON file; a leading byte order mark is skipped.

    Raises:
        DataError: the file is not JSON in UTF-8.
    """
    content = path.read_bytes()
    check_is_unpacked(path, content[:4])
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected JSON in UTF-8, got {type(error).__name__}: {error}. Download the file again, or repair it "
            "at this place"
        ) from error


def files_in(folder: Path, *patterns: str) -> tuple[Path, ...]:
    """Files of a folder that match one of the patterns, by name, without hidden ones (`._train.json` of macOS).

    Raises:
        DataError: a folder, a link without a file, a pipe or a device has such a name.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")})
    check_are_files(found)
    return tuple(found)


def check_are_files(paths: Iterable[Path]) -> None:
    """Checks that paths are files: who reads a pipe or a device waits without end.

    Raises:
        DataError: names the first that is none.
    """
    for path in paths:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "a link that leads nowhere, a pipe or a device"
            raise DataError(f"{path}: expected a file, got {got}. Copy the file here, or rename or remove this")


_SIGNS = (
    ("labelme", "*.json", b'"shapes"'),
    ("coco", "*.json", b'"annotations"'),
    ("coco", "*.json", b'"file_name"'),
    ("cvat", "*.xml", b"<annotations"),
    ("jsonl", "*.jsonl", b'"image"'),
)


RECOGNISED = tuple(dict.fromkeys(name for name, *_ in _SIGNS))
"""Formats that `recognised_formats` knows."""
_NUM_FILES_READ = 50


def recognised_formats(source: Path) -> dict[str, Path]:
    """Returns the formats that a source looks like, each with a file that does.

    The beginnings of the first 50 files of each kind in the folder and its subfolders are read.
    """
    found: dict[str, Path] = {}
    for name, pattern, sign in _SIGNS:
        for file in _candidates(source, pattern):
            with file.open("rb") as stream:
                if sign in stream.read(1 << 16):
                    found.setdefault(name, file)
                    break
    return found


def _candidates(source: Path, pattern: str) -> tuple[Path, ...]:
    if not source.is_dir():
        return (source,) if source.match(pattern) else ()
    return files_in(source, pattern, f"*/{pattern}")[:_NUM_FILES_READ]


def other_format(source: Path, *, than: str) -> str:
    """A sentence that names the format that a source looks like; "" if none is recognised."""
    found = recognised_formats(source) if source.exists() else {}
    return next((f" {file.name} looks like --format {name}." for name, file in found.items() if name != than), "")


def check_is_unpacked(path: Path, head: bytes) -> None:
    """Checks by its first bytes that a text file is not an archive.

    Raises:
        DataError: it is.
    """
    if head.startswith((b"PK\3\4", b"\x1f\x8b")):
        raise DataError(f"{path}: expected a text file, got a zip or gzip archive. Unpack it and name the file inside")


def check_image_folder(folder: Path, *, why: str) -> Path:
    """Returns the folder if it is one.

    Raises:
        DataError: it is not.
    """
    if not folder.is_dir():
        raise DataError(
            f"images in {folder} ({why}): expected a folder, got {'a file' if folder.exists() else 'nothing'} there. "
            "Name the folder of the images with --images"
        )
    return folder


def is_int64(value: object) -> bool:
    """Whether a value is a whole number that a 64-bit column holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
