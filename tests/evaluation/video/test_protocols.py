"""Rules of the protocols on small label maps, by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deris_llm.evaluation.video.metrics import FrameStatistics
from deris_llm.evaluation.video.protocols import (
    VOID,
    Score,
    davis_numbers,
    expression_scores,
    frame_score,
    fuse_expressions,
    mean_score,
    object_and_annotator,
    semi_supervised,
    unsupervised,
)
from tests.evaluation.video.video_world import box, labels_at

TRUTH = [labels_at(t) for t in range(4)]


def _swapped(labels: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1], dtype=np.uint8)[labels]


def test_an_expression_is_one_unit_however_long_its_video_is() -> None:
    long, short = [Score(1.0, 0.5)] * 9, [Score(0.0, 0.0)]
    total, each = expression_scores({("a", "0"): long, ("b", "0"): short})
    assert total == Score(0.5, 0.25)
    assert total.jf == 0.375
    assert each["a", "0"] == Score(1.0, 0.5)


def test_frames_without_a_target_need_no_rule() -> None:
    nothing = np.zeros((24, 32), dtype=bool)
    assert frame_score(nothing, nothing) == Score(1, 1)
    assert frame_score(nothing, box(3, 3)) == Score(0, 0)


def test_means_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one frame or unit"):
        mean_score([])
    with pytest.raises(ValueError, match="expected at least one object"):
        davis_numbers([])


def test_a_perfect_answer() -> None:
    for scored in (semi_supervised(TRUTH, TRUTH[1:-1]), unsupervised(TRUTH, TRUTH)):
        assert davis_numbers([scored]) == (FrameStatistics(1, 1, 0), FrameStatistics(1, 1, 0))
        assert [each.label for each in scored.objects] == [1, 2]


def test_only_the_unsupervised_protocol_forgives_exchanged_labels() -> None:
    swapped = [_swapped(labels) for labels in TRUTH]
    scored = unsupervised(TRUTH, swapped)
    assert [(each.label, each.answer_label) for each in scored.objects] == [(1, 2), (2, 1)]
    assert davis_numbers([scored]).score == Score(1, 1)
    assert davis_numbers([semi_supervised(TRUTH, swapped[1:-1])]).j.mean == 0


def test_the_assignment_is_the_best_one() -> None:
    rng = np.random.default_rng(3)
    truth = [labels_at(t, 3) for t in range(3)]
    answer = [
        np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape)).astype(np.uint8)
        for labels in truth
    ]
    scored = unsupervised(truth, answer)
    assert scored.matching is not None
    assert scored.matching.shape == (4, 3)
    best = max(
        sum(scored.matching[row, column] for column, row in enumerate(rows))
        for rows in itertools.permutations(range(4), 3)
    )
    assert sum(each.score.jf for each in scored.objects) == pytest.approx(best, abs=1e-12)


def test_objects_are_those_of_the_first_frame() -> None:
    later = [labels.copy() for labels in TRUTH]
    later[0][later[0] == 2] = 0  # object 2 comes later: background
    for scored in (semi_supervised(later, [np.where(x == 1, 1, 0) for x in later[1:-1]]), unsupervised(later, later)):
        assert [each.label for each in scored.objects] == [1]
        assert davis_numbers([scored]).score == Score(1, 1)


def test_a_label_left_out_below_the_largest_is_an_object() -> None:
    gap = [np.where(labels == 1, 0, labels) for labels in TRUTH]
    scored = semi_supervised(gap, gap[1:-1])
    assert len(scored.objects) == 2
    assert scored.never_seen == (1,)
    assert scored.objects[0].score == Score(1, 1)  # as in the public code; reported as a note


def test_missing_objects_are_empty_masks() -> None:
    only_one = [np.where(labels == 2, 0, labels) for labels in TRUTH]
    for scored in (semi_supervised(TRUTH, only_one[1:-1]), unsupervised(TRUTH, only_one)):
        assert scored.num_answers == 1
        assert davis_numbers([scored]).score == Score(0.5, 0.5)


def test_void_is_ignored_in_the_unsupervised_protocol_alone() -> None:
    truth = [labels.copy() for labels in TRUTH]
    for labels in truth:
        labels[:, :4] = VOID
    answer = [np.where(labels == VOID, 1, labels) for labels in truth]  # wrong only where the truth is void
    assert davis_numbers([unsupervised(truth, answer)]).score == Score(1, 1)
    assert davis_numbers([semi_supervised(truth, answer[1:-1])]).j.mean < 1


def test_semi_supervised_leaves_out_the_first_and_the_last_frame() -> None:
    scored = semi_supervised(TRUTH, TRUTH[1:-1])
    assert scored.num_frames == 2
    with pytest.raises(ValueError, match="all frames but the first and the last, 2, got 4"):
        semi_supervised(TRUTH, TRUTH)


def test_labels_that_cannot_be_are_refused() -> None:
    many = [labels.copy() for labels in TRUTH]
    many[1][0, 0] = 3
    with pytest.raises(ValueError, match="expected labels up to 2, as in the first frame of the truth, got 3"):
        semi_supervised(TRUTH, many[1:-1])
    assert len(unsupervised(TRUTH, many).objects) == 2
    many[1][0, 0] = 21
    with pytest.raises(ValueError, match="at most 20 proposals, labels 1 to 20, got label 21"):
        unsupervised(TRUTH, many)
    with pytest.raises(ValueError, match="expected objects in the first frame"):
        unsupervised([np.zeros_like(TRUTH[0])], [TRUTH[0]])
    with pytest.raises(ValueError, match=r"truth's size \(24, 32\), got \(32, 24\)"):
        unsupervised(TRUTH, [labels.T for labels in TRUTH])


def test_means_of_davis_are_over_objects_not_over_sequences() -> None:
    one_object = [np.where(labels == 1, 1, 0).astype(np.uint8) for labels in TRUTH]
    wrong = [np.zeros_like(labels) for labels in TRUTH]
    scored = [semi_supervised(TRUTH, TRUTH[1:-1]), semi_supervised(one_object, wrong[1:-1])]
    assert davis_numbers(scored).j.mean == pytest.approx(2 / 3)


def test_expressions_are_fused_by_the_highest_score() -> None:
    scores = np.array([[[0.5, 0.49, 0.7, 0.7]], [[0.2, 0.3, 0.7, 0.8]]], dtype=np.float32)
    # 0.5 is foreground, below it background; of equal scores the first object wins
    assert fuse_expressions(scores).tolist() == [[1, 0, 1, 2]]
    assert fuse_expressions(scores).dtype == np.uint8


def test_fusing_equals_the_public_rule() -> None:
    scores = np.random.default_rng(0).random((4, 20, 30)).astype(np.float32).round(1)
    kept = np.where(scores < 0.5, np.float32(0), scores)
    background = np.full((1, 20, 30), 0.1, dtype=np.float32)
    np.testing.assert_array_equal(fuse_expressions(scores), np.concatenate([background, kept]).argmax(axis=0))


def test_ids_of_expressions_in_ref_davis() -> None:
    assert object_and_annotator("0") == (0, 0)
    assert object_and_annotator("11") == (2, 3)
