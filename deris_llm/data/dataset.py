"""Records grouped by image: what the samplers number and the loaders fetch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow.compute as pc

from deris_llm.data.store.records import RecordView, as_records
from deris_llm.structures import ReferringRecord


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """One image and phrases that refer to it."""

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
    """One group per image, whatever datasets its phrases come from, in the order of first appearance.

    Groups are built when they are asked for; 8 bytes a record and a few an image are held.

    Attributes:
        sizes: int32, number of records of each group.
    """

    def __init__(self, records: Sequence[ReferringRecord]) -> None:
        self.records = as_records(records)
        numbers, ids = self.records.image_numbers()
        used, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)
        group_of_used = np.empty_like(by_appearance)
        group_of_used[by_appearance] = np.arange(len(first))
        groups = group_of_used[inverse]
        self._rows = np.argsort(groups, kind="stable")  # record numbers, group by group, in the order of the records
        self.sizes: np.ndarray = np.bincount(groups, minlength=len(first)).astype(np.int32)
        self._starts = np.concatenate(([0], np.cumsum(self.sizes)))
        self._image_ids = ids.take(used[by_appearance])

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> ImageGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageGroup]: ...
    def __getitem__(self, index: int | slice) -> ImageGroup | list[ImageGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return ImageGroup(tuple(self.records.record(int(row)) for row in self.rows(index)))

    def rows(self, group: int) -> np.ndarray:
        """Returns the record numbers of a group."""
        if not -len(self) <= group < len(self):
            raise IndexError(f"group {group} of {len(self)}")
        group %= len(self)
        return self._rows[self._starts[group] : self._starts[group + 1]]

    def image_id(self, group: int) -> str:
        """Returns the id of a group's image."""
        return self._image_ids[group].as_py()

    def phrases(self, group: int, numbers: slice = slice(None)) -> list[str]:
        """Returns phrases of a group without building records."""
        return self.records.phrases(self.rows(group)[numbers])

    def phrases_of(self, image_id: str) -> list[str]:
        """Returns all phrases of an image; empty if there is no such image."""
        group = pc.index(self._image_ids, image_id).as_py()
        return [] if group < 0 else self.phrases(group)

    def selected(self, selection: GroupSelection) -> tuple[ReferringRecord, ...]:
        """Builds the chosen records of a group and no others."""
        rows = self.rows(selection.group)
        return tuple(self.records.record(int(rows[i])) for i in selection.phrases)

    def every_nth(self, step: int) -> Iterator[ReferringRecord]:
        """Yields records number 0, step, 2 step, ..., counted group by group."""
        return (self.records.record(int(row)) for row in self._rows[::step])


def group_by_image(records: Sequence[ReferringRecord]) -> ImageGroups:
    """Groups records by image."""
    return ImageGroups(records)


def some_images(records: Sequence[ReferringRecord], max_images: int) -> RecordView:
    """Returns all phrases of ``max_images`` evenly spaced images, in the order of the records; 0 = all images."""
    source = as_records(records)
    numbers, _ = source.image_numbers()
    used, first = np.unique(numbers, return_index=True)
    images = used[np.argsort(first)]
    if 0 < max_images < len(images):
        images = images[np.arange(max_images) * len(images) // max_images]
    return RecordView([source], np.flatnonzero(np.isin(numbers, images)))
