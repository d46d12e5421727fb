"""Evaluates all score thresholds in one pass: a phrase's mask changes only where one of its queries crosses the threshold.

Letters: P phrases, Q queries, T thresholds.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.config.protocols import Protocol, protocols_of
from deris_llm.data.dataset import some_images
from deris_llm.data.sources import is_generalised, read_split
from deris_llm.evaluation.calibration import Calibration, choose
from deris_llm.evaluation.evaluator import answers_of, check_records
from deris_llm.evaluation.metrics import Outcome, metric_ratios, overlap, percents
from deris_llm.evaluation.truth import merged_truths, resampled_truth, without_ignored
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.models.postprocess import answering_queries, upsampled_masks
from deris_llm.structures import DerisOutput, ReferringRecord

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
_CURVE = {False: ("mIoU", "oIoU", "Pr@0.5"), True: ("gIoU", "cIoU", "N-acc", "T-acc")}  # by is_generalised


class SweptPhrase(NamedTuple):
    """One phrase under T thresholds."""

    phrase_id: str
    outcomes: tuple[Outcome, ...]  # T


def check_sweep(config: RunConfig, split: str) -> Protocol:
    """Checks, before any work, that a threshold may be chosen on a split and makes a difference.

    Returns:
        The protocol that decides: the run's first.

    Raises:
        ValueError: not a val split, or nothing to sweep.
    """
    dataset, _, part = split.partition("/")
    if not dataset or not part.startswith("val"):
        raise ValueError(
            f"--sweep {split}: expected a val split, `dataset/val`, got {part or 'none'!r}: a threshold that is chosen on the "
            "split it is reported on, or on training data, means nothing. Choose a val split"
        )
    protocol = protocols_of(config)[0]
    if protocol.selection == "best":
        raise ValueError(
            "--sweep: expected evaluation.selection=threshold or threshold_or_best, got best, which ignores the threshold: nothing "
            "to sweep. Change it with --set"
        )
    if protocol.miss == "dropped":
        raise ValueError(
            f"--sweep: expected a protocol with miss=empty_mask, got {protocol.id}, which drops phrases without an answer: the "
            "highest threshold would win by dropping. Choose another --protocol"
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
    max_images: int = 0,
    progress: bool = True,
) -> Calibration:
    """Evaluates a split under every threshold and chooses the one with the best mIoU (generalised: gIoU).

    Args:
        model: a `Deris` or a wrapper of one; all ranks call this together.
        config: the run, with its selection and presence rule; its first protocol decides.
        processor: the cognition backend's.
        split: a val split.
        thresholds: in (0, 1); the present one is added to them.
        present: the threshold in use, which is kept unless another is better; None = that of ``config``.
        max_images: evenly spaced images of the split; 0 = all.
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
    if records[0].video is not None and config.evaluation.video_selection == "video":
        raise ValueError(
            f"--sweep {split}: expected evaluation.video_selection=frame, got video: the sweep compares every frame on its own, and its "
            "threshold is not the best one for mean scores. Set the threshold by hand, or sweep with frame"
        )
    generalised = is_generalised(config.data.root, records[0].dataset)
    phrases = answers_of(
        model,
        config,
        records,
        processor,
        partial(swept, protocol=protocol, thresholds=thresholds),
        device=next(model.parameters()).device,
        progress=progress,
        title=f"sweep {split}",
    )
    curve = []
    for t, threshold in enumerate(thresholds):
        values = percents(metric_ratios([phrase.outcomes[t] for phrase in phrases], is_generalised=generalised))
        curve.append({"threshold": threshold} | {name: values[name] for name in _CURVE[generalised]})
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
        curve=tuple(curve),
    )


def swept(
    output: DerisOutput, asked: Sequence[ReferringRecord], *, protocol: Protocol, thresholds: Sequence[float]
) -> list[SweptPhrase]:
    """Compares P phrases under T thresholds; each distinct answer is drawn once.

    The selected queries are always the best ones, more of them the lower the threshold: each mask is upsampled once and
    joined to those of better queries.
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
    sizes = [protocol.drawn_size_hw(record.height, record.width) for record in asked]
    found = []
    truths = map(partial(resampled_truth, protocol), merged_truths(asked, protocol.crowds))
    for record, truth, answers, masks in zip(
        asked, truths, selected, upsampled_masks(output, most, sizes), strict=True
    ):
        joined = np.concatenate([np.zeros((1, *masks.shape[1:]), dtype=bool), np.logical_or.accumulate(masks, axis=0)])
        outcomes: dict[int, Outcome] = {}  # by number of selected queries
        for number in {len(answer) for answer in answers}:
            mask = resampled_truth(protocol, joined[number]) if protocol.resizes_finished_masks else joined[number]
            mask = without_ignored(protocol, record, mask)
            says_target = bool(joined[number].any())
            outcomes[number] = Outcome(
                overlap(mask, without_ignored(protocol, record, truth)),
                has_target=not record.is_no_target,
                says_target=says_target,
            )
        found.append(SweptPhrase(record.phrase_id, tuple(outcomes[len(answer)] for answer in answers)))
    return found
