"""Prepares REFER's files on first use, so that they are read as any prepared set.

    CACHE/KEY/refcoco/    a prepared set, see `deris_llm.data.store.prepared`

CACHE is ROOT/.deris_llm or, if the data root is read-only, a folder in the user's cache. KEY is a hash of the content of
the refs file and instances.json: changed files are prepared again, moved ones are not. Images are neither part of the key
nor looked at during the preparation; `check_usable` checks that they exist whenever a split is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from deris_llm.common.folders import FolderError, written_aside
from deris_llm.common.terminal import console
from deris_llm.data.errors import DataError, bad_records_error
from deris_llm.data.formats import refer
from deris_llm.data.store.prepared import (
    LAYOUT,
    LEFT_OUT_FILE,
    MANIFEST_FILE,
    Manifest,
    PreparedSplit,
    file_sha256,
    read_images,
    read_manifest,
)

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".deris_llm"


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
        return read_manifest(folder, refer.find_image_folder(root))
    return read_manifest(folder, root / refer.IMAGE_FOLDERS[0])


def check_usable(root: str | Path, manifest: Manifest, split: str) -> None:
    """Checks that every record of a split is usable and every image exists.

    Raises:
        DataError: names the records.
    """
    dataset = manifest.folder.name
    image_folder = refer.find_image_folder(root)
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
    lines = map(json.loads, (manifest.folder / LEFT_OUT_FILE).read_bytes().splitlines())
    return [line for line in lines if line["split"] == split and line["num_phrases"]]  # 0: a referent without pixels


@lru_cache(maxsize=4)
def _listing(folder: str, _modified_ns: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


@lru_cache(maxsize=32)
def _set_folder(root: Path, dataset: str, stamps: tuple[tuple[str, int, int], ...]) -> Path:
    """Finds or makes the prepared set of files; hashes them once per process."""
    content = [LAYOUT, dataset, *(file_sha256(Path(path)) for path, _, _ in stamps)]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    for cache in _caches(root):
        if (cache / key / dataset / MANIFEST_FILE).is_file():
            return cache / key / dataset
    cache = _writable_cache(root)
    with _locked(cache / "lock"):
        if not (cache / key / dataset / MANIFEST_FILE).is_file():  # another rank may have prepared it meanwhile
            _prepare(root, dataset, cache / key)
            if cache.parent == root:
                _remove_other_versions(cache, dataset, key)
    return cache / key / dataset


def _caches(root: Path) -> tuple[Path, Path]:
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / CACHE_FOLDER, of_user / "deris_llm" / "data"


def _writable_cache(root: Path) -> Path:
    in_root, of_user = _caches(root)
    problems = []
    for cache in (in_root, of_user):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache):
                pass
        except OSError as error:
            problems.append(str(error))
            continue
        if cache == of_user:
            logger.warning("%s is not writable (%s); prepared data go to %s", in_root, problems[0], of_user)
        return cache
    raise FolderError(
        f"{in_root} and {of_user}: expected one of them to be writable, for data prepared of REFER's files, got "
        f"{'; '.join(problems)}. Make room or change the permissions, or set XDG_CACHE_HOME"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of a machine prepare while the others wait."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks; `train` lets rank 0 go first anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(root: Path, dataset: str, folder: Path) -> None:
    # The readers of all formats are needed here only; commands start faster without them.
    from deris_llm.data.store.prepare import PrepareOptions, prepare

    logger.info("preparing %s of %s, once; the result is kept in %s", dataset, root, folder.parent)
    with written_aside(folder) as partial, _progress(f"preparing {dataset} (once)") as on_progress:
        options = PrepareOptions("refer", str(root), partial / dataset, images=root, skip_bad=True, decode_images=False)
        prepare(options, on_progress=on_progress)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on a terminal; a log has the line of `_prepare`."""
    from rich.progress import Progress  # slow to import, and needed here only

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda _, done, total: progress.update(task, completed=done, total=total)


def _remove_other_versions(cache: Path, dataset: str, key: str) -> None:
    for other in cache.iterdir():
        if other.name != key and (other / dataset).is_dir():
            shutil.rmtree(other, ignore_errors=True)
