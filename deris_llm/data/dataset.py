"""Records by image: what the samplers number and the loaders fetch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from deris_llm.data.phrase_conversion import PhraseConversion, text_number
from deris_llm.data.store.record_views import image_numbers, is_lazy, phrase_ids, phrases
from deris_llm.structures import ReferringRecord


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """One picture and phrases that look at it."""

    records: tuple[ReferringRecord, ...]  # at least one, all of one image

    def __post_init__(self) -> None:
        images = {record.image_id for record in self.records}
        if len(images) != 1:
            raise ValueError(f"ImageGroup: expected records of one image, got {sorted(images)[:3]}; use group_by_image")


@dataclass(frozen=True)
class GroupSelection:
    """Some phrases of one group."""

    group: int  # index of the group
    phrases: tuple[int, ...]  # indices of its records, ascending
    epoch: int = 0  # of the training sampler; the phrase conversion draws by it


class ImageGroups(Sequence[ImageGroup]):
    """Groups of records that are not in memory, built when they are asked for; 8 bytes a record, 16 a picture are held.

    Order and content are those of the list that `group_by_image` makes of the same records in memory.
    """

    def __init__(self, records: Sequence[ReferringRecord]) -> None:
        self.records = records
        numbers, ids = image_numbers(records)
        _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)
        group_of_number = np.empty_like(by_appearance)
        group_of_number[by_appearance] = np.arange(len(first))
        groups = group_of_number[inverse]
        self._rows = np.argsort(groups, kind="stable")  # record numbers, group by group, in the records' order
        self.sizes: np.ndarray = np.bincount(groups, minlength=len(first)).astype(np.int32)
        self._starts = np.concatenate(([0], np.cumsum(self.sizes)))
        hashes = (text_number(ids[int(numbers[i])].as_py()) for i in first[by_appearance])
        found = np.fromiter(hashes, np.uint64, len(first))
        self._by_hash = np.argsort(found).astype(np.int32)
        self._hashes = found[self._by_hash]

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> ImageGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageGroup]: ...
    def __getitem__(self, index: int | slice) -> ImageGroup | list[ImageGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return ImageGroup(tuple(self.records[int(row)] for row in self.rows(index)))

    def rows(self, group: int) -> np.ndarray:
        """The numbers of a group's records among all."""
        if not -len(self) <= group < len(self):
            raise IndexError(f"group {group} of {len(self)}")
        group %= len(self)
        return self._rows[self._starts[group] : self._starts[group + 1]]

    def selected(self, selection: GroupSelection) -> tuple[ReferringRecord, ...]:
        """Some records of a group; the others are not built."""
        rows = self.rows(selection.group)
        return tuple(self.records[int(rows[i])] for i in selection.phrases)

    def every_nth(self, step: int) -> list[ReferringRecord]:
        """Records number 0, step, 2 step, ..., group by group."""
        return [self.records[int(row)] for row in self._rows[::step]]

    def all_phrase_ids(self) -> Iterator[str]:
        """Phrase ids of all records, group by group."""
        return phrase_ids(self.records, self._rows)

    # What `PhraseConversion` draws from: a `PhrasePool`.

    def image_id(self, group: int) -> str:
        return self.records[int(self.rows(group)[0])].image_id

    def num_phrases(self, group: int) -> int:
        return int(self.sizes[group])

    def phrase(self, group: int, number: int) -> str:
        return phrases(self.records, self.rows(group)[number : number + 1])[0]

    def phrases_of(self, image_id: str) -> list[str]:
        number = np.uint64(text_number(image_id))
        at = int(np.searchsorted(self._hashes, number))
        while at < len(self._hashes) and self._hashes[at] == number:
            group = int(self._by_hash[at])
            if self.image_id(group) == image_id:
                return phrases(self.records, self.rows(group))
            at += 1
        return []


def group_by_image(records: Iterable[ReferringRecord]) -> Sequence[ImageGroup]:
    """One group per picture, whatever datasets its phrases come from, in the order of first appearance.

    Returns:
        A list; of records that are not in memory an `ImageGroups`, which builds its groups when they are asked for.
    """
    if isinstance(records, Sequence) and is_lazy(records):
        return ImageGroups(records)
    by_image: dict[str, list[ReferringRecord]] = {}
    for record in records:
        by_image.setdefault(record.image_id, []).append(record)
    return [ImageGroup(tuple(found)) for found in by_image.values()]


def some_images(records: Sequence[ReferringRecord], max_images: int) -> list[ReferringRecord]:
    """All phrases of ``max_images`` evenly spaced pictures, in the records' order; 0 = all."""
    numbers, _ = image_numbers(records)
    in_use, appearance = np.unique(numbers, return_index=True)
    images = in_use[np.argsort(appearance)]
    if max_images <= 0 or max_images >= len(images):
        return list(records)
    kept = images[np.arange(max_images) * len(images) // max_images]
    return [records[int(row)] for row in np.flatnonzero(np.isin(numbers, kept))]


def group_sizes(groups: Sequence[ImageGroup]) -> list[int]:
    """Number of phrases of each group; builds no records."""
    return groups.sizes.tolist() if isinstance(groups, ImageGroups) else [len(group.records) for group in groups]


def group_phrase_ids(groups: Sequence[ImageGroup]) -> Iterator[str]:
    """Phrase ids of all records, group by group; builds no records."""
    if isinstance(groups, ImageGroups):
        return groups.all_phrase_ids()
    return (record.phrase_id for group in groups for record in group.records)


def every_nth_record(groups: Sequence[ImageGroup], most: int) -> tuple[list[ReferringRecord], int]:
    """At most about ``most`` records, evenly spaced over all groups, and the spacing."""
    if isinstance(groups, ImageGroups):
        step = max(1, -(-len(groups.records) // most))
        return groups.every_nth(step), step
    records = [record for group in groups for record in group.records]
    step = max(1, -(-len(records) // most))
    return records[::step], step


class GroupDataset:
    """Looks up the phrases that a sampler chose; pictures are decoded in the collator.

    Args:
        groups: what the sampler numbers.
        conversion: swaps some phrases (training only); None gives the records as they are.
    """

    def __init__(self, groups: Sequence[ImageGroup], conversion: PhraseConversion | None = None) -> None:
        self.groups = groups
        self.conversion = conversion

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, selection: GroupSelection) -> ImageGroup:
        if isinstance(self.groups, ImageGroups):
            records = self.groups.selected(selection)
        else:
            group = self.groups[selection.group]
            records = tuple(group.records[i] for i in selection.phrases)
        if self.conversion is not None:
            records = tuple(self.conversion.convert(record, selection.epoch).record for record in records)
        return ImageGroup(records)
