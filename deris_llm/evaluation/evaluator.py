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
from deris_llm.data.sources import is_generalised
from deris_llm.evaluation.boxes import boxes_of_masks
from deris_llm.evaluation.gres_metrics import GrecMetrics, GrecOutcome, GresMetrics, GresOutcome, baseline_outcomes
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
    oracle_overlaps: dict[str, Overlap]  # of the queries that fit the referents best, one each, by protocol id
    top_scores: tuple[float, ...]  # the highest referring scores, descending
    presence: float  # probability that a target exists
    has_target: bool = True
    says_target: bool = True  # some query was selected
    areas: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )  # px of truth, of picture, by protocol id
    boxes: GrecOutcome | None = (
        None  # those around the selected queries' masks; None where phrases always have a target
    )

    def outcome(self, protocol: str) -> GresOutcome:
        """What the phrase adds to the metrics of a generalised dataset; its ``iou`` holds for every dataset."""
        return GresOutcome(self.overlaps[protocol], has_target=self.has_target, says_target=self.says_target)

    def to_json(self) -> dict[str, Any]:
        """One line of the predictions file."""
        return {
            "phrase_id": self.phrase_id,
            "image": self.image,
            "phrase": self.phrase,
            "mask": self.mask,
            "iou": {name: round(100 * self.outcome(name).iou, 3) for name in self.overlaps},
            "oracle_iou": {name: round(100 * found.iou, 3) for name, found in self.oracle_overlaps.items()},
            "top_scores": [round(score, 4) for score in self.top_scores],
            "presence": round(self.presence, 4),
            "has_target": self.has_target,
            "says_target": self.says_target,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers in percent by protocol id, and the predictions they come from, in the order of the records."""

    # protocol id -> metric -> percent or count. RefCOCO: mIoU, oIoU, Pr@0.5 ... Pr@0.9, oracle_mIoU; gRefCOCO: gIoU,
    # cIoU, N-acc, T-acc, Pr@0.7 ... Pr@0.9, F1, oracle_gIoU, {always,never}_empty_{gIoU,cIoU}, n_no_target; None where
    # there is nothing to take a number of. Both: n_phrases, n_images.
    numbers: dict[str, dict[str, float | None]]
    predictions: list[PhrasePrediction]
    notes: tuple[str, ...] = ()  # why a number is None

    @classmethod
    def of(
        cls, predictions: list[PhrasePrediction], protocol_ids: Sequence[str], *, is_generalised: bool = False
    ) -> EvaluationResult:
        """Summarises the predictions of a whole split with the metrics of its dataset."""
        counts = {"n_phrases": len(predictions), "n_images": len({p.image_id for p in predictions})}
        numbers: dict[str, dict[str, float | None]] = {}
        notes: dict[str, None] = {}
        for name in protocol_ids:
            if is_generalised:
                metrics = GresMetrics.of([p.outcome(name) for p in predictions])
                numbers[name] = metrics.named() | _gres_extras(predictions, name)
                notes |= dict.fromkeys(metrics.notes)
            else:
                ris = RisMetrics.of([p.overlaps[name] for p in predictions])
                oracle = RisMetrics.of([p.oracle_overlaps[name] for p in predictions])
                numbers[name] = {**ris.named(), "oracle_mIoU": oracle.mean_iou}
            numbers[name] |= counts
        return cls(numbers, predictions, tuple(notes))

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
    _check_records(records, config.data.root)
    generalised = is_generalised(config.data.root, records[0].dataset)
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
                predictions += predict_batch(
                    model, batch, records_by_id, protocols, device=device, dtype=dtype, is_generalised=generalised
                )
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
    return EvaluationResult.of(
        _in_order(gathered, records),
        [protocol.id for protocol in protocols],
        is_generalised=generalised,
    )


def predict_batch(
    model: nn.Module,
    batch: ReferringBatch,
    records: Mapping[str, ReferringRecord],
    protocols: Sequence[Protocol],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    is_generalised: bool = False,
) -> list[PhrasePrediction]:
    """Runs the model once and compares its masks under every protocol.

    Args:
        model: gives a `DerisOutput`.
        batch: P phrases, on any device.
        records: by phrase id; where the ground truth comes from.
        protocols: with equal threshold and selection (those of one run).
        device: where the model is.
        dtype: of the model's input; None = float32.
        is_generalised: phrases may name nothing, or several objects: boxes are compared too.

    Returns:
        P predictions.
    """
    output: DerisOutput = model(batch.to(device, dtype=dtype))
    asked = [records[phrase_id] for phrase_id in batch.phrase_ids]
    referents = _decoded_referents(asked)
    truths = [np.logical_or.reduce(masks, axis=0) for masks in referents]
    answering = {
        "score_threshold": protocols[0].score_threshold,
        "selection": protocols[0].selection,
        "presence_use": protocols[0].presence,
    }
    original_sizes = [(record.height, record.width) for record in asked]
    originals = answer_masks(output, original_sizes, **answering)
    oracle_queries = _best_queries(output, referents)
    overlaps: dict[str, list[Overlap]] = {}
    oracle_overlaps: dict[str, list[Overlap]] = {}
    areas: dict[str, list[tuple[int, int]]] = {}
    for protocol in protocols:
        sizes = [protocol.size_hw(*size) for size in original_sizes]
        answers = originals if sizes == original_sizes else answer_masks(output, sizes, **answering)
        oracles = [np.logical_or.reduce(m, axis=0) for m in upsampled_masks(output, oracle_queries, sizes)]
        compared = [protocol.resampled_truth(truth) for truth in truths]
        overlaps[protocol.id] = [overlap(a.mask, truth) for a, truth in zip(answers, compared, strict=True)]
        oracle_overlaps[protocol.id] = [overlap(o, truth) for o, truth in zip(oracles, compared, strict=True)]
        areas[protocol.id] = [(int(np.count_nonzero(truth)), truth.size) for truth in compared]
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
            has_target=not record.is_no_target,
            says_target=bool(answer.query_index),
            areas={name: found[i] for name, found in areas.items()},
            boxes=GrecOutcome.of(boxes_of_masks(answer.instance_masks), boxes_of_masks(referents[i]))
            if is_generalised
            else None,
        )
        for i, (record, answer) in enumerate(zip(asked, originals, strict=True))
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


def merged_truth(record: ReferringRecord) -> np.ndarray:
    """Union of a phrase's referents, bool (height, width) of the original picture; all False for no target."""
    return np.logical_or.reduce(_decoded_referents([record])[0], axis=0)


def _decoded_referents(records: Sequence[ReferringRecord]) -> list[np.ndarray]:
    """Masks of each phrase's referents, bool (R, height, width); decodes once what several phrases share."""
    decoded: dict[tuple[str, str, int], np.ndarray] = {}
    referents = []
    for record in records:
        masks = [np.zeros((0, record.height, record.width), dtype=bool)]
        for instance in record.instances:
            key = (record.dataset, record.image_id, instance.annotation_id)
            if key not in decoded:
                decoded[key] = decode_segmentation(instance.segmentation, record.height, record.width)[None]
            masks.append(decoded[key])
        referents.append(np.concatenate(masks))
    return referents


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


def _gres_extras(predictions: Sequence[PhrasePrediction], protocol: str) -> dict[str, float | None]:
    """What stands beside the metrics of a generalised split: boxes, oracle, and what answers without looking get."""
    oracle = GresMetrics.of(
        [
            GresOutcome(p.oracle_overlaps[protocol], has_target=p.has_target, says_target=p.has_target)
            for p in predictions
        ]
    )
    found: dict[str, float | None] = {
        "F1": GrecMetrics.of([p.boxes for p in predictions if p.boxes is not None]).f1,
        "oracle_gIoU": oracle.giou,
    }
    for name, outcomes in baseline_outcomes([p.areas[protocol] for p in predictions]).items():
        baseline = GresMetrics.of(outcomes)
        key = name.replace(" ", "_")
        found |= {f"{key}_gIoU": baseline.giou, f"{key}_cIoU": baseline.ciou}
    return found | {"n_no_target": sum(not p.has_target for p in predictions)}


def _check_records(records: Sequence[ReferringRecord], root: str) -> None:
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
