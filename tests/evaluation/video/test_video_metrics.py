"""J, F and statistics: golden cases, a slow re-write of the definition, and mistakes that the cases must show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deris_llm.evaluation.video.metrics import (
    boundary_accuracy,
    boundary_of,
    boundary_radius,
    dilated,
    frame_statistics,
    outline,
    region_similarity,
    without_void,
)
from tests.evaluation.video.by_definition import Rules, slow_counts

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "video_metrics.json").read_text(encoding="utf-8"))["cases"]


def _masks(case: dict[str, Any]) -> list[np.ndarray | None]:
    return [None if case[n] is None else coco_mask.decode(case[n]).astype(bool) for n in ("truth", "answer", "void")]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_case(case: dict[str, Any]) -> None:
    truth, answer, void = _masks(case)
    assert region_similarity(truth, answer, void) == case["J"]
    assert boundary_accuracy(truth, answer, void) == case["F"]
    assert boundary_radius(*truth.shape) == case["radius"]
    kept_truth, kept_answer = without_void(truth, answer, void)
    counts = outline(kept_truth).counts(outline(kept_answer))
    assert [counts.truth, counts.answer] == case["boundary"]
    assert [counts.truth_matched, counts.answer_matched] == case["matched"]


@pytest.mark.parametrize(
    "rules",
    [
        Rules(float32_radius=True),
        Rules(floor_radius=True),
        Rules(last_row=False),
        Rules(last_column=False),
        Rules(corner=True),
        Rules(diagonal=False),
        Rules(square=True),
        Rules(both_empty=0.0),
        Rules(no_boundary=0.0),
        Rules(void=False),
    ],
    ids=lambda rules: ",".join(
        f"{name}={value}" for name, value in vars(rules).items() if value != getattr(Rules(), name)
    ),
)
def test_a_wrong_rule_changes_a_golden_case(rules: Rules) -> None:
    changed = 0
    for case in GOLDEN:
        wrong = slow_counts(*_masks(case), rules)
        changed += (wrong["J"], wrong["F"]) != (case["J"], case["F"])
    assert changed


def test_random_masks_equal_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = rng.integers(1, 40, 2)
        truth, answer = (rng.random((2, *size)) < rng.random()).astype(bool)
        void = (rng.random(size) < 0.2) if rng.random() < 0.5 else None
        slow = slow_counts(truth, answer, void)
        assert region_similarity(truth, answer, void) == slow["J"]
        assert boundary_accuracy(truth, answer, void) == slow["F"]


def test_symmetric_and_right_for_equal_masks() -> None:
    rng = np.random.default_rng(1)
    for density in (0.0, 0.1, 0.5, 1.0):
        truth, answer = rng.random((2, 37, 53)) < density
        assert region_similarity(truth, truth) == boundary_accuracy(truth, truth) == 1
        assert region_similarity(truth, answer) == region_similarity(answer, truth)
        assert boundary_accuracy(truth, answer) == boundary_accuracy(answer, truth)


def test_the_radius_equals_the_rule_in_integers() -> None:
    for height, width in [
        (75, 100),
        (225, 300),
        (450, 600),
        (900, 1200),
        (480, 854),
        (2160, 3840),
        (1, 1),
        (3000, 4000),
    ]:
        radius = boundary_radius(height, width)
        assert (125 * radius) ** 2 >= height**2 + width**2 > (125 * (radius - 1)) ** 2
    assert boundary_radius(60, 80, 0.02) == 2


def test_radius_in_px() -> None:
    truth = np.zeros((20, 20), dtype=bool)
    truth[5:10, 5:10] = True
    answer = np.roll(truth, 3, axis=1)
    assert boundary_accuracy(truth, answer, radius=3) == 1 > boundary_accuracy(truth, answer, radius=2)


def test_dilation_at_the_border_of_the_frame() -> None:
    for y, x in [(0, 0), (0, 9), (7, 0), (7, 9), (3, 4)]:
        boundary = np.zeros((8, 10), dtype=bool)
        boundary[y, x] = True
        rows, columns = np.ogrid[:8, :10]
        assert (dilated(boundary, 3) == ((rows - y) ** 2 + (columns - x) ** 2 <= 9)).all()
    assert not dilated(np.zeros((8, 10), dtype=bool), 3).any()


def test_masks_are_not_changed() -> None:
    truth, answer, void = np.ones((3, 6, 7), dtype=bool)
    region_similarity(truth, answer, void)
    boundary_accuracy(truth, answer, void)
    assert truth.all()
    assert answer.all()
    assert void.all()
    assert not boundary_of(truth).any()


def test_any_value_above_zero_is_inside() -> None:
    grey = np.zeros((6, 7), dtype=np.uint8)
    grey[2:4, 2:5] = (1, 128, 255)
    assert region_similarity(grey > 0, grey) == boundary_accuracy(grey > 0, grey) == 1


def test_masks_of_two_sizes_are_refused() -> None:
    truth = np.zeros((4, 5), dtype=bool)
    with pytest.raises(
        ValueError, match=r"truth \(4, 5\), answer \(5, 4\): the answer must have the size of the truth"
    ):
        region_similarity(truth, truth.T)
    with pytest.raises(ValueError, match=r"void \(2, 2\)"):
        boundary_accuracy(truth, truth, np.zeros((2, 2)))


def test_recall_counts_values_above_one_half() -> None:
    assert frame_statistics([0.5] * 8).recall == 0
    assert frame_statistics([0.5, 0.6, 0.7, 0.1]).recall == 0.5


def test_decay_by_hand() -> None:
    # edges of 6 frames: 1, 2.25, 3.5, 4.75, 6, rounded to frames 0, 1, 3, 4, 5
    assert frame_statistics([1, 2, 3, 4, 5, 7]).decay == 1.5 - 6
    # 4 frames: frames 0, 1 and 2, 3; an exact half (2.5) is rounded up
    assert frame_statistics([1, 2, 4, 8]).decay == 1.5 - 6
    assert frame_statistics([0.25]) == (0.25, 0, 0)


@pytest.mark.parametrize("num_frames", [255, 256, 257, 300, 400, 1000])
def test_decay_of_long_videos(num_frames: int) -> None:
    values = np.linspace(1, 0, num_frames)
    assert math.isclose(frame_statistics(values).decay, 0.75, abs_tol=0.01)


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one value per frame"):
        frame_statistics([])
