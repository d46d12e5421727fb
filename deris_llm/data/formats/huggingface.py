"""Reads a Hugging Face dataset: a folder of `save_to_disk`, a folder that `load_dataset` reads, or a name on the hub.

    --format hf --source FOLDER --mapping image=photo phrase=sentences.sent mask=segmentation

`--mapping FIELD=COLUMN` says which column is what; `a.b` is the member `b` of column `a`, in a list that of each. Fields:
`image` (an image, embedded or by path), `phrase` (a text or a list), `raw` (as typed), the referents as one of `mask` (a
image, an array or an RLE), `masks` (a list of them), `polygons` (the parts of one object) and `rle`; `no_target`, `id`,
`category`, `image_id`. `pairs` says which phrase means which mask where a row has several of both
(`deris_llm.data.formats.pairs`). What is not mapped is looked for under its own name. Every split of the dataset becomes one.
`--mapping json=COLUMN,COLUMN` names columns of text that hold JSON; they are parsed first, so that their members can be
named (`polygons=raw_anns.segmentation`).

Embedded images are written as files beside the prepared set, named by their content; paths are relative to --images or
the source's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deris_llm.data.errors import DataError, describe
from deris_llm.data.masks import encode_mask
from deris_llm.data.formats.base import (
    SourceEntry,
    SourceFault,
    SourceInstance,
    SourceOptions,
    SourcePhrase,
    checked_mapping,
    existing_image_folder,
)
from deris_llm.data.formats.pairs import Pairing, member
from deris_llm.common.strict_files import unique_keys

_FIELDS = ("image", "phrase", "raw", "mask", "masks", "polygons", "rle", "no_target", "id", "category", "image_id")
_MASK_FIELDS = ("masks", "mask", "polygons", "rle")
_ROWS = 64  # in memory at a time


class HuggingFaceReader:
    """The rows of all splits, as they are stored: nothing is decoded here but arrays."""

    is_generalised: bool | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, options: SourceOptions) -> None:
        self._mapping = checked_mapping(options, {name: name for name in _FIELDS} | {"json": "", "pairs": ""})
        self._pairing = Pairing.of(self._mapping.pop("pairs"))
        self._json_columns = tuple(filter(None, self._mapping.pop("json").split(",")))
        self._splits = _load(options.source)
        for split, rows in self._splits.items():
            self._check_columns(options, split, rows.column_names)
            for table in rows.with_format("arrow").iter(batch_size=1):
                self._check_texts(split, table.to_pylist()[0])
                break
        folder = Path(options.source)
        self.files = tuple(sorted(path for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else ()
        self.identity = "" if self.files else " ".join(rows._fingerprint for rows in self._splits.values())
        self._is_embedded = self._has_embedded_pictures()
        if self._is_embedded:
            self.image_folder = options.own_pictures
        else:
            self.image_folder = existing_image_folder(options.images or folder, why="images are named by path")

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, rows in self._splits.items():
            number = 0
            for table in rows.with_format("arrow").iter(batch_size=_ROWS):
                for row in table.to_pylist():
                    yield from self._entries_of(split, number, row, rows.features)
                    number += 1

    def _check_columns(self, options: SourceOptions, split: str, columns: list[str]) -> None:
        named = [name for name in options.mapping if name not in ("json", "pairs")]
        of_pairs = [path for path in (self._pairing.phrases, self._pairing.masks) if path]
        paths = [*(self._mapping[name] for name in (*named, "image")), *(of_pairs or [self._mapping["phrase"]])]
        wanted = [*self._json_columns, *(path.split(".")[0] for path in paths)]
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(
                f"--source {options.source}, split {split}: expected a column {missing[0]!r}, got {', '.join(columns)}. Say with "
                f"--mapping which column is what, e.g. image={columns[0]}; fields: {', '.join(_FIELDS)}"
            )
        if not of_pairs and not any(self._mapping[name].split(".")[0] in columns for name in _MASK_FIELDS):
            raise DataError(
                f"--source {options.source}, split {split}: expected a column for one of {', '.join(_MASK_FIELDS)}, got "
                f"{', '.join(columns)}. Say with --mapping which, e.g. mask={columns[-1]}"
            )

    def _has_embedded_pictures(self) -> bool:
        for rows in self._splits.values():
            for table in rows.with_format("arrow").iter(batch_size=1):
                found = member(table.to_pylist()[0], self._mapping["image"])
                return isinstance(found, dict) and found.get("bytes") is not None
        return False

    def _check_texts(self, split: str, row: Mapping[str, Any]) -> None:
        """Checks on the first row that no mapping asks for members of a text, or takes one for a mask."""
        of_pairs = [("pairs", path) for path in (self._pairing.phrases, self._pairing.masks) if path]
        for field, dotted in [*self._mapping.items(), *of_pairs]:
            path = dotted.split(".")
            if path[0] in self._json_columns:
                continue
            for depth in range(1, len(path) + 1):
                found = member(row, ".".join(path[:depth]))
                found = found[0] if isinstance(found, list) and found else found
                is_json = isinstance(found, str) and found.lstrip()[:1] in ("{", "[")
                if isinstance(found, str) and (depth < len(path) or (field in _MASK_FIELDS and is_json)):
                    raise DataError(
                        f"--mapping {field}={'.'.join(path)}, split {split}: expected "
                        + (f"`{'.'.join(path[:depth])}` to have members" if depth < len(path) else "a mask")
                        + f", got a column of text: {found[:60]!r}. If {path[0]!r} holds JSON, have it parsed with --mapping "
                        f"json={','.join([*self._json_columns, path[0]])}"
                    )

    def _entries_of(
        self, split: str, number: int, row: Mapping[str, Any], features: Any
    ) -> Iterator[SourceEntry | SourceFault]:
        where = f"{split} row {number}"
        try:
            row = self._parsed(row)
        except ValueError as error:
            yield SourceFault(where, split, "structure", str(error))
            return
        found = {name: member(row, path) for name, path in self._mapping.items()}
        if found["id"] is None:
            found["id"] = number
        if not self._pairing.phrases:
            yield self._entry(split, where, found, features)
            return
        pairs = self._pairing.fields_by_pair(row, found, number if isinstance(found["id"], list) else found["id"])
        if isinstance(pairs, str):
            yield SourceFault(where, split, "structure", pairs)
            return
        for number_of_pair, fields in enumerate(pairs):
            fields = {**found, **fields, "phrase": fields["phrases"]}
            yield self._entry(split, f"{where} pair {number_of_pair}", fields, features)

    def _entry(self, split: str, where: str, found: Mapping[str, Any], features: Any) -> SourceEntry | SourceFault:
        texts, raws = found["phrase"], found["raw"]
        texts = texts if isinstance(texts, list) else [texts]
        raws = raws if isinstance(raws, list) else [raws]
        if not texts or len(raws) != len(texts):
            raws = [None] * len(texts)
        if not texts:
            return SourceFault(where, split, "phrase", "expected a phrase, got an empty list")
        given = [name for name in _MASK_FIELDS if found[name] is not None]
        masks = (found["masks"] if given[0] == "masks" else [_mask(given[0], found[given[0]])]) if given else []
        if not isinstance(masks, list):
            return SourceFault(where, split, "structure", f"expected `masks` to be a list, got {describe(masks)}")
        if given and given[0] == "masks":
            masks = [_mask("mask", mask) for mask in masks]
        if given and not self._pairing.phrases:
            paths = {"phrases": self._mapping["phrase"], "field": given[0], "path": self._mapping[given[0]]}
            if (message := self._pairing.fault(texts, masks, **paths)) is not None:
                return SourceFault(where, split, "structure", message, len(texts))
        first_id = found["id"]
        return SourceEntry(
            where=where,
            split=split,
            image=self._picture(found["image"]),
            phrases=tuple(
                SourcePhrase(first_id if len(texts) == 1 else f"{first_id}-{k}", text, raw)
                for k, (text, raw) in enumerate(zip(texts, raws, strict=True))
            ),
            instances=tuple(SourceInstance(mask) for mask in masks),
            is_no_target=found["no_target"] is True or found["no_target"] == 1,
            image_id=found["image_id"],
            category=_class_name(found["category"], features.get(self._mapping["category"])),
        )

    def _parsed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its columns of JSON as what they hold.

        Raises:
            ValueError: one is no JSON.
        """
        row = dict(row)
        for name in self._json_columns:
            try:
                row[name] = None if row[name] is None else json.loads(row[name], object_pairs_hook=unique_keys)
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"column {name}: expected JSON in a text, got {describe(row[name])} ({error})") from error
        return row

    def _picture(self, value: Any) -> Any:
        """Name of the image below the image folder; an embedded one is written there first."""
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes) and self._is_embedded:
            name = f"{hashlib.sha256(value['bytes']).hexdigest()[:32]}{_suffix(value['bytes'])}"
            path = self.image_folder / name
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".part").write_bytes(value["bytes"])
                path.with_suffix(".part").replace(path)
            return name
        name = value.get("path") if isinstance(value, dict) else value
        if (
            isinstance(name, str)
            and Path(name).is_absolute()
            and Path(name).is_relative_to(self.image_folder.resolve())
        ):
            return str(Path(name).relative_to(self.image_folder.resolve()))
        return name


def _load(source: str) -> dict[str, Any]:
    import datasets  # noqa: PLC0415  (seconds)

    folder = Path(source)
    try:
        is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        found: Any = datasets.load_from_disk(source) if is_saved else datasets.load_dataset(source)
    except Exception as error:  # of many kinds: missing and broken files, no network, a script that is not run
        raise DataError(
            f"--source {source}: expected a Hugging Face dataset (a folder of save_to_disk, a folder or name that load_dataset "
            f"reads), got {type(error).__name__}: {str(error)[:300]}. Check the path, or load it once in Python"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        splits = {str(split): rows for split, rows in found.items()}
    else:
        splits = {str(found.split or "train"): found}
    if not any(len(rows) for rows in splits.values()):
        raise DataError(f"--source {source}: expected a dataset with rows, got an empty one. Check the path")
    return splits


def _mask(field: str, value: Any) -> Any:
    """A mask as the validation knows it: polygons, RLE, or the bytes of an image."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if field == "polygons" and isinstance(value, list) and value and not isinstance(value[0], list):
        return [value]
    if field == "mask" and isinstance(value, list):
        try:
            array = np.asarray(value)
        except ValueError:  # rows of different lengths: polygons
            return value
        is_mask = array.ndim == 2 and array.size > 0 and np.isin(array, (0, 1, 255)).all()  # no coordinates
        if is_mask and not {1, 255} <= set(np.unique(array).tolist()):  # a label map is refused by the validation
            return encode_mask(array > 0)
    return value


def _class_name(value: Any, feature: Any) -> Any:
    is_label = isinstance(value, int) and hasattr(feature, "int2str") and 0 <= value < feature.num_classes
    return feature.int2str(value) if is_label else str(value) if isinstance(value, int) else value


def _suffix(content: bytes) -> str:
    known = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
    return next((suffix for magic, suffix in known.items() if content.startswith(magic)), ".image")
