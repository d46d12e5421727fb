"""What a reader of a source format gives to `deris-llm data prepare`: entries, unchecked, and where each stands.

A reader only finds its way through its format. Whether a name is safe, an image is there, a mask is a mask and a phrase
says something is checked in one place for all formats (`deris_llm.data.validation`), so fields may hold whatever the
source holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from deris_llm.data.errors import DataError
from deris_llm.common.strict_files import unique_keys

FaultReason = Literal["structure", "reference", "image", "size", "mask", "target", "phrase", "duplicate id"]
"""Why a record cannot be used; the manifest counts skipped records by it."""


@dataclass(frozen=True, eq=False)
class SourcePhrase:
    """One phrase as the source has it."""

    id: Any  # unique in its split
    text: Any
    raw: Any = None  # what the annotator typed, where the source has both


@dataclass(frozen=True)
class MaskFile:
    """A mask that is an image of one channel; pixels above 0 are inside."""

    name: str  # relative to the reader's image folder


@dataclass(frozen=True, eq=False)
class SourceInstance:
    """One referent as the source has it."""

    mask: Any  # COCO polygons or RLE, a `MaskFile`, the bytes of such a file, or the ValueError why there is none
    id: Any = None  # annotation id; None: the mask's content is its identity
    is_crowd: bool = False  # beside other referents: kept apart, for protocols that take crowds


@dataclass(frozen=True, eq=False)
class SourceEntry:
    """Phrases of one image for the same referents."""

    where: str  # for messages: "line 7", "ref_id 12"
    split: Any
    image: Any  # file name below the reader's image folder
    phrases: tuple[SourcePhrase, ...]
    instances: tuple[SourceInstance, ...]
    is_no_target: bool = False  # said by the source: nothing is meant; without it an entry needs an instance
    may_be_empty: bool = False  # if no referent draws a pixel, the truth is empty, as in REFER's own API; else it is a fault
    size_hw: Any = None  # px, for which the masks were annotated; None: the masks say it themselves, or the image
    image_id: Any = None  # only if the source's ids are shared with other datasets
    category: str | None = None
    num_same_class: int | None = None
    ref_id: int | None = None
    asks_class: bool = False  # means all objects of a class in the image, so that no other entry may have more of them


@dataclass(frozen=True)
class SourceFault:
    """An entry that the reader could not make sense of."""

    where: str
    split: Any
    reason: FaultReason
    message: str
    num_phrases: int = 1


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about a source."""

    source: str  # a file or folder; of Hugging Face datasets a name too
    name: str  # of the prepared set
    images: Path | None = None  # folder of the images; None: where the format has them
    splits: tuple[str, ...] = ()  # only these; () = all
    mapping: Mapping[str, str] = field(default_factory=dict)  # format-specific: which field is what
    own_pictures: Path = Path("pictures")  # where a reader writes images that are no files in the source
    follow_links: bool = False  # links in the folder of the images may lead outside it
    takes_crowds: bool = False  # annotations with iscrowd=1 are objects as others (coco)


class SourceReader(Protocol):
    """An opened source; `entries` may be iterated several times and gives the same in the same order."""

    image_folder: Path
    files: tuple[Path, ...]  # whose content decides whether two runs have the same input
    identity: str  # the same for a source that has no files here
    is_generalised: bool | None  # phrases may name nothing or several objects; None: the entries show it
    notes: tuple[str, ...]  # what was left out or chosen on opening, a sentence each; printed and kept in the manifest

    def entries(self) -> Iterator[SourceEntry | SourceFault]: ...


def read_json_file(path: Path) -> Any:
    """Parses a JSON file; a byte order mark at its beginning is skipped.

    Raises:
        DataError: it is no JSON in UTF-8.
    """
    content = path.read_bytes()
    check_is_unpacked(path, content[:4])
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected JSON in UTF-8, got {type(error).__name__}: {error}. Download the file again, or repair it "
            "at the place named"
        ) from error


def files_in(folder: Path, *patterns: str) -> tuple[Path, ...]:
    """Files of a folder that match one of the patterns, by name; hidden ones (`._train.json` of macOS) are left out."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return tuple(sorted(path for path in found if path.is_file() and not path.name.startswith(".")))


_SIGNS = (
    ("labelme", "*.json", b'"shapes"'),
    ("coco", "*.json", b'"annotations"'),
    ("coco", "*.json", b'"file_name"'),
    ("cvat", "*.xml", b"<annotations"),
    ("jsonl", "*.jsonl", b'"image"'),
)


def other_format(source: Path, *, than: str) -> str:
    """A sentence that names the format that a source looks like; empty if it is none that is known."""
    for name, pattern, sign in _SIGNS:
        files = files_in(source, pattern, f"*/{pattern}") if source.is_dir() else (source,)
        for file in files[:1] if name != than else ():
            with file.open("rb") as stream:
                if sign in stream.read(1 << 16):
                    return f" {file.name} looks like --format {name}."
    return ""


def check_is_unpacked(path: Path, head: bytes) -> None:
    """Checks the first bytes of a file that should be text.

    Raises:
        DataError: it is an archive.
    """
    if head.startswith((b"PK\3\4", b"\x1f\x8b")):
        raise DataError(f"{path}: expected a text file, got a zip or gzip archive. Unpack it and name what was inside")


def checked_mapping(options: SourceOptions, known: Mapping[str, str]) -> dict[str, str]:
    """The user's mapping over the defaults.

    Raises:
        DataError: a key that the format does not have.
    """
    unknown = [key for key in options.mapping if key not in known]
    if unknown:
        raise DataError(
            f"--mapping {unknown[0]}=...: expected one of {', '.join(known) or 'none: this format has no mapping'}, got "
            f"{', '.join(unknown)}. Correct the key, or leave it out"
        )
    return {**known, **options.mapping}


def existing_source(options: SourceOptions, expected: str) -> Path:
    """The source as a path.

    Raises:
        DataError: nothing is there.
    """
    path = Path(options.source)
    if not path.exists():
        raise DataError(f"--source {path}: expected {expected}, got nothing at this path. Check the path")
    return path


def existing_image_folder(folder: Path, *, why: str) -> Path:
    """The folder of the images.

    Raises:
        DataError: it is no folder.
    """
    if not folder.is_dir():
        raise DataError(
            f"images in {folder} ({why}): expected a folder, got {'a file' if folder.exists() else 'nothing'} there. "
            "Name the folder of the images with --images"
        )
    return folder


def is_int64(value: object) -> bool:
    """A whole number that a column of 64 bits holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
