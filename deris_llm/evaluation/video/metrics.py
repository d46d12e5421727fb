"""J, F and their statistics over frames, as DAVIS defines them (Perazzi et al. 2016; Pont-Tuset et al. 2017).

    J  region similarity: intersection over union of two masks; 1 if both are empty
    F  boundary accuracy: 2 p c / (p + c), where p is the share of the answer's boundary pixels that have a boundary pixel of
       the truth within a radius, and c the share of the truth's that have one of the answer; 1 if neither has a boundary, 0 if
       only one has

The radius is 0.8 % of the diagonal, rounded up. A pixel is a boundary pixel if its right, lower or lower right neighbour differs
from it. The border of the frame is no boundary, so a mask that fills the frame has none: F = 1 against an empty mask, while J = 0.
Void pixels, which the truth leaves open, are removed from both masks before anything is counted; their outline then is a boundary
of both masks where it cuts an object. All numbers equal those of the public DAVIS code (`scripts/parity/video.py`), except decay
of more than 255 frames, where that code overflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

BOUNDARY_TOLERANCE = 0.008
"""Radius of F as a share of the frame's diagonal."""


class BoundaryCounts(NamedTuple):
    """Boundary pixels of two masks, and how many of them lie near the other mask's boundary."""

    truth: int
    answer: int
    truth_matched: int
    answer_matched: int

    @property
    def accuracy(self) -> float:
        """F in [0, 1]."""
        if not self.truth or not self.answer:
            return float(self.truth == self.answer)
        precision, recall = self.answer_matched / self.answer, self.truth_matched / self.truth
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Outline(NamedTuple):
    """The boundary of a mask, ready to be compared with others."""

    boundary: np.ndarray  # bool (H, W)
    near: np.ndarray  # bool (H, W), within the radius of the boundary

    def counts(self, answer: Outline) -> BoundaryCounts:
        """Counts matched pixels; self is the truth's outline."""
        return BoundaryCounts(
            truth=int(np.count_nonzero(self.boundary)),
            answer=int(np.count_nonzero(answer.boundary)),
            truth_matched=int(np.count_nonzero(self.boundary & answer.near)),
            answer_matched=int(np.count_nonzero(answer.boundary & self.near)),
        )


class FrameStatistics(NamedTuple):
    """Statistics of one value per frame."""

    mean: float
    recall: float  # share of the frames above 0.5
    decay: float  # mean of the first quarter of the frames minus mean of the last


def region_similarity(truth: np.ndarray, answer: np.ndarray, void: np.ndarray | None = None) -> float:
    """Returns J of two masks.

    Args:
        truth: bool (H, W).
        answer: bool (H, W).
        void: bool (H, W), True = not counted.

    Raises:
        ValueError: the sizes differ.
    """
    truth, answer = without_void(truth, answer, void)
    union = int(np.count_nonzero(truth | answer))
    return int(np.count_nonzero(truth & answer)) / union if union else 1.0


def boundary_accuracy(
    truth: np.ndarray, answer: np.ndarray, void: np.ndarray | None = None, radius: int | None = None
) -> float:
    """Returns F of two masks.

    Args:
        truth: bool (H, W).
        answer: bool (H, W).
        void: bool (H, W), True = not counted.
        radius: px; default `boundary_radius` of the frame.

    Raises:
        ValueError: the sizes differ.
    """
    truth, answer = without_void(truth, answer, void)
    return outline(truth, radius).counts(outline(answer, radius)).accuracy


def frame_statistics(values: Sequence[float] | np.ndarray) -> FrameStatistics:
    """Returns mean, recall and decay of one value per frame.

    Quarters share the frame at their edge, as in the public code.

    Args:
        values: (T,), in the order of the frames.

    Raises:
        ValueError: there are no frames.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"frame_statistics: expected one value per frame of a video, got an array of {vector.shape}")
    edges = quarter_edges(vector.size)
    first, last = vector[edges[0] : edges[1] + 1], vector[edges[3] : edges[4] + 1]
    return FrameStatistics(float(vector.mean()), float((vector > 0.5).mean()), float(first.mean() - last.mean()))


def quarter_edges(num_frames: int) -> list[int]:
    """Returns the first frame, the three between the quarters and the last one; halves are rounded up."""
    return [math.floor(edge + 0.5 + 1e-10) - 1 for edge in np.linspace(1, num_frames, 5).tolist()]


def boundary_radius(height: int, width: int, tolerance: float = BOUNDARY_TOLERANCE) -> int:
    """Returns the radius of F in px.

    float64 is needed: in float32, 0.008 times a diagonal of 375 px exceeds 3 and would be rounded up to 4.
    """
    return math.ceil(tolerance * math.sqrt(height * height + width * width))


def outline(mask: np.ndarray, radius: int | None = None) -> Outline:
    """Returns the boundary of a mask, bool (H, W), and what lies within the radius of it."""
    boundary = boundary_of(mask)
    return Outline(boundary, dilated(boundary, boundary_radius(*mask.shape) if radius is None else radius))


def boundary_of(mask: np.ndarray) -> np.ndarray:
    """Returns the boundary pixels of a mask: those that differ from a neighbour to the right, below or diagonally below."""
    boundary = np.zeros_like(mask)
    boundary[:, :-1] = mask[:, :-1] != mask[:, 1:]
    boundary[:-1] |= mask[:-1] != mask[1:]
    boundary[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return boundary


def dilated(boundary: np.ndarray, radius: int) -> np.ndarray:
    """Returns the pixels at most ``radius`` px away from a True pixel, bool (H, W)."""
    near = np.zeros_like(boundary)
    left, top, width, height = cv2.boundingRect(boundary.view(np.uint8))
    if width:  # only around the boundary: dilation takes most of the time
        rows = slice(max(top - radius, 0), top + height + radius)
        columns = slice(max(left - radius, 0), left + width + radius)
        part = np.ascontiguousarray(boundary[rows, columns]).view(np.uint8)
        near[rows, columns] = cv2.dilate(part, _disk(radius)).view(bool)
    return near


def without_void(
    truth: np.ndarray, answer: np.ndarray, void: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns two masks as bool (H, W), False where the truth is void.

    Raises:
        ValueError: the sizes differ.
    """
    masks = [np.ascontiguousarray(mask, dtype=bool) for mask in (truth, answer)]
    if void is not None:
        void = np.asarray(void, dtype=bool)
    if masks[0].ndim != 2 or any(mask.shape != masks[0].shape for mask in (masks[1], void) if mask is not None):
        sizes = ", ".join(
            f"{name} {mask.shape}"
            for name, mask in zip(("truth", "answer", "void"), (*masks, void), strict=True)
            if mask is not None
        )
        raise ValueError(f"expected masks (H, W) of one size, got {sizes}: the answer must have the size of the truth")
    return (masks[0], masks[1]) if void is None else (masks[0] & ~void, masks[1] & ~void)


@cache
def _disk(radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets[None] ** 2 <= radius * radius).astype(np.uint8)
