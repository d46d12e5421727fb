"""All score thresholds in one pass: a phrase's mask changes only where one of its queries crosses the threshold.

Letters: P phrases, Q queries, T thresholds.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.config.protocols import Protocol, protocols_of
from deris_llm.data.dataset import some_images
from deris_llm.data.sources import is_generalised, read_split
from deris_llm.evaluation.calibration import Calibration, choose
from deris_llm.evaluation.evaluator import answers_of, check_records
from deris_llm.evaluation.gres_metrics import GresMetrics, GresOutcome
from deris_llm.evaluation.metrics import Overlap, RisMetrics, overlap
from deris_llm.evaluation.truth import merged_truths, resampled_truth
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.models.postprocess import answering_queries, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringRecord

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
_CURVE = {False: ("mIoU", "oIoU", "Pr@0.5"), True: ("gIoU", "cIoU", "N-acc", "T-acc")}  # by is_generalised


@dataclass(frozen=True)
class SweptPhrase:
    """One phrase under T thresholds."""

    phrase_id: str
    has_target: bool
    overlaps: tuple[Overlap, ...]  # T
    says_target: tuple[bool, ...]  # T


def check_sweep(config: RunConfig, split: str) -> Protocol:
    """Whether a threshold may be chosen on a split, and makes a difference; before the work.

    Returns:
        The protocol that decides: the run's first.

    Raises:
        ValueError: not a val split, or nothing to sweep.
    """
    dataset, _, part = split.partition("/")
    if not dataset or not part.startswith("val"):
        raise ValueError(
            f"--sweep {split}: expected a val split, `dataset/val`, got {part or 'none'!r}: a threshold that is chosen on the "
            "split it is reported on, or on what was trained on, says nothing. Take a val split"
        )
    protocol = protocols_of(config)[0]
    if protocol.selection == "best":
        raise ValueError(
            "--sweep: expected evaluation.selection=threshold or threshold_or_best, got best, which takes the best query whatever "
            "the threshold: nothing to sweep. Change it with --set"
        )
    if protocol.miss == "dropped":
        raise ValueError(
            f"--sweep: expected a protocol with miss=empty_mask, got {protocol.id}, which drops phrases without an answer: the "
            "highest threshold would win by dropping. Name another --protocol"
        )
    evaluation = config.evaluation
    rule = (evaluation.score_threshold, evaluation.selection, evaluation.presence)
    if protocol.rule != rule:
        raise ValueError(
            f"--sweep: expected protocol {protocol.id} to leave threshold, selection and presence to the run, {rule}, got "
            f"{protocol.rule}: the chosen threshold would not be used. Remove them from the file, use --set evaluation.selection"
        )
    return protocol


def sweep(
    model: nn.Module,
    config: RunConfig,
    processor: CognitionProcessor,
    split: str,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    present: float | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_images: int = 0,
    progress: bool = True,
) -> Calibration:
    """Evaluates a split under every threshold and chooses the one of the best mIoU (generalised: gIoU).

    Args:
        model: a `Deris` or a wrapper of one; all ranks call this together.
        config: the run; its selection and use of presence stay as they are, its first protocol decides.
        processor: the cognition backend's.
        split: a val split.
        thresholds: in (0, 1); the present one joins them.
        present: the threshold in use, which stays where another is not better; None = that of ``config``.
        device: where the model is; None = where its parameters are.
        rank: this process.
        world_size: number of ranks.
        max_images: evenly spaced pictures of the split; 0 = all.
        progress: shows a bar on rank 0.

    Returns:
        The choice and the curve, the same on every rank.

    Raises:
        ValueError: as `check_sweep`.
    """
    protocol = check_sweep(config, split)
    present = config.evaluation.score_threshold if present is None else present
    thresholds = sorted({*thresholds, present})
    records = some_images(read_split(config.data.root, split, phrase_field=config.data.phrase_field), max_images)
    check_records(records, config.data.root)
    generalised = is_generalised(config.data.root, records[0].dataset)
    phrases = answers_of(
        model,
        config,
        records,
        processor,
        partial(swept, protocol=protocol, thresholds=thresholds),
        device=next(model.parameters()).device if device is None else device,
        rank=rank,
        world_size=world_size,
        progress=progress,
        title=f"sweep {split}",
    )
    curve = tuple(
        {"threshold": threshold, **_numbers(phrases, t, is_generalised=generalised)}
        for t, threshold in enumerate(thresholds)
    )
    metric = _CURVE[generalised][0]
    chosen = choose(curve, metric, present)
    return Calibration(
        threshold=chosen,
        selection=protocol.selection,
        presence=protocol.presence,
        split=split,
        metric=metric,
        protocol=protocol.id,
        fingerprint=replace(protocol, score_threshold=chosen).fingerprint(),
        n_phrases=len(phrases),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        curve=curve,
    )


def swept(
    output: DerisOutput, asked: Sequence[ReferringRecord], *, protocol: Protocol, thresholds: Sequence[float]
) -> list[SweptPhrase]:
    """Compares P phrases under T thresholds; each distinct answer is drawn once.

    The selected queries are always the best ones, more of them the lower the threshold; each mask is upsampled once and
    joined to those of better queries.

    Returns:
        P phrases.
    """
    scores = output.final.referring_logits.float().sigmoid().cpu().numpy()
    presence = output.presence_logit.float().sigmoid().tolist()
    selection, presence_use = protocol.rule[1:]
    selected = [
        [
            answering_queries(row, exists, score_threshold=t, selection=selection, presence_use=presence_use)
            for t in thresholds
        ]
        for row, exists in zip(scores, presence, strict=True)
    ]
    most = [max(answers, key=len) for answers in selected]  # the others are its first so many
    original_sizes = [(record.height, record.width) for record in asked]
    finished = protocol.prediction_resampling == "finished_mask"
    sizes = original_sizes if finished else [protocol.size_hw(*size) for size in original_sizes]
    found = []
    truths = map(partial(resampled_truth, protocol), merged_truths(asked, protocol.crowds))
    for record, truth, answers, masks in zip(
        asked, truths, selected, upsampled_masks(output, most, sizes), strict=True
    ):
        joined = np.concatenate([np.zeros((1, *masks.shape[1:]), dtype=bool), np.logical_or.accumulate(masks, axis=0)])
        overlaps: dict[int, Overlap] = {}
        is_drawn = [bool(mask.any()) for mask in joined]
        for number in {len(answer) for answer in answers}:
            mask = resampled_truth(protocol, joined[number]) if finished else joined[number]
            overlaps[number] = overlap(mask, truth)
        found.append(
            SweptPhrase(
                phrase_id=record.phrase_id,
                has_target=not record.is_no_target,
                overlaps=tuple(overlaps[len(answer)] for answer in answers),
                says_target=tuple(is_drawn[len(answer)] for answer in answers),
            )
        )
    return found


def _numbers(phrases: Sequence[SweptPhrase], t: int, *, is_generalised: bool) -> dict[str, float | None]:
    """What stands in the curve of one threshold, percent."""
    named: Mapping[str, float | None]
    if is_generalised:
        outcomes = [GresOutcome(p.overlaps[t], has_target=p.has_target, says_target=p.says_target[t]) for p in phrases]
        named = GresMetrics.of(outcomes).named()
    else:
        named = RisMetrics.of([p.overlaps[t] for p in phrases]).named()
    return {name: named[name] for name in _CURVE[is_generalised]}
