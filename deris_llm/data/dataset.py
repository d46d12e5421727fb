"""Records by image: what the samplers number and the loaders fetch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from deris_llm.data.phrase_conversion import PhraseConversion
from deris_llm.structures import ReferringRecord


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """One picture and phrases that look at it."""

    records: tuple[ReferringRecord, ...]  # at least one, all of one image

    def __post_init__(self) -> None:
        images = {record.image_path for record in self.records}
        if len(images) != 1:
            raise ValueError(f"ImageGroup: expected records of one image, got {sorted(images)[:3]}; use group_by_image")


@dataclass(frozen=True)
class GroupSelection:
    """Some phrases of one group."""

    group: int  # index of the group
    phrases: tuple[int, ...]  # indices of its records, ascending
    epoch: int = 0  # of the training sampler; the phrase conversion draws by it


def group_by_image(records: Iterable[ReferringRecord]) -> list[ImageGroup]:
    """One group per picture, whatever datasets its phrases come from, in the order of first appearance."""
    by_image: dict[str, list[ReferringRecord]] = {}
    for record in records:
        by_image.setdefault(record.image_id, []).append(record)
    return [ImageGroup(tuple(found)) for found in by_image.values()]


class GroupDataset(Dataset[ImageGroup]):
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
        group = self.groups[selection.group]
        records = (group.records[i] for i in selection.phrases)
        if self.conversion is not None:
            records = (self.conversion.convert(record, selection.epoch).record for record in records)
        return ImageGroup(tuple(records))
