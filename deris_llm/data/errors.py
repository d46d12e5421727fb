"""Errors about data: one error names everything that is wrong with a dataset."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from deris_llm.common.words import count_of, printable, shortened
from deris_llm.structures import ReferringRecord


class DataError(ValueError):
    """A folder, file or record that cannot be used; the message says where, expected, got and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def plain_message(error: BaseException) -> str:
    """The message of an error, without the traceback that torch prepends to errors of loader workers."""
    message = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", message):
        return message
    raised = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", message, flags=re.MULTILINE)
    return raised[-1].rstrip() if len(raised) > 1 else message


def check_is_split(name: str, splits: Sequence[str]) -> None:
    """Checks that the split of ``dataset/split`` is one of ``splits``.

    Raises:
        DataError: it is not; the message suggests the nearest name.
    """
    dataset, _, split = name.partition("/")
    if split not in splits:
        near = difflib.get_close_matches(split, splits, n=1)
        raise DataError(
            f"split {name!r}: expected one of {', '.join(f'{dataset}/{known}' for known in splits)}, got {split!r}."
            + (f" Did you mean {dataset}/{near[0]}?" if near else "")
        )


def check_has_truth(record: ReferringRecord, *, needed_for: str) -> None:
    """Checks that the referents of a record are known.

    Raises:
        DataError: they are not published.
    """
    if not record.has_truth:
        raise DataError(
            f"{record.phrase_id}: expected a phrase with its truth for {needed_for}, got one of {record.dataset}/{record.split}, whose "
            "truth is not published. Choose a split with truth; masks of this one can only be predicted"
        )


def bad_records_error(
    where: str, problems: Sequence[str], *, num_records: int, num_bad: int | None = None
) -> DataError:
    """One error for all bad records of a file, listed by cause; ``num_bad`` defaults to the number of problems."""
    num_bad = len(problems) if num_bad is None else num_bad
    return DataError(
        f"{where}: {num_bad:,} of {count_of(num_records, 'record')} cannot be used\n{listed_by_cause(problems)}\n"
        "Repair or remove these records (nothing is dropped silently), or download the files again"
    )


def listed_by_cause(problems: Sequence[str], *, num_shown: int = 30) -> str:
    """Lists the first problem of each cause, how often the cause occurs, and its first places.

    Args:
        problems: ``place: message``; messages that differ only in names and numbers have the same cause.
        num_shown: causes that are listed.
    """
    causes: dict[str, list[str]] = {}
    for problem in problems:
        causes.setdefault(_cause(problem.partition(": ")[2]), []).append(problem)
    lines: list[str] = []
    for of_cause in list(causes.values())[:num_shown]:
        others = list(dict.fromkeys(problem.partition(": ")[0] for problem in of_cause))[1:]
        also = ": also " + ", ".join(others[:3] + ["..."] * (len(others) > 3)) if others else ""
        lines.append(f"  - {of_cause[0]}" + (f" ({len(of_cause):,} times{also})" if len(of_cause) > 1 else ""))
    num_more = len(causes) - num_shown
    return "\n".join(lines + ([f"  - and {num_more:,} other cause{'s' * (num_more > 1)}"] if num_more > 0 else []))


def _cause(message: str) -> str:
    """The message without quoted words, file names and numbers."""
    plain = re.sub(r"(?<!\w)('[^']*'|\"[^\"]*\")|\S*[\d/\\]\S*|\S+\.[a-z]{2,5}\b", "#", message[:400])
    return re.sub(r"#(\W*#)+", "#", plain)


def missing_path_error(path: Path, purpose: str, *, hint: str = "") -> DataError:
    """Names a missing path, what its folder holds instead, and similar names."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    entries = {entry.name: entry.is_dir() for entry in sorted(folder.iterdir())}
    found = [name + "/" * is_dir for name, is_dir in entries.items()]
    wanted = path.relative_to(folder).parts[0]
    # Suggest folders for a folder, files for a file.
    alike = [name for name, is_dir in entries.items() if is_dir == (folder != path.parent)]
    near = difflib.get_close_matches(wanted, alike, n=3)
    listed = ", ".join(found[:20]) + (f", … ({len(found):,} in all)" if len(found) > 20 else "") if found else "nothing"
    return DataError(
        f"{purpose}: expected {path}; {folder}/ holds {listed}."
        + (f" Is it {' or '.join(repr(name) for name in near)}? Rename it to {wanted!r}." if near else "")
        + (f" {hint}" if hint else "")
    )


def describe(value: object) -> str:
    """Describes a parsed value in a few words."""
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(_key, list(value)[:8])) or 'nothing'}"
    if isinstance(value, list) and value:
        first = shortened(value[0]) if isinstance(value[0], list) else describe(value[0])
        return f"a list of {len(value):,}, first {first}"
    return f"{type(value).__name__} {(value[:60] if isinstance(value, str) else shortened(value, 60))!r}"


def _key(key: object) -> str:
    return key if isinstance(key, str) and len(key) <= 60 else shortened(key, 60)
