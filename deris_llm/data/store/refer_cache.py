"""Prepares REFER's files on first use, so that they are read as any prepared set.

`deris_llm.data.store.first_use` says where the set is kept; its key is a hash of the content of the refs file and
instances.json. Images are neither part of the key nor looked at during the preparation; `check_usable` checks that they exist
whenever a split is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from deris_llm.common.strict_files import json_of
from deris_llm.data.errors import DataError, bad_records_error
from deris_llm.data.formats import refer
from deris_llm.data.store.first_use import CACHE_FOLDER, prepared_once
from deris_llm.data.store.prepared import (
    LAYOUT,
    LEFT_OUT_FILE,
    Manifest,
    PreparedSplit,
    file_sha256,
    read_images,
    read_manifest,
)

if TYPE_CHECKING:
    from deris_llm.data.formats.base import PrepareOptions


def refer_manifest(root: str | Path, dataset: str) -> Manifest:
    """Returns the manifest of the set that is prepared of a dataset's refs file; prepares it if that was not done yet.

    Raises:
        DataError: an unknown dataset, a missing or malformed file, or no usable record.
    """
    root = Path(root)
    files = refer.dataset_paths(root, dataset)
    stamps = tuple((str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    folder = _set_folder(root, dataset, stamps)
    with contextlib.suppress(
        DataError
    ):  # only reading records needs the images, and `check_usable` says what is missing
        return read_manifest(folder, refer.find_image_folder(root, dataset))
    return read_manifest(folder, root / refer.DATASETS[dataset].image_folders[0])


def check_usable(root: str | Path, manifest: Manifest, split: str) -> None:
    """Checks that every record of a split is usable and every image exists.

    Raises:
        DataError: names the records.
    """
    dataset = manifest.folder.name
    image_folder = refer.find_image_folder(root, dataset)
    problems = [f"{fault['where']}: {fault['message']}" for fault in _faults(manifest, split)]
    num_phrases = sum(manifest.content["skipped"].get(split, {}).values())
    if split in manifest.splits:
        num_phrases += manifest.splits[split]["num_phrases"]
        records = PreparedSplit(manifest, split, phrase_field="sent")
        present = _listing(str(image_folder.resolve()), image_folder.stat().st_mtime_ns)
        files = read_images(manifest).column("file").to_pylist()
        missing = [row for row in np.unique(records.image_rows).tolist() if files[row] not in present]
        for row in np.flatnonzero(np.isin(records.image_rows, missing)).tolist():
            record = records.record(row)
            problems.append(f"ref_id {record.ref_id}: image file {record.image_path} is missing")
    if problems:
        where = f"{refer.refs_path(root, dataset)} ({dataset}/{split})"
        raise bad_records_error(where, list(dict.fromkeys(problems)), num_records=num_phrases)


def split_names(manifest: Manifest) -> tuple[str, ...]:
    """Returns the names of all splits, including those without a usable record."""
    return refer.in_known_order({*manifest.splits, *manifest.content["skipped"]})


def unusable_images(manifest: Manifest, split: str) -> set[str]:
    """Returns the ids of images that only unusable records of a split name, as far as these records tell."""
    return {PurePosixPath(fault["image"]).stem for fault in _faults(manifest, split) if fault["image"]}


def _faults(manifest: Manifest, split: str) -> list[dict]:
    if split not in manifest.content["skipped"]:
        return []
    lines = map(json_of, (manifest.folder / LEFT_OUT_FILE).read_bytes().splitlines())
    return [line for line in lines if line["split"] == split and line["num_phrases"]]  # 0: a referent without pixels


@lru_cache(maxsize=4)
def _listing(folder: str, _modified_ns: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


@lru_cache(maxsize=32)
def _set_folder(root: Path, dataset: str, stamps: tuple[tuple[str, int, int], ...]) -> Path:
    """Finds or makes the prepared set of files; hashes them once per process."""
    content = [LAYOUT, dataset, *(file_sha256(Path(path)) for path, _, _ in stamps)]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    folder, is_new = prepared_once(root, dataset, key, partial(_options, root))
    if is_new and folder.parents[1] == root / CACHE_FOLDER:
        _remove_other_versions(folder.parents[1], dataset, key)
    return folder


def _options(root: Path, out: Path) -> PrepareOptions:
    from deris_llm.data.formats.base import PrepareOptions  # needed here only

    return PrepareOptions("refer", str(root), out, images=root, skip_bad=True, decode_images=False)


def _remove_other_versions(cache: Path, dataset: str, key: str) -> None:
    for other in cache.iterdir():
        if other.name != key and (other / dataset).is_dir():
            shutil.rmtree(other, ignore_errors=True)
