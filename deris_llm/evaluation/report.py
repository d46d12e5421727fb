"""The report of a run: `report.json`, percent throughout, and a table beside published numbers."""

from __future__ import annotations

import json
import platform
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deris_llm.common.folders import replace_text
from deris_llm.common.strict_files import json_of
from deris_llm.evaluation.calibration import Calibration
from deris_llm.evaluation.tables import Column, StackedTable

Numbers = TypeVar("Numbers")
Section = Literal["splits", "control", "step0", "videos"]
SplitNumbers = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Split -> protocol id -> metric -> percent or count, None where there is nothing to take a number of; and beside them what
`output.extras` gives."""


class Described(typing.Protocol):
    """A protocol of images or of videos, as a report names it."""

    @property
    def id(self) -> str: ...
    def describe(self) -> str: ...


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

NOTE = (
    "95 %: bootstrap over images, of frames over videos. "
    "Best query: the number if each referent were answered by the query whose mask fits it best."
)

CONTROL_NOTE = (
    "Control: each phrase is swapped for one that names another object of its image, and the answer is compared with the "
    "original object: low is good."
)

SYNTHETIC_NOTE = (
    "These images are synthetic (deris-llm data synth), the published numbers are of photographs: they show what is possible "
    "there and are no comparison."
)

PUBLISHED_NOTE = (
    "Other data: published numbers on the real COCO images, DeRIS paper, Table 1. \N{DAGGER}: its group of MLLM-based methods, "
    "whose metric the table does not state: the paper's text calls DeRIS-7B's lead over SAM4MLLM-8B cIoU, its appendix says 'For RIS, "
    "we use mIoU', and LISA, GSVA, GLaMM and SAM4MLLM report cIoU (here: oIoU) in their own papers."
)

_GRES_SPLITS = ("grefcoco/val", "grefcoco/testA", "grefcoco/testB")

PUBLISHED_GRES: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "DeRIS-L": dict(
        zip(_GRES_SPLITS, ((77.67, 72.00, 82.22), (75.30, 73.73, 78.30), (67.99, 67.38, 66.81)), strict=True)
    ),
    "DeRIS-B": dict(
        zip(_GRES_SPLITS, ((74.10, 68.06, 77.03), (73.72, 71.99, 75.98), (65.63, 64.65, 63.44)), strict=True)
    ),
    "GSVA-7B": dict(
        zip(_GRES_SPLITS, ((66.47, 63.29, 62.43), (71.08, 69.93, 65.31), (62.23, 60.47, 60.56)), strict=True)
    ),
}
"""Table 2 of the DeRIS paper: gIoU, cIoU, N-acc, percent."""

GRES_NOTE = (
    "Always empty, never empty: what answers without looking get (no target for every phrase; the whole image for "
    "every phrase). F1: share of phrases whose boxes are all right. Best query: the number if each referent were answered by the "
    "query whose mask fits it best. 95 %: bootstrap over images, of frames over videos."
)

PUBLISHED_GRES_NOTE = "Other data: published gIoU / cIoU / N-acc on the real COCO images, DeRIS paper, Table 2."

BENCHMARK_METRICS: Mapping[str, Sequence[str]] = {
    "Ref-ZOM": ("mIoU", "oIoU", "Acc", "Pr@0.5", "Pr@0.7", "Pr@0.9"),
    "R-RefCOCO": ("mIoU", "oIoU", "mRR", "rIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "summed Pr@0.5"),
}
"""Benchmark -> its own metrics in tables; a report names them "Ref-ZOM mIoU" and so on (`metrics.benchmark_ratios`)."""

BENCHMARK_NOTES: Mapping[str, str] = {
    "Ref-ZOM": "mIoU, oIoU and Pr@X: of the phrases with a target. Acc: share of the others whose answer covers no pixel.",
    "R-RefCOCO": "mIoU: mean over refs, of the phrases with a target; mRR: mean over refs of the share of the others whose answer "
    "covers no pixel; rIoU: mean over refs of I / U with the pixels of wrong answers in U. Pr@X is per phrase; summed Pr@X adds up "
    "the IoU of a ref's phrases before it compares, as the public code does by mistake.",
}

PUBLISHED_BENCHMARKS: Mapping[str, tuple[str, str]] = {
    "Ref-ZOM": (
        "ref-zom/test",
        "Published: DMMI (Swin-B), the dataset's own method, mIoU 68.25, oIoU 68.77 (README of toggle1995/RIS-DMMI, 753cd60; its test.py "
        "compares at 480x480 px, as protocol rela480).",
    ),
}
"""Benchmark -> the split that a published number is of, and the number with its source."""

VIDEO_NOTE = (
    "J&F: mean of region similarity J and boundary accuracy F, by expression. 95 %: bootstrap over videos. Recall: share of the frames "
    "above 0.5. Decay: first quarter of the frames minus last. Best query: if each frame were answered by the query whose mask fits it "
    "best. First frame: its answer held still over all frames. Control: the expression is swapped for one of another object of the video, "
    "where there is one; control_own_J&F of report.json is the "
    "J&F of these expressions without the swap."
)

_INTERVAL = "95 %"  # a column of the table beside the first metric, not a metric

_TABLE_METRICS = ("mIoU", _INTERVAL, "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "oracle_mIoU")

_GRES_TABLE_METRICS = ("gIoU", _INTERVAL, "cIoU", "N-acc", "T-acc", "Pr@0.7", "F1", "oracle_gIoU")

_SHORT = {"original": "orig.", "oracle_gIoU": "best\nquery", "oracle_mIoU": "best\nquery"}

VIDEO_COLUMNS = {
    "J&F": "J&F",
    _INTERVAL: _INTERVAL,
    "J": "J",
    "F": "F",
    "J_recall": "J\nrecall",
    "J_decay": "J\ndecay",
    "best_query_J&F": "best\nquery",
    "first_frame_J&F": "first\nframe",
    "control_J&F": "control\nJ&F",
}
"""Metrics of `videos` and their headings."""

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
        report = json_of(path.read_text(encoding="utf-8"))
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
    protocols: Iterable[Described] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Adds numbers and times to a report and writes it aside before it takes the old one's place.

    Args:
        path: ``report.json``; made if absent.
        section: where the numbers belong; ``step0`` = before fine-tuning, ``control`` = with swapped phrases, ``videos`` = J and F
            of splits whose images are frames of videos, which is there only when needed.
        numbers: per split and protocol; replace those of the same split.
        timing: seconds per stage.
        protocols: those that made the numbers; their descriptions join ``versions``.
        notes: split -> what must be read with its numbers, and why some are null; they join ``notes``, which is there only
            when needed.
        about: where the numbers come from; replaces ``about``, which is there only when given.

    Returns:
        The whole report.
    """
    path = Path(path)
    report = read_report(path)
    if section is not None and numbers is not None:
        report.setdefault(section, {}).update(
            {split: {name: dict(values) for name, values in found.items()} for split, found in numbers.items()}
        )
    report["timing"].update({stage: round(seconds, 2) for stage, seconds in (timing or {}).items()})
    report["versions"].update(library_versions())
    report["versions"].setdefault("protocols", {}).update({protocol.id: protocol.describe() for protocol in protocols})
    for split, said in (notes or {}).items():
        if said:
            report.setdefault("notes", {})[split] = list(said)
        else:
            report.get("notes", {}).pop(split, None)
    if about is not None:
        report["about"] = dict(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(_rounded(report), indent=1, ensure_ascii=False) + "\n")
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


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """The numbers of a report beside published ones, and under them what they must not be read without.

    Args:
        report: as `read_report` gives it; its ``splits`` decide the rows, the first split's protocols the columns.
    """
    is_gres = {split: "gIoU" in next(iter(found.values())) for split, found in report["splits"].items()}
    tables: list[RenderableType] = []
    if not all(is_gres.values()):
        tables.append(_ris_table(report, [split for split, gres in is_gres.items() if not gres]))
    if any(is_gres.values()):
        tables.append(_gres_table(report, [split for split, gres in is_gres.items() if gres]))
    tables += [_benchmark_table(report, name, splits) for name, splits in splits_by_benchmark(report).items()]
    if report.get("videos"):
        tables.insert(0, _video_table(report["videos"]))
    return Group(*tables, *(Text(line) for line in provenance(report)))


def report_line(found: SplitNumbers) -> str:
    """Returns mIoU, gIoU or J&F of every split in a line, by the first protocol."""
    said = []
    for split, by_protocol in found.items():
        numbers = next(iter(by_protocol.values()))
        metric = next(name for name in ("J&F", "gIoU", "mIoU") if name in numbers)
        said.append(f"{split} {metric} {_cell(numbers, metric)}")
    return ", ".join(said)


def provenance(report: Mapping[str, Any]) -> list[str]:
    """One line each: leakage, protocols with their fingerprints, the threshold's source, notes of the splits."""
    about, lines = report.get("about") or {}, []
    if about.get("leakage"):
        lines.append(str(about["leakage"]))
    prints: dict[str, dict[str, list[str]]] = {}  # protocol id -> fingerprint -> splits
    for split, found in (*report["splits"].items(), *report.get("videos", {}).items()):
        for name, values in found.items():
            prints.setdefault(name, {}).setdefault(values.get("fingerprint", "not noted"), []).append(split)
    said = [
        f"{name} ({fingerprint}{'' if len(by_print) == 1 else ': ' + ', '.join(splits)})"
        for name, by_print in prints.items()
        for fingerprint, splits in by_print.items()
    ]
    if said:
        lines.append(f"Protocols: {', '.join(said)}.")
    if about.get("threshold_source"):
        lines.append(f"Score {about['threshold_source']}.")
    lines += [f"{split}: {'; '.join(notes)}." for split, notes in report.get("notes", {}).items()]
    return lines


def sweep_table(found: Calibration) -> RenderableType:
    """A sweep's curve with the chosen threshold marked, and the choice in words."""
    metrics = [name for name in found.curve[0] if name != "threshold"]
    table = Table(title=f"Sweep of {found.split}, percent", box=box.SIMPLE_HEAD, padding=0)
    for name in ("threshold", *metrics):
        table.add_column(f" {name}", justify="right", no_wrap=True)
    for point in found.curve:
        style = "bold green" if point["threshold"] == found.threshold else ""
        cells = [_cell(point, name) for name in metrics]
        table.add_row(f"{point['threshold']:.2f}", *cells, style=style)
    return Group(table, Text(f"{found}."))


def _columns(report: Mapping[str, Any], splits: Sequence[str], metrics: Sequence[str]) -> list[tuple[str, str]]:
    """All metrics of the first protocol; of another one mean and sums, of several others the means alone."""
    protocols = list(dict.fromkeys(name for split in splits for name in report["splits"][split])) or ["original"]
    shown = ("mIoU", "gIoU", "oIoU", "cIoU") if len(protocols) == 2 else ("mIoU", "gIoU")
    means = [metric for metric in metrics if metric in shown]
    return [(protocols[0], metric) for metric in metrics] + [(name, m) for name in protocols[1:] for m in means]


def table_notes(report: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    """Returns what must be read with the table of splits that are all generalised or all not."""
    is_gres = "gIoU" in next(iter(report["splits"][splits[0]].values()))
    notes = [GRES_NOTE if is_gres else NOTE]
    if any(report["control"].get(split) for split in splits):
        notes.append(CONTROL_NOTE)
    if found := [numbers for split in splits if (numbers := report["step0"].get(split))]:
        images = {next(iter(numbers.values())).get("n_images") for numbers in found}
        sample = f", on {images.pop():,} images of each split" if len(images) == 1 and None not in images else ""
        notes.append(f"Step 0: the model before fine-tuning{sample}.")
    if published_on(splits, PUBLISHED_GRES if is_gres else PUBLISHED):
        is_synthetic = (report.get("about") or {}).get("synthetic")
        notes += [SYNTHETIC_NOTE] if is_synthetic else []
        notes.append(PUBLISHED_GRES_NOTE if is_gres else PUBLISHED_NOTE)
    return notes


def published_on(
    splits: Sequence[str], published: Mapping[str, Mapping[str, Numbers]]
) -> Mapping[str, Mapping[str, Numbers]]:
    """The published numbers, if one of the splits has some: beside others they would compare nothing."""
    return {method: numbers for method, numbers in published.items() if any(split in numbers for split in splits)}


def _ris_table(report: Mapping[str, Any], splits: Sequence[str]) -> StackedTable:
    columns = _columns(report, splits, _TABLE_METRICS)
    found = [report["splits"][split] for split in splits]
    published = published_on(splits, PUBLISHED)
    shown = [Column("\n\nphrases", [f"{next(iter(numbers.values()))['n_phrases']:,}" for numbers in found])]
    shown += _metric_columns(columns, found)
    shown += _section_columns(report, splits, columns[0][0], "mIoU")
    shown += [
        Column(f"other\ndata\n{method}\N{DAGGER}", [f"{n[s]:.2f}" if s in n else "-" for s in splits], "dim")
        for method, n in published.items()
    ]
    title, caption = "Referring image segmentation, percent", " ".join(table_notes(report, splits))
    return StackedTable(title, Column("\n\nsplit", splits), shown, caption=caption)


def _gres_table(report: Mapping[str, Any], splits: Sequence[str]) -> StackedTable:
    columns = _columns(report, splits, _GRES_TABLE_METRICS)
    published = published_on(splits, PUBLISHED_GRES)
    names: list[str] = []
    styles: list[str] = []
    rows: list[Mapping[str, Mapping[str, Any]]] = []  # by protocol
    phrases: list[str] = []
    for split in splits:
        found = report["splits"][split]
        counts = next(iter(found.values()))
        names += [split, "  always empty", "  never empty"]
        styles += ["", "dim", "dim"]
        phrases += [f"{counts['n_phrases']:,} ({counts['n_no_target']:,})", "", ""]
        rows.append(found)
        for baseline, n_acc in (("always empty", 100.0), ("never empty", 0.0)):
            rows.append({name: _baseline(numbers, baseline, n_acc) for name, numbers in found.items()})
    shown = [Column("\nphrases\n(no target)", phrases), *_metric_columns(columns, rows)]
    shown += _spread(_section_columns(report, splits, columns[0][0], "gIoU"))
    shown += _spread(
        [
            Column(
                f"other\ndata\n{method}",
                ["/".join(f"{number:.1f}" for number in n[s]) if s in n else "-" for s in splits],
                "dim",
            )
            for method, n in published.items()
        ]
    )
    title, caption = "Generalised referring segmentation, percent", " ".join(table_notes(report, splits))
    return StackedTable(title, Column("\n\nsplit", names), shown, styles, caption)


def splits_by_benchmark(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns benchmark -> the splits of a report that have its own metrics."""
    found: dict[str, list[str]] = {}
    for split, by_protocol in report["splits"].items():
        numbers = next(iter(by_protocol.values()))
        for name, metrics in BENCHMARK_METRICS.items():
            if f"{name} {metrics[0]}" in numbers:
                found.setdefault(name, []).append(split)
    return found


def _benchmark_table(report: Mapping[str, Any], name: str, splits: Sequence[str]) -> StackedTable:
    found = [report["splits"][split] for split in splits]
    shown = [
        Column(
            f"{_SHORT.get(protocol, protocol)}\n{metric}",
            [_cell(numbers.get(protocol), f"{name} {metric}") for numbers in found],
            "" if metric != BENCHMARK_METRICS[name][0] else "bold",
        )
        for number, protocol in enumerate(dict.fromkeys(protocol for numbers in found for protocol in numbers))
        for metric in BENCHMARK_METRICS[name]
        if not number or "Pr@" not in metric
    ]
    title, caption = f"{name}'s own numbers, percent", " ".join(benchmark_notes(report, name, splits))
    return StackedTable(title, Column("\nsplit", splits), shown, caption=caption)


def benchmark_notes(report: Mapping[str, Any], name: str, splits: Sequence[str]) -> list[str]:
    """Returns what must be read with a benchmark's own numbers; published ones stand beside its real data only."""
    split, published = PUBLISHED_BENCHMARKS.get(name, ("", ""))
    is_synthetic = (report.get("about") or {}).get("synthetic")
    return [BENCHMARK_NOTES[name], *([published] if split in splits and not is_synthetic else [])]


def _video_table(found: SplitNumbers) -> StackedTable:
    """J, F and what they are read with; the controls stand where they were run."""
    splits = list(found)
    rows = [next(iter(found[split].values())) for split in splits]
    counts = [f"{row['n_videos']:,} / {row['n_expressions']:,}" for row in rows]
    shown = [Column("videos /\nexpressions", counts)]
    for metric, heading in VIDEO_COLUMNS.items():
        cells = [
            _cell({"intervals": {"mIoU": row["intervals"].get("J&F")}} if metric == _INTERVAL else row, metric)
            for row in rows
        ]
        if any(cell != "-" for cell in cells):
            shown.append(Column("\n" * ("\n" not in heading) + heading, cells, "bold" if metric == "J&F" else ""))
    return StackedTable("Videos, percent", Column("\nsplit", splits), shown, caption=VIDEO_NOTE)


def _metric_columns(
    columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Mapping[str, Any]]]
) -> list[Column]:
    return [
        Column(
            "\n" * ("\n" not in _SHORT.get(metric, ""))
            + f"{_SHORT.get(protocol, protocol)}\n{_SHORT.get(metric, metric)}",
            [_cell(row.get(protocol), metric) for row in rows],
            "" if number else "bold",
        )
        for number, (protocol, metric) in enumerate(columns)
    ]


def _section_columns(report: Mapping[str, Any], splits: Sequence[str], protocol: str, metric: str) -> list[Column]:
    """The first metric of the control run and of step 0, where they were run."""
    return [
        Column(
            f"\n{heading}\n{metric}",
            [_cell(report[name].get(split, {}).get(protocol), metric) for split in splits],
            "yellow",
        )
        for name, heading in (("control", "control"), ("step0", "step 0"))
        if any(report[name].get(split) for split in splits)
    ]


def _spread(columns: Sequence[Column]) -> list[Column]:
    """Columns of splits with empty cells for the two rows below each."""
    return [Column(c.heading, [cell for own in c.cells for cell in (own, "", "")], c.style) for c in columns]


def _baseline(numbers: Mapping[str, float | None], name: str, n_acc: float) -> dict[str, float | None]:
    """Numbers of an answer without looking; N-acc and T-acc follow from what it is."""
    key = name.replace(" ", "_")
    return {
        "gIoU": numbers[f"{key}_gIoU"],
        "cIoU": numbers[f"{key}_cIoU"],
        "N-acc": None if numbers["N-acc"] is None else n_acc,
        "T-acc": None if numbers["T-acc"] is None else 100 - n_acc,
    }


def _cell(values: Mapping[str, Any] | None, metric: str) -> str:
    if metric == _INTERVAL:
        found = (values or {}).get("intervals") or {}
        interval = found.get("mIoU") or found.get("gIoU")
        return f" {interval[0]:.1f}-{interval[1]:.1f}" if interval else "-"
    value = None if values is None else values.get(metric)
    return "-" if value is None else f"{value:.2f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
