"""The tables of a COCO instances file by id, and the records of it that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deris_llm.data.errors import describe

logger = logging.getLogger(__name__)

_NUMBERS = {"images": ("id", "width", "height"), "annotations": ("id", "image_id"), "categories": ("id",)}
_TEXTS = {"images": "file_name", "categories": "name"}


@dataclass(frozen=True)
class TableFault:
    """Why a record, or all records of one id, cannot be used."""

    table: str  # images, annotations or categories
    id: int | None  # None: the record has no usable id
    message: str  # names the records by their number in the file
    records: tuple[dict[str, Any], ...] = ()  # those that the message names
    is_repeated: bool = False  # good records, but different ones of one id

    @property
    def where(self) -> str:
        """The record for a message, e.g. ``annotation 7``."""
        singular = {"images": "image", "annotations": "annotation", "categories": "category"}
        return self.table if self.id is None else f"{singular[self.table]} {self.id}"


@dataclass(frozen=True, eq=False)
class CocoTables:
    """Records by id; a record that is repeated word by word is one, an id of different records is none of them."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]
    faults: list[TableFault] = field(default_factory=list)

    def fault_of(self, table: str, record_id: object) -> str | None:
        """Why the file has no usable record of this id, although it names one; None if it does not name one."""
        return None if record_id is None else self._messages.get((table, record_id))

    @cached_property
    def _messages(self) -> dict[tuple[str, object], str]:
        return {(fault.table, fault.id): fault.message for fault in self.faults}


def coco_tables(content: object) -> CocoTables | str:
    """Indexes a parsed COCO instances file; masks and names of images are not looked at.

    Returns:
        The tables, or what keeps the file from being COCO instances.
    """
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return describe(content)
    content = {"categories": [], **content}
    for name in _NUMBERS:
        if not isinstance(content[name], list):
            return f"{name} that are {describe(content[name])}"
    faults: list[TableFault] = []
    by_name = {name: _by_id(name, content[name], faults) for name in _NUMBERS}
    return CocoTables(**by_name, faults=faults)


def _by_id(table: str, records: Sequence[Any], faults: list[TableFault]) -> dict[int, dict[str, Any]]:
    numbers: dict[int, int] = {}  # id -> its first record
    found: dict[int, dict[str, Any]] = {}
    different: dict[int, tuple[str, list[dict[str, Any]]]] = {}
    num_equal = 0
    for number, given in enumerate(records):
        record = _whole_record(table, given)
        if isinstance(record, str):
            known = whole_number(given.get("id")) if isinstance(given, dict) else None
            records_of_fault = (given,) if isinstance(given, dict) else ()
            faults.append(TableFault(table, known, f"number {number} of {table}: {record}", records_of_fault))
            continue
        first = numbers.setdefault(record["id"], number)
        if first == number:
            found[record["id"]] = record
        elif record == found[record["id"]]:
            num_equal += 1
        else:
            one = found[record["id"]]
            different.setdefault(record["id"], (_difference(table, first, one, number, record), [one]))[1].append(record)
    if num_equal:
        logger.info("%d of %d %s repeat an earlier record word by word; each is one", num_equal, len(records), table)
    for record_id, (message, of_id) in different.items():
        faults.append(TableFault(table, record_id, message, tuple(of_id), is_repeated=True))
        del found[record_id]
    return found


def _whole_record(table: str, record: Any) -> dict[str, Any] | str:
    """The record with its numbers as integers, or what is wrong with it."""
    if not isinstance(record, dict):
        return f"expected an object, got {describe(record)}"
    numbers: dict[str, int] = {}
    for key in _NUMBERS[table]:
        if (whole := whole_number(record.get(key))) is None:
            return f"expected a whole number as {key}, got {_said(record, key)}"
        numbers[key] = whole
    key = _TEXTS.get(table)
    if key is not None and (key in record or table == "categories") and not isinstance(record.get(key), str):
        return f"expected a text as {key}, got {_said(record, key)}"
    category = whole_number(record.get("category_id"))
    return {**record, **numbers, **({} if category is None else {"category_id": category})}


def whole_number(value: object) -> int | None:
    """An integer, also one that a table program wrote as 1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _said(record: dict[str, Any], key: str) -> str:
    return repr(record[key])[:60] if key in record else f"none ({describe(record)})"


def _difference(table: str, first: int, one: dict[str, Any], second: int, other: dict[str, Any]) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]

    def says(record: dict[str, Any]) -> str:
        return ", ".join(f"{key} {repr(record.get(key))[:40]}" for key in keys[:3])

    return (
        f"expected one record of id {one['id']} in {table}, got different ones: number {first} ({says(one)}) and number "
        f"{second} ({says(other)})"
    )
