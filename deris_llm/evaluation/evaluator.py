"""Predicts every phrase of a split exactly once, on any number of ranks, and compares under all protocols in one pass.

Letters: P phrases, Q queries.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from deris_llm.cognition import CognitionProcessor
from deris_llm.config import RunConfig
from deris_llm.data.loaders import evaluation_loader
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sampler import EvaluationBatchSampler
from deris_llm.evaluation.metrics import Overlap, RisMetrics, overlap
from deris_llm.evaluation.protocols import Protocol, protocols_of
from deris_llm.postprocess import answer_masks, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringRecord

logger = logging.getLogger(__name__)

_NUM_TOP_SCORES = 3
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class PhrasePrediction:
    """The answer to one phrase and how good it is."""

    phrase_id: str
    image: str  # file name of the picture
    image_id: str
    phrase: str  # as it was asked (in the control run: the swapped one)
    mask: dict[str, Any]  # COCO RLE of the merged mask at the original size
    overlaps: dict[str, Overlap]  # by protocol id
    oracle_overlaps: dict[str, Overlap]  # of the query that fits the ground truth best, by protocol id
    top_scores: tuple[float, ...]  # the highest referring scores, descending
    presence: float  # probability that a target exists

    def to_json(self) -> dict[str, Any]:
        """One line of the predictions file."""
        return {
            "phrase_id": self.phrase_id,
            "image": self.image,
            "phrase": self.phrase,
            "mask": self.mask,
            "iou": {name: round(100 * found.iou, 3) for name, found in self.overlaps.items()},
            "oracle_iou": {name: round(100 * found.iou, 3) for name, found in self.oracle_overlaps.items()},
            "top_scores": [round(score, 4) for score in self.top_scores],
            "presence": round(self.presence, 4),
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers in percent by protocol id, and the predictions they come from, in the order of the records."""

    numbers: dict[
        str, dict[str, float]
    ]  # protocol id -> mIoU, oIoU, Pr@0.5 ... Pr@0.9, oracle_mIoU, n_phrases, n_images
    predictions: list[PhrasePrediction]

    @classmethod
    def of(cls, predictions: list[PhrasePrediction], protocol_ids: Sequence[str]) -> EvaluationResult:
        """Summarises the predictions of a whole split."""
        counts = {"n_phrases": len(predictions), "n_images": len({p.image_id for p in predictions})}
        numbers = {}
        for name in protocol_ids:
            metrics = RisMetrics.of([p.overlaps[name] for p in predictions])
            oracle = RisMetrics.of([p.oracle_overlaps[name] for p in predictions])
            numbers[name] = metrics.named() | {"oracle_mIoU": oracle.mean_iou} | counts
        return cls(numbers, predictions)

    def write_jsonl(self, path: str | Path) -> None:
        """One JSON object a line; masks are COCO RLE at the original size."""
        with Path(path).open("w", encoding="utf-8") as file:
            for prediction in self.predictions:
                file.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")


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
        RuntimeError: another rank failed.
    """
    if phrase_override is not None:
        records = [
            dataclasses.replace(r, phrase=phrase_override[r.phrase_id])
            for r in records
            if r.phrase_id in phrase_override
        ]
    _check_records(records)
    protocols = protocols_of(config)
    device = torch.device(device)
    loader = evaluation_loader(config, records, processor, rank=rank, world_size=world_size, with_targets=False)
    records_by_id = {record.phrase_id: record for record in records}
    dtype = torch.bfloat16 if config.training.precision == "bf16" else None
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    predictions: list[PhrasePrediction] = []
    failure: Exception | None = None
    most_batches = _most_batches(len(loader)) if world_size > 1 and _is_partitioned(model) else len(loader)
    try:
        with _evaluation_mode(model), torch.no_grad(), autocast, _progress(enabled=progress and rank == 0) as bar:
            size = _shard_size(loader)
            task, lines = bar.add_task(title, total=size), _LogLines(title, size)
            for batch in loader:
                predictions += predict_batch(model, batch, records_by_id, protocols, device=device, dtype=dtype)
                bar.update(task, completed=len(predictions))
                if progress and rank == 0 and not bar.console.is_terminal:
                    lines.update(len(predictions))
            if len(loader) < most_batches:
                _keep_step(model, config, records, processor, most_batches - len(loader), device, dtype)
    except Exception as error:  # told to the other ranks before it is raised: they would wait for this one forever
        if world_size == 1:
            raise
        failure = error
    gathered = _gather(predictions, failure, world_size)
    return EvaluationResult.of(_in_order(gathered, records), [protocol.id for protocol in protocols])


def predict_batch(
    model: nn.Module,
    batch: ReferringBatch,
    records: Mapping[str, ReferringRecord],
    protocols: Sequence[Protocol],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[PhrasePrediction]:
    """Runs the model once and compares its masks under every protocol.

    Args:
        model: gives a `DerisOutput`.
        batch: P phrases, on any device.
        records: by phrase id; where the ground truth comes from.
        protocols: with equal threshold and selection (those of one run).
        device: where the model is.
        dtype: of the model's input; None = float32.

    Returns:
        P predictions.
    """
    output: DerisOutput = model(batch.to(device, dtype=dtype))
    asked = [records[phrase_id] for phrase_id in batch.phrase_ids]
    truths = _decoded_truths(asked)
    answering = {"score_threshold": protocols[0].score_threshold, "selection": protocols[0].selection}
    original_sizes = [(record.height, record.width) for record in asked]
    originals = answer_masks(output, original_sizes, **answering)
    oracle_queries = [[query] for query in _best_queries(output, truths)]
    overlaps: dict[str, list[Overlap]] = {}
    oracle_overlaps: dict[str, list[Overlap]] = {}
    for protocol in protocols:
        sizes = [protocol.size_hw(*size) for size in original_sizes]
        answers = originals if sizes == original_sizes else answer_masks(output, sizes, **answering)
        oracles = upsampled_masks(output, oracle_queries, sizes)
        compared = [protocol.resampled_truth(truth) for truth in truths]
        overlaps[protocol.id] = [overlap(a.mask, truth) for a, truth in zip(answers, compared, strict=True)]
        oracle_overlaps[protocol.id] = [overlap(o[0], truth) for o, truth in zip(oracles, compared, strict=True)]
    return [
        PhrasePrediction(
            phrase_id=record.phrase_id,
            image=Path(record.image_path).name,
            image_id=record.image_id,
            phrase=record.phrase,
            mask=encode_mask(answer.mask),
            overlaps={name: found[i] for name, found in overlaps.items()},
            oracle_overlaps={name: found[i] for name, found in oracle_overlaps.items()},
            top_scores=tuple(float(s) for s in np.sort(answer.referring_scores)[::-1][:_NUM_TOP_SCORES]),
            presence=answer.presence,
        )
        for i, (record, answer) in enumerate(zip(asked, originals, strict=True))
    ]


def control_phrases(records: Sequence[ReferringRecord]) -> dict[str, str]:
    """Swaps each phrase with one of the same picture and dataset that names another object.

    A model that reads the phrase must fail on these; one that finds the conspicuous object does not. The next such
    phrase in the order of the records is taken, cyclically. A phrase of the same text as one of its own referent's is
    never taken.

    Returns:
        Phrase id -> other text; phrases whose picture has no other referent are left out (compare the lengths).
    """
    by_image: dict[tuple[str, str], list[ReferringRecord]] = defaultdict(list)
    for record in records:
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


def merged_truth(record: ReferringRecord) -> np.ndarray:
    """Union of a phrase's referents, bool (height, width) of the original picture; all False for no target."""
    truth = np.zeros((record.height, record.width), dtype=bool)
    for instance in record.instances:
        truth |= decode_segmentation(instance.segmentation, record.height, record.width)
    return truth


def _decoded_truths(records: Sequence[ReferringRecord]) -> list[np.ndarray]:
    """Decodes once what several phrases of a picture share."""
    decoded: dict[tuple[str, str, tuple[int, ...]], np.ndarray] = {}
    truths = []
    for record in records:
        key = (record.dataset, record.image_id, tuple(instance.annotation_id for instance in record.instances))
        if key not in decoded:
            decoded[key] = merged_truth(record)
        truths.append(decoded[key])
    return truths


def _best_queries(output: DerisOutput, truths: Sequence[np.ndarray]) -> list[int]:
    """The query per phrase that fits the truth best at the resolution of the logits (the truth averaged to it)."""
    masks = (output.final.mask_logits >= 0).float().cpu()
    size = (masks.shape[2], masks.shape[3])
    soft = torch.stack([functional.adaptive_avg_pool2d(torch.from_numpy(t).float()[None], size)[0] for t in truths])
    intersection = torch.einsum("pqhw,phw->pq", masks, soft)
    union = masks.sum((2, 3)) + soft.sum((1, 2))[:, None] - intersection
    return (intersection / union.clamp(min=1e-6)).argmax(dim=1).tolist()


def _check_records(records: Sequence[ReferringRecord]) -> None:
    if not records:
        raise ValueError(
            "evaluation: expected at least one phrase, got none: check the split, or, in a control run, that pictures "
            "have phrases of different objects"
        )
    repeated = [phrase_id for phrase_id, count in Counter(r.phrase_id for r in records).items() if count > 1]
    if repeated:
        raise ValueError(
            f"evaluation: expected every phrase id once, got {len(repeated)} repeated ones, e.g. {repeated[:3]}: "
            f"evaluate each split by itself"
        )


def _gather(predictions: list[PhrasePrediction], failure: Exception | None, world_size: int) -> list[PhrasePrediction]:
    if world_size == 1:
        return predictions
    parts: list[Any] = [None] * world_size
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    distributed.all_gather_object(parts, (predictions, said))
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(parts) if text is not None]
    if failed:
        raise RuntimeError(
            f"evaluation: expected predictions of {world_size} ranks, but {'; '.join(failed)}: see that rank's message"
        )
    return [prediction for part, _ in parts for prediction in part]


def _in_order(predictions: list[PhrasePrediction], records: Sequence[ReferringRecord]) -> list[PhrasePrediction]:
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("phrases"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not enabled,
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
