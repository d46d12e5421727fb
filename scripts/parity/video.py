"""Compares J, F and the video protocols with what the public evaluation code computed, number by number.

    python scripts/parity/video.py --fixtures DIR [--tolerance 1e-12] [--json OUT]

DIR holds any of the parts jf_cases.json with jf_cases*.npz, mevis/, ref_ytvos/, ref_davis/ and davis/. Every number of a part is
computed again; a table says how many were compared and how far the worst one is off. The exit status is 1 when one is beyond the
tolerance, or when something that DIR holds was not compared, and 2 when DIR cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

from scripts.parity.video_parts import Comparison, davis, jf_cases, mevis, ref_davis, ref_ytvos

TOLERANCE = 1e-12
"""Absolute; measured worst on the whole fixtures 1.7e-16, one step of float64. Counts, maps and radii must be equal."""
PARTS: dict[str, tuple[Callable[[Path, Comparison], None], Callable[[str], bool]]] = {
    "jf_cases": (jf_cases, lambda name: name.startswith("jf_cases") and name.endswith((".json", ".npz"))),
    "mevis": (mevis, lambda name: name == "mevis"),
    "ref_ytvos": (ref_ytvos, lambda name: name == "ref_ytvos"),
    "ref_davis": (ref_davis, lambda name: name == "ref_davis"),
    "davis": (davis, lambda name: name == "davis"),
}
"""Part -> what compares it, and which entries of DIR belong to it."""
_TEXTS = (".md", ".txt", ".rst", "LICENSE")
_DIFFERENCES_SHOWN = 10
_DAMAGED = (EOFError, zipfile.BadZipFile, zlib.error)
"""Errors of numpy at a damaged npz."""


def compare_fixtures(folder: Path, tolerance: float = TOLERANCE) -> list[Comparison]:
    """Compares every part that a folder holds.

    Args:
        folder: of the fixtures.
        tolerance: absolute, of numbers that are no counts.

    Returns:
        One comparison per part, and one for what belongs to no part.

    Raises:
        ValueError: the folder holds no part.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of fixtures, got none there: check --fixtures")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found: list[Comparison] = []
    for part, (compare, belongs) in PARTS.items():
        if any(belongs(name) for name in names):
            comparison = Comparison(part, tolerance)
            try:
                compare(folder, comparison)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, *_DAMAGED) as error:
                comparison.differs("", f"stopped: {type(error).__name__}: {error}")
            if not comparison.number:
                comparison.differs("", "no number was compared")
            found.append(comparison)
    if not found:
        raise ValueError(f"{folder}: expected at least one of {', '.join(PARTS)}, got {', '.join(names) or 'nothing'}")
    unknown = [n for n in names if not n.endswith(_TEXTS) and not any(belongs(n) for _, belongs in PARTS.values())]
    if unknown:
        others = Comparison("(no part)", tolerance)
        for name in unknown:
            others.differs(name, "not compared: it belongs to no part that this script knows")
        found.append(others)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints a table.

    Returns:
        0 all equal within the tolerance, 1 something is not or was not compared, 2 unusable arguments or fixtures.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", type=Path, required=True, metavar="DIR", help="folder of the fixtures")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X", help=f"absolute (default {TOLERANCE:g})"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparison as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = compare_fixtures(arguments.fixtures, arguments.tolerance)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    _show(found)
    if arguments.json is not None:
        report = {"tolerance": arguments.tolerance, "parts": [comparison.report() for comparison in found]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(comparison.differences for comparison in found))


def _show(found: Sequence[Comparison]) -> None:
    from rich import box
    from rich.table import Table

    from deris_llm.common.terminal import console

    table = Table("part", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("  numbers compared", "  texts, maps", "  worst deviation", "  "):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        mark = f"{len(one.differences):,} DIFFER" if one.differences else "equal"
        table.add_row(one.part, f"{one.number:,}", f"{one.others:,}", f"{one.worst:.1e}", f" {mark}")
    shown = console()
    shown.print(table)
    for one in found:
        for name, why in one.differences[:_DIFFERENCES_SHOWN]:
            shown.print(f"{one.part}: {name + ': ' if name else ''}{why}", soft_wrap=True)
        if len(one.differences) > _DIFFERENCES_SHOWN:
            shown.print(f"{one.part}: and {len(one.differences) - _DIFFERENCES_SHOWN:,} more")
        for note in one.notes:
            shown.print(f"{one.part}: {note}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
