"""The main metric by kind of phrase and object: where a method is good, and where it fails.

A phrase can be in several rows of a dimension (location words) or in none (a no-target phrase has no size).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.intervals import intervals
from deris_llm.evaluation.metrics import Ratio
from deris_llm.structures import ReferringRecord

_COCO_SMALL_PX, _COCO_LARGE_PX = 32**2, 96**2

LOCATION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("left", "leftmost", "lefty"),
    "right": ("right", "rightmost", "righty"),
    "top": ("top", "upper", "above", "up", "over", "topmost", "highest"),
    "bottom": ("bottom", "lower", "below", "under", "underneath", "down", "lowest"),
    "middle": ("middle", "center", "centre", "central", "between", "mid"),
    "near": ("front", "foreground", "near", "nearest", "closest", "closer", "close", "next", "beside"),
    "far": ("back", "background", "behind", "far", "farthest", "furthest", "rear", "farther", "further"),
    "ordinal": ("first", "second", "third", "fourth", "fifth", "sixth", "last", "1st", "2nd", "3rd", "4th", "5th"),
}
"""Row -> the words that put a phrase into it."""


def breakdown(
    answers: Sequence[Answer], records: Mapping[str, ReferringRecord], metrics: Mapping[str, Ratio]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the main metric by dimension and row.

    Args:
        answers: those that a protocol counts.
        records: by phrase id.
        metrics: of these answers, the main one first (`metrics.metric_ratios`).

    Returns:
        Dimension -> rows ``{"label", "n_phrases", "mIoU" or "gIoU", "oracle" if known, "interval"}`` in percent, see
        `intervals.intervals`; rows and dimensions without phrases are left out.
    """
    metric = next(iter(metrics))
    oracle = metrics.get(f"oracle_{metric}")
    rows: dict[tuple[str, str], np.ndarray] = {}
    for dimension, (labels, labels_of) in _DIMENSIONS.items():
        if dimension == "targets" and metric != "gIoU":
            continue
        found = [labels_of(answer, records[answer.phrase_id]) for answer in answers]
        for label in labels:
            phrases = np.array([label in labelled for labelled in found], dtype=bool)
            if phrases.any():
                rows[dimension, label] = phrases
    ratios = {str(number): metrics[metric].among(phrases) for number, phrases in enumerate(rows.values())}
    sure = intervals(ratios, [records[answer.phrase_id].video or answer.image_id for answer in answers])
    dimensions: dict[str, list[dict[str, Any]]] = {}
    for number, ((dimension, label), phrases) in enumerate(rows.items()):
        row: dict[str, Any] = {"label": label, "n_phrases": int(phrases.sum()), metric: ratios[str(number)].percent}
        if oracle is not None:
            row["oracle"] = oracle.among(phrases).percent
        dimensions.setdefault(dimension, []).append({**row, "interval": sure[str(number)]})
    return dimensions


def _size(answer: Answer, _: ReferringRecord) -> tuple[str, ...]:
    """By COCO's bounds on the area of the truth (the union of several referents) in px of the original image."""
    if not answer.has_target:
        return ()
    area = answer.truth_px
    return (_SIZES[0 if area < _COCO_SMALL_PX else 1 if area <= _COCO_LARGE_PX else 2],)


def _length(answer: Answer, _: ReferringRecord) -> tuple[str, ...]:
    number = len(answer.phrase.split())
    return (_LENGTHS[0 if number <= 2 else 1 if number <= 5 else 2 if number <= 9 else 3],)


def _location(answer: Answer, _: ReferringRecord) -> tuple[str, ...]:
    words = set(re.findall(r"\w+", answer.phrase.lower()))
    return tuple(row for row, known in LOCATION_WORDS.items() if words & set(known)) or (_NO_LOCATION,)


def _same_class(_: Answer, record: ReferringRecord) -> tuple[str, ...]:
    number = record.num_same_class
    return () if number is None else (_SAME_CLASS[min(number, 3)],)


def _targets(_: Answer, record: ReferringRecord) -> tuple[str, ...]:
    return (_TARGETS[min(len(record.instances), 2)],)


_SIZES = ("small, < 32x32 px", "medium", "large, > 96x96 px")
_LENGTHS = ("1-2 words", "3-5 words", "6-9 words", "10 words or more")
_NO_LOCATION = "no location word"
_SAME_CLASS = ("alone in its class", "1 other of its class", "2 others", "3 others or more")
_TARGETS = ("no target", "one target", "several targets")

_Labels = Callable[[Answer, ReferringRecord], tuple[str, ...]]
_DIMENSIONS: Mapping[str, tuple[Sequence[str], _Labels]] = {
    "targets": (_TARGETS, _targets),
    "object_size": (_SIZES, _size),
    "phrase_length": (_LENGTHS, _length),
    "location_words": ((*LOCATION_WORDS, _NO_LOCATION), _location),
    "same_class": (_SAME_CLASS, _same_class),
}
"""Dimension -> its rows in order, and the function that says which of them a phrase is in."""
