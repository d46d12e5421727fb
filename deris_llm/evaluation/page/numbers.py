"""The page's numbers: tables beside published ones, where the rest is lost, breakdowns, curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deris_llm.common.words import count_of
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.page.charts import NUM_SERIES, Chart, Line, Marker, line_chart
from deris_llm.evaluation.page.stored import Evaluation, logged
from deris_llm.evaluation.report import (
    BENCHMARK_METRICS,
    PUBLISHED,
    PUBLISHED_GRES,
    benchmark_notes,
    published_on,
    splits_by_benchmark,
    table_notes,
)

_RIS_METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9", "oracle_mIoU")
_GRES_METRICS = ("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "F1", "oracle_gIoU")
_NAMES = {"oracle_mIoU": "best query", "oracle_gIoU": "best query"} | {
    f"{name} {metric}": metric for name, metrics in BENCHMARK_METRICS.items() for metric in metrics
}
_EVALUATED_WHILE_TRAINING = ("eval_mIoU", "eval_oIoU", "eval_gIoU", "eval_cIoU", "eval_N-acc", "eval_T-acc")
PARTS = (
    ("part-answer", "right: the answer's IoU"),
    ("part-choice", "lost by the choice: another query had the mask"),
    ("part-mask", "lost by the masks: no query had it"),
)
_CURVE_STEPS = 50


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a number with its full precision, or a text."""

    value: float | str | None = ""  # None is shown as a dash
    style: str = ""
    interval: Sequence[float] | None = None
    span: int = 1
    scope: str = ""  # `col`, `row`, `colgroup` make a heading
    label: str = ""  # what stands above the number on a narrow page, which has no headings


@dataclass(frozen=True)
class Table:
    """A table with the notes below it."""

    title: str
    heads: list[list[Cell]]
    rows: list[tuple[str, list[Cell]]]  # class of the row, cells
    notes: list[str]
    counts_no_target: bool


def main_metric(evaluation: Evaluation, split: str) -> str:
    """Returns the metric that stands for a split."""
    return "gIoU" if evaluation.is_generalised(split) else "mIoU"


def tiles(evaluation: Evaluation) -> list[tuple[str, float | None, str, str]]:
    """Returns for every split its name, main number, the metric with its interval, and the number of phrases.

    A run that was not evaluated by itself has its last evaluation while training.
    """
    found = []
    videos = evaluation.report.get("videos", {})
    for split, numbers in evaluation.report["splits"].items():
        values = numbers[evaluation.protocol(split)]
        metric = main_metric(evaluation, split)
        if split in videos:
            values, metric = next(iter(videos[split].values())), "J&F"
        interval = (values.get("intervals") or {}).get(metric)
        sure = "" if interval is None else f" · {interval[0]:.1f}–{interval[1]:.1f}"
        counted = (
            count_of(values["n_expressions"], "expression")
            if split in videos
            else count_of(values["n_phrases"], "phrase")
        )
        found.append((split, values.get(metric), metric + sure, counted))
    if not found and (entries := _evaluations_while_training(evaluation)):
        last = entries[-1]
        metric = "gIoU" if "eval_gIoU" in last else "mIoU"
        said = f"{last['eval_n_phrases']:,} phrases, step {last['step']:,}"
        found.append((_training_split(evaluation), last.get(f"eval_{metric}"), f"{metric} while training", said))
    return found


def tables(evaluation: Evaluation) -> list[Table]:
    """Returns tables of the RIS and of the GRES splits, with published numbers beside the splits that have some.

    A run that was not evaluated by itself has a table of its evaluations while training.
    """
    splits = list(evaluation.report["splits"])
    ris = [split for split in splits if not evaluation.is_generalised(split)]
    gres = [split for split in splits if evaluation.is_generalised(split)]
    found = []
    for part in (
        [s for s in ris if published_on([s], PUBLISHED)],
        [s for s in ris if not published_on([s], PUBLISHED)],
    ):
        if part:
            found.append(_table(evaluation, "One target per phrase, percent", part, _RIS_METRICS))
    if gres:
        found.append(_table(evaluation, "No, one or several targets per phrase, percent", gres, _GRES_METRICS))
    found += [_benchmark_table(evaluation, *of) for of in splits_by_benchmark(evaluation.report).items()]
    if not splits and _evaluations_while_training(evaluation):
        found.append(_training_table(evaluation))
    return found


def _benchmark_table(evaluation: Evaluation, name: str, splits: Sequence[str]) -> Table:
    metrics = [f"{name} {metric}" for metric in BENCHMARK_METRICS[name]]
    columns = _columns(evaluation, splits, metrics)
    rows: list[tuple[str, list[Cell]]] = []
    for split in splits:
        found = evaluation.report["splits"][split]
        row = [Cell(split, scope="row"), Cell(f"{found[evaluation.protocol(split)]['n_phrases']:,}", label="phrases")]
        for protocol, metric in columns:
            values = found.get(protocol, {})
            interval = (values.get("intervals") or {}).get(metric)
            style = "main first" if metric == metrics[0] else ""
            row.append(Cell(values.get(metric), style, interval, label=_label(columns, protocol, metric)))
        rows.append(("", row))
    heads = _heads(columns, metrics[0], (), {}, "")
    notes = benchmark_notes(evaluation.report, name, splits)
    return Table(f"{name}'s own numbers, percent", heads, rows, notes, counts_no_target=False)


def _evaluations_while_training(evaluation: Evaluation) -> list[Mapping[str, Any]]:
    return [entry for entry in evaluation.training if "eval_n_phrases" in entry]


def _training_split(evaluation: Evaluation) -> str:
    config = evaluation.config
    return config.training.eval_split if config is not None else "evaluation"


def _training_table(evaluation: Evaluation) -> Table:
    entries = _evaluations_while_training(evaluation)
    metrics = [m for m in dict.fromkeys((*_RIS_METRICS, *_GRES_METRICS)) if any(f"eval_{m}" in e for e in entries)]
    heads = [Cell(name, scope="col") for name in ("", "phrases", *(_NAMES.get(m, m) for m in metrics))]
    rows = [
        (
            "",
            [
                Cell(f"step {entry['step']:,}", scope="row"),
                Cell(f"{entry['eval_n_phrases']:,}", label="phrases"),
                *(Cell(entry.get(f"eval_{m}"), label=_NAMES.get(m, m)) for m in metrics),
            ],
        )
        for entry in entries
    ]
    notes = [
        f"The run's own evaluations on training.eval_split={_training_split(evaluation)}. deris-llm eval evaluates all "
        "splits, with intervals and predictions."
    ]
    return Table("While training, percent", [heads], rows, notes, counts_no_target=False)


def _table(evaluation: Evaluation, title: str, splits: Sequence[str], metrics: Sequence[str]) -> Table:
    report = evaluation.report
    is_gres = evaluation.is_generalised(splits[0])
    columns = _columns(evaluation, splits, metrics)
    sections = [
        (name, label)
        for name, label in (("control", "control"), ("step0", "step 0"))
        if any(report[name].get(split) for split in splits)
    ]
    # Of generalised splits a method has three numbers: these are rows, not columns.
    published = {} if is_gres else published_on(splits, PUBLISHED)
    rows = []
    for split in splits:
        found = report["splits"][split]
        counts = found[evaluation.protocol(split)]
        phrases = f"{counts['n_phrases']:,}"
        phrases += f" ({counts['n_no_target']:,})" if counts.get("n_no_target") is not None else ""
        row = [Cell(split, scope="row"), Cell(phrases, label="phrases (no target)" if is_gres else "phrases")]
        for name, metric in columns:
            values = found.get(name, {})
            style = "main first" if metric == metrics[0] else ""
            interval = (values.get("intervals") or {}).get(metric)
            row.append(Cell(values.get(metric), style, interval, label=_label(columns, name, metric)))
        for place, (name, label) in enumerate(sections):
            values = report[name].get(split, {}).get(evaluation.protocol(split), {})
            row.append(Cell(values.get(metrics[0]), "" if place else "first", label=label))
        for place, (method, numbers) in enumerate(published.items()):
            text = f"{numbers[split]:.2f}" if split in numbers else "–"
            row.append(Cell(text, "other" if place else "other first", label=f"{method}\N{DAGGER}"))
        rows.append(("", row))
        if is_gres:
            rows += [("below", _row_below(*below, columns, len(sections))) for below in _below(split, found)]
    other_data = "photographs" if evaluation.about.get("synthetic") else "other data"
    return Table(
        title, _heads(columns, metrics[0], sections, published, other_data), rows, table_notes(report, splits), is_gres
    )


def _columns(evaluation: Evaluation, splits: Sequence[str], metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (protocol, metric) of the columns: all metrics of the first protocol, the first two of the others."""
    found = [evaluation.report["splits"][split] for split in splits]
    columns = []
    for place, protocol in enumerate(dict.fromkeys(name for numbers in found for name in numbers)):
        there = [numbers.get(protocol, {}) for numbers in found]
        wanted = metrics[:2] if place else metrics
        columns += [(protocol, metric) for metric in wanted if any(metric in values for values in there)]
    return columns


def _label(columns: Sequence[tuple[str, str]], protocol: str, metric: str) -> str:
    """Returns the metric, with its protocol unless that is the first."""
    name = _NAMES.get(metric, metric)
    return name if protocol == columns[0][0] else f"{protocol} {name}"


def _heads(
    columns: Sequence[tuple[str, str]],
    first_metric: str,
    sections: Sequence[tuple[str, str]],
    published: Mapping[str, Any],
    other_data: str,
) -> list[list[Cell]]:
    spans: dict[str, int] = defaultdict(int)
    for protocol, _ in columns:
        spans[protocol] += 1
    over = [Cell(span=2, scope="none")]
    over += [Cell(f"protocol {name}", span=span, scope="colgroup") for name, span in spans.items()]
    if sections:
        over.append(Cell("comparison", span=len(sections), scope="colgroup"))
    if published:
        over.append(Cell(f"published, {other_data}", "other", span=len(published), scope="colgroup"))
    titles = [Cell("split", scope="none"), Cell("phrases", scope="none")]
    titles += [Cell(_NAMES.get(m, m), "first" if m == first_metric else "", scope="col") for _, m in columns]
    titles += [Cell(label, "" if place else "first", scope="col") for place, (_, label) in enumerate(sections)]
    titles += [
        Cell(f"{method}\N{DAGGER}", "other" if place else "other first", scope="col")
        for place, method in enumerate(published)
    ]
    return [over, titles]


def _below(split: str, found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[tuple[str, str], Any]]]:
    """Returns what stands below a generalised split: answers without looking, and published methods, by column."""
    rows: list[tuple[str, dict[tuple[str, str], Any]]] = []
    for name, n_acc in (("always empty", 100.0), ("never empty", 0.0)):
        values: dict[tuple[str, str], Any] = {}
        for protocol, numbers in found.items():
            for metric in ("gIoU", "cIoU"):
                values[protocol, metric] = numbers.get(f"{name.replace(' ', '_')}_{metric}")
            for metric, follows in (("N-acc", n_acc), ("T-acc", 100 - n_acc)):  # follow from the answer itself
                values[protocol, metric] = None if numbers.get(metric) is None else follows
        if any(values[protocol, "gIoU"] is not None for protocol in found):
            rows.append((name, values))
    first = next(iter(found))
    for method, published in PUBLISHED_GRES.items():
        if split in published:
            giou, ciou, n_acc = published[split]
            values = {(first, "gIoU"): giou, (first, "cIoU"): ciou, (first, "N-acc"): n_acc}
            rows.append((f"{method}, published", values))
    return rows


def _row_below(
    name: str, values: Mapping[tuple[str, str], Any], columns: Sequence[tuple[str, str]], num_more: int
) -> list[Cell]:
    row = [Cell(name, scope="row"), Cell()]
    for column in columns:
        value = values.get(column)
        style = "first" if column[1] == "gIoU" else ""
        row.append(Cell("" if value is None else value, style, label=_label(columns, *column)))
    return [*row, Cell(style="first", span=num_more)] if num_more else row


def lost_where(evaluation: Evaluation) -> list[tuple[str, list[tuple[float, str, str]]]]:
    """Returns by split the percentages of `PARTS`, each with its style and description."""
    rows = []
    for split, numbers in evaluation.report["splits"].items():
        found = numbers[evaluation.protocol(split)]
        metric = main_metric(evaluation, split)
        answer, oracle = found.get(metric), found.get(f"oracle_{metric}")
        if answer is not None and oracle is not None:
            shares = (answer, max(oracle - answer, 0.0), 100 - max(oracle, answer))
            rows.append((split, [(share, *part) for share, part in zip(shares, PARTS, strict=True)]))
    return rows


def breakdowns(evaluation: Evaluation) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Returns split, metric, protocol, and the rows by dimension, of the splits whose report has a breakdown."""
    found = []
    for split, numbers in evaluation.report["splits"].items():
        protocol = evaluation.protocol(split)
        dimensions = numbers[protocol].get("breakdown")
        if dimensions:
            found.append((split, main_metric(evaluation, split), protocol, dimensions))
    return found


def curves(evaluation: Evaluation) -> list[Chart]:
    """Returns the charts: Pr@X by dataset, the sweep of the threshold, and the training's curves."""
    by_dataset: dict[str, list[Line]] = defaultdict(list)
    for split, answers in evaluation.answers.items():
        asked = [a for a in answers if a.has_target]
        if asked:
            dataset, _, name = split.partition("/")
            by_dataset[dataset].append(Line(name or split, precision_curve(asked, evaluation.protocol(split))))
    charts = [precision_chart(dataset, lines[:NUM_SERIES]) for dataset, lines in by_dataset.items()]
    return [*charts, *_sweep_chart(evaluation), *_training_charts(evaluation)]


def precision_chart(title: str, lines: Sequence[Line]) -> Chart:
    """Lays out the share of phrases whose IoU reaches x, for every x: Pr@X as a curve."""
    return line_chart(
        f"{title}: IoU of at least x",
        lines,
        x_label="IoU x",
        y_label="percent of phrases",
        x_range=(0.0, 1.0),
        y_range=(0.0, 100.0),
    )


def precision_curve(answers: Sequence[Answer], protocol: str) -> list[tuple[float, float]]:
    """Returns (x, percent of the answers whose IoU is at least x) for x from 0 to 1."""
    levels = [step / _CURVE_STEPS for step in range(_CURVE_STEPS + 1)]
    iou = [answer.iou[protocol] for answer in answers]
    return [(x, 100 * sum(value >= 100 * x for value in iou) / len(iou)) for x in levels]


def _training_charts(evaluation: Evaluation) -> list[Chart]:
    """Lays out loss, its parts in the last round, rates, and evaluations during training."""
    training = evaluation.training
    keys = list(dict.fromkeys(key for entry in training for key in entry))
    rounds = [int(key.rpartition("round")[2]) for key in keys if key.startswith("loss/") and "/round" in key]
    last = f"/round{max(rounds)}" if rounds else "/round"
    parts = [key for key in keys if key.startswith("loss/") and (key.endswith(last) or key == "loss/presence")]
    rates = [key for key in keys if key.startswith("learning_rate")]
    scores = [key for key in _EVALUATED_WHILE_TRAINING if key in keys]
    wanted = (
        ("Training loss", {"loss": "loss"}, "loss", None),
        (
            "Its parts in the last round, unweighted",
            {key: key.removeprefix("loss/").removesuffix(last).replace("_", " ") for key in parts},
            "loss",
            None,
        ),
        ("Learning rate", {key: key.rpartition("/")[2].replace("_", " ") for key in rates}, "rate", None),
        ("Evaluation during training", {key: key.removeprefix("eval_") for key in scores}, "percent", (0.0, 100.0)),
    )
    charts = []
    for title, series, unit, y_range in wanted:
        lines = [Line(label, logged(training, key)) for key, label in list(series.items())[:NUM_SERIES]]
        lines = [line for line in lines if len(line.points) > 1]
        if lines:
            charts.append(line_chart(title, lines, x_label="step", y_label=unit, y_range=y_range))
    return charts


def _sweep_chart(evaluation: Evaluation) -> list[Chart]:
    """Lays out the metrics against the threshold, as `calibration.json` has them."""
    found = evaluation.calibration
    if found is None or not found.curve:
        return []
    lines = []
    for name in [name for name in found.curve[0] if name != "threshold"][:NUM_SERIES]:
        points = [(row["threshold"], row.get(name)) for row in found.curve]
        lines.append(Line(name, [(x, y) for x, y in points if x is not None and y is not None]))
    chart = line_chart(
        f"Score threshold, swept on {found.split}",
        [line for line in lines if line.points],
        x_label="score threshold",
        y_label="percent",
        x_range=(0.0, 1.0),
        y_range=(0.0, 100.0),
        marker=Marker(found.threshold, f"chosen: {found.threshold:g}"),
    )
    return [chart]


def provenance(evaluation: Evaluation) -> dict[str, Any]:
    """Returns what made the numbers, by name: checkpoint, data, seed, threshold, versions, times."""
    report, about = evaluation.report, evaluation.about
    libraries = {name: said for name, said in report["versions"].items() if isinstance(said, str)}
    facts = {
        "config": about.get("name"),
        "checkpoint": str(evaluation.checkpoint) if evaluation.checkpoint else None,
        "predictions": about.get("predictions"),
        "data": about.get("data_root"),
        "evaluated": about.get("date"),
        "seed": about.get("seed"),
        "score threshold": about.get("threshold_source") or (evaluation.calibration and str(evaluation.calibration)),
        "images per split": about.get("max_images") or None,
        "versions": ", ".join(f"{name} {said}" for name, said in libraries.items()) or None,
        "seconds": ", ".join(f"{stage} {seconds:g}" for stage, seconds in report["timing"].items()) or None,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}
