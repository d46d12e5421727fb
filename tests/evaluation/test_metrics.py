"""Metrics by hand: RIS, the four quadrants of GRES, splits of one kind; upstream's numbers: test_parity_functions.py."""

import numpy as np
import pytest

from deris_llm.evaluation.metrics import (
    Outcome,
    Overlap,
    baseline_outcomes,
    metric_ratios,
    overlap,
    percents,
    undefined_metrics,
)

RIGHT_EMPTY = Outcome(Overlap(0, 0), has_target=False, says_target=False)
WRONG_FULL = Outcome(Overlap(0, 40), has_target=False, says_target=True)
WRONG_EMPTY = Outcome(Overlap(0, 30), has_target=True, says_target=False)
HIT = Outcome(Overlap(70, 100), has_target=True, says_target=True)


def _ris(*overlaps: Overlap) -> dict[str, float | None]:
    return percents(metric_ratios([Outcome(each) for each in overlaps], is_generalised=False))


def _gres(*outcomes: Outcome) -> dict[str, float | None]:
    found = percents(metric_ratios(outcomes, is_generalised=True))
    assert list(found)[:7] == ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    return found


def test_two_empty_masks_count_zero() -> None:
    nothing = overlap(np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool))
    assert nothing == Overlap(0, 0)
    found = {name: value for name, value in _ris(nothing).items() if name != "oracle_mIoU"}
    assert found == {"mIoU": 0, "oIoU": 0} | {f"Pr@0.{i}": 0 for i in range(5, 10)}


def test_a_miss_lowers_the_mean_and_stays_in_the_union() -> None:
    found = _ris(Overlap(10, 10), Overlap(0, 30))
    assert (found["mIoU"], found["oIoU"], found["Pr@0.5"]) == (50, 25, 50)


def test_precision_includes_its_level() -> None:
    assert _ris(Overlap(1, 2))["Pr@0.5"] == 100
    assert _ris(Overlap(9, 10))["Pr@0.9"] == 100


def test_every_phrase_of_refcoco_has_an_answer() -> None:
    """A mask counts as it is, whatever the answer says: there are no quadrants."""
    unselected = Outcome(Overlap(70, 100), has_target=True, says_target=False)
    assert percents(metric_ratios([unselected], is_generalised=False))["mIoU"] == 70


def test_the_four_quadrants() -> None:
    outcomes = (RIGHT_EMPTY, WRONG_FULL, WRONG_EMPTY, HIT)
    found = _gres(*outcomes)
    assert found["gIoU"] == pytest.approx(100 * (1 + 0 + 0 + 0.7) / 4)
    assert found["cIoU"] == pytest.approx(100 * 70 / (0 + 40 + 30 + 100))
    assert (found["N-acc"], found["T-acc"]) == (50, 50)
    assert [found[f"Pr@{x}"] for x in (0.7, 0.8, 0.9)] == [50, 0, 0]  # of the two phrases with a target
    assert undefined_metrics(outcomes) == ()
    assert found["gIoU"] == pytest.approx(100 * np.mean([outcome.iou for outcome in outcomes]))


def test_the_score_decides_not_the_mask() -> None:
    """A selected query with an empty mask says that there is a target; an unselected one's mask counts as no answer."""
    assert _gres(Outcome(Overlap(0, 0), has_target=False, says_target=True))["N-acc"] == 0
    unselected = Outcome(Overlap(20, 50), has_target=True, says_target=False)
    assert unselected.iou == 0
    pixels = metric_ratios([unselected], is_generalised=True)["cIoU"]
    assert (pixels.above.tolist(), pixels.below.tolist()) == ([0], [50])


def test_only_phrases_with_a_target() -> None:
    found = _gres(WRONG_EMPTY, HIT, HIT)
    assert found["N-acc"] is None
    assert found["T-acc"] == pytest.approx(200 / 3)  # upstream reports 0 here
    assert undefined_metrics((WRONG_EMPTY, HIT, HIT)) == ("no phrase without a target: no N-acc",)


def test_only_phrases_without_a_target() -> None:
    found = _gres(RIGHT_EMPTY, WRONG_FULL)
    assert (found["gIoU"], found["cIoU"], found["N-acc"]) == (50, 0, 50)
    assert found["T-acc"] is None
    assert {found[f"Pr@{x}"] for x in (0.7, 0.8, 0.9)} == {None}
    assert undefined_metrics((RIGHT_EMPTY, WRONG_FULL)) == ("no target phrases: no T-acc, no Pr@X",)
    perfect = _gres(RIGHT_EMPTY)
    assert (perfect["gIoU"], perfect["cIoU"]) == (100, None)
    assert undefined_metrics((RIGHT_EMPTY,))[-1] == "no pixel answered and none asked for: no cIoU"


def test_no_phrase_is_no_number() -> None:
    assert set(_ris().values()) == set(_gres().values()) == {None}
    assert undefined_metrics(()) == ("no phrases: no number",)


def test_the_order_of_phrases_does_not_matter() -> None:
    outcomes = (RIGHT_EMPTY, WRONG_FULL, WRONG_EMPTY, HIT, HIT)
    assert _gres(*outcomes) == pytest.approx(_gres(*outcomes[::-1]))


def test_boxes_and_best_queries_are_counted_where_all_phrases_have_them() -> None:
    known = (
        Outcome(Overlap(50, 100), oracle=Overlap(90, 100), boxes_match=True),
        Outcome(Overlap(0, 9), has_target=False, oracle=Overlap(0, 0), boxes_match=False),
        Outcome(Overlap(0, 9), says_target=False, oracle=Overlap(30, 100), boxes_match=True),
    )
    found = _gres(*known)
    assert found["F1"] == pytest.approx(200 / 3)
    assert found["oracle_gIoU"] == pytest.approx(100 * (0.9 + 1 + 0.3) / 3)  # they know whether there is a target
    assert {"F1", "oracle_gIoU"} & _gres(*known, HIT).keys() == set()


def test_baselines() -> None:
    """Two phrases with a target of 25 and 50 of 100 pixels, two without."""
    areas = [Outcome(Overlap(0, 0), truth_px=truth, image_px=100) for truth in (25, 0, 50, 0)]
    outcomes = baseline_outcomes(areas)
    empty, full = (_gres(*outcomes[name]) for name in ("always_empty", "never_empty"))
    assert [empty[name] for name in ("gIoU", "cIoU", "N-acc", "T-acc")] == [50, 0, 100, 0]
    assert [full[name] for name in ("gIoU", "N-acc", "T-acc")] == [100 * 0.75 / 4, 0, 100]
    assert full["cIoU"] == pytest.approx(100 * 75 / 400)
