"""The door to data: what `dataset/split` means below a data root.

Two kinds of datasets exist at run time: REFER's own files (`deris_llm.data.formats.refer`), and sets that `deris-llm data
prepare` made of any format (`deris_llm.data.store.prepared`). Where one name has both, the prepared set is read, and the log
says so. Everybody but these modules reads data through this one.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from deris_llm.config import RunConfig
from deris_llm.data.formats import refer
from deris_llm.data.errors import DataError, check_is_split
from deris_llm.data.store.prepared import Manifest, PreparedSplit, find_manifest, prepared_sets, read_images
from deris_llm.structures import ReferringRecord

logger = logging.getLogger(__name__)


def read_split(
    root: str | Path, name: str, *, phrase_field: Literal["sent", "raw"] = "sent"
) -> Sequence[ReferringRecord]:
    """The records of one split, one per phrase, in the order of the source.

    Those of a prepared set are built when they are asked for: don't put them into a list where the split may be large.

    Args:
        root: the folder that holds the images and one folder per dataset.
        name: ``dataset/split``, e.g. ``refcoco/testA``.
        phrase_field: ``sent`` is REFER's cleaned text, ``raw`` what the annotator typed; sources with one text have
            it as both.

    Raises:
        DataError: a missing or misnamed file, an unknown dataset or split, or unusable records (all in one error).
    """
    check_split(root, name)
    dataset, _, split = name.partition("/")
    if _prepared(root, dataset) is not None:
        return PreparedSplit(root, dataset, split, phrase_field=phrase_field)
    return refer.read_split(root, name, phrase_field=phrase_field)


def split_notes(
    root: str | Path, name: str, *, phrase_field: Literal["sent", "raw"] = "sent"
) -> tuple[str, ...]:
    """What must be read with the numbers of ``dataset/split``: referents that are crowds or draw no pixel, counted, named."""
    dataset, _, split = name.partition("/")
    if (manifest := _prepared(root, dataset)) is not None:
        return tuple(manifest.splits.get(split, {}).get("notes", ()))
    return refer.split_notes(root, name, phrase_field=phrase_field)


def check_split(root: str | Path, name: str) -> None:
    """Checks that ``dataset/split`` is there; its records are not looked at.

    Raises:
        DataError: a missing or misnamed file or folder, an unknown dataset or split.
    """
    dataset = name.partition("/")[0]
    existing = split_names(root, dataset)
    if _prepared(root, dataset) is None:
        refer.find_image_folder(root)
    check_is_split(name, existing)


def check_root(root: str | Path) -> None:
    """Checks that the data root is a folder; what is in it is not looked at.

    Raises:
        DataError: it is not.
    """
    if not Path(root).is_dir():
        raise DataError(
            f"data root {str(root)!r}: expected the folder of images and datasets, got {'a file' if Path(root).exists() else 'none'} "
            f"at {Path(root).absolute()}. Correct --data or --root, in a run config data.root (--set data.root=DIR)"
        )


def check_data_names(config: RunConfig) -> None:
    """Checks that every dataset and split that the config names is there.

    Raises:
        DataError: names the field.
    """
    named = [("data.train", f"{dataset}/train") for dataset in config.data.train]
    named += [("data.eval", name) for name in config.data.eval]
    named.append(("training.eval_split", config.training.eval_split))
    for field, name in named:
        try:
            check_split(config.data.root, name)
        except DataError as error:
            raise DataError(f"{field}: {error}") from error


def split_names(root: str | Path, dataset: str) -> tuple[str, ...]:
    """Names of a dataset's splits, train first.

    Raises:
        DataError: an unknown dataset or a missing file.
    """
    check_root(root)
    if (manifest := _prepared(root, dataset)) is not None:
        return refer.in_known_order(manifest.splits)
    if dataset not in refer.DATASETS and (sets := prepared_sets(root)):
        near = difflib.get_close_matches(dataset, sets, n=1)
        raise DataError(
            f"dataset {dataset!r}: expected one of {', '.join(refer.DATASETS)}, or one of the prepared sets of {root}: "
            f"{', '.join(sets)}; got another." + (f" Did you mean {near[0]}?" if near else " Correct the name")
        )
    return refer.split_names(root, dataset)


def images_of_split(root: str | Path, name: str) -> set[str]:
    """Image ids of ``dataset/split``, without reading its phrases."""
    dataset, _, split = name.partition("/")
    if (manifest := _prepared(root, dataset)) is not None:
        return set(_images(root, manifest, split).column("image_id").to_pylist())
    return refer.images_of_split(root, name)


def image_hashes_of_split(root: str | Path, name: str) -> dict[str, str]:
    """Content hash -> image id of a prepared split's pictures. None are known of REFER's own files."""
    dataset, _, split = name.partition("/")
    if (manifest := _prepared(root, dataset)) is None:
        return {}
    images = _images(root, manifest, split)
    return dict(zip(images.column("sha256").to_pylist(), images.column("image_id").to_pylist(), strict=True))


def count_refs(root: str | Path, name: str) -> int:
    """Number of entries of ``dataset/split``, each of one or more phrases for the same referents."""
    dataset, _, split = name.partition("/")
    if (manifest := _prepared(root, dataset)) is not None:
        return manifest.splits[split]["num_refs"] if split in manifest.splits else 0
    return refer.count_refs(root, name)


def is_generalised(root: str | Path, dataset: str) -> bool:
    """Whether phrases of a dataset may name nothing, or several objects: gRefCOCO's metrics are then the right ones."""
    if (manifest := _prepared(root, dataset)) is not None:
        return manifest.is_generalised
    return dataset in refer.GENERALISED_DATASETS


def is_there(root: str | Path, dataset: str) -> bool:
    """A prepared set of that name, or at least the folder of REFER's files."""
    folder = refer.DATASETS.get(dataset, (dataset, ""))[0]
    return _prepared(root, dataset) is not None or (dataset in refer.DATASETS and (Path(root) / folder).is_dir())


def _prepared(root: str | Path, dataset: str) -> Manifest | None:
    manifest = find_manifest(root, dataset)
    if manifest is not None and dataset in refer.DATASETS and refer.refs_path(root, dataset).is_file():
        _say_which(str(manifest.folder), str(refer.refs_path(root, dataset)))
    return manifest


@cache
def _say_which(folder: str, refs: str) -> None:
    logger.info("%s is a prepared set and is read instead of %s", folder, refs)


def _images(root: str | Path, manifest: Manifest, split: str) -> pa.Table:
    """The pictures of a prepared split."""
    if split not in manifest.splits:
        return read_images(manifest).slice(0, 0)
    rows = np.unique(PreparedSplit(root, manifest.folder.name, split, phrase_field="sent").image_rows)
    return read_images(manifest).take(pa.array(rows))
