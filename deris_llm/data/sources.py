"""Finds data by name: what `dataset/split` means below a data root.

A dataset is a prepared set: one that `deris-llm data prepare` made, or one that is prepared of REFER's files on first use
(`deris_llm.data.store.refer_cache`). If a name has both, the former is read and the log says so.
"""

from __future__ import annotations

import difflib
import logging
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from deris_llm.config import RunConfig
from deris_llm.data.errors import DataError, check_is_split
from deris_llm.data.formats import refer
from deris_llm.data.store import refer_cache
from deris_llm.data.store.prepared import Manifest, PreparedSplit, find_manifest, prepared_sets, read_images
from deris_llm.data.synthetic import WORLD_FILE

logger = logging.getLogger(__name__)


def read_split(root: str | Path, name: str, *, phrase_field: Literal["sent", "raw"] = "sent") -> PreparedSplit:
    """Opens one split: one record per phrase, in the order of the source, each built when it is asked for.

    Args:
        root: the folder that holds the images and one folder per dataset.
        name: ``dataset/split``, e.g. ``refcoco/testA``.
        phrase_field: ``sent`` is REFER's cleaned text, ``raw`` what the annotator typed. Sources with one text have it
            as both.

    Raises:
        DataError: a missing or misnamed file, an unknown dataset or split, or unusable records (all in one error).
    """
    check_split(root, name)
    dataset, _, split = name.partition("/")
    manifest = manifest_of(root, dataset)
    if is_refer(root, dataset):
        refer_cache.check_usable(root, manifest, split)
    records = PreparedSplit(manifest, split, phrase_field=phrase_field)
    _warn_of_empty_masks(name, *manifest.splits[split].get("notes", ()))
    return records


@cache
def _warn_of_empty_masks(name: str, *notes: str) -> None:
    for note in notes:
        if note.startswith("referents that draw no pixel"):
            logger.warning("%s: %s", name, note)


def manifest_of(root: str | Path, dataset: str) -> Manifest:
    """Returns the manifest of a dataset; REFER's files are prepared if that was not done yet.

    Raises:
        DataError: a missing file, an unknown dataset, or no usable record.
    """
    check_root(root)
    if (manifest := _own_set(root, dataset)) is not None:
        return manifest
    if dataset not in refer.DATASETS and (sets := prepared_sets(root)):
        near = difflib.get_close_matches(dataset, sets, n=1)
        raise DataError(
            f"dataset {dataset!r}: expected one of {', '.join(refer.DATASETS)}, or one of the prepared sets of {root}: "
            f"{', '.join(sets)}; got another." + (f" Did you mean {near[0]}?" if near else " Correct the name")
        )
    return refer_cache.refer_manifest(root, dataset)


def is_synthetic(root: str | Path) -> bool:
    """Returns whether `deris-llm data synth` wrote the data, whose splits have the names of published ones."""
    return Path(root, WORLD_FILE).is_file()


def is_refer(root: str | Path, dataset: str) -> bool:
    """Whether a dataset is read from REFER's files, not from a set that `deris-llm data prepare` made."""
    return find_manifest(root, dataset) is None


def has_truth(root: str | Path, name: str) -> bool:
    """Whether the referents of the phrases of ``dataset/split`` are known, so that they can be trained on or compared with."""
    dataset, _, split = name.partition("/")
    return manifest_of(root, dataset).has_truth(split)


def split_notes(root: str | Path, name: str) -> tuple[str, ...]:
    """Returns what must be read with the numbers of ``dataset/split``: referents that are crowds or draw no pixel, frames left out."""
    dataset, _, split = name.partition("/")
    manifest = manifest_of(root, dataset)
    content = manifest.splits.get(split, {})
    notes = tuple(content.get("notes", ()))
    if content.get("num_videos") and (number := manifest.num_skipped(split)):
        notes += (
            f"LEFT OUT by data prepare --skip-bad: {number:,} of {number + content['num_phrases']:,} sentences in frames; numbers are of "
            "the others",
        )
    return notes


def check_split(root: str | Path, name: str) -> None:
    """Checks that ``dataset/split`` exists; its records are not looked at.

    Raises:
        DataError: a missing or misnamed file or folder, an unknown dataset or split.
    """
    dataset = name.partition("/")[0]
    existing = split_names(root, dataset)
    if is_refer(root, dataset):
        refer.find_image_folder(root, dataset)
    check_is_split(name, existing)


def check_root(root: str | Path) -> None:
    """Checks that the data root is a folder; its content is not looked at.

    Raises:
        DataError: it is not a folder.
    """
    if not Path(root).is_dir():
        raise DataError(
            f"data root {str(root)!r}: expected the folder of images and datasets, got {'a file' if Path(root).exists() else 'none'} "
            f"at {Path(root).absolute()}. Correct --data or --root, in a run config data.root (--set data.root=DIR)"
        )


def check_data_names(config: RunConfig) -> None:
    """Checks that every dataset and split that the config names exists.

    Raises:
        DataError: names the field; also if data.train or training.eval_split names a split without truth.
    """
    named = [("data.train", f"{dataset}/train") for dataset in config.data.train]
    named += [("data.eval", name) for name in config.data.eval]
    named.append(("training.eval_split", config.training.eval_split))
    for field, name in named:
        try:
            check_split(config.data.root, name)
            if field != "data.eval" and not has_truth(config.data.root, name):
                raise DataError(f"{name}: expected a split with truth, got one whose truth is not published. Name another split")
        except DataError as error:
            raise DataError(f"{field}: {error}") from error


def split_names(root: str | Path, dataset: str) -> tuple[str, ...]:
    """Returns the names of a dataset's splits, train first.

    Raises:
        DataError: an unknown dataset or a missing file.
    """
    manifest = manifest_of(root, dataset)
    return refer_cache.split_names(manifest) if is_refer(root, dataset) else refer.in_known_order(manifest.splits)


def images_of_split(root: str | Path, name: str) -> set[str]:
    """Returns the image ids of ``dataset/split``, those of unusable records included as far as they are known."""
    dataset, _, split = name.partition("/")
    manifest = manifest_of(root, dataset)
    ids = set(_images(manifest, split).column("image_id").to_pylist())
    return ids | refer_cache.unusable_images(manifest, split) if is_refer(root, dataset) else ids


def image_hashes_of_split(root: str | Path, name: str) -> dict[str, str]:
    """Maps the content hash of each image of a split to its id; empty for REFER's files, whose images are not hashed."""
    dataset, _, split = name.partition("/")
    if is_refer(root, dataset):
        return {}
    images = _images(manifest_of(root, dataset), split)
    return dict(zip(images.column("sha256").to_pylist(), images.column("image_id").to_pylist(), strict=True))


def count_refs(root: str | Path, name: str) -> int:
    """Returns the number of usable entries of ``dataset/split``, each with one or more phrases for the same referents."""
    dataset, _, split = name.partition("/")
    return manifest_of(root, dataset).splits.get(split, {}).get("num_refs", 0)


def is_generalised(root: str | Path, dataset: str) -> bool:
    """Whether phrases of a dataset may have no or several referents, so that gRefCOCO's metrics apply."""
    if (manifest := _own_set(root, dataset)) is not None:
        return manifest.is_generalised
    return dataset in refer.GENERALISED_DATASETS


def benchmark_of(root: str | Path, dataset: str) -> str | None:
    """Returns the benchmark whose own metrics are reported beside ours; None for most datasets."""
    if (manifest := _own_set(root, dataset)) is not None:
        return manifest.content.get("benchmark")
    return refer.DATASETS[dataset].benchmark if dataset in refer.DATASETS else None


def source_format(root: str | Path, dataset: str) -> str:
    """Returns the format that a dataset was prepared from, as `data prepare --format` names it."""
    return str(manifest_of(root, dataset).content["source"]["format"])


def is_there(root: str | Path, dataset: str) -> bool:
    """Whether there is a prepared set of that name, or at least the folder of REFER's files."""
    if _own_set(root, dataset) is not None:
        return True
    return dataset in refer.DATASETS and (Path(root) / refer.DATASETS[dataset].folder).is_dir()


def _own_set(root: str | Path, dataset: str) -> Manifest | None:
    manifest = find_manifest(root, dataset)
    if manifest is not None and dataset in refer.DATASETS and refer.refs_path(root, dataset).is_file():
        _say_which(str(manifest.folder), str(refer.refs_path(root, dataset)))
    return manifest


@cache
def _say_which(folder: str, refs: str) -> None:
    logger.info("%s is a prepared set and is read instead of %s", folder, refs)


def _images(manifest: Manifest, split: str) -> pa.Table:
    """The images of a split."""
    if split not in manifest.splits:
        return read_images(manifest).slice(0, 0)
    rows = np.unique(PreparedSplit(manifest, split, phrase_field="sent").image_rows)
    return read_images(manifest).take(pa.array(rows))
