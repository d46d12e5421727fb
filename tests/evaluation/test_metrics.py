"""RIS metrics against upstream's numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.metrics import Overlap, RisMetrics, overlap

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "upstream_ris_metrics.json").read_text())
OVERLAPS = [
    overlap(decode_segmentation(s["pred_mask"], 48, 64), decode_segmentation(s["gt_mask"], 48, 64))
    for s in GOLDEN["samples"]
]
TOLERANCE = 2e-6  # relative; upstream sums in float32; measured worst 8e-8


def _assert_equal(ours: RisMetrics, upstream: dict) -> None:
    assert ours.mean_iou == pytest.approx(upstream["mIoU"], rel=TOLERANCE)
    assert ours.overall_iou == pytest.approx(upstream["oIoU"], rel=TOLERANCE)
    assert list(ours.precision_at.values()) == pytest.approx(upstream["MaskACC"], rel=TOLERANCE)


@pytest.mark.parametrize(("case", "count"), [("all", 12), ("first6", 6)])
def test_upstream_cases(case: str, count: int) -> None:
    _assert_equal(RisMetrics.of(OVERLAPS[:count]), GOLDEN["cases"][case])


@pytest.mark.parametrize("index", range(12))
def test_upstream_per_sample(index: int) -> None:
    _assert_equal(RisMetrics.of([OVERLAPS[index]]), GOLDEN["per_sample"][index])


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
