"""The door to data: what `dataset/split` means below a data root.

Two kinds of datasets exist at run time: REFER's own files (`deris_llm.data.refer`), and sets that `deris-llm data
prepare` made of any format (`deris_llm.data.prepared`). Where one name has both, the prepared set is read, and the log
says so. Everybody but these two modules reads data through this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deris_llm.data import refer
from deris_llm.structures import ReferringRecord


def read_split(
    root: str | Path, name: str, *, phrase_field: Literal["sent", "raw"] = "sent"
) -> Sequence[ReferringRecord]:
    """The records of one split, one per phrase, in the order of the source.

    Args:
        root: the folder that holds the images and one folder per dataset.
        name: ``dataset/split``, e.g. ``refcoco/testA``.
        phrase_field: ``sent`` is REFER's cleaned text, ``raw`` what the annotator typed.

    Raises:
        DataError: a missing or misnamed file, an unknown dataset or split, or unusable records (all in one error).
    """
    return refer.read_split(root, name, phrase_field=phrase_field)


def check_split(root: str | Path, name: str) -> None:
    """Checks that ``dataset/split`` is there; its records are not looked at.

    Raises:
        DataError: a missing or misnamed file or folder, an unknown dataset or split.
    """
    refer.check_split(root, name)


def split_names(root: str | Path, dataset: str) -> tuple[str, ...]:
    """Names of a dataset's splits, train first.

    Raises:
        DataError: an unknown dataset or a missing file.
    """
    return refer.split_names(root, dataset)


def images_of_split(root: str | Path, name: str) -> set[str]:
    """Image ids of ``dataset/split``, without reading its phrases."""
    return refer.images_of_split(root, name)


def count_refs(root: str | Path, name: str) -> int:
    """Number of entries of ``dataset/split``, each of one or more phrases for the same referents."""
    return refer.count_refs(root, name)


def is_generalised(root: str | Path, dataset: str) -> bool:
    """Whether phrases of a dataset may name nothing, or several objects: gRefCOCO's metrics are then the right ones."""
    del root  # of REFER's files the name alone says it
    return dataset in refer.GENERALISED_DATASETS
