"""Two evaluations of the same phrases side by side: who is better by how much, and where they differ most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.intervals import Ratio, differences, sign_flip_p_value
from deris_llm.evaluation.overlays import pick
from deris_llm.evaluation.page.cases import answer_picture, badge, mask_picture
from deris_llm.evaluation.page.charts import Line, line_chart
from deris_llm.evaluation.page.html import Node, element, phrase, shortened
from deris_llm.evaluation.page.numbers import main_metric, number, precision_curve, with_code
from deris_llm.evaluation.page.stored import Evaluation
from deris_llm.structures import ReferringRecord

NUM_PAIRS = 24
"""Phrases that are shown, over all splits: they bound the page's size."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one phrase."""

    ours: Answer
    other: Answer
    gain: float  # points of IoU that ours is better

    @property
    def image_id(self) -> str:
        return self.ours.image_id


def pairs_of(evaluation: Evaluation, other: Evaluation) -> dict[str, list[Pair]]:
    """The phrases that both have answered, by split.

    Raises:
        ValueError: there is none, or they are not about the same pictures.
    """
    found: dict[str, list[Pair]] = {}
    for split, answers in evaluation.answers.items():
        protocol = evaluation.protocol(split)
        others = {a.phrase_id: a for a in other.answers.get(split, ()) if protocol in a.iou}
        pairs = [
            Pair(a, others[a.phrase_id], a.iou[protocol] - others[a.phrase_id].iou[protocol])
            for a in answers
            if a.phrase_id in others
        ]
        strange = [
            p.ours.phrase_id for p in pairs if (p.ours.image, p.ours.has_target) != (p.other.image, p.other.has_target)
        ]
        if strange:
            raise ValueError(
                f"report --against {other.folder}: expected predictions over the same data, got {len(strange)} phrases of {split} "
                f"with another picture or another truth, e.g. {strange[0]}: evaluate both on the same data"
            )
        if pairs:
            found[split] = pairs
    if not found:
        raise ValueError(
            f"report --against {other.folder}: expected predictions of phrases that {evaluation.folder} answered too, got "
            f"{_splits(other)}, beside {_splits(evaluation)}: evaluate both on the same splits under the same protocol"
        )
    return found


def choose_pairs(pairs: Sequence[Pair], num_each: int) -> tuple[list[Pair], list[Pair]]:
    """Where ours is better and where the other is, the largest differences first, other pictures before the same again."""
    seen: Counter[str] = Counter()
    by_gain = sorted((pair for pair in pairs if pair.gain), key=lambda pair: -pair.gain)
    better, worse = [p for p in by_gain if p.gain > 0], [p for p in reversed(by_gain) if p.gain < 0]
    return pick(better[: 4 * num_each], num_each, seen), pick(worse[: 4 * num_each], num_each, seen)


def names(evaluation: Evaluation, other: Evaluation) -> tuple[str, str]:
    """What the two are called: their names, or, where these are equal, checkpoints or folders."""
    candidates = (
        (evaluation.name, other.name),
        ("/".join((evaluation.checkpoint or evaluation.folder).parts[-2:]), "/".join((other.checkpoint or other.folder).parts[-2:])),
        (str(evaluation.folder), str(other.folder)),
    )  # fmt: skip
    return next((pair for pair in candidates if pair[0] != pair[1]), candidates[-1])


def comparison(
    evaluation: Evaluation,
    other: Evaluation,
    pairs: Mapping[str, Sequence[Pair]],
    records: Mapping[str, ReferringRecord],
) -> list[Node]:
    """The section: table, curves, and for every split the phrases where the two differ most."""
    ours, theirs = names(evaluation, other)
    nodes: list[Node] = [element("p", "This evaluation, ", element("b", ours), ", against ", element("b", theirs), ".")]
    nodes += [_table(evaluation, pairs, ours, theirs), *_warnings(evaluation, other, pairs)]
    charts = [
        line_chart(
            f"{split}: IoU of at least x",
            [
                Line(label, precision_curve([answer(p) for p in found if p.ours.has_target], evaluation.protocol(split)))
                for label, answer in ((shortened(ours, 40), _ours), (shortened(theirs, 40), _other))
            ],
            x_label="IoU x", y_label="percent of phrases", x_range=(0.0, 1.0), y_range=(0.0, 100.0),
        )
        for split, found in pairs.items()
        if any(p.ours.has_target for p in found)
    ]  # fmt: skip
    nodes.append(element("div", charts, class_="charts"))
    if not records:
        said = "No pictures: nobody says where the data is, `deris-llm report --data ROOT` does."
        nodes.append(element("p", with_code(said), class_="note"))
        return nodes
    for split, (better, worse) in _shown(pairs).items():
        protocol = evaluation.protocol(split)
        for title, chosen in ((f"{ours} is better", better), (f"{theirs} is better", worse)):
            if chosen:
                figures = [_figure(pair, records[pair.ours.phrase_id], protocol, (ours, theirs)) for pair in chosen]
                nodes += [element("h3", split, ": ", title), element("div", figures, class_="pairs")]
    return nodes


def shown_ids(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[str]]:
    """Split -> ids of the phrases whose pictures `comparison` shows."""
    return {
        split: [pair.ours.phrase_id for pair in (*better, *worse)] for split, (better, worse) in _shown(pairs).items()
    }


def _shown(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, tuple[list[Pair], list[Pair]]]:
    num_each = max(1, min(4, NUM_PAIRS // (2 * len(pairs))))
    return {split: choose_pairs(found, num_each) for split, found in list(pairs.items())[: NUM_PAIRS // 2]}


def _table(evaluation: Evaluation, pairs: Mapping[str, Sequence[Pair]], ours: str, theirs: str) -> Element:
    heads = ("split", "phrases", "metric", theirs, ours, "difference", "95 %", "p", "better", "equal", "worse")
    rows = []
    for split, found in pairs.items():
        protocol, metric = evaluation.protocol(split), main_metric(evaluation, split)
        images = [pair.ours.image_id for pair in found]
        first, second = (
            np.array([a.iou[protocol] / 100 for a in answers]) for answers in (map(_other, found), map(_ours, found))
        )
        ones = np.ones(len(found))
        change = differences({metric: Ratio(first, ones)}, {metric: Ratio(second, ones)}, images)[metric]
        p_value = sign_flip_p_value(first, second, images)
        low, high = change.interval or (0.0, 0.0)
        sign = "better" if low > 0 else "worse" if high < 0 else None  # coloured where it is no matter of chance
        counts = (sum(p.gain > 0 for p in found), sum(p.gain == 0 for p in found), sum(p.gain < 0 for p in found))
        interval = "–" if change.interval is None else f"{change.interval[0]:+.1f} to {change.interval[1]:+.1f}"
        rows.append(
            element(
                "tr",
                element("th", split, scope="row"),
                element("td", f"{len(found):,}"),
                element("td", metric),
                element("td", number(change.first)),
                element("td", number(change.second)),
                element("td", element("span", f"{change.difference or 0:+.2f}", class_=sign)),
                element("td", interval),
                element("td", "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"),
                [element("td", f"{count:,}") for count in counts],
            )
        )
    head = element("tr", [element("th", shortened(text, 40), scope="col") for text in heads])
    note = (
        "On the phrases that both answered. Interval: bootstrap over the pictures; p: paired, signs of whole pictures "
        "flipped. Better, equal, worse: phrases by their IoU."
    )
    table = element("div", element("table", element("thead", head), element("tbody", rows)), class_="scroll")
    return element("div", table, element("p", note, class_="note"))


def _warnings(evaluation: Evaluation, other: Evaluation, pairs: Mapping[str, Sequence[Pair]]) -> Iterable[Element]:
    for split, found in pairs.items():
        protocol = evaluation.protocol(split)
        prints = [e.report["splits"][split].get(protocol, {}).get("fingerprint") for e in (evaluation, other)]
        if None not in prints and prints[0] != prints[1]:
            said = f"{split}: protocol {protocol} was {prints[0]} here and {prints[1]} there: part of the difference is its."
            yield element("p", said, class_="warning", role="note")
        only = [len(e.answers[split]) - len(found) for e in (evaluation, other)]
        if any(only):
            yield element(
                "p", f"{split}: {only[0]:,} phrases were answered only here, {only[1]:,} only there.", class_="note"
            )
        reworded = sum(pair.ours.phrase != pair.other.phrase for pair in found)
        if reworded:
            yield element("p", f"{split}: {reworded:,} phrases were asked in other words.", class_="note")


def _figure(pair: Pair, record: ReferringRecord, protocol: str, labels: tuple[str, str]) -> Element:
    middle = element(
        "figure",
        mask_picture(record, None, f"ground truth of “{record.phrase}”", with_truth=True),
        element("figcaption", "ground truth" if record.instances else "no target"),
        class_="case",
    )
    sides = [
        element(
            "figure",
            answer_picture(answer, record),
            element("figcaption", badge(answer, protocol), shortened(label, 40), element("small", _sure(answer))),
            class_="case",
        )
        for answer, label in zip((pair.ours, pair.other), labels, strict=True)
    ]
    return element(
        "article",
        element("h3", phrase(pair.ours.phrase)),
        element("p", f"{pair.ours.phrase_id} · {abs(pair.gain):.1f} points apart", class_="soft"),
        element("div", sides[0], middle, sides[1], class_="three"),
        class_="pair",
    )


def _sure(answer: Answer) -> str:
    said = [f"best score {answer.top_scores[0]:.2f}"] if answer.top_scores else []
    return " · ".join(said + ([f"presence {answer.presence:.2f}"] if answer.presence is not None else []))


def _ours(pair: Pair) -> Answer:
    return pair.ours


def _other(pair: Pair) -> Answer:
    return pair.other


def _splits(evaluation: Evaluation) -> str:
    return ", ".join(evaluation.answers) or "no predictions"
