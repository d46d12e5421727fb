"""Bootstrap by picture against a slow re-write; the paired test; breakdown against means by hand."""

import numpy as np
import pytest

from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.breakdown import breakdown
from deris_llm.evaluation.intervals import differences, intervals, sign_flip_p_value
from deris_llm.evaluation.metrics import Outcome, Overlap, Ratio, metric_ratios
from deris_llm.structures import InstanceAnnotation, ReferringRecord

PROTOCOL = "original"
PHRASES = (
    "the left cat",
    "dog",
    "a very long phrase about the thing behind the other thing",
    "second one from the top",
    "cat",
)


def _predictions(seed: int = 0, *, generalised: bool = False) -> list[Answer]:
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
                Answer(
                    phrase_id=f"refcoco/val/{image}-{k}",
                    image=f"{image}.jpg",
                    image_id=str(image),
                    phrase=PHRASES[k],
                    has_target=has_target,
                    says_target=says_target,
                    truth_px=int(union * 0.7) if has_target else 0,
                    outcomes={
                        PROTOCOL: Outcome(
                            Overlap(inside, union),
                            has_target=has_target,
                            says_target=says_target,
                            oracle=Overlap((inside + union) // 2 if has_target else 0, union),
                        )
                    },
                )
            )
    return found


def _record(prediction: Answer, number: int) -> ReferringRecord:
    instances = tuple(InstanceAnnotation(i, []) for i in range(number % 3)) if not prediction.has_target else ()
    return ReferringRecord(
        prediction.phrase_id, "refcoco", "val", prediction.image_id, "", 640, 480, prediction.phrase, instances,
        num_same_class=number % 5 if number % 7 else None,
    )  # fmt: skip


def _ratios(answers: list[Answer], *, generalised: bool = False) -> dict[str, Ratio]:
    return metric_ratios([answer.outcomes[PROTOCOL] for answer in answers], is_generalised=generalised)


@pytest.mark.parametrize("generalised", [False, True])
def test_ratios_are_the_metrics(generalised: bool) -> None:
    """By loops over the phrases, which share nothing with the columns."""
    outcomes = [answer.outcomes[PROTOCOL] for answer in _predictions(generalised=generalised)]
    ious = [o.iou if generalised else o.overlap.iou for o in outcomes]
    asked = [o for o in outcomes if o.has_target]
    union = sum(o.overlap.union for o in outcomes if o.has_target or o.says_target)
    shared = sum(o.overlap.intersection for o in outcomes if o.has_target and o.says_target)
    expected = dict.fromkeys(("gIoU",) if generalised else ("mIoU",), 100 * np.mean(ious))
    expected["cIoU" if generalised else "oIoU"] = 100 * shared / union
    if generalised:
        expected["N-acc"] = 100 * np.mean([not o.says_target for o in outcomes if not o.has_target])
        expected["T-acc"] = 100 * np.mean([o.says_target for o in asked])
    for level in (0.7, 0.8, 0.9) if generalised else (0.5, 0.6, 0.7, 0.8, 0.9):
        expected[f"Pr@{level}"] = 100 * np.mean([o.iou >= level for o in asked])
    expected[f"oracle_{next(iter(expected))}"] = 100 * np.mean([o.oracle_iou for o in outcomes])
    found = metric_ratios(outcomes, is_generalised=generalised)
    assert {name: ratio.percent for name, ratio in found.items()} == expected  # to the last digit


@pytest.mark.parametrize("generalised", [False, True])
def test_intervals_equal_a_loop_over_draws(generalised: bool) -> None:
    predictions = _predictions(generalised=generalised)
    ratios = _ratios(predictions, generalised=generalised)
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
    ratios = _ratios(predictions)
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
    ratios = _ratios(predictions)
    assert set(intervals(ratios, [p.image_id for p in predictions]).values()) == {None}
    assert intervals({}, []) == {}


def test_a_method_against_itself_and_against_a_better_one() -> None:
    predictions = _predictions()
    images = [p.image_id for p in predictions]
    ratios = _ratios(predictions)
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
    found = breakdown(predictions, records, _ratios(predictions, generalised=generalised))
    assert set(found) == {"object_size", "phrase_length", "location_words", "same_class"} | (
        {"targets"} if generalised else set()
    )
    metric = "gIoU" if generalised else "mIoU"

    def row(dimension: str, label: str) -> dict:
        return next(row for row in found[dimension] if row["label"] == label)

    def mean(chosen: list[Answer]) -> float:
        outcomes = [answer.outcomes[PROTOCOL] for answer in chosen]
        return 100 * float(np.mean([o.iou if generalised else o.overlap.iou for o in outcomes]))

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
