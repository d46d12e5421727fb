"""Counts of a data folder beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deris_llm.data.errors import DataError
from deris_llm.data.refer import DATASETS, count_refs, find_image_folder, read_split, refs_path, split_names

KNOWN_COUNTS: dict[str, tuple[int, int, int]] = {
    "refcoco/train": (42_404, 120_624, 16_994),
    "refcoco/val": (3_811, 10_834, 1_500),
    "refcoco/testA": (1_975, 5_657, 750),
    "refcoco/testB": (1_810, 5_095, 750),
    "refcoco+/train": (42_278, 120_191, 16_992),
    "refcoco+/val": (3_805, 10_758, 1_500),
    "refcoco+/testA": (1_975, 5_726, 750),
    "refcoco+/testB": (1_798, 4_889, 750),
    "refcocog_umd/train": (42_226, 80_512, 21_899),
    "refcocog_umd/val": (2_573, 4_896, 1_300),
    "refcocog_umd/test": (5_023, 9_602, 2_600),
    "refcocog_google/train": (44_822, 85_474, 24_698),
    "refcocog_google/val": (5_000, 9_536, 4_650),
}
"""Refs, phrases, images of the published files."""

KNOWN_PHRASES: dict[str, tuple[int, int]] = {
    "grefcoco/train": (209_344, 19_140),
    "grefcoco/val": (14_229, 8_905),
    "grefcoco/testA": (19_200, 4_448),
    "grefcoco/testB": (16_063, 4_673),
}
"""Phrases, and those of them without a target, of the published files that may have such."""


def known_num_phrases(split: str) -> int:
    """Phrases of the published ``dataset/split``; 0 where it is not known."""
    return KNOWN_PHRASES[split][0] if split in KNOWN_PHRASES else KNOWN_COUNTS.get(split, (0, 0, 0))[1]


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds, or why it cannot be read."""

    name: str  # dataset/split
    num_refs: int
    num_phrases: int
    num_images: int
    num_images_in_train: int  # of its own dataset's train split; 0 for train itself
    num_no_target: int = 0  # phrases that name nothing
    problem: str | None = None

    @property
    def known(self) -> tuple[int, int, int] | None:
        """Refs, phrases, images of the published split."""
        return KNOWN_COUNTS.get(self.name)

    @property
    def known_phrases(self) -> tuple[int, int] | None:
        """Phrases, and those without a target, of the published split."""
        return KNOWN_PHRASES.get(self.name)

    @property
    def is_as_published(self) -> bool:
        """All that is known of the published split is so here."""
        if self.known_phrases is not None:
            return self.known_phrases == (self.num_phrases, self.num_no_target)
        return self.known == (self.num_refs, self.num_phrases, self.num_images)


def check_data(root: str | Path, datasets: Sequence[str] | None = None) -> list[SplitCounts]:
    """Reads and checks every split below ``root``.

    Args:
        root: the data folder.
        datasets: dataset names; None takes all whose refs file is there.

    Raises:
        DataError: no pictures or no dataset at all, or a dataset asked for that is missing.
    """
    find_image_folder(root)
    names = list(datasets) if datasets else [name for name in DATASETS if refs_path(root, name).is_file()]
    if not names:
        expected = ", ".join(str(refs_path(root, name)) for name in DATASETS)
        found = ", ".join(sorted(path.name for path in Path(root).iterdir()))
        raise DataError(
            f"{root}: expected at least one of {expected}; the folder holds {found}. Check the path and the names"
        )
    counts: list[SplitCounts] = []
    for dataset in names:
        train_images: set[str] = set()
        for split in split_names(root, dataset):
            name = f"{dataset}/{split}"
            try:
                records = read_split(root, name)
            except DataError as error:
                counts.append(SplitCounts(name, count_refs(root, name), 0, 0, 0, problem=str(error)))
                continue
            images = {record.image_id for record in records}
            shared = len(images & train_images)
            train_images |= images if split == "train" else set()
            no_target = sum(record.is_no_target for record in records)
            counts.append(SplitCounts(name, count_refs(root, name), len(records), len(images), shared, no_target))
    return counts
