"""Sequences of records that are not in memory: several sources as one, some of them left out, grouped by picture.

What is held per record is its position (an integer) and its picture's number; records are built when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from deris_llm.data.store.prepared import PreparedSplit
from deris_llm.structures import ReferringRecord

_BLOCK = 4096  # records whose texts are in memory at a time


class RecordView(Sequence[ReferringRecord]):
    """Records of several sources, one source after the other, those at ``positions`` only.

    Args:
        parts: the sources.
        positions: int64 (n,), ascending; of the concatenated parts.
    """

    def __init__(self, parts: Sequence[Sequence[ReferringRecord]], positions: np.ndarray) -> None:
        self.parts = tuple(parts)
        self.positions = positions
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> ReferringRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReferringRecord]: ...
    def __getitem__(self, index: int | slice) -> ReferringRecord | list[ReferringRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.place(index)
        return part[row]

    def place(self, index: int) -> tuple[Sequence[ReferringRecord], int]:
        """The source of a record, and its number there."""
        position = int(self.positions[index])
        number = int(np.searchsorted(self._ends, position, side="right"))
        return self.parts[number], position - (int(self._ends[number - 1]) if number else 0)


def in_order(records: Sequence[ReferringRecord]) -> Iterator[ReferringRecord]:
    """All records, one after the other: of those not in memory several times faster than by their numbers."""
    if not isinstance(records, RecordView):
        yield from records
        return
    start = 0
    for part in records.parts:
        first, last = np.searchsorted(records.positions, (start, start + len(part)))
        kept = iter((records.positions[first:last] - start).tolist())
        wanted = next(kept, None)
        for number, record in enumerate(part):
            if number == wanted:
                yield record
                wanted = next(kept, None)
        start += len(part)


def is_lazy(records: object) -> bool:
    """Records that must not be put into a list."""
    return isinstance(records, (RecordView, PreparedSplit))


def image_numbers(records: Sequence[ReferringRecord]) -> tuple[np.ndarray, pa.Array]:
    """Which picture each record looks at.

    Returns:
        int64 (n,), numbers of pictures; and text, the id of each number, every id once. Numbers may be unused.
    """
    if isinstance(records, PreparedSplit):
        return _unique_ids(records.image_rows, [records.image_ids])
    if isinstance(records, RecordView):
        offset, numbers, ids = 0, [], []
        for part in records.parts:
            of_part, ids_of_part = image_numbers(part)
            numbers.append(of_part + offset)
            ids.append(ids_of_part)
            offset += len(ids_of_part)
        return _unique_ids(np.concatenate(numbers)[records.positions], ids)
    found: dict[str, int] = {}
    of_records = np.array([found.setdefault(record.image_id, len(found)) for record in records], dtype=np.int64)
    return of_records, pa.array(list(found), pa.string())


def _unique_ids(numbers: np.ndarray, ids: Sequence[pa.Array]) -> tuple[np.ndarray, pa.Array]:
    encoded = pa.concat_arrays(ids).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64)[numbers], encoded.dictionary


def phrase_ids(records: Sequence[ReferringRecord], rows: np.ndarray) -> Iterator[str]:
    """The phrase ids of some records, in the order of ``rows``, a block at a time."""
    for first in range(0, len(rows), _BLOCK):
        yield from _texts(records, rows[first : first + _BLOCK], "phrase_id")


def phrases(records: Sequence[ReferringRecord], rows: np.ndarray) -> list[str]:
    """The phrases of some records, in the order of ``rows``."""
    return _texts(records, rows, "phrase")


def _texts(records: Sequence[ReferringRecord], rows: np.ndarray, field: str) -> list[str]:
    if isinstance(records, PreparedSplit):
        return records.phrase_ids(rows) if field == "phrase_id" else records.phrases(rows)
    if isinstance(records, RecordView):
        places = [records.place(int(row)) for row in rows]
        return [_texts(part, np.array([row]), field)[0] for part, row in places]
    return [getattr(records[int(row)], field) for row in rows]
