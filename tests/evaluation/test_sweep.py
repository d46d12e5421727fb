"""A sweep equals separate evaluations at its thresholds, to the last digit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.evaluator import evaluate
from deris_llm.evaluation.sweep import THRESHOLDS, check_sweep, sweep
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.structures import DerisOutput, ReferringBatch
from deris_llm.testing import tiny_config, tiny_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=1, num_val=3, num_test=2)
    return tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), f"data.root={root}")


class Spread(nn.Module):
    """A model whose scores and presences lie all over (0, 1), as those of a fresh one do not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ReferringBatch) -> DerisOutput:
        output: DerisOutput = self.model(batch)
        shape = output.final.referring_logits.shape
        seeds = [sum(map(ord, phrase_id)) for phrase_id in batch.phrase_ids]  # whatever shares the batch
        logits = torch.stack([torch.randn(shape[1], generator=torch.Generator().manual_seed(s)) * 2 for s in seeds])
        last = dataclasses.replace(output.final, referring_logits=logits)
        return dataclasses.replace(output, rounds=(*output.rounds[:-1], last), presence_logit=logits.sum(1))


@pytest.fixture(scope="module")
def model(config: RunConfig) -> nn.Module:
    torch.manual_seed(0)
    return Spread(build_model(config))


@pytest.mark.parametrize(
    ("split", "selection", "presence", "protocol"),
    [
        ("refcoco/val", "threshold_or_best", "none", "original"),
        ("refcoco/val", "threshold", "multiply", "deris"),
        ("grefcoco/val", "threshold", "gate", "original"),
    ],
)
def test_sweep_equals_separate_evaluations(
    config: RunConfig, model: nn.Module, split: str, selection: str, presence: str, protocol: str
) -> None:
    evaluation = dataclasses.replace(
        config.evaluation, selection=selection, presence=presence, protocols=(protocol, "rela480")
    )
    config = dataclasses.replace(config, evaluation=evaluation)
    processor = build_processor(config)
    found = sweep(model, config, processor, split, progress=False)
    assert [point["threshold"] for point in found.curve] == list(THRESHOLDS) == sorted(THRESHOLDS)
    assert (found.selection, found.presence, found.protocol, found.split) == (selection, presence, protocol, split)
    records = read_split(config.data.root, split)
    assert found.n_phrases == len(records)
    values = {}
    for threshold in (0.3, 0.5, found.threshold):
        at = dataclasses.replace(config, evaluation=dataclasses.replace(evaluation, score_threshold=threshold))
        numbers = evaluate(model, at, records, processor, device="cpu", progress=False).numbers[protocol]
        point = next(dict(point) for point in found.curve if point["threshold"] == threshold)
        del point["threshold"]
        assert point == {name: numbers[name] for name in point}
        values[threshold] = numbers[found.metric]
    assert max(values.values()) == values[found.threshold]
    assert len({point[found.metric] for point in found.curve}) > 5  # the thresholds matter here


@pytest.mark.parametrize(
    ("split", "overrides", "says"),
    [
        ("refcoco/testA", {}, "expected a val split"),
        ("refcoco/train", {}, "expected a val split"),
        ("val", {}, "expected a val split"),
        ("refcoco/val", {"selection": "best"}, "nothing to sweep"),
    ],
)
def test_what_cannot_be_swept_is_refused(config: RunConfig, split: str, overrides: dict, says: str) -> None:
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **overrides))
    with pytest.raises(ValueError, match=says):
        check_sweep(config, split)


def test_a_protocol_of_other_rules_or_that_drops_is_refused(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, says in (
        ("selection: threshold\nmiss: dropped\n", "win by dropping"),
        ("presence: gate\n", "the chosen threshold would not be used"),
    ):
        path.write_text(f"id: mine\nsize: original\n{text}")
        changed = dataclasses.replace(config.evaluation, protocols=(str(path),))
        with pytest.raises(ValueError, match=says):
            check_sweep(dataclasses.replace(config, evaluation=changed), "refcoco/val")
