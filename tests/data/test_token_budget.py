"""Phrases of an image are split where they exceed a number of tokens, and nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from deris_llm.models.cognition import build_processor
from deris_llm.config import ConfigError, RunConfig
from deris_llm.data.dataset import group_by_image
from deris_llm.data.loaders import evaluation_loader, train_loader
from deris_llm.data.sources import read_split
from deris_llm.data.sampler import EvaluationBatchSampler, TrainingBatchSampler
from deris_llm.data.token_budget import phrase_limits
from deris_llm.evaluation.evaluator import evaluate
from deris_llm.models.deris import Deris, build_model
from deris_llm.planning.plan import plan_run
from deris_llm.structures import ReferringBatch
from deris_llm.testing import relative_difference, synthetic_batch, synthetic_images, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_qwen_vl_weights

TEXT_FIRST = (
    "cognition.prompt_order=text_first",
    'cognition.prompt="<|im_start|>user\\nWhere is {phrase}?<image>\\n<|im_end|>\\n"',
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def qwen_vl(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*overrides, *tiny_qwen_vl_weights(tmp_path_factory.mktemp("qwen"))]


@pytest.fixture
def config(overrides: list[str], refer_root: Path) -> RunConfig:
    return tiny_config(*overrides, f"data.root={refer_root}", "data.phrases_per_image=5")


def limited(config: RunConfig, tokens: int) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_tokens_per_image=tokens))


def tokens_behind_images(batch: ReferringBatch, image_token: int) -> list[int]:
    """Of each image of a batch: its prefix once, and every phrase's own tokens."""
    inputs = batch.cognition
    found = []
    for image in range(len(batch.perception_image)):
        rows = (batch.image_index == image).nonzero().flatten()
        shared = int((inputs.input_ids[rows[0]] == image_token).nonzero().max()) + 1
        found.append(shared + sum(int((~inputs.token_padding_mask[row]).sum()) - shared for row in rows))
    return found


def lowest_limit(config: RunConfig, split: str, phrases: int) -> int:
    """With which the longest `phrases` of every image fit."""
    records = read_split(config.data.root, split)
    counts = build_processor(config).count_tokens([r.phrase for r in records], [(r.height, r.width) for r in records])
    return counts[0].shared + phrases * max(count.own for count in counts)


@pytest.mark.parametrize("order", [(), TEXT_FIRST], ids=["image_first", "text_first"])
@pytest.mark.parametrize("backend", ["overrides", "qwen_vl"])
def test_counts_are_those_of_the_prompts(backend: str, order: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    processor = build_processor(tiny_config(*request.getfixturevalue(backend), *order, "cognition.max_phrase_tokens=6"))
    batch = synthetic_batch(tiny_config(*request.getfixturevalue(backend), *order), num_images=1, phrases_per_image=4)
    phrases = [*batch.phrases, "a very long phrase about the red circle on the left behind the yellow star"]
    counts = processor.count_tokens(phrases, [(60, 80)] * len(phrases))
    ids = processor(synthetic_images(1), phrases, [0] * len(phrases))
    for row, count in enumerate(counts):
        assert sum(count) == int((~ids.token_padding_mask[row]).sum())
    assert {count.shared == 0 for count in counts} == {bool(order)}
    shared = counts[0].shared
    assert (ids.input_ids[:, :shared] == ids.input_ids[0, :shared]).all()


def test_limits_hold_whichever_phrases_are_chosen(config: RunConfig) -> None:
    records = read_split(config.data.root, "refcoco/train")
    groups, processor = group_by_image(records), build_processor(config)
    assert phrase_limits(config, groups, processor) is None
    for fitting in (1, 2, 3, 5):
        limit = lowest_limit(config, "refcoco/train", fitting)
        limits = phrase_limits(limited(config, limit), groups, processor)
        assert limits is not None
        assert min(limits) == fitting or fitting == 5
        loader = train_loader(limited(config, limit), groups, processor)
        batches = list(loader)
        image_token = processor.prompts.image_token_id
        assert max(max(tokens_behind_images(batch, image_token)) for batch in batches) <= limit
        assert len(batches) == len(loader)
        assert {p for b in batches for p in b.phrase_ids} == {record.phrase_id for record in records}


def test_the_order_is_another_one_only_where_there_is_a_limit(make_records: Any) -> None:
    groups = group_by_image(make_records([5, 1, 7]))
    options: dict[str, Any] = {"phrases_per_image": 4, "images_per_device": 1}
    free, loose = TrainingBatchSampler(groups, **options), TrainingBatchSampler(groups, **options, limits=[9, 9, 9])
    assert list(free) == list(loose)
    tight = TrainingBatchSampler(groups, **options, limits=[2, 1, 3])
    assert sorted(len(piece.phrases) for (piece,) in tight) == [1, 1, 2, 2, 2, 2, 3]


def test_evaluation_is_split_and_gives_the_same_answers(config: RunConfig) -> None:
    records = read_split(config.data.root, "refcoco/val")
    processor = build_processor(config)
    tight = limited(config, lowest_limit(config, "refcoco/val", 2))
    sizes = [batch.num_phrases for batch in evaluation_loader(tight, records, processor)]
    assert sum(sizes) == len(records) == 5
    torch.manual_seed(0)
    model = build_model(config).eval()
    ours, reference = (
        evaluate(model, each, records, processor, device="cpu", progress=False).answers for each in (tight, config)
    )
    for one, other in zip(ours, reference, strict=True):
        assert one.phrase_id == other.phrase_id
        assert one.top_scores == pytest.approx(other.top_scores, abs=1e-5)
        assert one.iou["original"] == pytest.approx(other.iou["original"], abs=2)


def test_pieces_of_one_image_may_share_a_batch(make_records: Any) -> None:
    groups = group_by_image(make_records([5, 1]))
    sampler = EvaluationBatchSampler(groups, images_per_device=2, max_phrases_per_batch=64, limits=[2, 2])
    assert [[len(piece.phrases) for piece in batch] for batch in sampler] == [[2, 2], [1, 1]]


def test_gradients_of_the_pieces_add_up(overrides: list[str]) -> None:
    """Six phrases of an image at once, and as 2 + 3 + 1 behind a copy of it each."""
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    model = build_model(config).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = synthetic_batch(config, num_images=1, phrases_per_image=6)
    whole = _gradients(model, [batch])
    pieces = _gradients(model, [_rows(config, batch, *rows) for rows in ((0, 2), (2, 5), (5, 6))])
    for name, gradient in whole.items():
        assert relative_difference(pieces[name], gradient) < 1e-4, name  # measured below 1e-5


def _gradients(model: Deris, batches: list[ReferringBatch]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        output = model(batch)
        loss = output.presence_logit.square().sum()
        for one in output.rounds:
            loss = loss + one.mask_logits.square().sum() / 100 + one.referring_logits.square().sum()
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".lora_" in n}


def _rows(config: RunConfig, batch: ReferringBatch, first: int, last: int) -> ReferringBatch:
    """Some of the phrases of a batch of one image."""
    rows = slice(first, last)
    return dataclasses.replace(
        batch,
        cognition=build_processor(config)(synthetic_images(1), batch.phrases[rows], [0] * (last - first)),
        image_index=batch.image_index[rows],
        phrases_per_image=tuple(torch.bincount(batch.image_index[rows], minlength=len(batch.perception_image)).tolist()),
        phrase_ids=batch.phrase_ids[rows],
        phrases=batch.phrases[rows],
    )


def test_a_phrase_that_does_not_fit_alone_is_named(config: RunConfig) -> None:
    groups = group_by_image(read_split(config.data.root, "refcoco/train"))
    with pytest.raises(ValueError, match=r"max_tokens_per_image=20: .* got \d+ tokens for refcoco/train/\d+ '.* thing"):
        phrase_limits(limited(config, 20), groups, build_processor(config))


def test_swapped_phrases_count_as_the_longest_of_all(make_records: Any, config: RunConfig) -> None:
    records, processor = make_records([3, 3]), build_processor(config)
    records[3] = dataclasses.replace(records[3], phrase="the red circle on the left behind the yellow star")
    groups = group_by_image(records)
    short = processor.count_tokens([groups[0].records[0].phrase], [(10, 10)])[0]
    limit = limited(config, short.shared + 2 * short.own)
    apart, swapped = (phrase_limits(limit, groups, processor, is_swapped=swaps) for swaps in (False, True))
    assert apart == [2, 1]
    assert swapped == [1, 1]


def test_a_processor_that_does_not_count_is_told(config: RunConfig, make_records: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="expected a cognition backend whose processor counts tokens"):
        phrase_limits(limited(config, 100), group_by_image(make_records([2])), processor)
    with pytest.raises(ConfigError, match="max_tokens_per_image=100 cannot take effect with cognition.backend=bert"):
        tiny_config("cognition.backend=bert", "data.max_tokens_per_image=100")
    with pytest.raises(ConfigError, match="max_tokens_per_image: expected 0 or more, got -1"):
        tiny_config("data.max_tokens_per_image=-1")


def test_no_phrases_per_image_is_an_error(make_records: Any) -> None:
    with pytest.raises(ConfigError, match="data.phrases_per_image: expected more than 0, got 0"):
        tiny_config("data.phrases_per_image=0")
    with pytest.raises(ValueError, match="expected phrases_per_image of 1 or more, got 0"):
        TrainingBatchSampler(group_by_image(make_records([2])), phrases_per_image=0, images_per_device=1)


def test_a_limit_lowers_what_is_planned(overrides: list[str]) -> None:
    free, tight = (
        plan_run(tiny_config(*overrides, f"data.max_tokens_per_image={limit}"), stages=("2",)) for limit in (0, 60)
    )
    own = tight.tokens_per_phrase - tight.shared_tokens
    assert tight.phrases_per_device == 2 * ((60 - tight.shared_tokens) // own) < free.phrases_per_device
    assert tight.memory[0].activations < free.memory[0].activations
