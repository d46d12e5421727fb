"""Bootstrap intervals, and a test whether two methods differ. Both resample images, not phrases.

Phrases of one image share its difficulty: drawing them one by one would make every interval too narrow.

Letters: P phrases, M images, K columns, D draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deris_llm.evaluation.metrics import Ratio

NUM_DRAWS = 1000
NUM_FLIPS = 10_000
SEED = 0
_PERCENTILES = (2.5, 97.5)
_NUMBERS_AT_A_TIME = 4_000_000  # D x M that are drawn together: 32 MB


def intervals(
    ratios: Mapping[str, Ratio], image_ids: Sequence[str], *, num_draws: int = NUM_DRAWS, seed: int = SEED
) -> dict[str, tuple[float, float] | None]:
    """Returns 95 % bootstrap intervals in percent: images are drawn with replacement, each with all of its phrases.

    Args:
        ratios: metrics over P phrases; all use the same draws.
        image_ids: P; of frames the name of their video, because frames of a video resemble each other.
        num_draws: D.
        seed: of the draws.

    Returns:
        By the names of ``ratios``; None if the phrases of a metric belong to fewer than two images.
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
    interval: tuple[float, float] | None  # 95 % bootstrap of the difference, both methods on the same drawn images


def differences(
    first: Mapping[str, Ratio], second: Mapping[str, Ratio], image_ids: Sequence[str], *, num_draws: int = NUM_DRAWS
) -> dict[str, Difference]:
    """Returns the metrics that both methods have, side by side; see `intervals`."""
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

    If both methods were equally good, either could have got either value of an image: the sign of an image's whole
    difference is flipped at random.

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


def _by_image(ratios: Iterable[Ratio], image_ids: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns the sums over each image's phrases, float64 (M, 2K), a metric's `above` and `below` side by side; and M."""
    names, index_P = np.unique(np.array(image_ids, dtype=str), return_inverse=True)
    columns = [column for ratio in ratios for column in ratio]
    sums = np.zeros((len(names), len(columns)))
    for k, column in enumerate(columns):
        sums[:, k] = np.bincount(index_P, weights=column, minlength=len(names))
    return sums, len(names)


def _drawn(sums_MK: np.ndarray, *, num_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums over M images drawn with replacement: `above` (D, K), `below` (D, K)."""
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
