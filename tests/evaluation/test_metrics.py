"""RIS metrics: what they count; upstream's numbers are compared in tests/scripts/test_parity_functions.py."""

import math

import numpy as np

from deris_llm.evaluation.metrics import Overlap, RisMetrics, detection_accuracy, overlap, top_box_iou


def test_two_empty_masks_count_zero() -> None:
    nothing = overlap(np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool))
    assert nothing == Overlap(0, 0)
    assert RisMetrics.of([nothing]).named() == {"mIoU": 0, "oIoU": 0} | {f"Pr@0.{i}": 0 for i in range(5, 10)}


def test_a_miss_lowers_the_mean_and_stays_in_the_union() -> None:
    metrics = RisMetrics.of([Overlap(10, 10), Overlap(0, 30)])
    assert (metrics.mean_iou, metrics.overall_iou, metrics.precision_at[0.5]) == (50, 25, 50)


def test_precision_includes_its_level() -> None:
    assert RisMetrics.of([Overlap(1, 2)]).precision_at[0.5] == 100
    assert RisMetrics.of([Overlap(9, 10)]).precision_at[0.9] == 100


def test_no_phrase_is_no_number() -> None:
    assert math.isnan(RisMetrics.of([]).mean_iou)


def test_detection_takes_the_best_scoring_box_alone() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    truth = np.array([0.0, 0, 10, 10])
    assert top_box_iou(boxes, np.array([0.2, 0.9]), truth) == 0.6
    assert detection_accuracy([0.6, 1.0, 0.0, 0.6]) == {0.5: 75, 0.6: 75, 0.7: 25, 0.8: 25, 0.9: 25}
    assert all(math.isnan(value) for value in detection_accuracy([]).values())
