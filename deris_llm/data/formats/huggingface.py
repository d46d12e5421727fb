"""Reads a Hugging Face dataset: a folder of `save_to_disk`, a folder that `load_dataset` reads, or a name on the hub.

    --format hf --source FOLDER --mapping image=photo phrase=sentences.sent mask=segmentation

`--mapping FIELD=COLUMN` says which column means what; `a.b` is the member `b` of column `a`, in a list that of each. Fields:
`image` (an image, embedded or by path), `phrase` (a text or a list), `raw` (as typed), the referents as one of `mask` (an
image, an array or an RLE), `masks` (a list of them), `polygons` (the parts of one object) and `rle`; `no_target`, `id`,
`category`, `image_id`. `pairs` says which phrase means which mask if a row has several of both
(`deris_llm.data.formats.rows`). Fields that are not mapped are read from the column of their own name. The splits keep their names.
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

from deris_llm.common.strict_files import unique_keys
from deris_llm.data.errors import DataError, describe
from deris_llm.data.formats.base import SourceEntry, SourceFault, SourceInstance, PrepareOptions, check_are_files, check_image_folder
from deris_llm.data.formats.rows import RowReader, member, phrases_of
from deris_llm.data.masks import encode_mask

_FIELDS = ("image", "phrase", "raw", "mask", "masks", "polygons", "rle", "no_target", "id", "category", "image_id")
_MASK_FIELDS = ("masks", "mask", "polygons", "rle")
_ROWS = 64  # in memory at a time


class HuggingFaceReader(RowReader):
    """The rows of all splits, as they are stored: only arrays are decoded here."""

    format = "hf"
    mapping_keys = {name: name for name in _FIELDS} | {"json": "", "pairs": ""}

    def __init__(self, options: PrepareOptions) -> None:
        super().__init__(options)
        self._json_columns = tuple(filter(None, self.mapping.pop("json").split(",")))
        self._splits = _load(options.source)
        self._is_embedded = False
        for split, rows in self._splits.items():
            self._check_columns(split, rows.column_names)
            for row in _rows_of(rows, 1):
                self._check_texts(split, row)
                image = member(row, self.mapping["image"])
                self._is_embedded |= isinstance(image, dict) and image.get("bytes") is not None
                break
        self.files = tuple(sorted(path for path in self.source.rglob("*") if path.is_file())) if self.source.is_dir() else ()
        self.identity = "" if self.files else " ".join(rows._fingerprint for rows in self._splits.values())
        if self._is_embedded:
            self.image_folder = options.work / "pictures"
        else:
            self.image_folder = check_image_folder(options.images or self.source, why="images are named by path")

    def check_source(self) -> None:
        """A name on the hub is not a path; loading checks it."""

    def entries(self) -> Iterator[SourceEntry | SourceFault]:
        for split, rows in self._splits.items():
            self._features = rows.features
            for number, row in enumerate(_rows_of(rows, _ROWS)):
                where = f"{split} row {number}"
                try:
                    row = self._parsed(row)
                except ValueError as error:
                    yield SourceFault(where, split, "structure", str(error))
                    continue
                found = {name: member(row, path) for name, path in self.mapping.items()}
                if found["id"] is None:
                    found["id"] = number
                yield from self.entries_of_row(row, found, split, where, number)

    def _check_columns(self, split: str, columns: list[str]) -> None:
        named = [name for name in self.options.mapping if name not in ("json", "pairs")]
        phrase_paths = self.pair_paths or (self.mapping["phrase"],)
        paths = [*(self.mapping[name] for name in (*named, "image")), *phrase_paths]
        wanted = [*self._json_columns, *(path.split(".")[0] for path in paths)]
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(
                f"--source {self.options.source}, split {split}: expected a column {missing[0]!r}, got {', '.join(columns)}. Say "
                f"with --mapping which column means what, e.g. image={columns[0]}; fields: {', '.join(_FIELDS)}"
            )
        if not self.pair_paths and not any(self.mapping[name].split(".")[0] in columns for name in _MASK_FIELDS):
            raise DataError(
                f"--source {self.options.source}, split {split}: expected a column for one of {', '.join(_MASK_FIELDS)}, got "
                f"{', '.join(columns)}. Say with --mapping which, e.g. mask={columns[-1]}"
            )

    def _check_texts(self, split: str, row: Mapping[str, Any]) -> None:
        """Checks on the first row that no mapping names members of a text, or takes a text for a mask."""
        for field, dotted in [*self.mapping.items(), *(("pairs", path) for path in self.pair_paths)]:
            path = dotted.split(".")
            if path[0] in self._json_columns:
                continue
            for depth in range(1, len(path) + 1):
                found = member(row, ".".join(path[:depth]))
                found = found[0] if isinstance(found, list) and found else found
                is_json = isinstance(found, str) and found.lstrip()[:1] in ("{", "[")
                if isinstance(found, str) and (depth < len(path) or (field in _MASK_FIELDS and is_json)):
                    raise DataError(
                        f"--mapping {field}={dotted}, split {split}: expected "
                        + (f"`{'.'.join(path[:depth])}` to have members" if depth < len(path) else "a mask")
                        + f", got a column of text: {found[:60]!r}. If {path[0]!r} holds JSON, have it parsed with --mapping "
                        f"json={','.join([*self._json_columns, path[0]])}"
                    )

    def entry(self, row: Mapping[str, Any], found: Mapping[str, Any], split: Any, where: str) -> SourceEntry | SourceFault:
        texts = found["phrases"] if "phrases" in found else found["phrase"]
        raws = found["raw"]
        texts = texts if isinstance(texts, list) else [texts]
        raws = raws if isinstance(raws, list) else [raws]
        if not texts:
            return SourceFault(where, split, "phrase", "expected a phrase, got an empty list")
        given = next((name for name in _MASK_FIELDS if found[name] is not None), None)
        masks = [] if given is None else found[given] if given == "masks" else [_mask(given, found[given])]
        if not isinstance(masks, list):
            return SourceFault(where, split, "structure", f"expected `masks` to be a list, got {describe(masks)}")
        if given == "masks":
            masks = [_mask("mask", mask) for mask in masks]
        if given is not None and not self.pair_paths:
            if (message := self.fault_of_masks(texts, masks, "phrase", given)) is not None:
                return SourceFault(where, split, "structure", message, len(texts))
        return SourceEntry(
            where=where,
            split=split,
            image=self._image(found["image"]),
            phrases=phrases_of(found["id"], texts, raws if len(raws) == len(texts) else None),
            instances=tuple(SourceInstance(mask) for mask in masks),
            is_no_target=found["no_target"] is True or found["no_target"] == 1,
            image_id=found["image_id"],
            category=_class_name(found["category"], self._features.get(self.mapping["category"])),
        )

    def _parsed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its columns of JSON parsed.

        Raises:
            ValueError: one is not JSON.
        """
        row = dict(row)
        for name in self._json_columns:
            try:
                row[name] = None if row[name] is None else json.loads(row[name], object_pairs_hook=unique_keys)
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"column {name}: expected JSON in a text, got {describe(row[name])} ({error})") from error
        return row

    def _image(self, value: Any) -> Any:
        """The image's name below the image folder; an embedded image is written there first."""
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes) and self._is_embedded:
            name = f"{hashlib.sha256(value['bytes']).hexdigest()[:32]}{_suffix(value['bytes'])}"
            path = self.image_folder / name
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".part").write_bytes(value["bytes"])
                path.with_suffix(".part").replace(path)
            return name
        name = value.get("path") if isinstance(value, dict) else value
        folder = self.image_folder.resolve()
        if isinstance(name, str) and Path(name).is_absolute() and Path(name).is_relative_to(folder):
            return str(Path(name).relative_to(folder))
        return name


def _rows_of(rows: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    for table in rows.with_format("arrow").iter(batch_size=batch_size):
        yield from table.to_pylist()


def _load(source: str) -> dict[str, Any]:
    import datasets  # takes seconds

    folder = Path(source)
    check_are_files(path for path in folder.rglob("*") if path.exists() and not path.is_dir())
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
    """A mask in a form that the validation knows: polygons, RLE, or the bytes of an image."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if field == "polygons" and isinstance(value, list) and value and not isinstance(value[0], list):
        return [value]
    if field == "mask" and isinstance(value, list):
        try:
            array = np.asarray(value)
        except ValueError:  # rows of different lengths: polygons
            return value
        is_mask = array.ndim == 2 and array.size > 0 and np.isin(array, (0, 1, 255)).all()  # not coordinates
        if is_mask and not {1, 255} <= set(np.unique(array).tolist()):  # the validation refuses a label map
            return encode_mask(array > 0)
    return value


def _class_name(value: Any, feature: Any) -> Any:
    is_label = isinstance(value, int) and hasattr(feature, "int2str") and 0 <= value < feature.num_classes
    return feature.int2str(value) if is_label else str(value) if isinstance(value, int) else value


def _suffix(content: bytes) -> str:
    known = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
    return next((suffix for magic, suffix in known.items() if content.startswith(magic)), ".picture")
