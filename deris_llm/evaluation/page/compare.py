"""Two evaluations of the same phrases side by side: who is better by how much, and where they differ most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deris_llm.common.html import shortened
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.intervals import Ratio, differences, sign_flip_p_value
from deris_llm.evaluation.overlays import pick
from deris_llm.evaluation.page.cases import Figure, answer_picture, badge, scores, truth_figure
from deris_llm.evaluation.page.charts import Chart, Line
from deris_llm.evaluation.page.numbers import main_metric, precision_chart, precision_curve
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
        ValueError: there is none, or they are not about the same images.
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
                f"with another image or another truth, e.g. {strange[0]}: evaluate both on the same data"
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
    """Where ours is better and where the other is, the largest differences first, other images before the same again."""
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


@dataclass(frozen=True)
class Change:
    """How a split's main number differs."""

    split: str
    num_phrases: int
    metric: str
    theirs: float | None
    ours: float | None
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    counts: tuple[int, int, int]  # phrases that are better, equal, worse

    @property
    def style(self) -> str:
        """Colours a difference whose interval excludes zero."""
        low, high = self.interval or (0.0, 0.0)
        return "better" if low > 0 else "worse" if high < 0 else ""


@dataclass(frozen=True)
class Apart:
    """A phrase that the two answer differently."""

    phrase: str
    about: str
    figures: list[Figure]  # ours, the ground truth, theirs


def changes(evaluation: Evaluation, pairs: Mapping[str, Sequence[Pair]]) -> list[Change]:
    """Compares the main number of every split: difference, interval by bootstrap over images or videos, paired test."""
    rows = []
    for split, found in pairs.items():
        protocol, metric = evaluation.protocol(split), main_metric(evaluation, split)
        videos = {frame: each.video for each in evaluation.videos.get(split, ()) for frame in each.frames}
        images = [videos.get(pair.ours.phrase_id, pair.ours.image_id) for pair in found]
        first = np.array([pair.other.iou[protocol] / 100 for pair in found])
        second = np.array([pair.ours.iou[protocol] / 100 for pair in found])
        ones = np.ones(len(found))
        change = differences({metric: Ratio(first, ones)}, {metric: Ratio(second, ones)}, images)[metric]
        rows.append(
            Change(
                split,
                len(found),
                metric,
                change.first,
                change.second,
                change.difference or 0.0,
                change.interval,
                sign_flip_p_value(first, second, images),
                (sum(p.gain > 0 for p in found), sum(p.gain == 0 for p in found), sum(p.gain < 0 for p in found)),
            )
        )
    return rows


def warnings(
    evaluation: Evaluation, other: Evaluation, pairs: Mapping[str, Sequence[Pair]]
) -> Iterator[tuple[str, str]]:
    """Gives what makes a comparison less than fair, with the class of the page's style."""
    for split, found in pairs.items():
        protocol = evaluation.protocol(split)
        prints = [e.report["splits"][split].get(protocol, {}).get("fingerprint") for e in (evaluation, other)]
        if None not in prints and prints[0] != prints[1]:
            yield (
                "warning",
                f"{split}: protocol {protocol} was {prints[0]} here and {prints[1]} there, which explains part of the difference.",
            )
        only = [len(e.answers[split]) - len(found) for e in (evaluation, other)]
        if any(only):
            yield "note", f"{split}: {only[0]:,} phrases were answered only here, {only[1]:,} only there."
        reworded = sum(pair.ours.phrase != pair.other.phrase for pair in found)
        if reworded:
            yield "note", f"{split}: {reworded:,} phrases were asked in other words."


def precision_charts(evaluation: Evaluation, pairs: Mapping[str, Sequence[Pair]], names: Sequence[str]) -> list[Chart]:
    """Lays out Pr@X of both, by split."""
    charts = []
    for split, found in pairs.items():
        asked = [pair for pair in found if pair.ours.has_target]
        if asked:
            sides = ([pair.ours for pair in asked], [pair.other for pair in asked])
            curves = [precision_curve(answers, evaluation.protocol(split)) for answers in sides]
            lines = [Line(shortened(name, 40), curve) for name, curve in zip(names, curves, strict=True)]
            charts.append(precision_chart(split, lines))
    return charts


def apart(
    evaluation: Evaluation,
    pairs: Mapping[str, Sequence[Pair]],
    names: Sequence[str],
    records: Mapping[str, ReferringRecord],
) -> Iterator[tuple[str, list[Apart]]]:
    """Draws the phrases on which the two differ most, by split and by who is better; gives title and phrases."""
    for split, sides in _shown(pairs).items():
        for name, chosen in zip(names, sides, strict=True):
            if chosen:
                found = [
                    _apart(pair, records[pair.ours.phrase_id], evaluation.protocol(split), names) for pair in chosen
                ]
                yield f"{split}: {name} is better", found


def _apart(pair: Pair, record: ReferringRecord, protocol: str, names: Sequence[str]) -> Apart:
    ours, theirs = (
        Figure(
            answer_picture(answer, record),
            shortened(name, 40),
            small=" · ".join(scores(answer)),
            badge=badge(answer, protocol),
        )
        for answer, name in zip((pair.ours, pair.other), names, strict=True)
    )
    about = f"{pair.ours.phrase_id} · {abs(pair.gain):.1f} points apart"
    return Apart(pair.ours.phrase, about, [ours, truth_figure(record), theirs])


def shown_ids(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[str]]:
    """Split -> ids of the phrases whose images `apart` shows."""
    return {
        split: [pair.ours.phrase_id for pair in (*better, *worse)] for split, (better, worse) in _shown(pairs).items()
    }


def _shown(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, tuple[list[Pair], list[Pair]]]:
    num_each = max(1, min(4, NUM_PAIRS // (2 * len(pairs))))
    return {split: choose_pairs(found, num_each) for split, found in list(pairs.items())[: NUM_PAIRS // 2]}


def _splits(evaluation: Evaluation) -> str:
    return ", ".join(evaluation.answers) or "no predictions"
