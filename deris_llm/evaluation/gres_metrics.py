"""Metrics of generalised referring segmentation and comprehension (gRefCOCO): a phrase names none, one or several.

What a phrase adds, by whether it has a target and whether the answer says so (some query was selected; what its mask
covers does not matter):

| phrase    | answer    | counts as | IoU   | intersection | union                                    |
| --------- | --------- | --------- | ----- | ------------ | ---------------------------------------- |
| no target | no target | TP        | 1     | 0            | 0                                        |
| no target | target    | FN        | 0     | 0            | pixels of the answer                     |
| target    | no target | FP        | 0     | 0            | pixels of the truth (and of the answer)  |
| target    | target    | TN        | I / U | I            | U                                        |

    gIoU = mean IoU over all phrases             N-acc = TP / (TP + FN), of the phrases without a target
    cIoU = sum of I / sum of U                   T-acc = TN / (TN + FP), of the phrases with one
    Pr@X = share of the phrases WITH a target whose IoU is >= X

These are the conventions of the public DeRIS code, `interop.parity_functions` compares the numbers; gIoU has nothing to
do with the generalised IoU of boxes. A number that has nothing to be taken of is None, not 0, and `notes` says why: N-acc without
no-target phrases, T-acc and Pr without target phrases, cIoU where no pixel was answered and none was asked for. The
public code stops with a division by zero there, or reports 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deris_llm.evaluation.boxes import box_giou
from deris_llm.evaluation.metrics import Overlap

GRES_PRECISION_LEVELS = (0.7, 0.8, 0.9)
GREC_BOX_OVERLAP = 0.5


@dataclass(frozen=True)
class GresOutcome:
    """One phrase's answer against the truth; what ranks gather and metrics are made of."""

    overlap: Overlap  # of the answer's mask with the truth, as counted; `iou` and `pixels` apply the quadrants
    has_target: bool
    says_target: bool  # some query was selected

    @property
    def iou(self) -> float:
        """In [0, 1], by quadrant."""
        if not self.has_target:
            return 0.0 if self.says_target else 1.0
        return self.overlap.iou if self.says_target else 0.0

    @property
    def pixels(self) -> Overlap:
        """What the phrase adds to the sums of cIoU."""
        if self.has_target and self.says_target:
            return self.overlap
        return Overlap(0, self.overlap.union if self.has_target or self.says_target else 0)


@dataclass(frozen=True)
class GresMetrics:
    """Numbers over the phrases of a split, in percent; None where there is nothing to take them of."""

    giou: float | None
    ciou: float | None
    n_acc: float | None
    t_acc: float | None
    precision_at: dict[float, float | None]  # of the phrases with a target
    num_no_target: int
    num_target: int

    @classmethod
    def of(cls, outcomes: Sequence[GresOutcome]) -> GresMetrics:
        """Summarises phrases, each exactly once; the order does not matter."""
        targets = [o for o in outcomes if o.has_target]
        others = [o for o in outcomes if not o.has_target]
        union = sum(o.pixels.union for o in outcomes)
        target_iou = np.array([o.iou for o in targets])
        return cls(
            giou=_percent([o.iou for o in outcomes]),
            ciou=100 * sum(o.pixels.intersection for o in outcomes) / union if union else None,
            n_acc=_percent([not o.says_target for o in others]),
            t_acc=_percent([o.says_target for o in targets]),
            precision_at={level: _percent(target_iou >= level) for level in GRES_PRECISION_LEVELS},
            num_no_target=len(others),
            num_target=len(targets),
        )

    def named(self) -> dict[str, float | None]:
        """``{"gIoU": ..., "cIoU": ..., "N-acc": ..., "T-acc": ..., "Pr@0.7": ..., ...}``."""
        return {"gIoU": self.giou, "cIoU": self.ciou, "N-acc": self.n_acc, "T-acc": self.t_acc} | {
            f"Pr@{level}": value for level, value in self.precision_at.items()
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Why numbers are None; empty when all are there."""
        found = []
        if self.num_no_target + self.num_target == 0:
            return ("no phrases: no number",)
        if not self.num_no_target:
            found.append("no phrase without a target: no N-acc")
        if not self.num_target:
            found.append("no target phrases: no T-acc, no Pr@X")
        if self.ciou is None:
            found.append("no pixel answered and none asked for: no cIoU")
        return tuple(found)


def baseline_outcomes(
    targets: Sequence[tuple[int, int]],
) -> dict[str, list[GresOutcome]]:
    """What answers without looking get: the floor under every number of a split.

    Args:
        targets: per phrase, pixels of its truth (0 = no target) and of its picture.

    Returns:
        ``always empty``: every phrase is answered with no target; ``never empty``: every phrase with the whole picture.
    """
    return {
        "always empty": [
            GresOutcome(Overlap(0, truth), has_target=truth > 0, says_target=False) for truth, _ in targets
        ],
        "never empty": [
            GresOutcome(Overlap(truth, picture), has_target=truth > 0, says_target=True) for truth, picture in targets
        ],
    }


@dataclass(frozen=True)
class GrecOutcome:
    """One phrase's boxes against the true ones."""

    f1: float  # in [0, 1]
    has_target: bool
    says_target: bool

    @classmethod
    def of(cls, boxes_xyxy_px: np.ndarray, truth_xyxy_px: np.ndarray) -> GrecOutcome:
        """Matches greedily: the pair with the greatest generalised IoU first, as long as it is at least 0.5.

        Args:
            boxes_xyxy_px: float (N, 4), of the selected queries; none says there is no target.
            truth_xyxy_px: float (M, 4); none = no target.
        """
        num_boxes, num_truth = len(boxes_xyxy_px), len(truth_xyxy_px)
        if not num_boxes or not num_truth:
            return cls(float(num_boxes == num_truth), has_target=num_truth > 0, says_target=num_boxes > 0)
        left = box_giou(boxes_xyxy_px, truth_xyxy_px)
        matched = 0
        while matched < min(num_boxes, num_truth):
            box, truth = np.unravel_index(np.argmax(left), left.shape)
            if left[box, truth] < GREC_BOX_OVERLAP:
                break
            left[box, :] = left[:, truth] = -np.inf
            matched += 1
        return cls(2 * matched / (num_boxes + num_truth), has_target=True, says_target=True)


@dataclass(frozen=True)
class GrecMetrics:
    """Numbers over the phrases of a split, in percent; None where there is nothing to take them of."""

    f1: float | None  # share of phrases whose boxes are all right: F1 = 1 at generalised box IoU >= 0.5
    n_acc: float | None
    t_acc: float | None

    @classmethod
    def of(cls, outcomes: Sequence[GrecOutcome]) -> GrecMetrics:
        """Summarises phrases, each exactly once."""
        return cls(
            f1=_percent([o.f1 == 1 for o in outcomes]),
            n_acc=_percent([not o.says_target for o in outcomes if not o.has_target]),
            t_acc=_percent([o.says_target for o in outcomes if o.has_target]),
        )

    def named(self) -> dict[str, float | None]:
        """``{"F1": ..., "N-acc": ..., "T-acc": ...}``."""
        return {"F1": self.f1, "N-acc": self.n_acc, "T-acc": self.t_acc}


def _percent(shares: Sequence[float] | Sequence[bool] | np.ndarray) -> float | None:
    return 100 * float(np.mean(shares)) if len(shares) else None
