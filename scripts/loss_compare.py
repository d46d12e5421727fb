#!/usr/bin/env python
"""Compares two recordings of `scripts/golden_losses.py`: files, or folders of them.

    python scripts/loss_compare.py A B [--tolerance X]

Without --tolerance, recordings of the same machine and libraries must be equal to the last digit, and others within a
relative difference of 1e-5. Exit status: 0 within the tolerance, 1 beyond it, 2 the recordings cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ELSEWHERE = 1e-5  # relative; largest measured under other rounding: see tests/test_golden_losses.py
ELSEWHERE_PIXELS = 2e-3  # share of a mask's pixels; a pixel whose logit is near zero may change sides


class Row(NamedTuple):
    """The comparison of one series of numbers, e.g. the losses of a run on two ranks."""

    name: str
    absolute: float  # largest difference
    relative: float  # largest difference over the larger of the two magnitudes
    first_step: int | None  # the first that differs, counted from 1; None if all are bit-equal
    tolerance: float

    @property
    def is_within(self) -> bool:
        """Whether no number differs by more than the tolerance."""
        return self.relative <= self.tolerance


def read_recordings(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a recording, or all of a folder, by the name of its run.

    Raises:
        ValueError: there is no recording, or one is not readable.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: expected a recording of scripts/golden_losses.py or a folder of them, found none")
    found = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found[content["run"]] = content
            assert "losses" in content or "predictions" in content
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{file}: expected a recording of scripts/golden_losses.py, got {error!r}") from error
    return found


def is_same_place(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Returns whether two recordings come from equal machines and libraries, so that equal code gives equal bits."""
    return a["machine"] == b["machine"] and a["libraries"] == b["libraries"]


def compare_recordings(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float | None = None) -> list[Row]:
    """Compares two recordings of a run.

    Args:
        a: the expected one.
        b: the other.
        tolerance: largest relative difference; None = 0 in the same place, else `ELSEWHERE` (masks: `ELSEWHERE_PIXELS`).

    Raises:
        ValueError: one has a series that the other lacks, or of another length.
    """
    ours, theirs = dict(_series(a)), dict(_series(b))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{a['run']}: expected the series {', '.join(ours)} on both sides, got {', '.join(theirs)}")
    rows = []
    for name, expected in ours.items():
        found = theirs[name]
        if len(found) != len(expected):
            raise ValueError(f"{a['run']} {name}: expected {len(expected)} numbers, got {len(found)}")
        limit = tolerance
        if limit is None:
            limit = 0.0 if is_same_place(a, b) else ELSEWHERE
        rows.append(_row(f"{a['run']}  {name}", expected, found, limit))
    if "predictions" in a:
        limit = (0.0 if is_same_place(a, b) else ELSEWHERE_PIXELS) if tolerance is None else tolerance
        rows.append(_mask_row(a, b, limit))
    return rows


def _series(recording: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    yield from recording.get("losses", {}).items()
    if "predictions" in recording:
        for field in ("score", "presence", "best_query"):
            yield field, [answer[field] for answer in recording["predictions"]]


def _row(name: str, expected: Sequence[float], found: Sequence[float], tolerance: float) -> Row:
    differing = [k for k, (x, y) in enumerate(zip(expected, found, strict=True), start=1) if x != y]
    absolute = [abs(x - y) for x, y in zip(expected, found, strict=True)]
    relative = [
        difference / max(abs(x), abs(y)) if difference else 0.0
        for difference, x, y in zip(absolute, expected, found, strict=True)
    ]
    finite = all(math.isfinite(value) for value in (*expected, *found))
    return Row(
        name,
        max(absolute, default=0.0) if finite else math.inf,
        max(relative, default=0.0) if finite else math.inf,
        differing[0] if differing else None,
        tolerance,
    )


def _mask_row(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float) -> Row:
    """Compares the masks; the relative difference is the share of pixels that differ."""
    from pycocotools import mask as rle

    def decode(answer: Mapping[str, Any]) -> Any:
        return rle.decode({"size": answer["size_hw"], "counts": answer["mask"].encode()})

    pixels, shares = [], []
    for expected, found in zip(a["predictions"], b["predictions"], strict=True):
        asked = [(answer["image"], answer["phrase"], answer["size_hw"]) for answer in (expected, found)]
        if asked[0] != asked[1]:
            raise ValueError(f"{a['run']}: expected the answer to {asked[0]}, got that to {asked[1]}")
        pixels.append(float((decode(expected) != decode(found)).sum()))
        shares.append(pixels[-1] / math.prod(expected["size_hw"]))
    differing = [k for k, number in enumerate(pixels, start=1) if number]
    return Row(f"{a['run']}  masks (pixels)", max(pixels), max(shares), differing[0] if differing else None, tolerance)


def compare(a: Path, b: Path, tolerance: float | None = None) -> list[Row]:
    """Compares the recordings of two files or folders.

    Raises:
        ValueError: unreadable recordings, or a run that one side lacks.
    """
    ours, theirs = read_recordings(a), read_recordings(b)
    if missing := sorted(ours.keys() ^ theirs.keys()):
        where = [f"{name} only in {a if name in ours else b}" for name in missing]
        raise ValueError(f"expected the same runs on both sides, got {'; '.join(where)}")
    return [row for name, expected in ours.items() for row in compare_recordings(expected, theirs[name], tolerance)]


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'run':{width}}  {'max abs':>9}  {'max rel':>9}  {'tolerance':>9}  first differing"]
    for row in rows:
        where = "bit-equal" if row.first_step is None else f"{row.first_step}{'' if row.is_within else '  DIFFERS'}"
        lines.append(f"{row.name:{width}}  {row.absolute:9.2g}  {row.relative:9.2g}  {row.tolerance:9.2g}  {where}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="the expected recording, or a folder of them")
    parser.add_argument("b", type=Path, metavar="B", help="the other")
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference")
    arguments = parser.parse_args(argv)
    try:
        rows = compare(arguments.a, arguments.b, arguments.tolerance)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(rows) + "\n")
    return 0 if all(row.is_within for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
