"""Predicts every phrase of a split exactly once, on any number of ranks, and compares under all protocols in one pass.

Letters: P phrases, Q queries.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from deris_llm.common.ranks import OtherRankError
from deris_llm.common.terminal import console
from deris_llm.config import RunConfig
from deris_llm.config.protocols import Protocol, Rule, protocols_of
from deris_llm.data.loaders import evaluation_loader
from deris_llm.data.masks import encode_mask
from deris_llm.data.sampler import EvaluationBatchSampler
from deris_llm.data.sources import is_generalised
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.background import in_order
from deris_llm.evaluation.boxes import Box, boxes_f1, boxes_of_masks
from deris_llm.evaluation.metrics import Outcome, overlap
from deris_llm.evaluation.results import EvaluationResult, check_misses
from deris_llm.evaluation.truth import decoded_referents, merged_truths, resampled_truth
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.models.postprocess import PhraseAnswer, answer_masks, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringRecord

logger = logging.getLogger(__name__)

_NUM_TOP_SCORES = 3
_SECONDS_BETWEEN_LINES = 15.0


def evaluate(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    phrase_override: Mapping[str, str] | None = None,
    progress: bool = True,
    title: str = "evaluation",
) -> EvaluationResult:
    """Evaluates records under all protocols of the run config.

    Every rank predicts its own images (exact, disjoint shards: nothing is padded or counted twice); the predictions are
    gathered by phrase id, so all ranks return the same result. The model's training mode is restored.

    Args:
        model: a `Deris`, or a wrapper with the same forward; under ZeRO-3 all ranks step together.
        config: sizes, protocols, threshold and selection.
        records: all of the split, the same on every rank.
        processor: the cognition backend's.
        device: where the model is.
        rank: this process.
        world_size: number of ranks; above 1 torch.distributed must be initialised.
        phrase_override: phrase id -> the text to ask instead; records it does not name are left out (the control run).
        progress: shows a bar on rank 0.
        title: its label.

    Raises:
        ValueError: there is no record, or two have the same phrase id.
        OtherRankError: another rank failed.
    """
    if phrase_override is not None:
        records = [
            dataclasses.replace(r, phrase=phrase_override[r.phrase_id])
            for r in records
            if r.phrase_id in phrase_override
        ]
    check_records(records, config.data.root)
    generalised = is_generalised(config.data.root, records[0].dataset)
    protocols = protocols_of(config)
    check_misses(protocols, records[0].dataset, is_generalised=generalised)
    predictions = answers_of(
        model,
        config,
        records,
        processor,
        partial(compared, protocols=protocols, is_generalised=generalised),
        device=device,
        rank=rank,
        world_size=world_size,
        progress=progress,
        title=title,
    )
    return EvaluationResult.of(predictions, protocols, is_generalised=generalised)


class HasPhraseId(typing.Protocol):
    """What `answers_of` gathers and orders."""

    @property
    def phrase_id(self) -> str: ...


Found = TypeVar("Found", bound=HasPhraseId)


def answers_of(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    compare: Callable[[DerisOutput, Sequence[ReferringRecord]], list[Found]],
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    title: str = "evaluation",
) -> list[Found]:
    """Runs the model over records in exact shards and gathers what ``compare`` makes of its output.

    Args:
        model: as for `evaluate`.
        config: sizes of the batches, precision.
        records: each phrase id once, the same on every rank.
        processor: the cognition backend's.
        compare: the output of P phrases and their records -> P answers; as `background.in_order` wants it.
        device: where the model is.
        rank: this process.
        world_size: number of ranks.
        progress: shows a bar on rank 0.
        title: its label.

    Returns:
        One answer per record, in their order, on every rank.

    Raises:
        OtherRankError: another rank failed.
    """
    device = torch.device(device)
    loader = evaluation_loader(config, records, processor, rank=rank, world_size=world_size, with_targets=False)
    records_by_id = {record.phrase_id: record for record in records}
    dtype = torch.bfloat16 if config.training.precision == "bf16" else None
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    answers: list[Found] = []
    failure: Exception | None = None
    most_batches = _most_batches(len(loader)) if world_size > 1 and _is_partitioned(model) else len(loader)
    try:
        with _evaluation_mode(model), torch.no_grad(), autocast, _progress(enabled=progress and rank == 0) as bar:
            size = _shard_size(loader)
            task, lines = bar.add_task(title, total=size), _LogLines(title, size)
            outputs = (
                (model(batch.to(device, dtype=dtype)), [records_by_id[phrase_id] for phrase_id in batch.phrase_ids])
                for batch in loader
            )
            for found in in_order(compare, outputs, num_workers=config.evaluation.compare_workers):
                answers += found
                bar.update(task, completed=len(answers))
                if progress and rank == 0 and not bar.console.is_terminal:
                    lines.update(len(answers))
            if len(loader) < most_batches:
                _keep_step(model, config, records, processor, most_batches - len(loader), device, dtype)
    except Exception as error:  # told to the other ranks before it is raised: they would wait for this one forever
        if world_size == 1:
            raise
        failure = error
    return _in_order(_gather(answers, failure, world_size), records)


def compared(
    output: DerisOutput,
    asked: Sequence[ReferringRecord],
    *,
    protocols: Sequence[Protocol],
    is_generalised: bool,
) -> list[Answer]:
    """Answers P phrases and compares the masks under every protocol.

    Args:
        output: the model's, of these P phrases.
        asked: P records with the ground truth.
        protocols: those of one run; the first one's rule chooses `Answer.mask`.
        is_generalised: phrases may name nothing, or several objects: boxes are compared too.

    Returns:
        P answers.
    """
    referents = decoded_referents(asked)
    sizes = [(record.height, record.width) for record in asked]
    drawn = {
        rule: _answers(output, rule, sizes) for rule in dict.fromkeys(protocol.rule for protocol in protocols)
    }  # at the images' own sizes
    boxes = {
        rule: [_boxes(answer.instance_masks) if is_generalised else None for answer in answers]
        for rule, answers in drawn.items()
    }
    true_boxes = [boxes_of_masks(masks) if is_generalised else None for masks in referents]
    truths = {"left_out": [np.logical_or.reduce(masks, axis=0) for masks in referents]}
    if any(protocol.crowds == "taken" for protocol in protocols):
        truths["taken"] = merged_truths(asked, "taken")
    best_queries = _best_queries(output, referents)
    outcomes: list[dict[str, Outcome]] = [{} for _ in asked]
    others: list[dict[str, Answer]] = [{} for _ in asked]
    first = protocols[0]
    for protocol in protocols:
        drawn_sizes = [protocol.drawn_size_hw(*size) for size in sizes]
        answers = drawn[protocol.rule]
        if drawn_sizes != sizes:
            answers = _answers(output, protocol.rule, drawn_sizes)
        is_other_mask = protocol.rule != first.rule or not protocol.compares_finished_masks
        oracles = upsampled_masks(output, best_queries, drawn_sizes)
        for i, answer in enumerate(answers):
            mask, oracle = answer.mask, np.logical_or.reduce(oracles[i], axis=0)
            if protocol.resizes_finished_masks:
                mask, oracle = resampled_truth(protocol, mask), resampled_truth(protocol, oracle)
            truth = resampled_truth(protocol, truths[protocol.crowds][i])
            found, expected = boxes[protocol.rule][i], true_boxes[i]
            outcomes[i][protocol.id] = Outcome(
                overlap(mask, truth),
                has_target=not asked[i].is_no_target,
                says_target=answer.says_target,
                oracle=overlap(oracle, truth),
                boxes_match=None if found is None or expected is None else boxes_f1(found, expected) == 1,
                truth_px=int(np.count_nonzero(truth)),
                image_px=truth.size,
            )
            if is_other_mask:
                others[i][protocol.id] = Answer(mask=encode_mask(mask), says_target=answer.says_target, boxes=found)
    return [
        Answer(
            phrase_id=record.phrase_id,
            image=Path(record.image_path).name,
            image_id=record.image_id,
            phrase=record.phrase,
            mask=encode_mask(answer.mask),
            top_scores=tuple(float(s) for s in np.sort(answer.referring_scores)[::-1][:_NUM_TOP_SCORES]),
            presence=answer.presence,
            has_target=not record.is_no_target,
            says_target=answer.says_target,
            boxes=around,
            answers=other,
            truth_px=int(np.count_nonzero(truth)),
        ).with_outcomes(outcome)
        for record, answer, around, other, truth, outcome in zip(
            asked, drawn[first.rule], boxes[first.rule], others, truths[first.crowds], outcomes, strict=True
        )
    ]


def _answers(output: DerisOutput, rule: Rule, sizes_hw: Sequence[tuple[int, int]]) -> list[PhraseAnswer]:
    score_threshold, selection, presence_use = rule
    return answer_masks(
        output, sizes_hw, score_threshold=score_threshold, selection=selection, presence_use=presence_use
    )


def _boxes(masks: np.ndarray) -> tuple[Box, ...]:
    """Boxes around instance masks, bool (N, h, w), as plain numbers; empty masks have none."""
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes_of_masks(masks).tolist())


def control_phrases(records: Sequence[ReferringRecord]) -> dict[str, str]:
    """Swaps each phrase with one of the same picture and dataset that names another object.

    A model that reads the phrase must fail on these; one that finds the conspicuous object does not. The next such
    phrase in the order of the records is taken, cyclically. A phrase of the same text as one of its own referent's is
    never taken. Phrases without a target take no part.

    Returns:
        Phrase id -> other text; phrases whose picture has no other referent are left out (compare the lengths).
    """
    by_image: dict[tuple[str, str], list[ReferringRecord]] = defaultdict(list)
    for record in records:
        if record.is_no_target:
            continue
        by_image[record.dataset, record.image_id].append(record)
    swapped: dict[str, str] = {}
    for group in by_image.values():
        referents = [frozenset(instance.annotation_id for instance in record.instances) for record in group]
        own_texts: dict[frozenset[int], set[str]] = defaultdict(set)
        for record, referent in zip(group, referents, strict=True):
            own_texts[referent].add(record.phrase)
        for i, record in enumerate(group):
            for j in (*range(i + 1, len(group)), *range(i)):
                if not referents[j] & referents[i] and group[j].phrase not in own_texts[referents[i]]:
                    swapped[record.phrase_id] = group[j].phrase
                    break
    return swapped


def _best_queries(output: DerisOutput, referents: Sequence[np.ndarray]) -> list[list[int]]:
    """For each referent the query that fits it best at the resolution of the logits (the truth averaged to it)."""
    masks = (output.final.mask_logits >= 0).float().cpu()
    size = (masks.shape[2], masks.shape[3])
    best: list[list[int]] = []
    for phrase_masks, truths in zip(masks, referents, strict=True):
        if not len(truths):
            best.append([])
            continue
        soft = functional.adaptive_avg_pool2d(torch.from_numpy(truths).float(), size)
        intersection = torch.einsum("qhw,rhw->rq", phrase_masks, soft)
        union = phrase_masks.sum((1, 2)) + soft.sum((1, 2))[:, None] - intersection
        best.append(sorted(set((intersection / union.clamp(min=1e-6)).argmax(dim=1).tolist())))
    return best


def check_records(records: Sequence[ReferringRecord], root: str | Path) -> None:
    """Refuses records that have no common numbers: none, of datasets with other metrics, or with one id twice.

    Raises:
        ValueError: see above.
    """
    if not records:
        raise ValueError(
            "evaluation: expected at least one phrase, got none: check the split, or, in a control run, that pictures "
            "have phrases of different objects"
        )
    datasets = {record.dataset for record in records}
    if len({is_generalised(root, name) for name in datasets}) > 1:
        raise ValueError(
            f"evaluation: expected phrases of datasets with the same metrics, got {', '.join(sorted(datasets))}: evaluate "
            "each split by itself"
        )
    repeated = [phrase_id for phrase_id, count in Counter(r.phrase_id for r in records).items() if count > 1]
    if repeated:
        raise ValueError(
            f"evaluation: expected every phrase id once, got {len(repeated)} repeated ones, e.g. {repeated[:3]}: "
            f"evaluate each split by itself"
        )


def _gather(predictions: list[Found], failure: Exception | None, world_size: int) -> list[Found]:
    if world_size == 1:
        return predictions
    parts: list[Any] = [None] * world_size
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    distributed.all_gather_object(parts, (predictions, said))
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(parts) if text is not None]
    if failed:
        raise OtherRankError(
            f"evaluation: expected predictions of {world_size} ranks, but {'; '.join(failed)}: see that rank's message"
        )
    return [prediction for part, _ in parts for prediction in part]


def _in_order(predictions: list[Found], records: Sequence[ReferringRecord]) -> list[Found]:
    by_id = {prediction.phrase_id: prediction for prediction in predictions}
    assert len(predictions) == len(by_id) == len(records), (
        f"every phrase must be predicted exactly once: {len(records)} phrases, {len(predictions)} predictions "
        f"of {len(by_id)} ids"
    )
    return [by_id[record.phrase_id] for record in records]


def _is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 spreads the weights over ranks: then every forward is a collective operation."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _most_batches(num_batches: int) -> int:
    """Of all ranks; asked before the first forward, since under ZeRO-3 no other collective may come between forwards."""
    counts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(counts, num_batches)
    return max(counts)


def _keep_step(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    num_missing: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Under ZeRO-3, goes on with forwards whose output nobody reads until the rank with most batches is done."""
    batch = next(iter(evaluation_loader(config, records, processor, with_targets=False))).to(device, dtype=dtype)
    for _ in range(num_missing):
        model(batch)


def _shard_size(loader: DataLoader[ReferringBatch]) -> int:
    assert isinstance(loader.batch_sampler, EvaluationBatchSampler), "built by evaluation_loader"
    return sum(len(selection.phrases) for batch in loader.batch_sampler for selection in batch)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _progress(*, enabled: bool) -> Progress:
    """A bar with the time left; `_LogLines` speaks where no terminal shows it."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("phrases"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not enabled,
        console=console(stderr=True),
    )


class _LogLines:
    """What the bar would say, as a log line now and then: for output that goes to a file."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.said = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES and done:
            self.said = now
            left = (now - self.started) * (self.total - done) / done
            logger.info("%s: %d of %d phrases, about %.0f s left", self.title, done, self.total, left)
