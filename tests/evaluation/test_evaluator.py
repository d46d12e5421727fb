"""Every phrase once, exact numbers for known answers, one rank = two ranks."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.data.masks import decode_segmentation
from deris_llm.evaluation.evaluator import control_phrases, evaluate
from deris_llm.evaluation.metrics import metric_ratios
from deris_llm.evaluation.truth import merged_truth
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.deris import build_model
from deris_llm.structures import DerisOutput, InstanceAnnotation, ReferringBatch, ReferringRecord, RoundOutput
from deris_llm.testing import tiny_config, tiny_weights
from tests.evaluation.known_answers import NUM_QUERIES, Answers

_spec = importlib.util.spec_from_file_location("evaluation_world", Path(__file__).with_name("evaluation_world.py"))
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *tiny_weights(tmp_path_factory.mktemp("weights")),
        "evaluation.images_per_device=2",
        "evaluation.max_phrases_per_batch=4",
    ]


@pytest.fixture(scope="module")
def config(overrides: list[str]) -> RunConfig:
    return tiny_config(*overrides)


@pytest.fixture(scope="module")
def processor(config: RunConfig) -> CognitionProcessor:
    return build_processor(config)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ReferringRecord]:
    return world.write_records(tmp_path_factory.mktemp("pictures"))


def test_right_answers_score_100(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    result = evaluate(Answers(records), config, records, processor, device="cpu", progress=False)
    assert [p.phrase_id for p in result.answers] == [r.phrase_id for r in records]
    for name in ("original", "deris"):
        numbers = result.numbers[name]
        assert numbers["mIoU"] > 96  # an edge pixel of the resized masks may differ
        assert numbers["Pr@0.9"] == 100
        assert (numbers["n_phrases"], numbers["n_images"]) == (15, 5)
        assert numbers.keys() == {
            "mIoU",
            "oIoU",
            *(f"Pr@0.{i}" for i in range(5, 10)),
            "oracle_mIoU",
            "n_phrases",
            "n_images",
        }


def test_processes_that_compare_change_nothing(
    overrides: list[str], processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    config = tiny_config(*overrides, "evaluation.compare_workers=1")
    model = Answers(records)
    here, elsewhere = (
        evaluate(model, each, records, processor, device="cpu", progress=False)
        for each in (tiny_config(*overrides), config)
    )
    assert elsewhere.answers == here.answers
    assert elsewhere.numbers == here.numbers


def test_an_error_of_a_process_that_compares_arrives(
    overrides: list[str], processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    broken = [dataclasses.replace(record, instances=(InstanceAnnotation(1, [[1.0, 2.0]]),)) for record in records]
    config = tiny_config(*overrides, "evaluation.compare_workers=1")
    with pytest.raises(ValueError, match="expected at least 3 points"):
        evaluate(Answers(records), config, broken, processor, device="cpu", progress=False)


def test_misses_count_as_empty(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    missed = tuple(r.phrase_id for r in records[:3])
    strict = tiny_config(*_overrides_of(config), "evaluation.selection=threshold")
    result = evaluate(Answers(records, missed=missed), strict, records, processor, device="cpu", progress=False)
    right = evaluate(Answers(records), strict, records, processor, device="cpu", progress=False)
    assert result.answers[0].outcomes["original"].overlap.union == merged_truth(records[0]).sum()
    for name in ("original", "deris"):
        assert [p.outcomes[name].overlap.intersection for p in result.answers[:3]] == [0, 0, 0]
        expected = sum(p.outcomes[name].overlap.iou for p in right.answers[3:]) / 15
        assert result.numbers[name]["mIoU"] == pytest.approx(100 * expected)
        assert result.numbers[name]["Pr@0.5"] == pytest.approx(80)


def test_oracle_tells_perception_from_cognition(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    result = evaluate(Answers(records, chosen_query=2), config, records, processor, device="cpu", progress=False)
    assert result.numbers["original"]["mIoU"] == 0
    assert result.numbers["original"]["oracle_mIoU"] > 96


def test_override_asks_other_phrases_about_the_same_truth(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    swapped = control_phrases(records)
    model = Answers(records)
    result = evaluate(model, config, records, processor, device="cpu", phrase_override=swapped, progress=False)
    assert model.asked == swapped
    assert result.numbers["original"]["n_phrases"] == 14  # the picture with one phrase has no other
    assert result.numbers["original"]["mIoU"] > 96  # the truth is still that of the phrase id


def test_control_phrases_name_another_object(records: list[ReferringRecord]) -> None:
    swapped = control_phrases(records)
    assert swapped.keys() == {r.phrase_id for r in records if r.image_id != "picture_1"}
    by_text = {(r.image_id, r.phrase): r for r in records}
    for record in records:
        if record.phrase_id in swapped:
            other = by_text[record.image_id, swapped[record.phrase_id]]
            assert other.instances[0].annotation_id != record.instances[0].annotation_id


def test_training_mode_comes_back(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    model = Answers(records).train()
    evaluate(model, config, records[:2], processor, device="cpu", progress=False)
    assert model.training


def test_jsonl_holds_the_masks(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord], tmp_path: Path
) -> None:
    result = evaluate(Answers(records), config, records, processor, device="cpu", progress=False)
    result.write_jsonl(tmp_path / "predictions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["phrase_id"] for line in lines] == [r.phrase_id for r in records]
    for line, record in zip(lines, records, strict=True):
        mask = decode_segmentation(line["mask"], record.height, record.width)
        truth = merged_truth(record)
        iou = 100 * (mask & truth).sum() / (mask | truth).sum()
        assert line["iou"]["original"] == pytest.approx(iou, abs=1e-3)
        assert line["phrase"] == record.phrase
        assert line["image"] == f"{record.image_id}.png"
        assert line["top_scores"] == sorted(line["top_scores"], reverse=True)
        assert line["presence"] == 0.5


def test_repeated_ids_and_no_records_are_errors(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord]
) -> None:
    with pytest.raises(ValueError, match="expected every phrase id once, got 1 repeated"):
        evaluate(Answers(records), config, [*records, records[4]], processor, device="cpu", progress=False)
    with pytest.raises(ValueError, match="at least one phrase"):
        evaluate(Answers(records), config, [], processor, device="cpu", progress=False)


def test_two_ranks_equal_one(
    overrides: list[str], config: RunConfig, records: list[ReferringRecord], tmp_path: Path
) -> None:
    folder = Path(records[0].image_path).parent
    script = Path(__file__).with_name("evaluate_on_ranks.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(folder), str(tmp_path), *overrides],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        said = process.communicate()[1]
        assert process.returncode == 0, said[-3000:]
    torch.manual_seed(0)
    alone = evaluate(build_model(config), config, records, build_processor(config), device="cpu", progress=False)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]["predictions"]) == len(records) == 15
    for ours, theirs in zip(alone.answers, ranks[0]["predictions"], strict=True):
        expected = ours.to_json()
        assert theirs["phrase_id"] == expected["phrase_id"]
        # other batches, other rounding: a score may move in its last digit and a pixel at the border may flip
        assert theirs["top_scores"] == pytest.approx(expected["top_scores"], abs=2e-4)
        assert theirs["iou"]["original"] == pytest.approx(expected["iou"]["original"], abs=0.5)
    for name, numbers in alone.numbers.items():
        assert ranks[0]["numbers"][name] == pytest.approx(numbers, abs=0.1)
    for rank in range(2):
        assert "exactly once" in (tmp_path / f"rank{rank}.count").read_text()
    assert (tmp_path / "rank1.failure").read_text() == "OSError: the disk is gone"
    assert "rank 1: OSError: the disk is gone" in (tmp_path / "rank0.failure").read_text()


@pytest.fixture(scope="module")
def generalised(records: list[ReferringRecord]) -> list[ReferringRecord]:
    """The same phrases as gRefCOCO's: those of the third picture name nothing, those of the fifth both objects."""
    both = {r.instances[0].annotation_id: r.instances[0] for r in records if r.image_id == "picture_4"}
    instances = {"picture_2": (), "picture_4": tuple(both.values())}
    return [
        dataclasses.replace(r, dataset="grefcoco", instances=instances.get(r.image_id, r.instances)) for r in records
    ]


class ReferentAnswers(Answers):
    """Query k has the mask of referent k; phrases without a target score low, unless they are named in ``invented``."""

    def __init__(self, records: list[ReferringRecord], *, invented: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(records, **options)
        self.by_id = {r.phrase_id: r for r in records}
        self.invented = invented

    def forward(self, batch: ReferringBatch) -> DerisOutput:
        masks = torch.full((batch.num_phrases, NUM_QUERIES, 256, 256), -10.0)
        scores = torch.full((batch.num_phrases, NUM_QUERIES), -4.0)
        presence = torch.full((batch.num_phrases,), -4.0)
        for row, phrase_id in enumerate(batch.phrase_ids):
            record = self.by_id[phrase_id]
            for k, instance in enumerate(record.instances):
                truth = torch.from_numpy(decode_segmentation(instance.segmentation, record.height, record.width))
                drawn = nn.functional.interpolate(truth[None, None].float(), size=(256, 256), mode="bilinear")
                masks[row, k] = 20 * drawn[0, 0] - 10
                if phrase_id not in self.missed:
                    scores[row, k] = 4.0
            if phrase_id in self.invented:
                masks[row, 0, :128, :128] = 10.0
                scores[row, 0] = 4.0
            presence[row] = 4.0 if record.instances else -4.0
        return DerisOutput((RoundOutput(masks, scores),), presence)


def test_a_generalised_split_has_its_own_metrics(
    overrides: list[str], processor: CognitionProcessor, generalised: list[ReferringRecord]
) -> None:
    config = tiny_config(*overrides, "evaluation.selection=threshold")
    right = evaluate(ReferentAnswers(generalised), config, generalised, processor, device="cpu", progress=False)
    for name in ("original", "deris"):
        numbers = right.numbers[name]
        assert numbers.keys() == {
            "gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "F1", "oracle_gIoU", "always_empty_gIoU",
            "always_empty_cIoU", "never_empty_gIoU", "never_empty_cIoU", "n_no_target", "n_phrases", "n_images",
        }  # fmt: skip
        assert numbers["gIoU"] > 96  # an edge pixel of the resized masks may differ
        assert numbers["cIoU"] > 95
        assert numbers["gIoU"] == pytest.approx(numbers["oracle_gIoU"])
        assert (numbers["N-acc"], numbers["T-acc"], numbers["Pr@0.9"], numbers["F1"]) == (100, 100, 100, 100)
        assert (numbers["n_phrases"], numbers["n_no_target"], numbers["n_images"]) == (15, 4, 5)
        assert numbers["always_empty_gIoU"] == pytest.approx(100 * 4 / 15)
        assert numbers["always_empty_cIoU"] == 0
        assert 10 < numbers["never_empty_cIoU"] < 60
    shares = [merged_truth(r).mean() for r in generalised]
    assert right.numbers["original"]["never_empty_gIoU"] == pytest.approx(100 * sum(shares) / 15)
    assert right.notes == ()
    lines = [p.to_json() for p in right.answers]
    assert [line["has_target"] for line in lines] == [line["says_target"] for line in lines]
    assert all(line["iou"]["original"] > 90 for line in lines)  # 100 where nothing was to be found


def test_the_quadrants_of_a_generalised_split(
    overrides: list[str], processor: CognitionProcessor, generalised: list[ReferringRecord]
) -> None:
    nothing = [r.phrase_id for r in generalised if r.is_no_target]
    something = [r.phrase_id for r in generalised if not r.is_no_target]
    config = tiny_config(*overrides, "evaluation.selection=threshold")
    model = ReferentAnswers(generalised, invented=(nothing[0],), missed=(something[0], something[-1]))
    result = evaluate(model, config, generalised, processor, device="cpu", progress=False)
    numbers = result.numbers["original"]
    assert numbers["N-acc"] == 75
    assert numbers["T-acc"] == pytest.approx(100 * 9 / 11)
    assert numbers["F1"] == pytest.approx(100 * 12 / 15)
    assert numbers["oracle_gIoU"] > 96
    outcomes = {p.phrase_id: p.outcomes["original"] for p in result.answers}
    pixels = metric_ratios([outcomes[nothing[0]]], is_generalised=True)["cIoU"]
    assert pixels.above.tolist() == [0]
    assert pixels.below.tolist() == [32 * 32]  # a quarter of the picture of 64 x 64 px
    gated = tiny_config(*overrides, "evaluation.selection=threshold", "evaluation.presence=gate")
    saved = evaluate(model, gated, generalised, processor, device="cpu", progress=False)
    assert saved.numbers["original"]["N-acc"] == 100
    assert saved.numbers["original"]["T-acc"] == numbers["T-acc"]


def test_splits_of_one_kind_say_what_they_have_no_number_of(
    overrides: list[str], processor: CognitionProcessor, generalised: list[ReferringRecord]
) -> None:
    config = tiny_config(*overrides, "evaluation.selection=threshold")
    model = ReferentAnswers(generalised)
    nothing = [r for r in generalised if r.is_no_target]
    result = evaluate(model, config, nothing, processor, device="cpu", progress=False)
    numbers = result.numbers["deris"]
    assert (numbers["gIoU"], numbers["cIoU"], numbers["N-acc"], numbers["T-acc"]) == (100, None, 100, None)
    assert result.notes == (
        "no target phrases: no T-acc, no Pr@X",
        "no pixel answered and none asked for: no cIoU",
    )
    something = [r for r in generalised if not r.is_no_target]
    result = evaluate(model, config, something, processor, device="cpu", progress=False)
    assert (result.numbers["deris"]["N-acc"], result.numbers["deris"]["T-acc"]) == (None, 100)


def test_control_takes_phrases_with_a_target_only(generalised: list[ReferringRecord]) -> None:
    by_image = {r.phrase_id: r.image_id for r in generalised}
    # picture 0 has two objects, picture 3 too; phrases of picture 4 all name both
    assert {by_image[phrase_id] for phrase_id in control_phrases(generalised)} == {"picture_0", "picture_3"}


def test_datasets_with_different_metrics_are_not_mixed(
    config: RunConfig, processor: CognitionProcessor, records: list[ReferringRecord], generalised: list[ReferringRecord]
) -> None:
    with pytest.raises(ValueError, match="datasets with the same metrics, got grefcoco, refcoco: evaluate each split"):
        evaluate(Answers(records), config, [*records[:4], *generalised[4:]], processor, device="cpu", progress=False)


def _overrides_of(config: RunConfig) -> list[str]:
    return [
        f"cognition.weights={config.cognition.weights}",
        f"perception.weights={config.perception.weights}",
        f"perception.image_size={config.perception.image_size}",
        "data.num_workers=0",
    ]
