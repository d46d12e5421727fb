"""Reads a user's own JSONL: one line per image and referents.

    {"image": "street/001.jpg", "phrase": "the red car", "polygons": [[10, 10, 60, 10, 60, 40]]}
    {"image": "002.jpg", "phrase": "both dogs", "masks": [{"size": [480, 640], "counts": "..."}, "b.png"]}
    {"image": "003.jpg", "phrase": "the unicorn", "no_target": true, "split": "val", "id": "u-17"}

Referents, one of: `polygons`, the parts of one object, [[x0, y0, x1, y1, ...], ...] in px; `rle`, one object as COCO RLE;
`png`, one object as an image of one channel, above 0 = inside; `masks`, a list of objects, each in one of these forms.
Where a line has several phrases and several masks, `--mapping pairs=...` says which means which
(`deris_llm.data.formats.pairs`). `no_target: true` says that nothing is meant; a line that has no mask without saying so is an error.

Optional: `id` (of the phrase; default: the line's number), `split` (default: the file's name, of parts without -00000-of-00002), `width` and `height` (of
the image as annotated), `raw` (text as typed), `category`, `image_id` (only if other datasets use the same ids for the
same images). Unknown fields are ignored. `image` and `png` are relative to the folder of the file, or --images.

`--source` is a file, or a folder whose `*.jsonl` (without such, `*.json`) are read in the order of their names; a file may
hold one JSON array of such objects instead of lines. Where several files hold parts of one split, a line's default id is
`FILE-NUMBER`. `--mapping phrase=caption` says that the field `phrase` is called `caption`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deris_llm.data.errors import DataError, describe
from deris_llm.data.images import ImageFolder
from deris_llm.data.formats.base import (
    MaskFile,
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourcePhrase,
    check_is_unpacked,
    checked_mapping,
    existing_image_folder,
    existing_source,
    files_in,
    other_format,
    read_json_file,
)
from deris_llm.data.formats.pairs import Pairing, member
from deris_llm.common.strict_files import unique_keys

FIELDS = (
    "image", "phrase", "phrases", "raw", "masks", "polygons", "rle", "png", "no_target", "id", "split", "width", "height",
    "category", "image_id",
)  # fmt: skip

_MASK_FIELDS = ("masks", "polygons", "rle", "png")


class JsonlReader:
    """Reads line by line; nothing but the current line is in memory, or the whole of a file that is an array."""

    identity = ""
    is_generalised: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        source = existing_source(options, "a .jsonl file, or a folder of them")
        self._files = (
            files_in(source, "*.jsonl", "*.ndjson") or files_in(source, "*.json") if source.is_dir() else (source,)
        )
        if not self._files:
            raise DataError(
                f"--source {source}: expected *.jsonl files in this folder, or *.json that hold an array, got none."
                f"{other_format(source, than='jsonl')} Check the path and --format"
            )
        folder = source if source.is_dir() else source.parent
        self.image_folder = existing_image_folder(options.images or folder, why="beside the JSONL, or --images")
        self._mapping = checked_mapping(options, {name: name for name in FIELDS} | {"pairs": ""})
        self._pairing = Pairing.of(self._mapping.pop("pairs"))
        mask_files, self._shared_splits = self._look_through(ImageFolder(self.image_folder, options.follow_links))
        self.files = (*self._files, *mask_files)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for file in self._files:
            unit, records = _records(file)
            stem = _split_of(file)
            for number, line, fault in records:
                where = f"{file.name} {unit} {number}"
                if fault is not None:
                    yield SourceFault(where, stem, "structure", fault)
                elif line is not None:
                    yield from self._entries_of(line, where, number, file)

    def _entries_of(
        self, line: Mapping[str, Any], where: str, number: int, file: Path
    ) -> Iterator[SourceEntry | SourceFault]:
        found = {name: line[key] for name, key in self._mapping.items() if key in line}
        if self._pairing.phrases:  # other fields may be members of the pairs too
            members = {name: member(line, key) for name, key in self._mapping.items() if "." in key}
            found |= {name: value for name, value in members.items() if value is not None}
        found.setdefault("split", _split_of(file))
        found.setdefault("id", f"{file.stem}-{number}" if str(found["split"]) in self._shared_splits else number)
        if not self._pairing.phrases:
            yield self._entry(line, found, where)
            return
        pairs = self._pairing.fields_by_pair(line, found, number if isinstance(found["id"], list) else found["id"])
        if isinstance(pairs, str):
            yield SourceFault(where, found["split"], "structure", pairs)
            return
        shared = {name: value for name, value in found.items() if name not in ("phrase", "phrases", *_MASK_FIELDS)}
        for number_of_pair, fields in enumerate(pairs):
            yield self._entry(line, {**shared, **fields}, f"{where} pair {number_of_pair}")

    def _entry(self, line: Mapping[str, Any], found: Mapping[str, Any], where: str) -> SourceEntry | SourceFault:
        split = found["split"]

        def fault(message: str) -> SourceFault:
            return SourceFault(where, split, "structure", message)

        if ("phrase" in found) == ("phrases" in found):
            return fault(f"expected `phrase` or `phrases`, got {describe(dict(line))}")
        texts = found["phrases"] if "phrases" in found else [found["phrase"]]
        raws = found.get("raw") if "phrases" in found else [found.get("raw")]
        if not isinstance(texts, list) or not texts:
            return fault(f"expected `phrases` to be a list of texts, got {describe(texts)}")
        if raws is not None and (not isinstance(raws, list) or len(raws) != len(texts)):
            return fault(f"expected `raw` to be as many texts as `phrases`, {len(texts)}, got {describe(raws)}")
        given = [name for name in _MASK_FIELDS if name in found]
        if len(given) > 1:
            return fault(f"expected one of {', '.join(_MASK_FIELDS)}, got {' and '.join(given)}")
        masks = found[given[0]] if given else []
        if given == ["masks"] and not isinstance(masks, list):
            return fault(f"expected `masks` to be a list of objects' masks, got {describe(masks)}")
        if given and given != ["masks"]:
            masks = [masks]
        if given and not self._pairing.phrases and "phrases" in found:
            paths = {"phrases": self._mapping["phrases"], "field": given[0], "path": self._mapping[given[0]]}
            if (message := self._pairing.fault(texts, masks, **paths)) is not None:
                return fault(message)
        if not isinstance(found.get("no_target", False), bool):
            return fault(f"expected `no_target` to be true or false, got {found['no_target']!r}")
        first_id = found["id"]
        return SourceEntry(
            where=where,
            split=split,
            image=found.get("image"),
            phrases=tuple(
                SourcePhrase(first_id if len(texts) == 1 else f"{first_id}-{k}", text, raws[k] if raws else None)
                for k, text in enumerate(texts)
            ),
            instances=tuple(SourceInstance(MaskFile(mask) if isinstance(mask, str) else mask) for mask in masks),
            is_no_target=found.get("no_target", False),
            size_hw=(found.get("height"), found.get("width")) if {"width", "height"} & found.keys() else None,
            image_id=found.get("image_id"),
            category=found.get("category"),
        )

    def _look_through(self, folder: ImageFolder) -> tuple[tuple[Path, ...], set[str]]:
        """Masks that are files of their own, as what they hold is part of the source; splits that several files hold."""
        found: dict[Path, None] = {}
        files_of: dict[str, set[Path]] = {}
        paths = [path for path in (self._mapping["png"], self._mapping["masks"], self._pairing.masks) if path]
        for file in self._files:
            for _, line, _ in _records(file)[1]:
                files_of.setdefault(str((line or {}).get(self._mapping["split"], _split_of(file))), set()).add(file)
                for value in [line.get(path, member(line, path)) for path in paths] if line else ():
                    for mask in _texts_in(value):
                        path = folder.file(mask)[0]
                        if path is not None and os.path.isfile(path):  # False for names that no file can have
                            found[path] = None
        return tuple(found), {split for split, files in files_of.items() if len(files) > 1}


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each) if isinstance(each, (str, list)) else ()


_Records = Iterator[tuple[int, dict[str, Any] | None, str | None]]
"""Number from 1, the object, and what is wrong with it or None."""


def _records(file: Path) -> tuple[str, _Records]:
    """What the records of a file are, ``line`` or (of one array) ``entry``, and these.

    Raises:
        DataError: an array that is cut off, one object over many lines, text that is not UTF-8 throughout.
    """
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    check_is_unpacked(file, start[:4])
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: expected UTF-8, got UTF-16, as some programs of Windows write. Save the file as UTF-8")
    if start.startswith(b"["):
        values = enumerate(read_json_file(file), start=1)
        return "entry", (
            (i, value, None) if isinstance(value, dict) else (i, None, _not_an_object(value)) for i, value in values
        )
    if start.rstrip() == b"{":
        raise DataError(
            f"{file}: expected an object per line, or one array of objects, got one object over several lines."
            f"{other_format(file, than='jsonl')} Write each record on a line of its own"
        )
    return "line", _lines(file)


def _split_of(file: Path) -> str:
    """The file's name; `train-00000-of-00002.jsonl` is a part of `train`."""
    return re.sub(r"[-_.]\d+-of-\d+$", "", file.stem)


def _not_an_object(value: object) -> str:
    return f"expected an object {{...}}, got {describe(value)}"


def _lines(file: Path) -> _Records:
    """The lines that are not blank."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(text, object_pairs_hook=unique_keys) if text else None
            except (ValueError, RecursionError) as error:
                yield number, None, f"expected an object of JSON in UTF-8, got {type(error).__name__}: {error}"
                continue
            if isinstance(value, dict):
                yield number, value, None
            elif text:
                yield number, None, _not_an_object(value)
