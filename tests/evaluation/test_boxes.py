"""Boxes: overlaps by hand, and those around masks."""

import numpy as np
import pytest

from deris_llm.evaluation.boxes import box_giou, box_iou, boxes_of_masks

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
    assert box_iou(UNIT, other_xyxy) == pytest.approx(iou)
    assert box_giou(UNIT, other_xyxy) == pytest.approx(giou)
    assert box_giou(other_xyxy, UNIT) == pytest.approx(giou)


def test_two_points_at_one_place_have_no_overlap() -> None:
    point = np.array([[3.0, 3, 3, 3]])
    assert box_iou(point, point) == 0
    assert box_giou(point, point) == 0


def test_all_pairs() -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(0, 50, (7, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 30, (7, 2))], axis=1)
    iou, giou = box_iou(boxes[:3], boxes), box_giou(boxes[:3], boxes)
    assert iou.shape == giou.shape == (3, 7)
    assert np.diag(iou) == pytest.approx(1)
    assert (giou <= iou + 1e-12).all()
    assert (giou > -1).all()
    for i in range(3):
        for j in range(7):
            assert box_iou(boxes[[i]], boxes[[j]])[0, 0] == iou[i, j]


def test_around_masks() -> None:
    masks = np.zeros((3, 6, 9), dtype=bool)
    masks[0, 2, 3] = True
    masks[2, 0, 8] = masks[2, 5, 1] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [1, 0, 9, 6]]
    assert boxes_of_masks(masks[1:2]).shape == (0, 4)
