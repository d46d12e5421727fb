"""Metrics of referring segmentation, defined once: what each phrase adds to a numerator and a denominator.

Numbers of a split, their bootstrap intervals and their breakdown are all taken from these columns (`metric_ratios`).

On RefCOCO, RefCOCO+ and RefCOCOg every phrase has a target: IoU = I / U, and 0 if both masks are empty. On gRefCOCO a phrase may
have none. What it adds depends on whether it has a target and on whether the answer says so (some query was selected, whatever
its mask covers):

| phrase    | answer    | counts as | IoU   | intersection | union                                    |
| --------- | --------- | --------- | ----- | ------------ | ---------------------------------------- |
| no target | no target | TP        | 1     | 0            | 0                                        |
| no target | target    | FN        | 0     | 0            | pixels of the answer                     |
| target    | no target | FP        | 0     | 0            | pixels of the truth (and of the answer)  |
| target    | target    | TN        | I / U | I            | U                                        |

    mIoU, gIoU = mean IoU over all phrases       N-acc = TP / (TP + FN), of the phrases without a target
    oIoU, cIoU = sum of I / sum of U             T-acc = TN / (TN + FP), of the phrases with one
    Pr@X = share of the phrases WITH a target whose IoU is >= X
    F1 = share of the phrases whose boxes all match (`boxes.boxes_f1`)

Benchmarks that define numbers of their own (`benchmark_ratios`) have them beside these, under names with the benchmark's:
"Ref-ZOM mIoU" is over the phrases with a target, "R-RefCOCO mIoU" over refs.

These are the conventions of the public DeRIS code; `scripts/parity/functions.py` compares the numbers. gIoU is unrelated to the
generalised IoU of boxes. An undefined number is None, not 0, and `undefined_metrics` says why: N-acc without no-target phrases,
T-acc and Pr without target phrases, cIoU where no pixel was answered and none was asked for. The public code divides by zero
there, or reports 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PRECISION_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
GRES_PRECISION_LEVELS = (0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Overlap:
    """Pixels of a predicted mask and the ground truth."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """In [0, 1]; 0 for two empty masks."""
        return self.intersection / self.union if self.union else 0.0


def overlap(mask: np.ndarray, truth: np.ndarray) -> Overlap:
    """Counts the pixels of two masks, bool (h, w)."""
    assert mask.shape == truth.shape, f"masks of one size, got {mask.shape} and {truth.shape}"
    intersection = int(np.count_nonzero(mask & truth))
    return Overlap(intersection, int(np.count_nonzero(mask)) + int(np.count_nonzero(truth)) - intersection)


class Outcome(NamedTuple):
    """One phrase's answer against the truth under one protocol: all that the metrics need."""

    overlap: Overlap  # of the answer's mask with the truth, before the quadrants
    has_target: bool = True
    says_target: bool = True
    oracle: Overlap | None = None  # of the best queries, one per referent; None if unknown
    boxes_match: bool | None = None  # None if there are no boxes
    truth_px: int = 0  # area of the truth at the compared size
    image_px: int = 0  # area of the image at the compared size
    ref_id: int | None = None  # REFER's ref: phrases about one object have the same; for `benchmark_ratios`

    @property
    def iou(self) -> float:
        """In [0, 1], by quadrant."""
        if not self.has_target:
            return 0.0 if self.says_target else 1.0
        return self.overlap.iou if self.says_target else 0.0

    @property
    def oracle_iou(self) -> float | None:
        """IoU of the best queries, which also know whether there is a target."""
        return None if self.oracle is None else self.oracle.iou if self.has_target else 1.0


class Ratio(NamedTuple):
    """A metric as sum over phrases / sum over phrases."""

    above: np.ndarray  # (P,), float64; int64 if it counts pixels
    below: np.ndarray  # (P,), of the same type

    def among(self, phrases: np.ndarray) -> Ratio:
        """The metric of some of the phrases, bool (P,)."""
        return Ratio(self.above * phrases, self.below * phrases)

    @property
    def percent(self) -> float | None:
        """None if undefined for these phrases."""
        above, below = self.above.sum().item(), self.below.sum().item()
        if not below:
            return None
        # Integers are exact when scaled first; means are divided first: both as in all published numbers, to the last digit.
        return 100 * above / below if isinstance(above, int) else 100 * (above / below)


def metric_ratios(outcomes: Sequence[Outcome], *, is_generalised: bool) -> dict[str, Ratio]:
    """Returns every metric of P phrases by name, the main one (mIoU, gIoU) first.

    Args:
        outcomes: P, each phrase once; the order does not matter.
        is_generalised: the phrases may name nothing: gIoU, cIoU, N-acc and T-acc instead of mIoU and oIoU.
    """
    ones = np.ones(len(outcomes))
    pixels = np.array([(o.overlap.intersection, o.overlap.union) for o in outcomes], dtype=np.int64).reshape(-1, 2).T
    flags = np.array([(o.has_target, o.says_target) for o in outcomes], dtype=bool).reshape(-1, 2).T
    target, says = flags if is_generalised else np.ones_like(flags)
    intersection, union = pixels[0] * (target & says), pixels[1] * (target | says)
    iou = np.divide(intersection, union, out=np.zeros(len(outcomes)), where=union > 0)
    iou[~target & ~says] = 1
    if is_generalised:
        found = {
            "gIoU": Ratio(iou, ones),
            "cIoU": Ratio(intersection, union),
            "N-acc": Ratio((~says & ~target) * 1.0, ~target * 1.0),
            "T-acc": Ratio((says & target) * 1.0, target * 1.0),
        }
    else:
        found = {"mIoU": Ratio(iou, ones), "oIoU": Ratio(intersection, union)}
    for level in GRES_PRECISION_LEVELS if is_generalised else PRECISION_LEVELS:
        found[f"Pr@{level}"] = Ratio((target & (iou >= level)) * 1.0, target * 1.0)
    if is_generalised and all(o.boxes_match is not None for o in outcomes):
        found["F1"] = Ratio(np.array([o.boxes_match for o in outcomes], dtype=bool) * 1.0, ones)
    if all(o.oracle is not None for o in outcomes):
        oracle_iou = [o.oracle_iou for o in outcomes]
        found["oracle_gIoU" if is_generalised else "oracle_mIoU"] = Ratio(np.array(oracle_iou), ones)
    return found


def benchmark_ratios(outcomes: Sequence[Outcome], benchmark: str | None) -> dict[str, Ratio]:
    """Returns the numbers that a benchmark defines beside those of `metric_ratios`; none for datasets without own ones.

    ``ref-zom`` (toggle1995/RIS-DMMI 753cd60, test.py; DeRIS' refzom.py): mIoU, oIoU and Pr@X of the phrases with a target; Acc
    of the others: the answer covers no pixel.

    ``r-refcoco`` (jianzongwu/robust-ref-seg 97dd7f9, utils/validation.py; DeRIS' rrefcoco.py): a ref has phrases that name its
    object and phrases that name nothing. mIoU: mean over refs of the mean IoU of the former; oIoU: sum I / sum U of the former;
    mRR: mean over refs of the share of the latter whose answer covers no pixel; rIoU: mean over refs of I / U, where the pixels
    answered to the latter are added to U. Refs that lack what a mean needs are left out of it; the public code divides by zero.
    It also adds up the IoU of a ref's phrases before comparing it with X (``summed Pr@X``; Pr@X here is per phrase).
    """
    if benchmark is None:
        return {}
    target, says = np.array([(o.has_target, o.says_target) for o in outcomes], dtype=bool).reshape(-1, 2).T
    pixels = np.array([(o.overlap.intersection, o.overlap.union) for o in outcomes], dtype=np.int64).reshape(-1, 2).T
    intersection, union = pixels[0] * (target & says), pixels[1] * (target | says)
    iou = np.divide(intersection, union, out=np.zeros(len(outcomes)), where=union > 0)
    is_right = ~target & (union == 0)
    hits = {level: (target & (iou >= level)) * 1.0 for level in PRECISION_LEVELS}
    oiou = Ratio(intersection * target, union * target)
    if benchmark == "ref-zom":
        found = {
            "mIoU": Ratio(iou * target, target * 1.0),
            "oIoU": oiou,
            "Acc": Ratio(is_right * 1.0, ~target * 1.0),
        }
        found |= {f"Pr@{level}": Ratio(hit, target * 1.0) for level, hit in hits.items()}
        return {f"Ref-ZOM {name}": ratio for name, ratio in found.items()}
    assert benchmark == "r-refcoco", f"a benchmark with own metrics, got {benchmark}"
    assert all(o.ref_id is not None for o in outcomes), "phrases with a ref"
    refs = np.unique(np.array([o.ref_id for o in outcomes], dtype=np.int64), return_inverse=True)[1]
    running = _running_sums(iou * target, refs)
    summed = {level: (target & (running >= level)) * 1.0 for level in PRECISION_LEVELS}
    found = {
        "mIoU": _mean_over_refs(iou * target, target * 1.0, refs),
        "oIoU": oiou,
        "mRR": _mean_over_refs(is_right * 1.0, ~target * 1.0, refs),
        "rIoU": _mean_over_refs(intersection, union, refs, among=np.bincount(refs, target)[refs] > 0),
    }
    found |= {f"Pr@{level}": Ratio(hit, target * 1.0) for level, hit in hits.items()}
    found |= {f"summed Pr@{level}": Ratio(hit, target * 1.0) for level, hit in summed.items()}
    return {f"R-RefCOCO {name}": ratio for name, ratio in found.items()}


def _mean_over_refs(
    above: np.ndarray, below: np.ndarray, refs: np.ndarray, *, among: np.ndarray | None = None
) -> Ratio:
    """The mean over refs of sum / sum over the ref's phrases; the first phrase of a ref carries its value.

    Args:
        above: (P,).
        below: (P,).
        refs: int (P,), numbers from 0.
        among: bool (P,), phrases of the refs that count; None: those where ``below`` has a sum.
    """
    num_refs = int(refs.max()) + 1 if len(refs) else 0
    sums = np.bincount(refs, above, num_refs), np.bincount(refs, below, num_refs)
    values = np.divide(*sums, out=np.zeros(num_refs), where=sums[1] > 0)
    first = np.zeros(len(refs))
    first[np.unique(refs, return_index=True)[1]] = 1
    counts = first * (sums[1][refs] > 0 if among is None else among)
    return Ratio(values[refs] * counts, counts)


def _running_sums(values: np.ndarray, refs: np.ndarray) -> np.ndarray:
    """For each phrase the sum of the values of its ref's phrases up to it."""
    found = np.zeros(len(values))
    order = np.argsort(refs, kind="stable")
    for phrases in np.split(order, np.flatnonzero(np.diff(refs[order])) + 1):
        found[phrases] = np.cumsum(values[phrases])
    return found


def percents(ratios: Mapping[str, Ratio]) -> dict[str, float | None]:
    """Returns metrics in percent, None if undefined; oIoU of phrases without a single pixel is 0, as their IoU is."""
    found = {name: ratio.percent for name, ratio in ratios.items()}
    if found.get("mIoU") is not None and found["oIoU"] is None:
        found["oIoU"] = 0.0
    return found


def baseline_outcomes(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Returns what answers that ignore the image get on the same phrases: a lower bound for every number of a split.

    Returns:
        ``always_empty``: no phrase has a target; ``never_empty``: every phrase is answered with the whole image.
    """
    areas = [(o.truth_px, o.image_px) for o in outcomes]
    return {
        "always_empty": [Outcome(Overlap(0, truth), has_target=truth > 0, says_target=False) for truth, _ in areas],
        "never_empty": [
            Outcome(Overlap(truth, image), has_target=truth > 0, says_target=True) for truth, image in areas
        ],
    }


def undefined_metrics(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Says why metrics of a generalised split are undefined; empty if all are defined."""
    if not outcomes:
        return ("no phrases: no number",)
    found = []
    if all(o.has_target for o in outcomes):
        found.append("no phrase without a target: no N-acc")
    if not any(o.has_target for o in outcomes):
        found.append("no target phrases: no T-acc, no Pr@X")
    if not any(o.overlap.union for o in outcomes if o.has_target or o.says_target):
        found.append("no pixel answered and none asked for: no cIoU")
    return tuple(found)
