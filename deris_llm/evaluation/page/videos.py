"""The page's part on videos: J&F over the frames, and expressions as strips of frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.page.cases import Figure, answer_picture
from deris_llm.evaluation.page.charts import Chart, Line, line_chart
from deris_llm.evaluation.page.numbers import Cell, Table
from deris_llm.evaluation.page.stored import Evaluation
from deris_llm.evaluation.report import VIDEO_COLUMNS, VIDEO_NOTE
from deris_llm.evaluation.video.frames import Expression
from deris_llm.evaluation.video.protocols import Score
from deris_llm.structures import ReferringRecord

_NUM_FRAMES = 5  # of a strip
_NUM_EACH = 2  # of the worst, the middle and the best
_NUM_PARTS = 20  # of a video, for the curve over videos of different length


@dataclass(frozen=True)
class Strip:
    """One expression: frames with the answer and the truth, and its J&F over all frames."""

    title: str
    phrase: str
    facts: str
    figures: list[Figure]
    chart: Chart


def video_table(evaluation: Evaluation) -> Table | None:
    """Returns J, F and what they are read with, a row per split; None without videos."""
    found = {split: next(iter(numbers.values())) for split, numbers in evaluation.report.get("videos", {}).items()}
    if not found:
        return None
    columns = {
        metric: heading.replace("\n", " ")
        for metric, heading in VIDEO_COLUMNS.items()
        if any(numbers.get(metric) is not None for numbers in found.values())
    }
    heads = [Cell(name, scope="col") for name in ("split", "videos", "expressions", *columns.values())]
    rows = []
    for split, numbers in found.items():
        counts = [Cell(f"{numbers[f'n_{what}']:,}", label=what) for what in ("videos", "expressions")]
        intervals = numbers.get("intervals") or {}
        cells = [
            Cell(numbers.get(m), "main" if m == "J&F" else "", intervals.get(m), label=name)
            for m, name in columns.items()
        ]
        rows.append(("", [Cell(split, scope="row"), *counts, *cells]))
    return Table("Videos, percent", [heads], rows, [VIDEO_NOTE], counts_no_target=False)


def curves(evaluation: Evaluation) -> list[Chart]:
    """Returns for each split the mean J&F by place in the video; videos of different length are cut into as many parts."""
    return [
        line_chart(
            split,
            [
                Line("answer", _by_part(expressions, lambda each: each.scores)),
                Line("best query", _by_part(expressions, lambda each: each.best_query)),
            ],
            x_label="place in the video, percent",
            y_label="J&F",
            x_range=(0, 100),
            y_range=(0, 100),
        )
        for split, expressions in evaluation.videos.items()
        if expressions
    ]


def chosen(evaluation: Evaluation) -> dict[str, list[tuple[str, Expression]]]:
    """Returns the worst, middle and best expressions of each split, each with its kind; short splits have each once."""
    found: dict[str, list[tuple[str, Expression]]] = {}
    for split, expressions in evaluation.videos.items():
        ranking = sorted(expressions, key=lambda each: each.score.jf)
        middle = len(ranking) // 2
        places = [
            *(("worst", i) for i in range(_NUM_EACH)),
            *(("middle", middle + i) for i in range(_NUM_EACH)),
            *(("best", len(ranking) - 1 - i) for i in range(_NUM_EACH)),
        ]
        by_place = {i: kind for kind, i in reversed(places) if 0 <= i < len(ranking)}
        found[split] = [(by_place[i], ranking[i]) for i in sorted(by_place)]
    return found


def shown_frames(expression: Expression) -> list[int]:
    """Returns the numbers of evenly spaced frames, first and last among them."""
    last = len(expression.frames) - 1
    return sorted({round(i * last / (_NUM_FRAMES - 1)) for i in range(_NUM_FRAMES)})


def strip(kind: str, expression: Expression, answers: dict[str, Answer], records: dict[str, ReferringRecord]) -> Strip:
    """Draws an expression.

    Args:
        kind: why it is shown.
        expression: with its scores.
        answers: by phrase id, of the frames that are shown.
        records: the same.
    """
    figures = []
    for i in shown_frames(expression):
        phrase_id, score = expression.frames[i], expression.scores[i]
        percent = 100 * score.jf
        figures.append(
            Figure(
                answer_picture(answers[phrase_id], records[phrase_id]),
                title=f"frame {i + 1}",
                badge=(f"J&F {percent:.0f}", "good" if percent >= 70 else "fair" if percent >= 50 else "poor"),
            )
        )
    lines = [
        Line(name, [(i + 1, 100 * score.jf) for i, score in enumerate(scores)])
        for name, scores in (("answer", expression.scores), ("best query", expression.best_query))
    ]
    chart = line_chart("J&F by frame", lines, x_label="frame", y_label="J&F", y_range=(0, 100))
    facts = f"{kind} · J&F {100 * expression.score.jf:.1f} · {expression.video}, expression {expression.id}"
    return Strip(f"{expression.video}/{expression.id}", expression.phrase, facts, figures, chart)


def _by_part(
    expressions: Sequence[Expression], scores_of: Callable[[Expression], Sequence[Score]]
) -> list[tuple[float, float]]:
    parts: list[list[float]] = [[] for _ in range(_NUM_PARTS)]
    for each in expressions:
        scores = scores_of(each)
        for i, score in enumerate(scores):
            parts[min(int((i + 0.5) / len(scores) * _NUM_PARTS), _NUM_PARTS - 1)].append(100 * score.jf)
    return [((i + 0.5) * 100 / _NUM_PARTS, float(np.mean(part))) for i, part in enumerate(parts) if part]
