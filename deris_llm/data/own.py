"""Own data by path: what `deris-llm train --data PATH` and `plan --data PATH` read.

The source is prepared once, by `deris_llm.data.store.first_use`. Nothing is left out without a word: a record that cannot be
used is an error, and the counts of every split are returned for printing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deris_llm.data.errors import DataError
from deris_llm.data.formats import refer
from deris_llm.data.formats.base import RECOGNISED, PrepareOptions, recognised_formats
from deris_llm.data.store.first_use import prepared_once
from deris_llm.data.store.prepare import source_key
from deris_llm.data.store.prepared import MANIFEST_FILE, Manifest, read_manifest

VAL_SHARE = 0.1
"""Fraction of the images, at least one, that becomes val if the source has no val."""


@dataclass(frozen=True)
class OwnData:
    """A source that is prepared and ready to train on."""

    manifest: Manifest
    is_new: bool  # prepared just now

    @property
    def overrides(self) -> list[str]:
        """Fields of a run config that train on this data, as ``section.field=value``."""
        name = self.manifest.folder.name
        evaluated = [f"{name}/{split}" for split in self.manifest.splits if split != "train"]
        return [
            f"data.root={json.dumps(str(self.manifest.folder.parent))}",
            f"data.train=[{name}]",
            f"data.eval=[{', '.join(evaluated)}]",
            f"training.eval_split={name}/val",
        ]


def own_data(source: Path, data_format: str | None = None) -> OwnData:
    """Finds the format of a source, prepares it if that was not done yet, and returns the set.

    Args:
        source: a file or folder in a format of `RECOGNISED`, or a prepared set.
        data_format: the format; None if the content shows it.

    Raises:
        DataError: the format is not clear, a record cannot be used, or there is no split to train or to evaluate on.
    """
    if not source.exists():
        raise DataError(f"--data {source}: expected a file or folder, got nothing at this path. Check the path")
    if (source / MANIFEST_FILE).is_file():
        found = OwnData(read_manifest(source), is_new=False)
    else:
        found = _prepared(source, data_format or _format_of(source))
    if missing := [split for split in ("train", "val") if split not in found.manifest.splits]:
        raise DataError(
            f"--data {source}: expected the splits train and val, got {', '.join(found.manifest.splits)}. Name the files or "
            f"folders by split (train.jsonl, val.jsonl), so that there is {missing[0]}; docs/data_formats.md says how each format "
            "names its splits"
        )
    return found


def _prepared(source: Path, data_format: str) -> OwnData:
    def options(out: Path) -> PrepareOptions:
        return PrepareOptions(data_format, str(source), out, val_share=VAL_SHARE, keeps_val=True)

    root, name = source if source.is_dir() else source.parent, _name_of(source)
    try:
        folder, is_new = prepared_once(root, name, source_key(options(root / name)), options)
    except DataError as error:
        raise DataError(
            f"--data {source}, read as {data_format}: {error}\nWhere the data needs options (--skip-bad, --mapping, --images, ...), "
            f"run `deris-llm data prepare --format {data_format} --source {source} --out data/{name}` with them, then train with "
            f"--data data/{name}"
        ) from error
    return OwnData(read_manifest(folder), is_new)


def _format_of(source: Path) -> str:
    if any(refer.refs_path(source, dataset).is_file() for dataset in refer.DATASETS):
        raise DataError(
            f"--data {source}: expected one dataset, got a data root in REFER's layout. Leave --data out and give --set "
            f"data.root={source}"
        )
    found = recognised_formats(source)
    if len(found) == 1:
        return next(iter(found))
    looks = ", ".join(f"{file.relative_to(source) if file != source else file.name} ({name})" for name, file in found.items())
    raise DataError(
        f"--data {source}: expected files of one format, got {looks or 'no file of a known format'}. Name the format with "
        f"--data-format {'|'.join(found or RECOGNISED)}, or name the file that is meant as --data"
    )


def _name_of(source: Path) -> str:
    """The name of the set: that of the folder or file, without characters that no set may have."""
    name = source.resolve().name if source.is_dir() else source.stem
    name = re.sub(r"[^A-Za-z0-9_+.-]+", "-", name).strip("-_+.")[:60] or "own"
    return f"own-{name}" if name in refer.DATASETS else name
