"""Boxes: overlaps by hand, and those around masks."""

import numpy as np
import pytest

from deris_llm.evaluation.boxes import box_giou, boxes_f1, boxes_of_masks, iou_and_union

UNIT = np.array([[0.0, 0, 2, 2]])


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ([0, 0, 2, 2], 1, 1),
        ([1, 0, 3, 2], 1 / 3, 1 / 3),  # the box around both has no gap
        ([0, 0, 1, 1], 1 / 4, 1 / 4),
        ([4, 0, 6, 2], 0, -1 / 3),  # apart by their own width
        ([1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
        ([5, 5, 5, 5], 0, -21 / 25),  # a point
    ],
)
def test_pairs(other: list[float], iou: float, giou: float) -> None:
    other_xyxy = np.array([other], dtype=float)
    assert iou_and_union(UNIT, other_xyxy)[0] == pytest.approx(iou)
    assert box_giou(UNIT, other_xyxy) == pytest.approx(giou)
    assert box_giou(other_xyxy, UNIT) == pytest.approx(giou)


def test_two_points_at_one_place_have_no_overlap() -> None:
    point = np.array([[3.0, 3, 3, 3]])
    assert iou_and_union(point, point)[0] == 0
    assert box_giou(point, point) == 0


def test_all_pairs() -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(0, 50, (7, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 30, (7, 2))], axis=1)
    iou, giou = iou_and_union(boxes[:3], boxes)[0], box_giou(boxes[:3], boxes)
    assert iou.shape == giou.shape == (3, 7)
    assert np.diag(iou) == pytest.approx(1)
    assert (giou <= iou + 1e-12).all()
    assert (giou > -1).all()
    for i in range(3):
        for j in range(7):
            assert iou_and_union(boxes[[i]], boxes[[j]])[0][0, 0] == iou[i, j]


def test_around_masks() -> None:
    masks = np.zeros((3, 6, 9), dtype=bool)
    masks[0, 2, 3] = True
    masks[2, 0, 8] = masks[2, 5, 1] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [1, 0, 9, 6]]
    assert boxes_of_masks(masks[1:2]).shape == (0, 4)


SQUARE = np.array([[0.0, 0, 10, 10]])
BESIDE = np.array([[20.0, 0, 30, 10]])
NONE = np.zeros((0, 4))


@pytest.mark.parametrize(
    ("boxes", "truth", "f1"),
    [
        (SQUARE, SQUARE, 1),
        (NONE, NONE, 1),
        (SQUARE, NONE, 0),
        (NONE, SQUARE, 0),
        (BESIDE, SQUARE, 0),
        (np.concatenate([SQUARE, BESIDE]), SQUARE, 2 / 3),  # one box too many
        (np.concatenate([SQUARE, SQUARE]), SQUARE, 2 / 3),  # the same twice: one is too many
        (SQUARE, np.concatenate([SQUARE, BESIDE]), 2 / 3),  # one missed
        (np.concatenate([BESIDE, SQUARE]), np.concatenate([SQUARE, BESIDE]), 1),
    ],
)
def test_boxes_of_a_phrase(boxes: np.ndarray, truth: np.ndarray, f1: float) -> None:
    assert boxes_f1(boxes, truth) == pytest.approx(f1)
    assert boxes_f1([tuple(box) for box in boxes.tolist()], truth) == boxes_f1(boxes, truth)


def test_boxes_are_matched_by_generalised_overlap() -> None:
    """IoU 0.5 passes; the same IoU with a gap in the box around both does not."""
    assert boxes_f1(np.array([[0.0, 0, 10, 5]]), SQUARE) == 1
    shifted = np.array([[2.0, 2, 12, 12]])  # IoU 64 / 136, GIoU less
    assert boxes_f1(shifted, SQUARE) == 0
