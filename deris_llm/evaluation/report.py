"""The report of a run: `report.json`, percent throughout, and a table beside published numbers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from deris_llm.evaluation.protocols import Protocol

Section = Literal["splits", "control", "step0"]
SplitNumbers = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> protocol id -> metric -> percent or count."""

_SPLITS = (
    "refcoco/val", "refcoco/testA", "refcoco/testB",
    "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
    "refcocog_umd/val", "refcocog_umd/test",
)  # fmt: skip

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "DeRIS-7B": dict(zip(_SPLITS, (84.05, 85.79, 83.32, 80.30, 83.92, 76.16, 80.62, 80.59), strict=True)),
    "LISA-7B": dict(zip(_SPLITS, (74.90, 79.10, 72.30, 65.10, 70.80, 58.10, 67.90, 70.60), strict=True)),
    "GLaMM-7B": dict(zip(_SPLITS, (79.50, 83.20, 76.90, 72.60, 78.70, 64.60, 74.20, 74.90), strict=True)),
}
"""Table 1 of the DeRIS paper, percent."""

PUBLISHED_NOTE = (
    "orig., deris: protocols `original` and `deris`. Other data: published numbers on the real COCO pictures, DeRIS "
    "paper, Table 1. DeRIS-7B: mIoU at 384 px (its appendix: 'For RIS, we use mIoU'); LISA-7B and GLaMM-7B: their "
    "authors report cIoU (here: oIoU) at the original size."
)

_TABLE_METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")

_SHORT = {"original": "orig."}

_EMPTY: dict[str, Any] = {"splits": {}, "control": {}, "step0": {}, "timing": {}, "versions": {}}


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads a report; an absent file gives an empty one.

    Raises:
        ValueError: the file is not a report.
    """
    path = Path(path)
    if not path.is_file():
        return json.loads(json.dumps(_EMPTY))
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a report in JSON, got {error}: delete the file and evaluate again"
        ) from error
    if not isinstance(report, dict) or not report.keys() >= _EMPTY.keys():
        raise ValueError(
            f"{path}: expected a report with {', '.join(_EMPTY)}, got something else: choose another output folder"
        )
    return report


def update_report(
    path: str | Path,
    *,
    section: Section | None = None,
    numbers: SplitNumbers | None = None,
    timing: Mapping[str, float] | None = None,
    protocols: Iterable[Protocol] = (),
) -> dict[str, Any]:
    """Adds numbers and times to a report and writes it aside before it takes the old one's place.

    Args:
        path: ``report.json``; made if absent.
        section: where the numbers belong; ``step0`` = before fine-tuning, ``control`` = with swapped phrases.
        numbers: per split and protocol; replace those of the same split.
        timing: seconds per stage.
        protocols: those that made the numbers; their descriptions join ``versions``.

    Returns:
        The whole report.
    """
    path = Path(path)
    report = read_report(path)
    if section is not None and numbers is not None:
        report[section].update(
            {split: {name: dict(values) for name, values in found.items()} for split, found in numbers.items()}
        )
    report["timing"].update({stage: round(seconds, 2) for stage, seconds in (timing or {}).items()})
    report["versions"].update(library_versions())
    report["versions"].setdefault("protocols", {}).update({protocol.id: protocol.describe() for protocol in protocols})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(_rounded(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return report


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("deris_llm", "torch", "transformers", "peft", "deepspeed", "pycocotools", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def report_table(report: Mapping[str, Any], *, title: str = "Referring image segmentation, percent") -> Table:
    """The numbers of a report beside published ones.

    Args:
        report: as `read_report` gives it; its ``splits`` decide the rows.
        title: of the table.
    """
    has = {name: any(report[name].values()) for name in ("control", "step0")}
    table = Table(title=title, caption=PUBLISHED_NOTE, caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("\n\nsplit", no_wrap=True)
    table.add_column("\n\nphrases", justify="right", no_wrap=True)
    columns = [("original", metric) for metric in _TABLE_METRICS] + [("deris", metric) for metric in ("mIoU", "oIoU")]
    for number, (protocol, metric) in enumerate(columns):
        table.add_column(
            f"\n{_SHORT.get(protocol, protocol)}\n{metric}",
            justify="right",
            style="" if number else "bold",
            no_wrap=True,
        )
    for name, heading in (("control", "control"), ("step0", "step 0")):
        if has[name]:
            table.add_column(f"\n{heading}\nmIoU", justify="right", style="yellow", no_wrap=True)
    for method in PUBLISHED:
        table.add_column(f"other\ndata\n{method}", justify="right", style="dim", no_wrap=True)

    def cell(values: Mapping[str, float] | None, metric: str) -> str:
        return f"{values[metric]:.2f}" if values else "-"

    for split, found in report["splits"].items():
        row = [split, f"{next(iter(found.values()))['n_phrases']:,}"]
        row += [cell(found.get(protocol), metric) for protocol, metric in columns]
        row += [cell(report[name].get(split, {}).get("original"), "mIoU") for name in ("control", "step0") if has[name]]
        row += [f"{numbers[split]:.2f}" if split in numbers else "-" for numbers in PUBLISHED.values()]
        table.add_row(*row)
    return table


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value
