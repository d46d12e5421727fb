"""Bootstrap by picture against a slow re-write; the paired test; breakdown against means by hand."""

import numpy as np
import pytest

from deris_llm.evaluation.breakdown import breakdown
from deris_llm.evaluation.gres_metrics import GresMetrics
from deris_llm.evaluation.intervals import differences, intervals, metric_ratios, sign_flip_p_value
from deris_llm.evaluation.metrics import Overlap, RisMetrics
from deris_llm.evaluation.predictions import PhrasePrediction
from deris_llm.structures import InstanceAnnotation, ReferringRecord

PROTOCOL = "original"
PHRASES = (
    "the left cat",
    "dog",
    "a very long phrase about the thing behind the other thing",
    "second one from the top",
    "cat",
)


def _predictions(seed: int = 0, *, generalised: bool = False) -> list[PhrasePrediction]:
    """30 pictures of 1 to 5 phrases."""
    random = np.random.default_rng(seed)
    found = []
    for image in range(30):
        for k in range(1 + image % 5):
            union = int(random.integers(50, 20_000))
            has_target = not (generalised and random.random() < 0.3)
            says_target = not (generalised and random.random() < 0.3)
            inside = int(union * random.random()) if has_target else 0
            found.append(
                PhrasePrediction(
                    phrase_id=f"refcoco/val/{image}-{k}",
                    image=f"{image}.jpg",
                    image_id=str(image),
                    phrase=PHRASES[k],
                    mask={},
                    overlaps={PROTOCOL: Overlap(inside, union)},
                    oracle_overlaps={PROTOCOL: Overlap((inside + union) // 2 if has_target else 0, union)},
                    top_scores=(),
                    presence=None,
                    has_target=has_target,
                    says_target=says_target,
                    truth_px=int(union * 0.7) if has_target else 0,
                )
            )
    return found


def _record(prediction: PhrasePrediction, number: int) -> ReferringRecord:
    instances = tuple(InstanceAnnotation(i, []) for i in range(number % 3)) if not prediction.has_target else ()
    return ReferringRecord(
        prediction.phrase_id, "refcoco", "val", prediction.image_id, "", 640, 480, prediction.phrase, instances,
        num_same_class=number % 5 if number % 7 else None,
    )  # fmt: skip


@pytest.mark.parametrize("generalised", [False, True])
def test_ratios_are_the_metrics(generalised: bool) -> None:
    predictions = _predictions(generalised=generalised)
    ratios = metric_ratios(predictions, PROTOCOL, is_generalised=generalised)
    expected = (
        GresMetrics.of([p.outcome(PROTOCOL) for p in predictions]).named()
        if generalised
        else RisMetrics.of([p.overlaps[PROTOCOL] for p in predictions]).named()
    )
    assert {name: ratios[name].percent for name in expected} == pytest.approx(expected)
    assert set(ratios) - set(expected) <= {"oracle_mIoU", "oracle_gIoU", "F1"}


@pytest.mark.parametrize("generalised", [False, True])
def test_intervals_equal_a_loop_over_draws(generalised: bool) -> None:
    predictions = _predictions(generalised=generalised)
    ratios = metric_ratios(predictions, PROTOCOL, is_generalised=generalised)
    found = intervals(ratios, [p.image_id for p in predictions], num_draws=200, seed=3)
    images = sorted({p.image_id for p in predictions})  # the order in which pictures are numbered
    drawn = np.random.default_rng(3).integers(0, len(images), (200, len(images)))
    values: dict[str, list[float]] = {name: [] for name in ratios}
    for row in drawn:
        phrases = [i for image in row for i, p in enumerate(predictions) if p.image_id == images[image]]
        for name, ratio in ratios.items():
            values[name].append(100 * ratio.above[phrases].sum() / ratio.below[phrases].sum())
    for name, seen in values.items():
        assert found[name] == pytest.approx(tuple(np.percentile(seen, [2.5, 97.5])))
        low, high = found[name] or (0, 0)
        assert low <= (ratios[name].percent or 0) <= high


def test_pictures_are_drawn_and_not_phrases() -> None:
    """Ten copies of every phrase in its own picture tell nothing new; in pictures of their own they would."""
    predictions = _predictions()
    images = [p.image_id for p in predictions]
    ratios = metric_ratios(predictions, PROTOCOL, is_generalised=False)
    (low, high), (low_10, high_10) = (
        intervals({"mIoU": ratio}, ids)["mIoU"] or (0, 0)
        for ratio, ids in (
            (ratios["mIoU"], images),
            (type(ratios["mIoU"])(*(np.tile(column, 10) for column in ratios["mIoU"])), images * 10),
        )
    )
    assert (low_10, high_10) == pytest.approx((low, high))


def test_one_picture_has_no_interval() -> None:
    predictions = [p for p in _predictions() if p.image_id == "4"]
    ratios = metric_ratios(predictions, PROTOCOL, is_generalised=False)
    assert set(intervals(ratios, [p.image_id for p in predictions]).values()) == {None}
    assert intervals({}, []) == {}


def test_a_method_against_itself_and_against_a_better_one() -> None:
    predictions = _predictions()
    images = [p.image_id for p in predictions]
    ratios = metric_ratios(predictions, PROTOCOL, is_generalised=False)
    same = differences(ratios, ratios, images)
    assert {name: (d.difference, d.interval) for name, d in same.items()} == dict.fromkeys(ratios, (0.0, (0.0, 0.0)))
    iou = ratios["mIoU"].above
    assert sign_flip_p_value(iou, iou, images) == 1
    better = {"mIoU": type(ratios["mIoU"])(np.minimum(iou + 0.05, 1), ratios["mIoU"].below)}
    found = differences(ratios, better, images)["mIoU"]
    assert found.interval is not None
    assert 0 < found.interval[0] <= (found.difference or 0) <= found.interval[1] <= 5
    assert sign_flip_p_value(iou, better["mIoU"].above, images) < 0.001
    noise = np.random.default_rng(9).normal(0, 0.1, len(iou))
    assert sign_flip_p_value(iou, iou + noise, images) > 0.01
    assert sign_flip_p_value(iou, better["mIoU"].above, images) == sign_flip_p_value(better["mIoU"].above, iou, images)


def test_p_values_are_uniform_where_methods_are_alike() -> None:
    random = np.random.default_rng(1)
    images = [str(i // 3) for i in range(60)]
    found = [sign_flip_p_value(random.random(60), random.random(60), images, num_flips=200) for _ in range(100)]
    assert 0.35 < np.mean(found) < 0.65
    assert sum(p < 0.1 for p in found) < 25


@pytest.mark.parametrize("generalised", [False, True])
def test_breakdown_rows_are_means_of_their_phrases(generalised: bool) -> None:
    predictions = _predictions(generalised=generalised)
    records = {p.phrase_id: _record(p, number) for number, p in enumerate(predictions)}
    found = breakdown(predictions, records, PROTOCOL, is_generalised=generalised)
    assert set(found) == {"object_size", "phrase_length", "location_words", "same_class"} | (
        {"targets"} if generalised else set()
    )
    metric = "gIoU" if generalised else "mIoU"

    def row(dimension: str, label: str) -> dict:
        return next(row for row in found[dimension] if row["label"] == label)

    def mean(chosen: list[PhrasePrediction]) -> float:
        return 100 * float(
            np.mean([p.outcome(PROTOCOL).iou if generalised else p.overlaps[PROTOCOL].iou for p in chosen])
        )

    dogs = [p for p in predictions if p.phrase in ("dog", "cat")]
    assert row("phrase_length", "1-2 words")["n_phrases"] == len(dogs)
    assert row("phrase_length", "1-2 words")[metric] == pytest.approx(mean(dogs))
    assert sum(r["n_phrases"] for r in found["phrase_length"]) == len(predictions)
    lefts = [p for p in predictions if "left" in p.phrase.split()]
    assert row("location_words", "left")[metric] == pytest.approx(mean(lefts))
    tops = [p for p in predictions if "top" in p.phrase]  # "second one from the top" is in two rows
    assert row("location_words", "top")["n_phrases"] == row("location_words", "ordinal")["n_phrases"] == len(tops)
    small = [p for p in predictions if p.has_target and p.truth_px < 32**2]
    assert row("object_size", "small, < 32x32 px")[metric] == pytest.approx(mean(small))
    assert sum(r["n_phrases"] for r in found["object_size"]) == sum(p.has_target for p in predictions)
    assert sum(r["n_phrases"] for r in found["same_class"]) == sum(
        r.num_same_class is not None for r in records.values()
    )
    assert all(r["interval"][0] <= r[metric] <= r["interval"][1] for r in found["phrase_length"])
    assert all("oracle" in r for rows in found.values() for r in rows)
