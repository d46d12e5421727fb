"""Boxes x0, y0, x1, y1 in px: those around masks, and whether an answer's boxes are right (F1 of gRefCOCO's detection task).

Letters: N answered boxes against M true ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in px of the original image."""

_MATCH = 0.5  # generalised IoU from which on two boxes match


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Returns the smallest boxes around masks.

    Args:
        masks: bool (N, h, w); empty masks have no box and are left out.

    Returns:
        float64 (n, 4), n <= N, along the pixels' borders: a mask of one pixel at (0, 0) has the box 0, 0, 1, 1.
    """
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def boxes_f1(boxes_xyxy_px: Sequence[Box] | np.ndarray, truth_xyxy_px: np.ndarray) -> float:
    """Returns the F1 of one phrase's boxes in [0, 1]; matched greedily, the pair with the greatest generalised IoU first.

    Args:
        boxes_xyxy_px: N; none answers that there is no target.
        truth_xyxy_px: float (M, 4); none = no target.
    """
    boxes = np.asarray(boxes_xyxy_px, dtype=np.float64).reshape(-1, 4)
    if not len(boxes) or not len(truth_xyxy_px):
        return float(len(boxes) == len(truth_xyxy_px))
    left = box_giou(boxes, truth_xyxy_px)
    matched = 0
    while matched < min(left.shape):
        box, truth = np.unravel_index(np.argmax(left), left.shape)
        if left[box, truth] < _MATCH:
            break
        left[box, :] = left[:, truth] = -np.inf
        matched += 1
    return 2 * matched / sum(left.shape)


def box_giou(boxes_xyxy_px: np.ndarray, others_xyxy_px: np.ndarray) -> np.ndarray:
    """Returns the generalised IoU of all pairs: IoU minus the share of the smallest enclosing box that neither covers.

    Args:
        boxes_xyxy_px: float (N, 4).
        others_xyxy_px: float (M, 4).

    Returns:
        float (N, M) in [-1, 1]; no small constant in a denominator, and 0 where a denominator is 0.
    """
    iou, union = iou_and_union(boxes_xyxy_px, others_xyxy_px)
    corner = np.minimum(boxes_xyxy_px[:, None, :2], others_xyxy_px[None, :, :2])
    opposite = np.maximum(boxes_xyxy_px[:, None, 2:], others_xyxy_px[None, :, 2:])
    around = np.prod(np.clip(opposite - corner, 0, None), axis=-1)
    return iou - np.divide(around - union, around, out=np.zeros_like(around), where=around > 0)


def iou_and_union(boxes_xyxy_px: np.ndarray, others_xyxy_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns IoU in [0, 1] (0 for two boxes without area) and union in px of all pairs, float64 (N, M)."""
    boxes, others = (np.asarray(each, dtype=np.float64) for each in (boxes_xyxy_px, others_xyxy_px))
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(opposite - corner, 0, None), axis=-1)
    areas, other_areas = (np.prod(np.clip(each[:, 2:] - each[:, :2], 0, None), axis=-1) for each in (boxes, others))
    union = areas[:, None] + other_areas[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0), union
