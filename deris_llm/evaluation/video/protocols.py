"""From masks per frame to the numbers of MeViS, Ref-YouTube-VOS, Ref-DAVIS17 and DAVIS 2017.

| protocol                | unit of the means | frames             | truth and answer are paired by | void            |
| ----------------------- | ----------------- | ------------------ | ------------------------------ | --------------- |
| MeViS                   | expression        | all                | expression                     | -               |
| Ref-YouTube-VOS         | expression        | all                | expression                     | -               |
| Ref-DAVIS17 B           | expression        | all                | expression                     | background      |
| Ref-DAVIS17 A           | object            | all                | best assignment                | ignored         |
| DAVIS unsupervised      | object            | all                | best assignment                | ignored         |
| DAVIS semi-supervised   | object            | not first and last | label                          | background      |

J and F are means over the frames of the unit, then over all units of all videos; J&F is the mean of the two. Where neither truth
nor answer has a pixel, J = F = 1, so frames and phrases without a target need no rule of their own.

Ref-DAVIS17 has two protocols under one name. A fuses the expressions of one annotator into one label map per frame
(`fuse_expressions`), which is scored as DAVIS unsupervised, so an answer that confuses two objects loses nothing; its numbers are
the means over the four annotators. B scores every expression on its own. Their numbers are not comparable.

Sources: the DAVIS 2017 evaluation code (both DAVIS protocols), that of MeViS, ReferFormer's inference for A, VISA and Sa2VA for B.
The server code of Ref-YouTube-VOS was never published; its rule here is that of MeViS.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from deris_llm.evaluation.video.metrics import (
    FrameStatistics,
    boundary_accuracy,
    frame_statistics,
    outline,
    region_similarity,
)

Key = TypeVar("Key", bound=Hashable)

VOID = 255
"""Label of pixels that the truth leaves open."""
MAX_PROPOSALS = 20
ANNOTATORS = 4
_FOREGROUND_A = 0.5  # of Ref-DAVIS17 A: 0.5 itself is foreground


class Score(NamedTuple):
    """J and F of one frame, or means of them."""

    j: float
    f: float

    @property
    def jf(self) -> float:
        """J&F."""
        return (self.j + self.f) / 2


def frame_score(truth: np.ndarray, answer: np.ndarray) -> Score:
    """Returns J and F of two masks, bool (H, W).

    Raises:
        ValueError: the sizes differ.
    """
    return Score(region_similarity(truth, answer), boundary_accuracy(truth, answer))


def mean_score(scores: Iterable[Score]) -> Score:
    """Returns the means over the frames of a unit, or over units.

    Raises:
        ValueError: there are none.
    """
    table = np.array(list(scores), dtype=np.float64)
    if not table.size:
        raise ValueError("mean_score: expected at least one frame or unit, got none: nothing to average")
    return Score(*table.mean(axis=0).tolist())


def expression_scores(frame_scores: Mapping[Key, Sequence[Score]]) -> tuple[Score, dict[Key, Score]]:
    """Returns the number of a split and the numbers of its expressions, as in all protocols whose unit is the expression.

    Args:
        frame_scores: the scores of every frame of every expression, by any key, e.g. (video, expression).
    """
    of_expression = {key: mean_score(frames) for key, frames in frame_scores.items()}
    return mean_score(of_expression.values()), of_expression


@dataclass(frozen=True, eq=False)
class ObjectScore:
    """One object of a sequence."""

    label: int  # in the truth
    answer_label: int  # in the answer; above `SequenceScore.num_answers`: no answer, an empty mask
    j: np.ndarray  # (T,), float64
    f: np.ndarray

    @property
    def score(self) -> Score:
        return Score(float(self.j.mean()), float(self.f.mean()))


@dataclass(frozen=True, eq=False)
class SequenceScore:
    """The objects of a sequence."""

    num_frames: int  # scored
    num_answers: int  # objects in the answer
    objects: tuple[ObjectScore, ...]
    matching: np.ndarray | None = None  # (answers, objects), J&F of every pair; the assignment maximises its sum
    never_seen: tuple[int, ...] = ()  # labels below the largest that occur in no scored frame: 1 for an empty answer


class DavisNumbers(NamedTuple):
    """The numbers of the DAVIS table: each the mean over all objects of all sequences."""

    j: FrameStatistics
    f: FrameStatistics

    @property
    def score(self) -> Score:
        return Score(self.j.mean, self.f.mean)


def davis_numbers(sequences: Iterable[SequenceScore]) -> DavisNumbers:
    """Returns the numbers of a set of sequences.

    Raises:
        ValueError: there is no object.
    """
    objects = [scored for sequence in sequences for scored in sequence.objects]
    if not objects:
        raise ValueError("davis_numbers: expected at least one object, got none: nothing to average")
    found = [
        np.mean([frame_statistics(values) for values in of_objects], axis=0).tolist()
        for of_objects in ([o.j for o in objects], [o.f for o in objects])
    ]
    return DavisNumbers(FrameStatistics(*found[0]), FrameStatistics(*found[1]))


def semi_supervised(truth: Sequence[np.ndarray], answer: Sequence[np.ndarray]) -> SequenceScore:
    """Scores a sequence whose objects are known from the first frame.

    Args:
        truth: label maps of all frames, uint8 (H, W).
        answer: label maps of all frames but the first and the last, which are not scored.

    Raises:
        ValueError: too few frames, other sizes, or labels that the first frame does not have.
    """
    if len(truth) < 3 or len(answer) != len(truth) - 2:
        raise ValueError(
            f"expected label maps of all frames but the first and the last, {max(len(truth) - 2, 1)}, got {len(answer)}"
        )
    num_objects = _count_objects(truth[0])
    num_answers = max(int(labels.max()) for labels in answer)
    if num_answers > num_objects:
        raise ValueError(
            f"expected labels up to {num_objects}, as in the first frame of the truth, got {num_answers}: renumber the objects"
        )
    scores = np.array(
        [
            [frame_score(true == label, labels == label) for label in range(1, num_objects + 1)]
            for true, labels in zip(truth[1:-1], answer, strict=True)
        ]
    )
    objects = tuple(ObjectScore(i + 1, i + 1, scores[:, i, 0], scores[:, i, 1]) for i in range(num_objects))
    return SequenceScore(len(answer), num_answers, objects, never_seen=_never_seen(truth[1:-1], num_objects))


def unsupervised(truth: Sequence[np.ndarray], answer: Sequence[np.ndarray]) -> SequenceScore:
    """Scores a sequence whose objects are found by the method: each true object gets the proposal that the best assignment gives it.

    Args:
        truth: label maps of all frames, uint8 (H, W).
        answer: the same, at most 20 proposals.

    Raises:
        ValueError: no frames, other sizes, or too many proposals.
    """
    if not truth or len(answer) != len(truth):
        raise ValueError(f"expected label maps of {max(len(truth), 1)} frames, got {len(answer)}")
    num_objects = _count_objects(truth[0])
    num_answers = max(int(labels.max()) for labels in answer)
    if num_answers > MAX_PROPOSALS:
        raise ValueError(
            f"expected at most {MAX_PROPOSALS} proposals, labels 1 to {MAX_PROPOSALS}, got label {num_answers}"
        )
    num_columns = max(num_answers, num_objects)  # objects without a proposal are given an empty mask
    pairs = [_pairs(true, labels, num_objects, num_columns) for true, labels in zip(truth, answer, strict=True)]
    # (2, proposals, objects, T), contiguous over frames: means are rounded as in the public code, so that ties stay ties
    j, f = np.ascontiguousarray(np.array(pairs).transpose(3, 1, 2, 0))
    matching = (j.mean(axis=-1) + f.mean(axis=-1)) / 2
    proposals, objects = linear_sum_assignment(-matching)
    found = [
        ObjectScore(int(label) + 1, int(proposal) + 1, j[proposal, label], f[proposal, label])
        for proposal, label in sorted(zip(proposals, objects, strict=True), key=lambda pair: pair[1])
    ]
    return SequenceScore(len(answer), num_answers, tuple(found), matching, _never_seen(truth, num_objects))


def fuse_expressions(scores: np.ndarray) -> np.ndarray:
    """Fuses what one annotator's expressions got in a frame into a label map (Ref-DAVIS17 A).

    A pixel belongs to the object of the highest score, of equal ones to the first; scores below 0.5 are background.

    Args:
        scores: float (objects, H, W), mask probabilities in [0, 1], one expression per object in the order of the objects.

    Returns:
        uint8 (H, W), 0 = background, i + 1 = object i.
    """
    # The public code compares with a background of 0.1 after setting scores below 0.5 to 0: the same.
    is_object = scores.max(axis=0) >= _FOREGROUND_A
    return np.where(is_object, scores.argmax(axis=0) + 1, 0).astype(np.uint8)


def object_and_annotator(expression: str) -> tuple[int, int]:
    """Returns the object, counted from 0, and the annotator, 0 to 3, of an expression's id in Ref-DAVIS17."""
    return divmod(int(expression), ANNOTATORS)


def _count_objects(first_frame: np.ndarray) -> int:
    """The largest label of the first frame: a label left out below it counts, a label that comes later does not."""
    largest = int(first_frame[first_frame != VOID].max(initial=0))
    if not largest:
        raise ValueError("expected objects in the first frame of the truth, got none: nothing can be scored")
    return largest


def _never_seen(truth: Sequence[np.ndarray], num_objects: int) -> tuple[int, ...]:
    seen = set().union(*(np.unique(labels).tolist() for labels in truth))
    return tuple(label for label in range(1, num_objects + 1) if label not in seen)


def _pairs(truth: np.ndarray, answer: np.ndarray, num_objects: int, num_answers: int) -> np.ndarray:
    """J and F of every proposal with every object in a frame, (proposals, objects, 2); void is ignored."""
    if truth.shape != answer.shape:
        raise ValueError(
            f"expected a label map of the truth's size {truth.shape}, got {answer.shape}: do not resize it"
        )
    void = truth == VOID
    kept_truth, kept_answer = (np.where(void, 0, labels) for labels in (truth, answer))
    ours = [kept_answer == label for label in range(1, num_answers + 1)]
    outlines = [outline(mask) for mask in ours]
    scores = np.empty((num_answers, num_objects, 2))
    for i in range(num_objects):
        true = kept_truth == i + 1
        true_outline = outline(true)
        for k, (mask, answer_outline) in enumerate(zip(ours, outlines, strict=True)):
            scores[k, i] = region_similarity(true, mask), true_outline.counts(answer_outline).accuracy
    return scores
