"""How sure a number is: bootstrap intervals, and whether two methods differ. Both by picture, not by phrase.

Phrases of one picture share its difficulty: drawing them one by one would make every interval too narrow.

Letters: P phrases, M pictures, K columns, D draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deris_llm.evaluation.gres_metrics import GRES_PRECISION_LEVELS
from deris_llm.evaluation.metrics import PRECISION_LEVELS, Overlap
from deris_llm.evaluation.predictions import PhrasePrediction, has_oracle

NUM_DRAWS = 1000
NUM_FLIPS = 10_000
SEED = 0
_PERCENTILES = (2.5, 97.5)
_NUMBERS_AT_A_TIME = 4_000_000  # D x M that are drawn together: 32 MB


class Ratio(NamedTuple):
    """A metric as sum over phrases / sum over phrases."""

    above: np.ndarray  # float64 (P,)
    below: np.ndarray  # float64 (P,)

    def among(self, phrases: np.ndarray) -> Ratio:
        """The metric of some phrases, bool (P,)."""
        return Ratio(self.above * phrases, self.below * phrases)

    @property
    def percent(self) -> float | None:
        below = float(self.below.sum())
        return 100 * float(self.above.sum()) / below if below else None


def metric_ratios(predictions: Sequence[PhrasePrediction], protocol: str, *, is_generalised: bool) -> dict[str, Ratio]:
    """Every metric of a split by name, the main one (mIoU, gIoU) first.

    Args:
        predictions: P, those that the protocol counts.
        protocol: id.
        is_generalised: which metrics.
    """
    outcomes = [p.outcome(protocol) for p in predictions]
    ones = np.ones(len(predictions))
    if is_generalised:
        iou = np.array([o.iou for o in outcomes])
        target = np.array([o.has_target for o in outcomes])
        says = np.array([o.says_target for o in outcomes])
        found = {
            "gIoU": Ratio(iou, ones),
            "cIoU": _pixels([o.pixels for o in outcomes]),
            "N-acc": Ratio((~says & ~target) * 1.0, (~target) * 1.0),
            "T-acc": Ratio((says & target) * 1.0, target * 1.0),
        }
        found |= {f"Pr@{x}": Ratio((target & (iou >= x)) * 1.0, target * 1.0) for x in GRES_PRECISION_LEVELS}
        if all(protocol in p.boxes for p in predictions):
            found["F1"] = Ratio(np.array([p.boxes[protocol].f1 == 1 for p in predictions]) * 1.0, ones)
        if has_oracle(predictions, protocol):
            found["oracle_gIoU"] = Ratio(np.array([p.oracle_outcome(protocol).iou for p in predictions]), ones)
        return found
    overlaps = [p.overlaps[protocol] for p in predictions]
    iou = np.array([o.iou for o in overlaps])
    found = {"mIoU": Ratio(iou, ones), "oIoU": _pixels(overlaps)}
    found |= {f"Pr@{x}": Ratio((iou >= x) * 1.0, ones) for x in PRECISION_LEVELS}
    if has_oracle(predictions, protocol):
        found["oracle_mIoU"] = Ratio(np.array([p.oracle_overlaps[protocol].iou for p in predictions]), ones)
    return found


def intervals(
    ratios: Mapping[str, Ratio], image_ids: Sequence[str], *, num_draws: int = NUM_DRAWS, seed: int = SEED
) -> dict[str, tuple[float, float] | None]:
    """95 % bootstrap intervals, percent: pictures are drawn with replacement, each with all of its phrases.

    Args:
        ratios: metrics over P phrases; all are taken of the same draws.
        image_ids: P.
        num_draws: D.
        seed: of the draws.

    Returns:
        By the names of ``ratios``; None where the phrases of a metric are of fewer than two pictures.
    """
    sums_MK, num_images = _by_image(ratios.values(), image_ids)
    if not ratios or not num_images:
        return dict.fromkeys(ratios)
    above_DK, below_DK = _drawn(sums_MK, num_draws=num_draws, seed=seed)
    values_DK = 100 * np.divide(above_DK, below_DK, out=np.full_like(above_DK, np.nan), where=below_DK > 0)
    enough_K = (sums_MK[:, 1::2] > 0).sum(axis=0) > 1
    found: dict[str, tuple[float, float] | None] = {}
    for name, values_D, enough in zip(ratios, values_DK.T, enough_K, strict=True):
        low, high = np.nanpercentile(values_D, _PERCENTILES) if enough else (0.0, 0.0)
        found[name] = (float(low), float(high)) if enough else None
    return found


class Difference(NamedTuple):
    """One metric of two methods on the same phrases: second - first."""

    first: float | None  # percent
    second: float | None
    difference: float | None  # points
    interval: tuple[float, float] | None  # 95 % bootstrap of the difference, both methods on the same drawn pictures


def differences(
    first: Mapping[str, Ratio], second: Mapping[str, Ratio], image_ids: Sequence[str], *, num_draws: int = NUM_DRAWS
) -> dict[str, Difference]:
    """Metrics that both methods have, side by side; see `intervals`."""
    names = [name for name in first if name in second]
    sums_MK, num_images = _by_image([each[name] for each in (first, second) for name in names], image_ids)
    above_DK, below_DK = _drawn(sums_MK, num_draws=num_draws, seed=SEED)
    values_DK = 100 * np.divide(above_DK, below_DK, out=np.full_like(above_DK, np.nan), where=below_DK > 0)
    found = {}
    for k, name in enumerate(names):
        one, other = first[name].percent, second[name].percent
        change_D = values_DK[:, k + len(names)] - values_DK[:, k]
        sure = one is not None and other is not None and num_images > 1
        low, high = np.nanpercentile(change_D, _PERCENTILES) if sure else (0.0, 0.0)
        found[name] = Difference(
            one,
            other,
            None if one is None or other is None else other - one,
            (float(low), float(high)) if sure else None,
        )
    return found


def sign_flip_p_value(
    first_P: np.ndarray, second_P: np.ndarray, image_ids: Sequence[str], *, num_flips: int = NUM_FLIPS
) -> float:
    """Two-sided paired permutation test: could the sum of the phrases' differences come about by chance?

    If both methods were alike, either could have got either value of a picture: the sign of a picture's whole difference
    is flipped at random.

    Args:
        first_P: float (P,), IoU of the first method.
        second_P: float (P,), of the second.
        image_ids: P.
        num_flips: random sign patterns; the smallest p is 1 / (num_flips + 1).

    Returns:
        p in (0, 1].
    """
    sums_MK, num_images = _by_image([Ratio(second_P - first_P, np.ones(len(first_P)))], image_ids)
    change_M = sums_MK[:, 0][sums_MK[:, 0] != 0]
    seen = abs(change_M.sum())
    random, as_far = np.random.default_rng(SEED), 0
    for size in _portions(num_flips, max(len(change_M), 1)):
        signs = random.integers(0, 2, (size, len(change_M)), dtype=np.int8)
        flipped = (2.0 * signs - 1) @ change_M
        as_far += int((np.abs(flipped) >= seen - 1e-9).sum())
    return (1 + as_far) / (1 + num_flips)


def _pixels(overlaps: Sequence[Overlap]) -> Ratio:
    found = np.array([(o.intersection, o.union) for o in overlaps], dtype=np.float64).reshape(-1, 2)
    return Ratio(found[:, 0], found[:, 1])


def _by_image(ratios: Iterable[Ratio], image_ids: Sequence[str]) -> tuple[np.ndarray, int]:
    """Sums of each picture's phrases, float64 (M, 2K): a metric's `above` and `below` side by side; and M."""
    names, index_P = np.unique(np.array(image_ids, dtype=str), return_inverse=True)
    columns = [column for ratio in ratios for column in ratio]
    sums = np.zeros((len(names), len(columns)))
    for k, column in enumerate(columns):
        sums[:, k] = np.bincount(index_P, weights=column, minlength=len(names))
    return sums, len(names)


def _drawn(sums_MK: np.ndarray, *, num_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums over M pictures drawn with replacement: `above` (D, K), `below` (D, K)."""
    random, num_images = np.random.default_rng(seed), len(sums_MK)
    parts = []
    for size in _portions(num_draws, num_images):
        drawn = random.integers(0, num_images, (size, num_images)) + num_images * np.arange(size)[:, None]
        times_DM = np.bincount(drawn.ravel(), minlength=size * num_images).reshape(size, num_images)
        parts.append(times_DM.astype(np.float64) @ sums_MK)
    sums_DK = np.concatenate(parts)
    return sums_DK[:, 0::2], sums_DK[:, 1::2]


def _portions(number: int, width: int) -> Iterator[int]:
    """Splits a number of rows so that rows x width stays in memory."""
    step = max(1, _NUMBERS_AT_A_TIME // max(width, 1))
    yield from (min(step, number - start) for start in range(0, number, step))
