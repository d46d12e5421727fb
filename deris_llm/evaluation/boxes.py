"""Boxes x0, y0, x1, y1 in px: overlap, generalised overlap, and those around masks.

Letters: N boxes against M boxes.
"""

from __future__ import annotations

import numpy as np


def box_iou(boxes_xyxy_px: np.ndarray, others_xyxy_px: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs.

    Args:
        boxes_xyxy_px: float (N, 4).
        others_xyxy_px: float (M, 4).

    Returns:
        float (N, M) in [0, 1]; 0 for two boxes without area.
    """
    return _overlaps(boxes_xyxy_px, others_xyxy_px)[0]


def box_giou(boxes_xyxy_px: np.ndarray, others_xyxy_px: np.ndarray) -> np.ndarray:
    """Generalised IoU of all pairs: IoU less the share of the smallest box around both that neither covers.

    Args:
        boxes_xyxy_px: float (N, 4).
        others_xyxy_px: float (M, 4).

    Returns:
        float (N, M) in [-1, 1]; no small constant in a denominator, and 0 where a denominator is 0.
    """
    iou, union = _overlaps(boxes_xyxy_px, others_xyxy_px)
    corner = np.minimum(boxes_xyxy_px[:, None, :2], others_xyxy_px[None, :, :2])
    opposite = np.maximum(boxes_xyxy_px[:, None, 2:], others_xyxy_px[None, :, 2:])
    around = np.prod(np.clip(opposite - corner, 0, None), axis=-1)
    return iou - np.divide(around - union, around, out=np.zeros_like(around), where=around > 0)


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """The smallest boxes around masks.

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


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and union (N, M)."""
    boxes, others = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(opposite - corner, 0, None), axis=-1)
    union = _areas(boxes)[:, None] + _areas(others)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0), union


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=-1)
