"""What is wrong with a dataset, in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path


class DataError(ValueError):
    """A folder, file or record that cannot be used; says where, what was expected, what was found and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with lone surrogates as escapes: JSON and names of files that are not UTF-8 hold some, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain_message(error: BaseException) -> str:
    """The message of an error; without the traceback that torch puts before one of a loader's worker."""
    message = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", message):
        return message
    raised = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", message, flags=re.MULTILINE)
    return raised[-1].rstrip() if len(raised) > 1 else message


def check_is_split(name: str, splits: Sequence[str]) -> None:
    """Checks that the split of ``dataset/split`` is one of the dataset's.

    Raises:
        DataError: it is not; with the nearest name.
    """
    dataset, _, split = name.partition("/")
    if split not in splits:
        near = difflib.get_close_matches(split, splits, n=1)
        raise DataError(
            f"split {name!r}: expected one of {', '.join(f'{dataset}/{known}' for known in splits)}, got {split!r}."
            + (f" Did you mean {dataset}/{near[0]}?" if near else "")
        )


def bad_records_error(
    where: str, problems: Sequence[str], *, num_records: int, num_bad: int | None = None
) -> DataError:
    """One error for all bad records of a file, by cause; ``num_bad``: how many records they spoil, if known."""
    num_bad = len(problems) if num_bad is None else num_bad
    return DataError(
        f"{where}: {num_bad:,} of {num_records:,} records cannot be used\n{listed_by_cause(problems)}\n"
        "Repair or remove these records (nothing is dropped silently), or download the files again"
    )


def listed_by_cause(problems: Sequence[str], *, num_shown: int = 10) -> str:
    """Lines of a message: the first problem of each cause, how often it occurs and the first places.

    Args:
        problems: ``place: message``; messages that differ in names and numbers alone have one cause.
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
    """The message without quoted words, names of files and numbers."""
    plain = re.sub(r"(?<!\w)('[^']*'|\"[^\"]*\")|\S*[\d/\\]\S*|\S+\.[a-z]{2,5}\b", "#", message[:400])
    return re.sub(r"#(\W*#)+", "#", plain)


def missing_path_error(path: Path, purpose: str, *, hint: str = "") -> DataError:
    """Names the path that should be there, what is there instead and the names that come near."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    entries = {entry.name: entry.is_dir() for entry in sorted(folder.iterdir())}
    found = [name + "/" * is_dir for name, is_dir in entries.items()]
    wanted = path.relative_to(folder).parts[0]
    # A folder is mistaken for a folder only, a file for a file.
    alike = [name for name, is_dir in entries.items() if is_dir == (folder != path.parent)]
    near = difflib.get_close_matches(wanted, alike, n=3)
    listed = ", ".join(found[:20]) + (f", … ({len(found):,} in all)" if len(found) > 20 else "") if found else "nothing"
    return DataError(
        f"{purpose}: expected {path}; {folder}/ holds {listed}."
        + (f" Is it {' or '.join(repr(name) for name in near)}? Rename it to {wanted!r}." if near else "")
        + (f" {hint}" if hint else "")
    )


def describe(value: object) -> str:
    """A value of a file in a few words."""
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, list(value)[:8])) or 'nothing'}"
    if isinstance(value, list) and value:
        return f"a list of {len(value)}, first {describe(value[0])}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
