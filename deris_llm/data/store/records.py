"""Records as columns: what all sources of records have in common, whether they lie in a file or in memory."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from deris_llm.structures import ReferringRecord


class Records(Sequence[ReferringRecord], abc.ABC):
    """A sequence of records that are built when they are asked for; some columns can be read without building any."""

    @overload
    def __getitem__(self, index: int) -> ReferringRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReferringRecord]: ...
    def __getitem__(self, index: int | slice) -> ReferringRecord | list[ReferringRecord]:
        if isinstance(index, slice):
            return [self.record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.record(index % len(self))

    @abc.abstractmethod
    def record(self, row: int) -> ReferringRecord:
        """Builds record number ``row``, 0 to len - 1."""

    @abc.abstractmethod
    def image_numbers(self) -> tuple[np.ndarray, pa.Array]:
        """Returns the image of each record.

        Returns:
            int64 (n,), image numbers; and text, the id of each number. Ids are distinct; some numbers may be unused.
        """

    @abc.abstractmethod
    def phrase_ids(self, rows: np.ndarray) -> list[str]:
        """Returns the phrase ids of some records, in the order of ``rows``."""

    @abc.abstractmethod
    def phrases(self, rows: np.ndarray) -> list[str]:
        """Returns the phrases of some records, in the order of ``rows``."""


class RecordList(Records):
    """Records in memory, for programs that make their own."""

    def __init__(self, records: Sequence[ReferringRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def record(self, row: int) -> ReferringRecord:
        return self.records[row]

    def image_numbers(self) -> tuple[np.ndarray, pa.Array]:
        found: dict[str, int] = {}
        numbers = [found.setdefault(record.image_id, len(found)) for record in self.records]
        return np.array(numbers, dtype=np.int64), pa.array(list(found), pa.string())

    def phrase_ids(self, rows: np.ndarray) -> list[str]:
        return [self.records[int(row)].phrase_id for row in rows]

    def phrases(self, rows: np.ndarray) -> list[str]:
        return [self.records[int(row)].phrase for row in rows]


class RecordView(Records):
    """Selected records of several sources, one source after the other; 8 bytes a record are held.

    Args:
        parts: the sources.
        positions: int64 (n,), ascending; numbers in the concatenation of the parts.
    """

    def __init__(self, parts: Sequence[Records], positions: np.ndarray) -> None:
        self.parts = tuple(parts)
        self.positions = positions
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)  # one more than parts

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[ReferringRecord]:
        """Iterates over each part from its first record: several times faster than by number for a file."""
        for part, start, end in zip(self.parts, self._starts, self._starts[1:], strict=False):
            first, last = np.searchsorted(self.positions, (start, end))
            kept = iter((self.positions[first:last] - start).tolist())
            wanted = next(kept, None)
            for row, record in enumerate(part):
                if row == wanted:
                    yield record
                    wanted = next(kept, None)

    def record(self, row: int) -> ReferringRecord:
        position = int(self.positions[row])
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.parts[number].record(position - int(self._starts[number]))

    def image_numbers(self) -> tuple[np.ndarray, pa.Array]:
        offset, numbers, ids = 0, [], []
        for part in self.parts:
            of_part, ids_of_part = part.image_numbers()
            numbers.append(of_part + offset)
            ids.append(ids_of_part)
            offset += len(ids_of_part)
        return distinct_ids(np.concatenate(numbers)[self.positions], ids)

    def phrase_ids(self, rows: np.ndarray) -> list[str]:
        return self._column(rows, lambda part, rows_of_part: part.phrase_ids(rows_of_part))

    def phrases(self, rows: np.ndarray) -> list[str]:
        return self._column(rows, lambda part, rows_of_part: part.phrases(rows_of_part))

    def _column(self, rows: np.ndarray, read: Callable[[Records, np.ndarray], list[str]]) -> list[str]:
        positions = self.positions[rows]
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.empty(len(rows), dtype=object)
        for number in np.unique(numbers):
            of_part = numbers == number
            found[of_part] = read(self.parts[number], positions[of_part] - self._starts[number])
        return found.tolist()


def as_records(records: Sequence[ReferringRecord]) -> Records:
    """Returns the records themselves if their columns can be read, else wraps them."""
    return records if isinstance(records, Records) else RecordList(records)


def distinct_ids(numbers: np.ndarray, ids: Sequence[pa.Array]) -> tuple[np.ndarray, pa.Array]:
    """Renumbers images so that equal ids have one number.

    Args:
        numbers: int64 (n,), indices into the concatenated ids.
        ids: text.
    """
    encoded = pa.concat_arrays(ids).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64)[numbers], encoded.dictionary
