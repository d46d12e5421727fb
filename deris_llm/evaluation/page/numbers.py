"""The page's numbers: what was evaluated and how, tables beside published ones, breakdowns, curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.page.charts import NUM_SERIES, Line, Marker, line_chart, share_bar, value_bar
from deris_llm.evaluation.page.html import Node, element, shortened
from deris_llm.evaluation.page.stored import Evaluation, logged
from deris_llm.evaluation.report import (
    GRES_NOTE,
    NOTE,
    PUBLISHED,
    PUBLISHED_GRES,
    PUBLISHED_GRES_NOTE,
    PUBLISHED_NOTE,
    published_on,
)

_RIS_METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9", "oracle_mIoU")
_GRES_METRICS = ("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "F1", "oracle_gIoU")
_NAMES = {"oracle_mIoU": "best query", "oracle_gIoU": "best query"}
_PARTS = (
    ("part-answer", "right: the answer's IoU"),
    ("part-choice", "lost by the choice: another query had the mask"),
    ("part-mask", "lost by the masks: no query had it"),
)
_CURVE_STEPS = 50


def main_metric(evaluation: Evaluation, split: str) -> str:
    """The metric that stands for a split."""
    return "gIoU" if evaluation.is_generalised(split) else "mIoU"


def number(value: float | None, digits: int = 2) -> Element:
    """A number as the report has it, shown with some digits; a dash where there is none."""
    return element("span", "–") if value is None else element("data", f"{value:.{digits}f}", value=repr(value))


def with_code(text: str) -> list[Node]:
    """A text with `code` between backticks."""
    return [element("code", part) if place % 2 else part for place, part in enumerate(text.split("`"))]


def header(evaluation: Evaluation) -> Element:
    """Name, where it comes from, and one number a split."""
    about = evaluation.about
    facts = [
        element("code", str(source)) if (source := evaluation.checkpoint or about.get("predictions")) else None,
        f"evaluated {about['date']}" if about.get("date") else None,
        f"seed {about['seed']}" if "seed" in about else None,
    ]
    shown: list[Node] = []
    for fact in facts:
        shown += [" · " if shown and fact is not None else None, fact]
    tiles = []
    for split, numbers in evaluation.report["splits"].items():
        found = numbers[evaluation.protocol(split)]
        metric = main_metric(evaluation, split)
        interval = (found.get("intervals") or {}).get(metric)
        sure = "" if interval is None else f" · {interval[0]:.1f}–{interval[1]:.1f}"
        tiles.append(
            element(
                "div",
                element("div", split, class_="what"),
                element("div", number(found.get(metric), 1), element("small", metric + sure), class_="value"),
                element("div", f"{found['n_phrases']:,} phrases", class_="soft"),
                class_="tile",
            )
        )
    notice = about.get("leakage") or evaluation.report.get("leakage")
    return element(
        "header",
        element(
            "div",
            element("p", "Referring image segmentation · evaluation", class_="eyebrow"),
            element("h1", evaluation.name),
            element("p", shown, class_="soft") if shown else None,
            element("div", tiles, class_="tiles") if tiles else element("p", "This run was not evaluated yet."),
            element("p", str(notice), class_="warning", role="note") if notice else None,
        ),
    )


def tables(evaluation: Evaluation) -> list[Node]:
    """One table for the RIS splits, one for the GRES splits, with published numbers at the side."""
    splits = list(evaluation.report["splits"])
    ris = [split for split in splits if not evaluation.is_generalised(split)]
    gres = [split for split in splits if evaluation.is_generalised(split)]
    found: list[Node] = []
    if ris:
        found += [
            element("h3", "One target a phrase, percent"),
            _table(evaluation, ris, _RIS_METRICS),
            element("p", f"{NOTE} {PUBLISHED_NOTE}" if published_on(ris, PUBLISHED) else NOTE, class_="note"),
        ]
    if gres:
        found += [
            element("h3", "None, one or several targets a phrase, percent"),
            _table(evaluation, gres, _GRES_METRICS),
            element(
                "p",
                f"{GRES_NOTE} {PUBLISHED_GRES_NOTE}" if published_on(gres, PUBLISHED_GRES) else GRES_NOTE,
                class_="note",
            ),
        ]
    if any(_of_protocols(evaluation, split, "intervals") for split in splits):
        about = "Small figures under a number: its 95 % interval by bootstrap over the pictures."
        found.append(element("p", about, class_="note"))
    notes = evaluation.report.get("notes", {})
    found += [element("p", f"{split}: {'; '.join(said)}.", class_="note") for split, said in notes.items()]
    return found


def _table(evaluation: Evaluation, splits: Sequence[str], metrics: Sequence[str]) -> Element:
    report = evaluation.report
    is_gres = evaluation.is_generalised(splits[0])
    names = list(dict.fromkeys(name for split in splits for name in report["splits"][split]))
    columns: list[tuple[str, str]] = []
    for place, name in enumerate(names):
        wanted = metrics if not place else metrics[:2]
        there = [report["splits"][split].get(name, {}) for split in splits]
        columns += [(name, metric) for metric in wanted if any(metric in values for values in there)]
    sections = [
        (name, label)
        for name, label in (("control", "control"), ("step0", "step 0"))
        if any(report[name].get(split) for split in splits)
    ]
    published = (
        {} if is_gres else published_on(splits, PUBLISHED)
    )  # of generalised splits three numbers a method: rows, not columns
    spans = [(name, sum(column == name for column, _ in columns)) for name in names]
    over = [element("th", colspan=2)]
    over += [element("th", f"protocol {name}", colspan=span, scope="colgroup") for name, span in spans if span]
    if sections:
        over.append(element("th", "comparison", colspan=len(sections), scope="colgroup"))
    if published:
        over.append(element("th", "published, other data", colspan=len(published), scope="colgroup", class_="other"))
    titles = [element("th", "split"), element("th", "phrases", [element("br"), "(no target)"] if is_gres else None)]
    titles += [
        element("th", _NAMES.get(metric, metric), scope="col", class_="first" if metric == metrics[0] else None)
        for _, metric in columns
    ]
    for place, (_, label) in enumerate(sections):
        titles.append(element("th", label, scope="col", class_=None if place else "first"))
    for place, method in enumerate(published):
        titles.append(element("th", f"{method}\N{DAGGER}", scope="col", class_="other" if place else "other first"))
    rows = []
    for split in splits:
        found = report["splits"][split]
        counts = found[evaluation.protocol(split)]
        phrases = f"{counts['n_phrases']:,}"
        phrases += f" ({counts['n_no_target']:,})" if counts.get("n_no_target") is not None else ""
        row = [element("th", split, scope="row"), element("td", phrases)]
        row += [_cell(found.get(name, {}), metric, is_first=metric == metrics[0]) for name, metric in columns]
        for place, (name, _) in enumerate(sections):
            values = report[name].get(split, {}).get(evaluation.protocol(split), {})
            row.append(element("td", number(values.get(metrics[0])), class_=None if place else "first"))
        for place, numbers in enumerate(published.values()):
            text = f"{numbers[split]:.2f}" if split in numbers else "–"
            row.append(element("td", text, class_="other" if place else "other first"))
        rows.append(element("tr", row))
        if is_gres:
            rows += [_row_below(name, values, columns, len(sections)) for name, values in _below(split, found)]
    head = element("thead", element("tr", over), element("tr", titles))
    return element("div", element("table", head, element("tbody", rows)), class_="scroll")


def _below(split: str, found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[tuple[str, str], Any]]]:
    """What stands below a generalised split: answers without looking, and published methods, by protocol and metric."""
    rows: list[tuple[str, dict[tuple[str, str], Any]]] = []
    for name, n_acc in (("always empty", 100.0), ("never empty", 0.0)):
        values: dict[tuple[str, str], Any] = {}
        for protocol, numbers in found.items():
            for metric in ("gIoU", "cIoU"):
                values[protocol, metric] = numbers.get(f"{name.replace(' ', '_')}_{metric}")
            for metric, follows in (("N-acc", n_acc), ("T-acc", 100 - n_acc)):  # from what such an answer is
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
) -> Element:
    cells = [
        element(
            "td",
            number(values[column]) if values.get(column) is not None else "",
            class_="first" if column[1] == "gIoU" else None,
        )
        for column in columns
    ]
    rest = element("td", colspan=num_more, class_="first") if num_more else None
    return element("tr", element("th", name, scope="row"), element("td"), cells, rest, class_="below")


def _cell(values: Mapping[str, Any], metric: str, *, is_first: bool) -> Element:
    interval = (values.get("intervals") or {}).get(metric)
    small = None if interval is None else element("small", f"{interval[0]:.1f}–{interval[1]:.1f}")
    return element("td", number(values.get(metric)), small, class_="main first" if is_first else None)


def lost_where(evaluation: Evaluation) -> list[Node]:
    """Whether the choice or the masks cost more: the paper's question, perception or cognition."""
    rows = []
    for split, numbers in evaluation.report["splits"].items():
        found = numbers[evaluation.protocol(split)]
        metric = main_metric(evaluation, split)
        answer, oracle = found.get(metric), found.get(f"oracle_{metric}")
        if answer is None or oracle is None:
            continue
        shares = (answer, max(oracle - answer, 0.0), 100 - max(oracle, answer))
        bar = share_bar([(share, style, about) for share, (style, about) in zip(shares, _PARTS, strict=True)])
        cells = [element("td", number(round(share, 4), 1)) for share in shares]
        rows.append(element("tr", element("th", split, scope="row"), element("td", bar, class_="bar"), cells))
    if not rows:
        return []
    key = [element("li", element("span", class_=f"swatch {style}"), about) for style, about in _PARTS]
    heads = [element("th", text, scope="col") for text in ("split", "", "right", "choice", "masks")]
    return [
        element("h3", "Where the rest is lost"),
        element("p", "If every phrase were answered by the query that fits best, only the masks' own error would be left. "
                     "100 percent = all of the mean IoU."),
        element("ul", key, class_="legend"),
        element("div", element("table", element("thead", element("tr", heads)), element("tbody", rows), class_="wide"),
                class_="scroll"),
    ]  # fmt: skip


def breakdowns(evaluation: Evaluation) -> list[Node]:
    """Numbers by kind of phrase and object, where the report has them."""
    found: list[Node] = []
    for split, numbers in evaluation.report["splits"].items():
        dimensions = numbers[evaluation.protocol(split)].get("breakdown")
        if dimensions:
            metric = main_metric(evaluation, split)
            made = [_breakdown(name, rows, metric) for name, rows in dimensions.items() if rows]
            title = element(
                "summary", f"{split} ", element("small", f"{metric}, protocol {evaluation.protocol(split)}")
            )
            found.append(
                element("details", title, element("div", made, class_="breakdowns"), open=None if found else "open")
            )
    if not found:
        return []
    about = "Bars: the answers' IoU; line: its 95 % interval; narrow mark: what the best query would get."
    return [element("h3", "By kind of phrase and object"), element("p", about, class_="note"), *found]


def _breakdown(name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> Element:
    body = []
    for row in rows:
        value, interval = row.get(metric), row.get("interval")
        bar = None
        if value is not None:
            ends = (float(interval[0]), float(interval[1])) if interval else None
            bar = value_bar(value, interval=ends, oracle=row.get("oracle"))
        body.append(
            element(
                "tr",
                element("td", shortened(str(row["label"]), 60)),
                element("td", f"{row['n_phrases']:,}", class_="soft"),
                element("td", bar, class_="bar"),
                element("td", number(value, 1)),
            )
        )
    return element("table", element("caption", name.replace("_", " ")), element("tbody", body), class_="breakdown")


def precision_charts(evaluation: Evaluation) -> list[Node]:
    """Share of phrases whose IoU reaches x, for every x: Pr@X as a curve, a chart per dataset."""
    by_dataset: dict[str, list[Line]] = defaultdict(list)
    for split, answers in evaluation.answers.items():
        asked = [a for a in answers if a.has_target]
        if asked:
            by_dataset[split.partition("/")[0]].append(
                Line(split.partition("/")[2] or split, precision_curve(asked, evaluation.protocol(split)))
            )
    return [
        line_chart(
            f"{dataset}: IoU of at least x",
            lines[:NUM_SERIES],
            x_label="IoU x",
            y_label="percent of phrases",
            x_range=(0.0, 1.0),
            y_range=(0.0, 100.0),
        )
        for dataset, lines in by_dataset.items()
    ]


def precision_curve(answers: Sequence[Answer], protocol: str) -> list[tuple[float, float]]:
    """(x, percent of the answers whose IoU is at least x) for x from 0 to 1."""
    levels = [step / _CURVE_STEPS for step in range(_CURVE_STEPS + 1)]
    iou = [answer.iou[protocol] for answer in answers]
    return [(x, 100 * sum(value >= 100 * x for value in iou) / len(iou)) for x in levels]


def training_charts(evaluation: Evaluation) -> list[Node]:
    """Loss, its parts in the last round, rates, and evaluations during training."""
    training = evaluation.training
    keys = list(dict.fromkeys(key for entry in training for key in entry))
    rounds = [int(key.rpartition("round")[2]) for key in keys if key.startswith("loss/") and "/round" in key]
    last = f"/round{max(rounds)}" if rounds else "/round"
    parts = [key for key in keys if key.startswith("loss/") and (key.endswith(last) or key == "loss/presence")]
    rates = [key for key in keys if key.startswith("learning_rate")]
    scores = [
        key for key in ("eval_mIoU", "eval_oIoU", "eval_gIoU", "eval_cIoU", "eval_N-acc", "eval_T-acc") if key in keys
    ]
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
    charts: list[Node] = []
    for title, series, unit, y_range in wanted:
        lines = [Line(label, logged(training, key)) for key, label in list(series.items())[:NUM_SERIES]]
        lines = [line for line in lines if len(line.points) > 1]
        if lines:
            charts.append(line_chart(title, lines, x_label="step", y_label=unit, y_range=y_range))
    return charts


def sweep_chart(evaluation: Evaluation) -> Element | None:
    """The metric against the threshold, as `calibration.json` has it."""
    found = evaluation.calibration
    if found is None or not found.curve:
        return None
    names = [name for name in found.curve[0] if name != "threshold"][:NUM_SERIES]
    lines = [
        Line(
            name,
            [(x, y) for row in found.curve if (x := row["threshold"]) is not None and (y := row.get(name)) is not None],
        )
        for name in names
    ]
    return line_chart(
        f"Score threshold, swept on {found.split}",
        [line for line in lines if line.points],
        x_label="score threshold",
        y_label="percent",
        x_range=(0.0, 1.0),
        y_range=(0.0, 100.0),
        marker=Marker(found.threshold, f"chosen: {found.threshold:g}"),
    )


def provenance(evaluation: Evaluation) -> list[Node]:
    """Protocols in full, where the threshold comes from, versions, times."""
    report, about = evaluation.report, evaluation.about
    protocols = report["versions"].get("protocols", {})
    libraries = {name: said for name, said in report["versions"].items() if isinstance(said, str)}
    facts = {
        "config": about.get("name"),
        "checkpoint": str(evaluation.checkpoint) if evaluation.checkpoint else None,
        "predictions": about.get("predictions"),
        "data": about.get("data_root"),
        "evaluated": about.get("date"),
        "seed": about.get("seed"),
        "score threshold": about.get("threshold_source") or (evaluation.calibration and str(evaluation.calibration)),
        "pictures of a split": about.get("max_images") or None,
        "versions": ", ".join(f"{name} {said}" for name, said in libraries.items()) or None,
        "seconds": ", ".join(f"{stage} {seconds:g}" for stage, seconds in report["timing"].items()) or None,
    }
    rows = [
        (element("dt", name), element("dd", str(value))) for name, value in facts.items() if value not in (None, "")
    ]
    return [
        element("dl", [node for row in rows for node in row]),
        *(element("p", with_code(said), class_="note") for said in protocols.values()),
    ]


def _of_protocols(evaluation: Evaluation, split: str, key: str) -> bool:
    return any(key in values for values in evaluation.report["splits"][split].values())
