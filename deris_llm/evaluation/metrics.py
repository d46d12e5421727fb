"""Metrics of referring image segmentation with one target (RefCOCO, RefCOCO+, RefCOCOg); upstream's, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deris_llm.evaluation.boxes import box_iou

PRECISION_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Overlap:
    """How far a predicted mask and the ground truth agree, in pixels."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """In [0, 1]; two empty masks give 0, because RefCOCO's phrases all name something."""
        return self.intersection / self.union if self.union else 0.0


def overlap(mask: np.ndarray, truth: np.ndarray) -> Overlap:
    """Counts pixels.

    Args:
        mask: bool (h, w), predicted.
        truth: bool (h, w).
    """
    assert mask.shape == truth.shape, f"masks of one size, got {mask.shape} and {truth.shape}"
    intersection = int(np.count_nonzero(mask & truth))
    return Overlap(intersection, int(np.count_nonzero(mask)) + int(np.count_nonzero(truth)) - intersection)


@dataclass(frozen=True)
class RisMetrics:
    """Numbers over the phrases of a split, in percent; NaN without phrases."""

    mean_iou: float  # mean of the IoU per phrase
    overall_iou: float  # sum of intersections / sum of unions (others say cIoU)
    precision_at: dict[float, float]  # share of phrases whose IoU is >= the level

    @classmethod
    def of(cls, overlaps: Sequence[Overlap]) -> RisMetrics:
        """Summarises phrases; a miss is an `Overlap` with intersection 0, never left out."""
        if not overlaps:
            return cls(float("nan"), float("nan"), dict.fromkeys(PRECISION_LEVELS, float("nan")))
        iou = np.array([o.iou for o in overlaps])
        union = sum(o.union for o in overlaps)
        return cls(
            mean_iou=100 * float(iou.mean()),
            overall_iou=100 * sum(o.intersection for o in overlaps) / union if union else 0.0,
            precision_at={level: 100 * float((iou >= level).mean()) for level in PRECISION_LEVELS},
        )

    def named(self) -> dict[str, float]:
        """``{"mIoU": ..., "oIoU": ..., "Pr@0.5": ..., ...}``."""
        return {"mIoU": self.mean_iou, "oIoU": self.overall_iou} | {
            f"Pr@{x}": value for x, value in self.precision_at.items()
        }


def top_box_iou(boxes_xyxy_px: np.ndarray, scores: np.ndarray, truth_xyxy_px: np.ndarray) -> float:
    """IoU of the best-scoring box with the one true box: what detection accuracy (REC) is counted of.

    Args:
        boxes_xyxy_px: float (Q, 4).
        scores: float (Q,).
        truth_xyxy_px: float (4,).
    """
    return float(box_iou(boxes_xyxy_px[[int(np.argmax(scores))]], truth_xyxy_px[None])[0, 0])


def detection_accuracy(top_box_ious: Sequence[float]) -> dict[float, float]:
    """Percent of phrases whose best-scoring box reaches each of `PRECISION_LEVELS`; at 0.5 it is the usual DetACC."""
    iou = np.array(top_box_ious)
    return {level: 100 * float((iou >= level).mean()) if len(iou) else float("nan") for level in PRECISION_LEVELS}
