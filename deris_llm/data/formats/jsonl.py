"""Reads a user's own JSONL: one line per image and referents.

    {"image": "street/001.jpg", "phrase": "the red car", "polygons": [[10, 10, 60, 10, 60, 40]]}
    {"image": "002.jpg", "phrase": "both dogs", "masks": [{"size": [480, 640], "counts": "..."}, "b.png"]}
    {"image": "003.jpg", "phrase": "the unicorn", "no_target": true, "split": "val", "id": "u-17"}

Referents, one of: `polygons`, the parts of one object, [[x0, y0, x1, y1, ...], ...] in px; `rle`, one object as COCO RLE;
`png`, one object as an image of one channel, above 0 = inside; `masks`, a list of objects, each in one of these forms.
If a line has several phrases and several masks, `--mapping pairs=...` says which means which
(`deris_llm.data.formats.rows`). `no_target: true` says that the phrase names nothing; a line without a mask and without it is
an error.

Optional: `id` (of the phrase; default: the line's number), `split` (default: the file's name, of parts without
-00000-of-00002), `width` and `height` (of the image as annotated), `raw` (text as typed), `category`, `image_id` (only if other
datasets use the same ids for the same images). Unknown fields are ignored. `image` and `png` are relative to the folder of the
file, or --images.

`--source` is a file, or a folder whose `*.jsonl` (without such, `*.json`) are read in the order of their names; a file may
hold one JSON array of such objects instead of lines. If several files hold parts of one split, a line's default id is
`FILE-NUMBER`. `--mapping phrase=caption` says that the field `phrase` is called `caption`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deris_llm.common.strict_files import unique_keys
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import (
    MaskFile,
    SourceEntry,
    SourceFault,
    SourceInstance,
    PrepareOptions,
    check_image_folder,
    check_is_unpacked,
    other_format,
    read_json_file,
)
from deris_llm.data.formats.rows import RowReader, member, phrases_of
from deris_llm.data.images import ImageFolder

FIELDS = (
    "image", "phrase", "phrases", "raw", "masks", "polygons", "rle", "png", "no_target", "id", "split", "width", "height",
    "category", "image_id",
)  # fmt: skip

_MASK_FIELDS = ("masks", "polygons", "rle", "png")


class JsonlReader(RowReader):
    """Reads line by line: only the current line is in memory, or the whole of a file that is an array."""

    format = "jsonl"
    expected = "a .jsonl file, a folder of *.jsonl, or of *.json that hold an array"
    mapping_keys = {name: name for name in FIELDS} | {"pairs": ""}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._files = self.find_files("*.jsonl|*.ndjson", "*.json")
        folder = self.source if self.source.is_dir() else self.source.parent
        self.image_folder = check_image_folder(options.images or folder, why="beside the JSONL, or --images")
        mask_files, self._shared_splits = self._look_through(ImageFolder(self.image_folder, options.follow_links))
        self.files = (*self._files, *mask_files)

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for file in self._files:
            unit, records = _records(file)
            for number, line in records:
                where = f"{file.name} {unit} {number}"
                if isinstance(line, ValueError):
                    yield SourceFault(where, _split_of(file), "structure", str(line))
                    continue
                found = {name: line[key] for name, key in self.mapping.items() if key in line}
                if self.pair_paths:  # other fields may be members of the pairs too
                    members = {name: member(line, key) for name, key in self.mapping.items() if "." in key}
                    found |= {name: value for name, value in members.items() if value is not None}
                    found = {name: value for name, value in found.items() if name not in ("phrase", "phrases", *_MASK_FIELDS)}
                split = found.setdefault("split", _split_of(file))
                found.setdefault("id", f"{file.stem}-{number}" if str(split) in self._shared_splits else number)
                yield from self.entries_of_row(line, found, split, where, number)

    def entry(self, row: Mapping[str, Any], found: Mapping[str, Any], split: Any, where: str) -> SourceEntry | SourceFault:
        try:
            texts, raws = _texts(row, found)
            masks = self._masks(found, texts)
            if not (masks or self.pair_paths or "no_target" in found) and (meant := _misspelt(row, (*_MASK_FIELDS, "no_target"))):
                raise ValueError(f"expected a mask, or `no_target`, got {describe(dict(row))}.{meant}")
            if not isinstance(found.get("no_target", False), bool):
                raise ValueError(f"expected `no_target` to be true or false, got {found['no_target']!r}")
        except ValueError as error:
            return SourceFault(where, split, "structure", str(error))
        return SourceEntry(
            where=where,
            split=split,
            image=found.get("image"),
            phrases=phrases_of(found["id"], texts, raws),
            instances=tuple(SourceInstance(MaskFile(mask) if isinstance(mask, str) else mask) for mask in masks),
            is_no_target=found.get("no_target", False),
            size_hw=(found.get("height"), found.get("width")) if {"width", "height"} & found.keys() else None,
            image_id=found.get("image_id"),
            category=found.get("category"),
        )

    def _masks(self, found: Mapping[str, Any], texts: list[Any]) -> list[Any]:
        given = [name for name in _MASK_FIELDS if name in found]
        if len(given) > 1:
            raise ValueError(f"expected one of {', '.join(_MASK_FIELDS)}, got {' and '.join(given)}")
        if not given:
            return []
        masks = found[given[0]] if given == ["masks"] else [found[given[0]]]
        if not isinstance(masks, list):
            raise ValueError(f"expected `masks` to be a list of objects' masks, got {describe(masks)}")
        if not self.pair_paths and "phrases" in found:
            if (message := self.fault_of_masks(texts, masks, "phrases", given[0])) is not None:
                raise ValueError(message)
        return masks

    def _look_through(self, folder: ImageFolder) -> tuple[tuple[Path, ...], set[str]]:
        """Masks that are files of their own, as their content is part of the source; splits that several files hold."""
        found: dict[Path, None] = {}
        files_of: dict[str, set[Path]] = {}
        paths = [path for path in (self.mapping["png"], self.mapping["masks"], *self.pair_paths[1:]) if path]
        for file in self._files:
            for _, record in _records(file)[1]:
                line = {} if isinstance(record, ValueError) else record
                files_of.setdefault(str(line.get(self.mapping["split"], _split_of(file))), set()).add(file)
                for value in [line.get(path, member(line, path)) for path in paths]:
                    for mask in _texts_in(value):
                        path = folder.file(mask)[0]
                        if path is not None and os.path.isfile(path):  # False for names that no file can have
                            found[path] = None
        return tuple(found), {split for split, files in files_of.items() if len(files) > 1}


def _texts(row: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[Any], list[Any] | None]:
    """The phrases of a record, and the same as typed if it has them."""
    if ("phrase" in found) == ("phrases" in found):
        meant = _misspelt(row, ("phrase", "phrases"))
        raise ValueError(f"expected `phrase` or `phrases`, got {describe(dict(row))}{'.' + meant if meant else ''}")
    texts = found["phrases"] if "phrases" in found else [found["phrase"]]
    raws = found.get("raw") if "phrases" in found else [found.get("raw")]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"expected `phrases` to be a list of texts, got {describe(texts)}")
    if raws is not None and (not isinstance(raws, list) or len(raws) != len(texts)):
        raise ValueError(f"expected `raw` to be as many texts as `phrases`, {len(texts)}, got {describe(raws)}")
    return texts, raws


def _misspelt(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Asks whether a key that is no field was meant as one of these; empty if none looks like it."""
    for key in row:
        if key not in FIELDS and (near := difflib.get_close_matches(key, fields, n=1, cutoff=0.75)):
            return f" Did you mean `{near[0]}` by `{key}`?"
    return ""


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each) if isinstance(each, (str, list)) else ()


_Records = Iterator[tuple[int, dict[str, Any] | ValueError]]
"""Number from 1, and the object or what is wrong with it."""


def _records(file: Path) -> tuple[str, _Records]:
    """What the records of a file are called, ``line`` or (in one array) ``entry``, and the records.

    Raises:
        DataError: an array that is cut off, one object over many lines, text that is not UTF-8 throughout.
    """
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    check_is_unpacked(file, start[:4])
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: expected UTF-8, got UTF-16, as some programs on Windows write. Save the file as UTF-8")
    if start.startswith(b"["):
        return "entry", ((i, _object(value)) for i, value in enumerate(read_json_file(file), start=1))
    if start.rstrip() == b"{":
        raise DataError(
            f"{file}: expected an object per line, or one array of objects, got one object over several lines."
            f"{other_format(file, than='jsonl')} Write each record on a line of its own"
        )
    return "line", _lines(file)


def _split_of(file: Path) -> str:
    """The file's name; `train-00000-of-00002.jsonl` is a part of `train`."""
    return re.sub(r"[-_.]\d+-of-\d+$", "", file.stem)


def _object(value: Any) -> dict[str, Any] | ValueError:
    return value if isinstance(value, dict) else ValueError(f"expected an object {{...}}, got {describe(value)}")


def _lines(file: Path) -> _Records:
    """The lines that are not blank."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, _object(json.loads(text, object_pairs_hook=unique_keys))
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"expected an object of JSON in UTF-8, got {type(error).__name__}: {error}")
