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
from typing import Any, NamedTuple, TypeVar

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
from deris_llm.evaluation.background import in_order
from deris_llm.evaluation.boxes import boxes_of_masks
from deris_llm.evaluation.gres_metrics import GrecOutcome
from deris_llm.evaluation.metrics import Overlap, overlap
from deris_llm.evaluation.predictions import (
    Box,
    EvaluationResult,
    OtherAnswer,
    PhrasePrediction,
    box_array,
    boxes_around,
    check_misses,
)
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


Answer = TypeVar("Answer", bound=HasPhraseId)


def answers_of(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    compare: Callable[[DerisOutput, Sequence[ReferringRecord]], list[Answer]],
    *,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    title: str = "evaluation",
) -> list[Answer]:
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
    answers: list[Answer] = []
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
) -> list[PhrasePrediction]:
    """Answers P phrases and compares the masks under every protocol.

    Args:
        output: the model's, of these P phrases.
        asked: P records; where the ground truth comes from.
        protocols: those of one run; the first one's rule chooses `PhrasePrediction.mask`.
        is_generalised: phrases may name nothing, or several objects: boxes are compared too.

    Returns:
        P predictions.
    """
    referents = decoded_referents(asked)
    truths = {"left_out": [np.logical_or.reduce(masks, axis=0) for masks in referents]}
    if any(protocol.crowds == "taken" for protocol in protocols):
        truths["taken"] = merged_truths(asked, "taken")
    originals = {
        rule: _answers(output, rule, [(record.height, record.width) for record in asked])
        for rule in dict.fromkeys(protocol.rule for protocol in protocols)
    }
    boxes = {
        rule: [boxes_around(answer.instance_masks) if is_generalised else None for answer in answers]
        for rule, answers in originals.items()
    }
    oracle_queries = _best_queries(output, referents)
    by_protocol = {
        protocol.id: _compared_under(
            protocol,
            output,
            originals[protocol.rule],
            truths[protocol.crowds],
            oracle_queries,
            boxes[protocol.rule],
            keeps_masks=protocol.rule != protocols[0].rule or not protocol.compares_finished_masks,
        )
        for protocol in protocols
    }
    predictions = []
    for i, (record, answer) in enumerate(zip(asked, originals[protocols[0].rule], strict=True)):
        found = {name: rows[i] for name, rows in by_protocol.items()}
        true_boxes = boxes_of_masks(referents[i]) if is_generalised else None
        predictions.append(
            PhrasePrediction(
                phrase_id=record.phrase_id,
                image=Path(record.image_path).name,
                image_id=record.image_id,
                phrase=record.phrase,
                mask=encode_mask(answer.mask),
                overlaps={name: row.overlap for name, row in found.items()},
                oracle_overlaps={name: row.oracle for name, row in found.items()},
                top_scores=tuple(float(s) for s in np.sort(answer.referring_scores)[::-1][:_NUM_TOP_SCORES]),
                presence=answer.presence,
                has_target=not record.is_no_target,
                says_target=answer.says_target,
                areas={name: row.area for name, row in found.items()},
                boxes={}
                if true_boxes is None
                else {
                    protocol.id: GrecOutcome.of(box_array(boxes[protocol.rule][i]), true_boxes)
                    for protocol in protocols
                },
                instance_boxes=boxes[protocols[0].rule][i],
                other_answers={name: row.other for name, row in found.items() if row.other is not None},
                truth_px=int(np.count_nonzero(truths[protocols[0].crowds][i])),
            )
        )
    return predictions


def _answers(output: DerisOutput, rule: Rule, sizes_hw: Sequence[tuple[int, int]]) -> list[PhraseAnswer]:
    score_threshold, selection, presence_use = rule
    return answer_masks(
        output, sizes_hw, score_threshold=score_threshold, selection=selection, presence_use=presence_use
    )


class _Compared(NamedTuple):
    """One phrase under one protocol."""

    overlap: Overlap
    oracle: Overlap
    area: tuple[int, int]  # px of truth, of picture
    other: OtherAnswer | None


def _compared_under(
    protocol: Protocol,
    output: DerisOutput,
    originals: Sequence[PhraseAnswer],
    truths: Sequence[np.ndarray],
    oracle_queries: Sequence[Sequence[int]],
    boxes: Sequence[tuple[Box, ...] | None],
    *,
    keeps_masks: bool,
) -> list[_Compared]:
    """Compares P phrases under one protocol.

    Args:
        protocol: where and how.
        output: of the P phrases.
        originals: P answers at the pictures' own sizes, by the protocol's rule.
        truths: P masks, bool (h, w) at the pictures' own sizes.
        oracle_queries: P lists of the queries that fit the referents best.
        boxes: P times those around the answer's instances.
        keeps_masks: the prediction must hold these masks, because they are not those of `PhrasePrediction.mask`.
    """
    original_sizes = [(truth.shape[0], truth.shape[1]) for truth in truths]
    finished = protocol.prediction_resampling == "finished_mask"
    sizes = original_sizes if finished else [protocol.size_hw(*size) for size in original_sizes]
    answers = originals if sizes == original_sizes else _answers(output, protocol.rule, sizes)
    masks = [answer.mask for answer in answers]
    oracles = [np.logical_or.reduce(drawn, axis=0) for drawn in upsampled_masks(output, oracle_queries, sizes)]
    if finished:
        masks, oracles = ([resampled_truth(protocol, mask) for mask in drawn] for drawn in (masks, oracles))
    return [
        _Compared(
            overlap(mask, truth),
            overlap(oracle, truth),
            (int(np.count_nonzero(truth)), truth.size),
            OtherAnswer(encode_mask(mask), answer.says_target, around) if keeps_masks else None,
        )
        for mask, oracle, truth, answer, around in zip(
            masks, oracles, map(partial(resampled_truth, protocol), truths), answers, boxes, strict=True
        )
    ]


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


def _gather(predictions: list[Answer], failure: Exception | None, world_size: int) -> list[Answer]:
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


def _in_order(predictions: list[Answer], records: Sequence[ReferringRecord]) -> list[Answer]:
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
