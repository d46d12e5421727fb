"""An inspection gives what the pipeline gives, by any rule, from one run of the network."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from deris_llm import DerisPipeline
from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.inspection import Inspection
from deris_llm.structures import DerisOutput, RoundOutput
from deris_llm.testing import synthetic_images

PHRASES = ["red circle", "the small blue square on the left", "star", "a green ring behind the large triangle", "ring"]


@pytest.fixture(scope="module")
def inspection(pipeline: DerisPipeline) -> Inspection:
    return pipeline.inspect(synthetic_images(1)[0], PHRASES)


def with_settings(pipeline: DerisPipeline, **evaluation: object) -> DerisPipeline:
    settings = dataclasses.replace(pipeline.config.evaluation, **evaluation)
    return DerisPipeline(dataclasses.replace(pipeline.config, evaluation=settings), pipeline.model, pipeline.processor)


def assert_equal(ours: ImageAnswer, theirs: ImageAnswer) -> None:
    """Bit for bit."""
    for field in dataclasses.fields(theirs):
        if field.name == "source":  # the image as it was given here, RGB there
            continue
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name), strict=True)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"score_threshold": 0.01, "selection": "threshold"},
        {"score_threshold": 0.99, "selection": "threshold"},
        {"score_threshold": 0.6, "presence": "multiply"},
        {"selection": "best", "presence": "gate"},
    ],
)
def test_answers_are_those_of_the_pipeline(
    pipeline: DerisPipeline, inspection: Inspection, rule: dict[str, object]
) -> None:
    asked = with_settings(pipeline, **rule)
    for ours, theirs in zip(inspection.answers(**rule), asked(inspection.image, PHRASES), strict=True):
        assert_equal(ours, theirs)


def test_it_is_printed_in_a_line(inspection: Inspection) -> None:
    width, height = inspection.image.size
    assert repr(
        inspection
    ) == f"<Inspection: 5 phrases, 3 queries, rounds 0 to 3, image of {width} x {height} px>".replace(
        "3 queries, rounds 0 to 3", f"{inspection.num_queries} queries, rounds 0 to {inspection.num_rounds - 1}"
    )


def test_the_network_runs_once(pipeline: DerisPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = pipeline.model.forward
    monkeypatch.setattr(pipeline.model, "forward", lambda batch: calls.append(batch.num_phrases) or forward(batch))
    found = pipeline.inspect(synthetic_images(1)[0], PHRASES)
    for threshold in (0.2, 0.5, 0.8):
        found.answers(score_threshold=threshold)
    found.best_masks(0)
    assert calls == [len(PHRASES)]


def test_many_images_in_batches_that_are_split(pipeline: DerisPipeline) -> None:
    small = with_settings(pipeline, max_phrases_per_batch=4, images_per_device=3)
    images = [*synthetic_images(3), *synthetic_images(2, seed=7, size=(48, 100))]
    pairs = [(image, PHRASES[: number + 1]) for number, image in enumerate(images)]
    for found, answers, (_, phrases) in zip(small.inspect_all(pairs), small.answer_all(pairs), pairs, strict=True):
        assert found.phrases == tuple(phrases)
        for ours, theirs in zip(found.answers(), answers, strict=True):
            assert_equal(ours, theirs)


def test_one_phrase_and_bad_input(pipeline: DerisPipeline) -> None:
    image = synthetic_images(1)[0]
    found = pipeline.inspect(image, "star")
    assert found.phrases == ("star",)
    assert len(found.answers()) == 1
    with pytest.raises(ValueError, match="expected at least one for an image, got none"):
        pipeline.inspect(image, [])
    with pytest.raises(ValueError, match="got no file"):
        pipeline.inspect("nowhere.jpg", ["star"])


def test_rounds_from_the_initial_queries_to_the_answer(pipeline: DerisPipeline, inspection: Inspection) -> None:
    assert inspection.num_rounds == pipeline.config.loopback.rounds + 1
    assert inspection.num_queries == 5
    answers = inspection.answers(selection="best", score_threshold=0)
    last = inspection.num_rounds - 1
    np.testing.assert_array_equal(inspection.referring_scores(last), [a.referring_scores for a in answers])
    np.testing.assert_array_equal(inspection.presence, [np.float32(a.presence) for a in answers])
    np.testing.assert_array_equal(inspection.best_masks(), [a.mask for a in answers])
    assert (inspection.referring_scores(0) != inspection.referring_scores(last)).any()
    for round_index in range(last + 1):
        scores = inspection.referring_scores(round_index)
        assert scores.shape == (5, 5)
        best = inspection.best_queries(round_index)
        assert [scores[p, q] for p, q in enumerate(best)] == scores.max(axis=1).tolist()
        masks = inspection.best_masks(round_index)
        for p, query in enumerate(best):
            probs = inspection.mask_probs(p, round_index)
            assert probs.dtype == np.float32
            assert probs.shape == (5, 60, 80)
            np.testing.assert_array_equal(masks[p], probs[query] >= 0.5)
            (alone,) = inspection.mask_probs(p, round_index, queries=[query])
            np.testing.assert_array_equal(alone, probs[query])
    for wrong in (last + 1, -last - 2):
        with pytest.raises(ValueError, match=rf"round_index: expected 0 to {last} \(-1 = the last\), got {wrong}"):
            inspection.best_masks(wrong)


def test_masks_for_display_are_bounded(inspection: Inspection) -> None:
    assert inspection.mask_probs(0, max_side=40).shape == (5, 30, 40)
    assert inspection.best_masks(max_side=7).shape == (5, 5, 7)
    assert inspection.display_image(40).size == (40, 30)
    assert inspection.answers(max_side=1024)[0].mask.shape == (60, 80)  # small images are not enlarged
    small, whole = inspection.answers(max_side=40)[0], inspection.answers()[0]
    assert small.mask.shape == (30, 40)
    assert abs(small.mask.mean() - whole.mask.mean()) < 0.05
    with pytest.raises(ValueError, match="max_side: expected at least 1 px, got 0"):
        inspection.best_masks(max_side=0)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"score_threshold": 1.5}, "score_threshold: expected 0 to 1, got 1.5"),
        ({"score_threshold": float("nan")}, "score_threshold: expected 0 to 1, got nan"),
        ({"selection": "most"}, "selection: expected threshold or threshold_or_best or best, got 'most'"),
        ({"presence": "always"}, "presence: expected none or multiply or gate, got 'always'"),
    ],
)
def test_rules_that_do_not_exist(inspection: Inspection, rule: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        inspection.answers(**rule)


def test_released_weights_are_read_as_their_answers_are(inspection: Inspection) -> None:
    torch.manual_seed(0)
    output = DerisOutput((RoundOutput(torch.randn(1, 2, 4, 4), torch.randn(1, 2)),), torch.zeros(1), "x4_align_corners")
    released = Inspection(Image.new("RGB", (40, 24)), ("star",), output, inspection.evaluation)
    np.testing.assert_array_equal(released.mask_probs(0)[released.best_queries()[0]] >= 0.5, released.best_masks()[0])
