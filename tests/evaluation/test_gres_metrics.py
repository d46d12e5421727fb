"""GRES and GREC: the four quadrants by hand, splits of one kind only; upstream's numbers: test_parity_functions.py."""

import numpy as np
import pytest

from deris_llm.evaluation.gres_metrics import (
    GrecMetrics,
    GrecOutcome,
    GresMetrics,
    GresOutcome,
    baseline_outcomes,
)
from deris_llm.evaluation.metrics import Overlap

RIGHT_EMPTY = GresOutcome(Overlap(0, 0), has_target=False, says_target=False)
WRONG_FULL = GresOutcome(Overlap(0, 40), has_target=False, says_target=True)
WRONG_EMPTY = GresOutcome(Overlap(0, 30), has_target=True, says_target=False)
HIT = GresOutcome(Overlap(70, 100), has_target=True, says_target=True)


def test_the_four_quadrants() -> None:
    metrics = GresMetrics.of([RIGHT_EMPTY, WRONG_FULL, WRONG_EMPTY, HIT])
    assert metrics.giou == pytest.approx(100 * (1 + 0 + 0 + 0.7) / 4)
    assert metrics.ciou == pytest.approx(100 * 70 / (0 + 40 + 30 + 100))
    assert (metrics.n_acc, metrics.t_acc) == (50, 50)
    assert metrics.precision_at == {0.7: 50, 0.8: 0, 0.9: 0}  # of the two phrases with a target
    assert (metrics.num_no_target, metrics.num_target) == (2, 2)
    assert metrics.notes == ()
    assert list(metrics.named()) == ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]


def test_the_score_decides_not_the_mask() -> None:
    """A selected query with an empty mask says that there is a target; an unselected one's mask counts as no answer."""
    assert GresMetrics.of([GresOutcome(Overlap(0, 0), has_target=False, says_target=True)]).n_acc == 0
    unselected = GresOutcome(Overlap(20, 50), has_target=True, says_target=False)
    assert unselected.iou == 0
    assert unselected.pixels == Overlap(0, 50)


def test_only_phrases_with_a_target() -> None:
    metrics = GresMetrics.of([WRONG_EMPTY, HIT, HIT])
    assert metrics.n_acc is None
    assert metrics.t_acc == pytest.approx(200 / 3)  # upstream reports 0 here
    assert metrics.notes == ("no phrase without a target: no N-acc",)


def test_only_phrases_without_a_target() -> None:
    metrics = GresMetrics.of([RIGHT_EMPTY, WRONG_FULL])
    assert (metrics.giou, metrics.ciou, metrics.n_acc) == (50, 0, 50)
    assert metrics.t_acc is None
    assert set(metrics.precision_at.values()) == {None}
    assert metrics.notes == ("no target phrases: no T-acc, no Pr@X",)
    perfect = GresMetrics.of([RIGHT_EMPTY])
    assert (perfect.giou, perfect.ciou) == (100, None)
    assert perfect.notes[-1] == "no pixel answered and none asked for: no cIoU"


def test_no_phrase_is_no_number() -> None:
    metrics = GresMetrics.of([])
    assert set(metrics.named().values()) == {None}
    assert metrics.notes == ("no phrases: no number",)


def test_the_order_of_phrases_does_not_matter() -> None:
    outcomes = [RIGHT_EMPTY, WRONG_FULL, WRONG_EMPTY, HIT, HIT]
    assert GresMetrics.of(outcomes).named() == pytest.approx(GresMetrics.of(outcomes[::-1]).named())


def test_baselines() -> None:
    """Two phrases with a target of 25 and 50 of 100 pixels, two without."""
    outcomes = baseline_outcomes([(25, 100), (0, 100), (50, 100), (0, 100)])
    empty, full = (GresMetrics.of(outcomes[name]) for name in ("always empty", "never empty"))
    assert (empty.giou, empty.ciou, empty.n_acc, empty.t_acc) == (50, 0, 100, 0)
    assert (full.giou, full.n_acc, full.t_acc) == (100 * 0.75 / 4, 0, 100)
    assert full.ciou == pytest.approx(100 * 75 / 400)


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
    outcome = GrecOutcome.of(boxes, truth)
    assert outcome.f1 == pytest.approx(f1)
    assert (outcome.has_target, outcome.says_target) == (len(truth) > 0, len(boxes) > 0)


def test_boxes_are_matched_by_generalised_overlap() -> None:
    """IoU 0.5 passes; the same IoU with a gap in the box around both does not."""
    assert GrecOutcome.of(np.array([[0.0, 0, 10, 5]]), SQUARE).f1 == 1
    shifted = np.array([[2.0, 2, 12, 12]])  # IoU 64 / 136, GIoU less
    assert GrecOutcome.of(shifted, SQUARE).f1 == 0


def test_grec_over_a_split() -> None:
    outcomes = [GrecOutcome.of(SQUARE, SQUARE), GrecOutcome.of(NONE, NONE), GrecOutcome.of(NONE, SQUARE)]
    metrics = GrecMetrics.of(outcomes)
    assert metrics.f1 == pytest.approx(200 / 3)
    assert (metrics.n_acc, metrics.t_acc) == (100, 50)
    assert GrecMetrics.of([]).named() == {"F1": None, "N-acc": None, "T-acc": None}
