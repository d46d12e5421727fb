"""Numbers that benchmarks define: against loops over refs and phrases, as their public code runs them, and by hand."""

import numpy as np
import pytest

from deris_llm.evaluation.metrics import Outcome, Overlap, benchmark_ratios, percents


def _random_outcomes(seed: int) -> list[Outcome]:
    """Refs of 1-3 phrases that name the object and 1-4 that name nothing, shuffled; a tenth of the answers is empty."""
    random = np.random.default_rng(seed)
    found = []
    for ref_id in range(40):
        for has_target in [True] * random.integers(1, 4) + [False] * random.integers(1, 5):
            says = bool(random.random() > 0.1)
            truth, answer = (int(random.integers(1, 900)) * part for part in (has_target, says))
            both = int(random.integers(0, min(truth, answer) + 1)) if random.random() > 0.5 else min(truth, answer)
            found.append(Outcome(Overlap(both, truth + answer - both), has_target, says, ref_id=1000 - ref_id))
    return [found[i] for i in random.permutation(len(found))]


def _by_ref(outcomes: list[Outcome]) -> list[list[Outcome]]:
    refs: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        refs.setdefault(outcome.ref_id or 0, []).append(outcome)
    return list(refs.values())


@pytest.mark.parametrize("seed", range(4))
def test_r_refcoco_as_its_public_code_adds_up(seed: int) -> None:
    outcomes = _random_outcomes(seed)
    means, robust, both, sums, hits, phrases = [], [], [], np.zeros(2), 0, 0
    for ref in _by_ref(outcomes):
        named = [o.overlap for o in ref if o.has_target]
        pixels = np.array([(each.intersection, each.union) for each in named]).sum(axis=0)
        sums += pixels
        running = 0.0
        for each in named:
            running += each.iou
            hits += running >= 0.7
            phrases += 1
        means.append(running / len(named))
        areas = [o.overlap.union for o in ref if not o.has_target]
        robust.append(sum(area == 0 for area in areas) / len(areas))
        both.append(pixels[0] / (pixels[1] + sum(areas)))
    found = percents(benchmark_ratios(outcomes, "r-refcoco"))
    expected = {
        "mIoU": np.mean(means),
        "oIoU": sums[0] / sums[1],
        "mRR": np.mean(robust),
        "rIoU": np.mean(both),
        "summed Pr@0.7": hits / phrases,
    }
    assert {name: found[f"R-RefCOCO {name}"] for name in expected} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )


@pytest.mark.parametrize("seed", range(4))
def test_ref_zom_as_its_public_code_adds_up(seed: int) -> None:
    outcomes = _random_outcomes(seed)
    named = [o.overlap for o in outcomes if o.has_target]
    found = percents(benchmark_ratios(outcomes, "ref-zom"))
    assert found["Ref-ZOM mIoU"] == pytest.approx(100 * np.mean([each.iou for each in named]))
    assert found["Ref-ZOM oIoU"] == pytest.approx(
        100 * sum(o.intersection for o in named) / sum(o.union for o in named)
    )
    assert found["Ref-ZOM Acc"] == pytest.approx(
        100 * np.mean([o.overlap.union == 0 for o in outcomes if not o.has_target])
    )
    assert found["Ref-ZOM Pr@0.9"] == pytest.approx(100 * np.mean([each.iou >= 0.9 for each in named]))


def test_the_sum_of_ious_counts_a_phrase_that_is_wrong() -> None:
    """Two answers of IoU 0.4 and one wrong: the public Pr@0.5 counts two of three as right, because it sums up to 0.8."""
    outcomes = [Outcome(Overlap(*pixels), ref_id=1) for pixels in ((40, 100), (40, 100), (0, 100))]
    found = percents(benchmark_ratios(outcomes, "r-refcoco"))
    assert found["R-RefCOCO Pr@0.5"] == 0
    assert found["R-RefCOCO summed Pr@0.5"] == pytest.approx(200 / 3)


def test_pixels_of_a_wrong_answer_join_the_union_of_its_ref_alone() -> None:
    outcomes = [
        Outcome(Overlap(50, 100), ref_id=1),
        Outcome(Overlap(0, 300), has_target=False, ref_id=1),
        Outcome(Overlap(0, 0), has_target=False, says_target=False, ref_id=1),
        Outcome(Overlap(100, 100), ref_id=2),
        Outcome(Overlap(0, 0), has_target=False, says_target=True, ref_id=2),  # a selected query without a pixel
    ]
    found = percents(benchmark_ratios(outcomes, "r-refcoco"))
    assert found["R-RefCOCO rIoU"] == pytest.approx(100 * (50 / 400 + 1) / 2)
    assert found["R-RefCOCO mRR"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert found["R-RefCOCO oIoU"] == 75


def test_refs_without_phrases_of_a_kind_are_left_out_of_its_means() -> None:
    only_named = [Outcome(Overlap(50, 100), ref_id=1)]
    only_wrong = [Outcome(Overlap(0, 10), has_target=False, ref_id=2)]
    found = percents(benchmark_ratios(only_named + only_wrong, "r-refcoco"))
    assert (found["R-RefCOCO mIoU"], found["R-RefCOCO rIoU"], found["R-RefCOCO mRR"]) == (50, 50, 0)
    assert percents(benchmark_ratios(only_named, "r-refcoco"))["R-RefCOCO mRR"] is None


def test_other_datasets_have_no_own_numbers() -> None:
    assert benchmark_ratios([Outcome(Overlap(1, 2))], None) == {}
    for benchmark in ("ref-zom", "r-refcoco"):
        assert set(percents(benchmark_ratios([], benchmark)).values()) == {None}
